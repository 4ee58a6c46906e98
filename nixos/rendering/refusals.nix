# Configurations that must be refused, each with words of the message. `relay` is services.atproto-relay (with
# `enable = true` added), `machine` the rest of the NixOS configuration.
{
  # Wrong types
  time-without-unit = {
    relay.settings.replay_window = 72;
    message = "A definition for option `services.atproto-relay.settings.replay_window' is not of type `null or time with a unit, as in \"90s\" or \"72h\"'";
  };
  size-in-words = {
    relay.settings.log.max_bytes = "500 gigabytes";
    message = "A definition for option `services.atproto-relay.settings.log.max_bytes' is not of type";
  };
  validation-that-does-not-exist = {
    relay.settings.validation = "none";
    message = "A definition for option `services.atproto-relay.settings.validation' is not of type `null or one of \"strict\", \"ratchet\", \"lenient\"'";
  };
  one-host-that-is-no-list = {
    relay.hosts = "pds.example.com";
    message = "A definition for option `services.atproto-relay.hosts' is not of type `list of string'";
  };
  port-without-address = {
    relay.listen = [ ":2470" ];
    message = "is not of type `address with a port, as in 127.0.0.1:2470 or [::1]:2470'";
  };
  port-that-does-not-exist = {
    relay.listen = [ "0.0.0.0:99999" ];
    message = "is not of type `address with a port, as in 127.0.0.1:2470 or [::1]:2470'";
  };
  address-that-does-not-exist = {
    relay.listen = [ "999.1.1.1:2470" ];
    message = "is not of type `address with a port, as in 127.0.0.1:2470 or [::1]:2470'";
  };
  weight-out-of-range = {
    relay.limits.cpuWeight = 0;
    message = "A definition for option `services.atproto-relay.limits.cpuWeight' is not of type `integer between 1 and 10000 (both inclusive)'";
  };
  file-system-that-is-not-offered = {
    relay.storage.log = {
      device = "/dev/disk/by-id/nvme-log";
      fsType = "btrfs";
    };
    message = "is not of type `one of \"xfs\", \"ext4\"'";
  };
  proxy-that-is-not-offered = {
    relay.proxy.server = "apache";
    message = "is not of type `null or one of \"caddy\", \"nginx\"'";
  };

  # Unknown options
  unknown-option = {
    relay.adminPassword = "hunter2";
    message = "The option `services.atproto-relay.adminPassword' does not exist";
  };
  unknown-volume = {
    relay.storage.logs.device = "/dev/disk/by-id/nvme-log";
    message = "The option `services.atproto-relay.storage.logs' does not exist";
  };

  weight-without-effect = {
    relay.limits.ioWeight = 500;
    message = "The option definition `services.atproto-relay.limits.ioWeight'";
  };

  # Secrets in the store
  password-as-a-path = {
    relay.admin.passwordFile = ./refusals.nix;
    message = "services.atproto-relay.admin.passwordFile is a file in the Nix store, which every user of the machine can read.";
  };
  url-in-the-store = {
    relay.database.urlFile = "${builtins.storeDir}/00000000000000000000000000000000-url";
    message = "services.atproto-relay.database.urlFile is a file in the Nix store, which every user of the machine can read.";
  };
  grafana-key-in-the-store = {
    relay.monitoring.grafana.secretKeyFile = "${builtins.storeDir}/00000000000000000000000000000000-key";
    message = "services.atproto-relay.monitoring.grafana.secretKeyFile is a file in the Nix store, which every user of the machine can read.";
  };
  password-in-the-url = {
    relay.database.createLocally = false;
    relay.settings.database_url = "postgres://relay:hunter2@db.example.com/relay";
    message = "services.atproto-relay.settings.database_url contains a password";
  };
  password-file-in-the-settings = {
    relay.settings.admin_password_file = "/run/secrets/admin";
    message = "services.atproto-relay.settings.admin_password_file cannot be read by the relay's user.";
  };

  # Options that contradict each other
  two-databases = {
    relay.database.createLocally = true;
    relay.database.urlFile = "/run/secrets/url";
    message = "services.atproto-relay.database.createLocally and services.atproto-relay.database.urlFile contradict each other";
  };
  two-urls = {
    relay.database.urlFile = "/run/secrets/url";
    relay.settings.database_url = "postgres://relay@db.example.com/relay";
    message = "services.atproto-relay.database.urlFile and services.atproto-relay.settings.database_url both name a database:";
  };
  two-addresses = {
    relay.listen = [ "0.0.0.0:2470" ];
    relay.settings.listen = "127.0.0.1:2480";
    message = "services.atproto-relay.settings.listen is not among services.atproto-relay.listen";
  };
  data-where-the-relay-may-not-write = {
    relay.settings.data_dir = "/data/relay";
    message = "services.atproto-relay.settings.data_dir is a folder that the relay cannot write to.";
  };
  user-that-is-not-declared = {
    relay.user = "relay";
    message = "services.atproto-relay.user is \"relay\", and users.users has no such user";
  };
  group-that-is-not-declared = {
    relay.group = "relays";
    message = "services.atproto-relay.group is \"relays\", and users.groups has no such group";
  };
  firewall-open-for-nobody = {
    relay.openFirewall = true;
    message = "services.atproto-relay.openFirewall has no effect: the relay listens only on loopback.";
  };
  proxy-without-name = {
    relay.proxy.server = "nginx";
    message = "services.atproto-relay.proxy.server needs services.atproto-relay.proxy.domain";
  };
  proxy-to-an-address-of-the-network = {
    relay = {
      listen = [ "192.0.2.1:2470" ];
      proxy = {
        server = "nginx";
        domain = "relay.example.com";
      };
    };
    message = "services.atproto-relay.proxy.server connects to the relay on loopback";
  };
  caddy-beside-nginx = {
    relay.proxy = {
      server = "caddy";
      domain = "relay.example.com";
    };
    machine.services.nginx = {
      enable = true;
      virtualHosts."shop.example.com" = { };
    };
    message = "services.atproto-relay.proxy.server is \"caddy\", but nginx already listens on port 80 or 443";
  };
  nginx-beside-caddy = {
    relay.proxy = {
      server = "nginx";
      domain = "relay.example.com";
    };
    machine.services.caddy.enable = true;
    message = "services.atproto-relay.proxy.server is \"nginx\", but Caddy already listens on port 80 and 443";
  };
  dashboards-in-a-file-of-ones-own = {
    relay.monitoring.enable = true;
    machine.services.grafana.provision.dashboards.path = "/etc/grafana/dashboards.yml";
    message = "services.atproto-relay.monitoring adds to services.grafana.provision.dashboards.settings";
  };
  too-few-open-files = {
    relay.limits.openFiles = 4096;
    relay.settings.max_consumers = 5000;
    message = "services.atproto-relay.limits.openFiles is too low for 5000 consumers: set 6024 or more";
  };

  # Dangerous disks
  disk-for-a-database-elsewhere = {
    relay.database.urlFile = "/run/secrets/url";
    relay.storage.database.device = "/dev/disk/by-id/nvme-database";
    message = "services.atproto-relay.storage.database is a volume for PostgreSQL on this machine";
  };
  database-beside-its-disk = {
    relay.storage.database.device = "/dev/disk/by-id/nvme-database";
    machine.services.postgresql.dataDir = "/data/pg";
    message = "services.postgresql.dataDir is /data/pg: the database would not be on that volume.";
  };
  one-disk-for-two = {
    relay.storage.log.device = "/dev/disk/by-id/nvme-one";
    relay.storage.database.device = "/dev/disk/by-id/nvme-one";
    message = "services.atproto-relay.storage names a device twice";
  };
  passing-name = {
    relay.storage.log = {
      device = "/dev/nvme0n1";
      format = true;
    };
    message = "services.atproto-relay.storage.log.format needs a stable device name";
  };
  passing-name-of-a-raid = {
    relay.storage.log = {
      device = "/dev/md0";
      format = true;
    };
    message = "services.atproto-relay.storage.log.format needs a stable device name";
  };
  passing-name-of-a-mapping = {
    relay.storage.log = {
      device = "/dev/dm-0";
      format = true;
    };
    message = "services.atproto-relay.storage.log.format needs a stable device name";
  };
  passing-name-of-a-card = {
    relay.storage.log = {
      device = "/dev/mmcblk0";
      format = true;
    };
    message = "services.atproto-relay.storage.log.format needs a stable device name";
  };
  name-from-the-content = {
    relay.storage.log = {
      device = "/dev/disk/by-label/relay-log";
      format = true;
    };
    message = "services.atproto-relay.storage.log.format needs a name of the device itself";
  };
  label-too-long = {
    relay.storage.log = {
      device = "/dev/disk/by-id/nvme-log";
      label = "log-of-all-events";
    };
    message = "services.atproto-relay.storage.log.label is too long: xfs allows 12 characters.";
  };
  writes-that-are-not-on-disk = {
    relay.storage.log = {
      device = "/dev/disk/by-id/nvme-log";
      mountOptions = [ "nobarrier" ];
    };
    message = "services.atproto-relay.storage.log.mountOptions contains nobarrier";
  };
}
