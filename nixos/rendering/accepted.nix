# Configurations beside those that are rendered, which must come to something: services.atproto-relay, with `enable = true`
# beside it.
{
  sqlite.database.createLocally = false;

  proxy-nginx = {
    openFirewall = true;
    proxy = {
      server = "nginx";
      domain = "relay.example.com";
    };
  };

  all-volumes.storage = {
    data = {
      device = "/dev/disk/by-id/nvme-data";
      discard = "online";
    };
    log.device = "/dev/disk/by-partuuid/log";
    mirror = {
      device = "/dev/disk/by-id/nvme-mirror";
      fsType = "ext4";
      format = true;
      discard = "never";
      mountOptions = [ "commit=30" ];
    };
    database.device = "/dev/mapper/database";
  };

  monitoring-with-all = {
    database.createLocally = false;
    monitoring = {
      enable = true;
      alertmanagers = [ "127.0.0.1:9093" ];
      grafana.secretKeyFile = "/run/secrets/grafana";
    };
  };

  monitoring-without-grafana.monitoring = {
    enable = true;
    grafana.enable = false;
  };

  users-of-ones-own = {
    user = "relay";
    group = "relay";
    slice = "relays.slice";
    limits.memoryMax = "80%";
  };

  # A key that the module does not know yet is for the relay to judge.
  settings-of-a-later-version.settings = {
    colour = "blue";
    limits.events_per_week = 1000000;
  };

  nothing-tuned = {
    database.tune = false;
    network.tune = false;
    storage.tune = false;
  };
}
