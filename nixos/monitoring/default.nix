# Prometheus, its exporters and Grafana on the same machine, all on loopback. The alerts are in rules.yml, the dashboard
# in dashboard.nix; both can be used without NixOS.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkDefault mkOption types;

  cfg = config.services.atproto-relay;
  monitoring = cfg.monitoring;
  grafana = monitoring.grafana;
  ofGrafana = config.services.grafana;

  loopback = "127.0.0.1";
  exporter = name: "${loopback}:${toString config.services.prometheus.exporters.${name}.port}";
  scrape = job: target: {
    job_name = job;
    scrape_interval = monitoring.scrapeInterval;
    static_configs = [
      {
        targets = [ target ];
        # The name of the machine; the loopback address would be the same on all machines.
        labels.instance = config.networking.hostName;
      }
    ];
  };

  # A store path of its own, so that promtool finds it when the configuration is built.
  rules = pkgs.writeText "atproto-relay-rules.yml" (builtins.readFile ./rules.yml);
  dashboard = pkgs.writeTextDir "atproto-relay.json" (
    builtins.toJSON (import ./dashboard.nix { inherit lib; })
  );

  # Grafana's key: a systemd credential, or generated at the first start.
  generatedKey = "${ofGrafana.dataDir}/secret-key";
  key =
    if grafana.secretKeyFile == null then
      generatedKey
    else
      "/run/credentials/grafana.service/secret-key";
  secretKey = "$__file{${key}}";

  # Grafana on loopback, without a public name.
  isPrivate =
    ofGrafana.settings.server.http_addr == loopback && ofGrafana.settings.server.domain == "localhost";
in
{
  options.services.atproto-relay.monitoring = {
    enable = lib.mkEnableOption "Prometheus with alerts, exporters of the machine and of PostgreSQL, and Grafana with a dashboard, all on loopback";

    scrapeInterval = mkOption {
      type = types.strMatching "[0-9]+(s|m)";
      default = "15s";
      description = "Scrape interval. The alerts assume one minute at most.";
    };

    retention = mkOption {
      type = types.strMatching "[0-9]+(h|d|w|y)";
      default = "60d";
      description = "How long Prometheus keeps the metrics.";
    };

    alertmanagers = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "127.0.0.1:9093" ];
      description = "Alertmanagers that receive the alerts. Without one, alerts are visible only on the dashboard and in Prometheus.";
    };

    dashboard = mkOption {
      type = types.package;
      internal = true;
      readOnly = true;
      default = dashboard;
      defaultText = lib.literalMD "folder with the dashboard";
      description = "Folder with the dashboard as Grafana reads it.";
    };

    rules = mkOption {
      type = types.package;
      internal = true;
      readOnly = true;
      default = rules;
      defaultText = lib.literalMD "file with the alerts";
      description = "File with the alerts as Prometheus reads it.";
    };

    grafana = {
      enable = mkOption {
        type = types.bool;
        default = true;
        description = "Whether {option}`services.atproto-relay.monitoring` includes Grafana.";
      };

      secretKeyFile = mkOption {
        type = types.nullOr (types.either types.path types.str);
        default = null;
        example = "/run/secrets/grafana-key";
        description = ''
          File with the key that encrypts Grafana's secrets. If null, a random key is generated at the first start and
          kept in Grafana's folder. This module stores no secrets in Grafana. Set a file if you add data sources with
          passwords and want to restore Grafana's database on another machine.
        '';
      };
    };
  };

  config = lib.mkIf (cfg.enable && monitoring.enable) (
    lib.mkMerge [
      {
        services.prometheus = {
          enable = true;
          listenAddress = mkDefault loopback;
          retentionTime = mkDefault monitoring.retention;
          # A change of the rules reloads Prometheus, without a gap in the graphs.
          enableReload = mkDefault true;
          ruleFiles = [ monitoring.rules ];
          scrapeConfigs = [
            (scrape "atproto-relay" (lib.head cfg.metricsListen))
            # Prefixed names: Prometheus rejects duplicate job names, and the machine can have jobs for exporters already.
            (scrape "atproto-relay-node" (exporter "node"))
          ]
          ++ lib.optional cfg.database.createLocally (scrape "atproto-relay-postgres" (exporter "postgres"));
          alertmanagers = lib.optional (monitoring.alertmanagers != [ ]) {
            static_configs = [ { targets = monitoring.alertmanagers; } ];
          };

          exporters.node = {
            enable = true;
            listenAddress = mkDefault loopback;
            # Restarts and failures of units, in addition to the default collectors.
            enabledCollectors = [ "systemd" ];
          };
          exporters.postgres = lib.mkIf cfg.database.createLocally {
            enable = true;
            listenAddress = mkDefault loopback;
            # As the user postgres over the Unix socket: without a password, with access to the statistics of all tables.
            runAsLocalSuperUser = mkDefault true;
          };
        };
      }

      (lib.mkIf grafana.enable {
        services.grafana = {
          enable = true;
          settings = {
            server = {
              http_addr = mkDefault loopback;
              http_port = mkDefault 3000;
            };
            # NixOS 26.05 has no default any more, and a key in the settings would be in the store.
            security.secret_key = mkDefault secretKey;
            # On loopback, everybody can view and nobody can edit: there are no users, and so no default password. A
            # Grafana with a public name or address keeps its users.
            security.disable_initial_admin_creation = mkDefault isPrivate;
            "auth.anonymous" = {
              enabled = mkDefault isPrivate;
              org_role = mkDefault "Viewer";
            };
            analytics = {
              reporting_enabled = mkDefault false;
              check_for_updates = mkDefault false;
              check_for_plugin_updates = mkDefault false;
            };
            dashboards.default_home_dashboard_path = mkDefault "${dashboard}/atproto-relay.json";
          };
          provision = {
            enable = true;
            datasources.settings = {
              apiVersion = 1;
              datasources = [
                {
                  # Not the default: the operator can have other data sources.
                  name = "AT Protocol relay";
                  uid = "atproto-relay-prometheus";
                  type = "prometheus";
                  access = "proxy";
                  url = "http://${loopback}:${toString config.services.prometheus.port}";
                  isDefault = false;
                  jsonData.timeInterval = monitoring.scrapeInterval;
                }
              ];
            };
            dashboards.settings = {
              apiVersion = 1;
              providers = [
                {
                  name = "atproto-relay";
                  type = "file";
                  allowUiUpdates = false;
                  options.path = dashboard;
                }
              ];
            };
          };
        };

        assertions = [
          {
            assertion =
              ofGrafana.provision.dashboards.path == null && ofGrafana.provision.datasources.path == null;
            message = ''
              services.atproto-relay.monitoring adds to services.grafana.provision.dashboards.settings and
              services.grafana.provision.datasources.settings, but one of them is set by path. Move the content of that
              file into the settings, or set services.atproto-relay.monitoring.grafana.enable = false.
            '';
          }
        ];

        systemd.services.grafana =
          if grafana.secretKeyFile == null then
            {
              # Not needed if the operator has set another key.
              preStart = lib.mkIf (ofGrafana.settings.security.secret_key == secretKey) (
                lib.mkBefore ''
                  if ! [ -s ${generatedKey} ]; then
                    (umask 077 && head -c 32 /dev/urandom | base64 >${generatedKey})
                  fi
                ''
              );
            }
          else
            { serviceConfig.LoadCredential = [ "secret-key:${toString grafana.secretKeyFile}" ]; };
      })
    ]
  );
}
