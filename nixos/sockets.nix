# The relay's listeners. systemd holds them, so that no connection is refused while the relay restarts, and so that the
# relay itself may bind nothing.
{ config, lib, ... }:

let
  inherit (lib) mkOption types;

  cfg = config.services.atproto-relay;

  address = types.strMatching "([0-9]+[.][0-9]+[.][0-9]+[.][0-9]+|[[][0-9A-Fa-f.:]+[]]):[0-9]+" // {
    description = "address with a port, as in 127.0.0.1:2470 or [::1]:2470";
  };
  addresses = types.nonEmptyListOf address;

  port = listen: lib.toInt (lib.last (lib.splitString ":" listen));
  isLoopback = listen: lib.hasPrefix "127." listen || lib.hasPrefix "[::1]:" listen;

  socket = name: description: config: {
    inherit description;
    wantedBy = [ "sockets.target" ];
    socketConfig = {
      FileDescriptorName = name;
      Service = "atproto-relay.service";
    }
    // config;
  };
  tcp = {
    # What waits while the relay restarts; the kernel cuts it to net.core.somaxconn.
    Backlog = 4096;
    # An address that is not there yet, as on a machine whose network comes up late, is no error.
    FreeBind = true;
    # [::] is IPv6 alone, so that 0.0.0.0 with the same port may stand beside it.
    BindIPv6Only = "ipv6-only";
    # Accepted connections have it too: a peer that vanished is found by the kernel (network.nix says when).
    KeepAlive = true;
  };
in
{
  options.services.atproto-relay = {
    listen = mkOption {
      type = addresses;
      default = [ "127.0.0.1:2470" ];
      example = [
        "0.0.0.0:2470"
        "[::]:2470"
      ];
      description = ''
        Addresses of the firehose and the XRPC methods, in plain HTTP. Leave it at loopback and put a proxy with TLS in
        front ({option}`services.atproto-relay.proxy`).
      '';
    };

    metricsListen = mkOption {
      type = addresses;
      default = [ "127.0.0.1:2471" ];
      description = "Addresses of `/metrics` and `/_health`. Keep them private.";
    };

    adminSocket = mkOption {
      type = types.path;
      default = "/run/atproto-relay-admin.sock";
      readOnly = true;
      description = ''
        Unix socket of the admin API. It asks for no password: the members of
        {option}`services.atproto-relay.group` may use it, and nobody else.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether to open the ports of {option}`services.atproto-relay.listen` that are not on loopback, or with a proxy
        those of HTTP and HTTPS. The metrics' port stays closed.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    # What the relay says of itself, and where it would listen by hand. The descriptors that systemd passes win.
    services.atproto-relay.settings = {
      listen = lib.head cfg.listen;
      metrics_listen = lib.head cfg.metricsListen;
    };

    systemd.sockets = {
      atproto-relay = socket "public" "Firehose and XRPC of the AT Protocol relay" tcp // {
        listenStreams = cfg.listen;
      };
      atproto-relay-metrics = socket "metrics" "Metrics of the AT Protocol relay" tcp // {
        listenStreams = cfg.metricsListen;
      };
      atproto-relay-admin =
        socket "admin" "Admin API of the AT Protocol relay" {
          # The mode is the password.
          SocketMode = "0660";
          SocketUser = "root";
          SocketGroup = cfg.group;
        }
        // {
          listenStreams = [ cfg.adminSocket ];
        };
    };

    systemd.services.atproto-relay =
      let
        sockets = [
          "atproto-relay.socket"
          "atproto-relay-metrics.socket"
          "atproto-relay-admin.socket"
        ];
      in
      {
        requires = sockets;
        after = sockets;
        serviceConfig.Sockets = sockets;
      };

    networking.firewall.allowedTCPPorts = lib.mkIf (cfg.openFirewall && cfg.proxy.server == null) (
      map port (lib.filter (listen: !isLoopback listen) cfg.listen)
    );

    assertions = [
      {
        assertion = cfg.openFirewall && cfg.proxy.server == null -> !lib.all isLoopback cfg.listen;
        message = ''
          services.atproto-relay.openFirewall opens nothing: the relay listens on loopback alone. Set
          services.atproto-relay.proxy, or an address in services.atproto-relay.listen that others reach.
        '';
      }
    ];
  };
}
