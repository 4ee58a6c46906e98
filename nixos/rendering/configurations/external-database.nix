# A relay with its database on another machine, and without a proxy on this machine.
{
  services.atproto-relay = {
    enable = true;
    listen = [
      "0.0.0.0:2470"
      "[::]:2470"
    ];
    openFirewall = true;
    hosts = [ "pds.example.com" ];
    admin.passwordFile = "/run/secrets/atproto-relay-admin";
    database.urlFile = "/run/secrets/atproto-relay-database-url";
    settings = {
      replay_window = "24h";
      log.max_bytes = "100GB";
    };
  };
}
