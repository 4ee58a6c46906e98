# Prometheus, its exporters and Grafana on the same machine, all on loopback. The alerts are in rules.yml, the dashboard
# in dashboard.nix; both are of use without NixOS too.
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
        # The name of the machine, not an address that all machines have.
        labels.instance = config.networking.hostName;
      }
    ];
  };

  # In the store under a name of its own, so that promtool finds it when the configuration is built.
  rules = pkgs.writeText "atproto-relay-rules.yml" (builtins.readFile ./rules.yml);
  dashboard = pkgs.writeTextDir "atproto-relay.json" (
    builtins.toJSON (import ./dashboard.nix { inherit lib; })
  );

  # Where Grafana finds the key: passed on by systemd, or made at the first start.
  generatedKey = "${ofGrafana.dataDir}/secret-key";
  key =
    if grafana.secretKeyFile == null then
      generatedKey
    else
      "/run/credentials/grafana.service/secret-key";
  secretKey = "$__file{${key}}";

  # Grafana at loopback, under no name that others know.
  isPrivate =
    ofGrafana.settings.server.http_addr == loopback && ofGrafana.settings.server.domain == "localhost";
in
{
  options.services.atproto-relay.monitoring = {
    enable = lib.mkEnableOption "Prometheus with alerts, exporters of the machine and of PostgreSQL, and Grafana with a dashboard, all on loopback";

    scrapeInterval = mkOption {
      type = types.strMatching "[0-9]+(s|m)";
      default = "15s";
      description = "How often the metrics are read. The alerts count on a minute at most.";
    };

    retention = mkOption {
      type = types.strMatching "[0-9]+(h|d|w|y)";
      default = "60d";
      description = "How long Prometheus keeps them.";
    };

    alertmanagers = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "127.0.0.1:9093" ];
      description = "Alertmanagers that are told of alerts. Without one, alerts are seen on the dashboard and in Prometheus.";
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
        description = "Whether Grafana is part of {option}`services.atproto-relay.monitoring`.";
      };

      secretKeyFile = mkOption {
        type = types.nullOr (types.either types.path types.str);
        default = null;
        example = "/run/secrets/grafana-key";
        description = ''
          File with the key that Grafana encrypts its own secrets with. Null: a random one is made at the first start, in
          Grafana's folder. There is no secret in what is set up here; name a file where you add data sources with
          passwords, and want to restore Grafana's database elsewhere.
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
          # A change of the rules is a reload, not a gap in the graphs.
          enableReload = mkDefault true;
          ruleFiles = [ monitoring.rules ];
          scrapeConfigs = [
            (scrape "atproto-relay" (lib.head cfg.metricsListen))
            # Under names that a machine with exporters of its own has not given already: Prometheus refuses a name that
            # is there twice.
            (scrape "atproto-relay-node" (exporter "node"))
          ]
          ++ lib.optional cfg.database.createLocally (scrape "atproto-relay-postgres" (exporter "postgres"));
          alertmanagers = lib.optional (monitoring.alertmanagers != [ ]) {
            static_configs = [ { targets = monitoring.alertmanagers; } ];
          };

          exporters.node = {
            enable = true;
            listenAddress = mkDefault loopback;
            # Restarts and failures of units; the other collectors are Prometheus' usual ones.
            enabledCollectors = [ "systemd" ];
          };
          exporters.postgres = lib.mkIf cfg.database.createLocally {
            enable = true;
            listenAddress = mkDefault loopback;
            # As the user postgres over the Unix socket: no password, and it sees the statistics of every table.
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
            # From NixOS 26.05 on there is no default, and one in the settings would be in the store.
            security.secret_key = mkDefault secretKey;
            # Whoever reaches loopback may look, and nobody may change anything: there is no user, and so no password
            # "admin". A Grafana that has a name or an address of its own keeps its users.
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
                  # Beside those that the operator has, of which one may be the default.
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
              services.grafana.provision.datasources.settings, and one of them has a path instead. Write what is in that
              file into the settings, or set services.atproto-relay.monitoring.grafana.enable = false.
            '';
          }
        ];

        systemd.services.grafana =
          if grafana.secretKeyFile == null then
            {
              # A key of the operator's own needs no file here.
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
