# The whole machine: separate NVMe drives for the log and the database, monitoring, and a proxy with TLS.
{
  services.atproto-relay = {
    enable = true;
    trustedDomains = [
      "*.host.bsky.network"
      "pds.example.com"
    ];
    # Hosts to begin with: those that this relay knows.
    bootstrap.relays = [ "https://relay1.us-east.bsky.network" ];
    admin.passwordFile = "/run/secrets/atproto-relay-admin";
    openFirewall = true;

    proxy = {
      server = "caddy";
      domain = "relay.example.com";
    };

    # Half of a machine with 32 GiB for each of the two.
    database.memoryMiB = 16384;
    limits.memoryHigh = "14G";

    # `ls -l /dev/disk/by-id` lists the drives of a machine; these are those of the VM tests.
    storage = {
      log = {
        device = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_relay-log";
        format = true;
      };
      database = {
        device = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_relay-database";
        fsType = "ext4";
        format = true;
      };
    };

    monitoring.enable = true;

    settings = {
      account_cache = "4GiB";
      log.max_bytes = "3TB";
      replay_window = "72h";
    };
  };
}
