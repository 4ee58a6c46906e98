# More configurations that must evaluate. `relay` is services.atproto-relay (with `enable = true` added), `machine` the rest
# of the NixOS configuration. `has` are lines that a file must contain, `lacks` text that it must not contain, and `warns`
# the words of each warning; without `warns` there must be no warning.
let
  unit = "units/atproto-relay.service";
  settings = "etc/atproto-relay/config.toml";
  sysctl = "etc/sysctl.d/60-nixos.conf";
  caddy = {
    server = "caddy";
    domain = "relay.example.com";
  };
  nginx = caddy // {
    server = "nginx";
  };
in
{
  sqlite.relay.database.createLocally = false;

  all-volumes.relay.storage = {
    data = {
      device = "/dev/disk/by-id/nvme-data";
      discard = "online";
    };
    log = {
      device = "/dev/disk/by-partuuid/log";
      fsType = "ext4";
      format = true;
      discard = "never";
      mountOptions = [ "commit=30" ];
    };
    database.device = "/dev/mapper/database";
  };

  # An unstable device name is accepted if nothing is formatted.
  volumes-without-format = {
    relay.storage.log.device = "/dev/md0";
    has."etc/fstab" = [
      "/dev/md0 /var/lib/atproto-relay/log xfs noatime,nodev,nosuid,noexec,nofail,x-systemd.device-timeout=30s,logbsize=256k 0 2"
    ];
  };

  # The log leaves more free space only on the disk of the system.
  log-on-the-disk-of-the-system = {
    relay = { };
    has.${settings} = [ ''min_free_bytes = "shared"'' ];
  };
  log-on-a-file-system-of-ones-own = {
    relay = { };
    machine.fileSystems."/var/lib/atproto-relay" = {
      device = "/dev/disk/by-label/relay";
      fsType = "xfs";
    };
    lacks.${settings} = [ "min_free_bytes" ];
  };

  # The machine's drives keep their settings, and no value is below the kernel's default.
  no-volume = {
    relay = { };
    lacks = {
      "etc/udev/rules.d/99-local.rules" = [ "nvme" ];
      ${sysctl} = [
        "tcp_rmem"
        "tcp_wmem"
        "rmem_max"
        "wmem_max"
        "ip_local_port_range"
      ];
    };
  };

  # A switch to another system does not restart it: the mount, the relay and the database stay up.
  volume-that-is-formatted = {
    relay.storage.log = {
      device = "/dev/disk/by-id/nvme-log";
      format = true;
    };
    has."units/atproto-relay-prepare-log.service" = [ "X-RestartIfChanged=false" ];
  };

  # The durability of other databases on the machine does not change.
  database-of-others = {
    relay = { };
    machine.services.postgresql.ensureDatabases = [ "shop" ];
    lacks."postgresql.conf" = [
      "synchronous_commit"
      "fsync"
      "full_page_writes = no"
    ];
  };

  database-at-another-port = {
    relay = { };
    machine.services.postgresql.settings.port = 5433;
    has.${settings} = [
      ''database_url = "postgres:///atproto-relay?host=/run/postgresql&port=5433&user=atproto-relay"''
    ];
  };

  monitoring-with-all.relay = {
    database.createLocally = false;
    monitoring = {
      enable = true;
      alertmanagers = [ "127.0.0.1:9093" ];
      grafana.secretKeyFile = "/run/secrets/grafana";
    };
  };

  monitoring-without-grafana.relay.monitoring = {
    enable = true;
    grafana.enable = false;
  };

  # A machine that already has Grafana and Prometheus keeps their configuration, and no access is added.
  monitoring-of-ones-own = {
    relay.monitoring.enable = true;
    machine.services = {
      prometheus = {
        enable = true;
        exporters.node.enable = true;
        scrapeConfigs = [
          {
            job_name = "node";
            static_configs = [ { targets = [ "127.0.0.1:9100" ]; } ];
          }
          {
            job_name = "postgres";
            static_configs = [ { targets = [ "127.0.0.1:9187" ]; } ];
          }
        ];
      };
      grafana = {
        enable = true;
        settings = {
          security.secret_key = "$__file{/run/secrets/grafana}";
          server.domain = "grafana.example.com";
        };
        provision.datasources.settings.datasources = [
          {
            name = "Prometheus";
            uid = "prometheus";
            type = "prometheus";
            url = "http://127.0.0.1:9090";
            isDefault = true;
          }
        ];
      };
    };
    has."grafana/secret-key" = [ "$__file{/run/secrets/grafana}" ];
    has."grafana/data-sources" = [
      "Prometheus: prometheus, the default"
      "AT Protocol relay: atproto-relay-prometheus"
    ];
    has."prometheus/jobs" = [
      "node"
      "postgres"
      "atproto-relay"
      "atproto-relay-node"
      "atproto-relay-postgres"
    ];
    has."grafana/anonymous" = [ "false" ];
    lacks."grafana/preStart" = [ "head -c 32" ];
  };

  users-of-ones-own = {
    relay = {
      user = "relay";
      group = "relay";
      slice = "relays.slice";
      limits.memoryMax = "80%";
    };
    machine.users = {
      users.relay = {
        isSystemUser = true;
        group = "relay";
      };
      groups.relay = { };
    };
    has.${unit} = [ "User=relay" ];
  };

  # The module passes unknown keys on, and the relay checks them.
  settings-of-a-later-version.relay.settings = {
    colour = "blue";
    limits.events_per_week = 1000000;
  };

  # The operator's settings take precedence, and a list replaces the module's list.
  settings-win = {
    relay.settings = {
      log_level = "debug";
      listen = "0.0.0.0:2470";
      trusted_domains = [ "pds.example.com" ];
      hosts = [ "pds.example.com" ];
      database_url = "postgres:///atproto-relay?host=/run/postgresql&user=atproto-relay&application_name=relay";
    };
    has = {
      ${settings} = [
        ''log_level = "debug"''
        ''listen = "0.0.0.0:2470"''
        ''trusted_domains = ["pds.example.com"]''
        ''hosts = ["pds.example.com"]''
        ''database_url = "postgres:///atproto-relay?host=/run/postgresql&user=atproto-relay&application_name=relay"''
      ];
      "units/atproto-relay.socket" = [ "ListenStream=0.0.0.0:2470" ];
    };
  };
  port-in-the-settings = {
    relay.settings.listen = ":2470";
    has."units/atproto-relay.socket" = [
      "ListenStream=0.0.0.0:2470"
      "ListenStream=[::]:2470"
    ];
  };
  database-elsewhere-in-the-settings = {
    relay.settings.database_url = "postgres://relay@db.example.com/relay";
    has.${settings} = [ ''database_url = "postgres://relay@db.example.com/relay"'' ];
    warns = [ "Set services.atproto-relay.database.createLocally = false." ];
  };
  sizes-as-the-relay-takes-them = {
    relay.settings.log = {
      min_free_bytes = "0";
      max_bytes = "1000000000000";
    };
    has.${settings} = [ ''min_free_bytes = "0"'' ];
  };

  more-consumers-than-are-kept = {
    relay.settings.max_consumers = 9000;
    has.${unit} = [ "FileDescriptorStoreMax=8008" ];
    warns = [ "a restart of the relay keeps the connections of 8000 consumers" ];
  };

  # The proxy connects on loopback, where the relay trusts its headers about client addresses.
  proxy-to-all-addresses = {
    relay = {
      listen = [ "0.0.0.0:2470" ];
      proxy = caddy;
    };
    has.Caddyfile = [ "  reverse_proxy 127.0.0.1:2470 {" ];
  };
  proxy-beside-a-public-listener = {
    relay = {
      listen = [
        "192.0.2.1:2470"
        "[::1]:2470"
      ];
      proxy = nginx;
    };
    has."nginx/locations.conf" = [ "proxy_pass http://[::1]:2470;" ];
  };
  nginx-for-more-consumers = {
    relay = {
      proxy = nginx;
      settings.max_consumers = 20000;
    };
    has."nginx/events.conf" = [ "worker_connections 41024;" ];
    warns = [ "a restart of the relay keeps the connections of 8000 consumers" ];
  };
  # nginx rejects duplicate directives.
  nginx-with-workers-of-ones-own = {
    relay.proxy = nginx;
    machine.services.nginx = {
      eventsConfig = "worker_connections 65536;";
      appendConfig = "worker_processes 4;";
    };
    has."nginx/events.conf" = [ "worker_connections 65536;" ];
    has."nginx/append.conf" = [ "worker_processes 4;" ];
    lacks."nginx/append.conf" = [ "auto" ];
  };
  caddy-beside-nginx-at-other-ports = {
    relay.proxy = caddy;
    machine.services.nginx = {
      enable = true;
      defaultHTTPListenPort = 8080;
      defaultSSLListenPort = 8443;
      virtualHosts."shop.example.com" = { };
    };
  };

  # The operator's command uses the relay's database and secrets.
  command-with-credentials = {
    relay = {
      database.urlFile = "/run/secrets/url";
      admin.passwordFile = "/run/secrets/admin";
    };
    has.command = [
      "--setenv=RELAY_CONFIG=/etc/atproto-relay/config.toml"
      "--property=LoadCredential=admin-password:/run/secrets/admin"
      "--property=LoadCredential=database-url:/run/secrets/url"
      "--uid=atproto-relay"
    ];
  };

  nothing-tuned.relay = {
    database.tune = false;
    network.tune = false;
    storage.tune = false;
  };
}
