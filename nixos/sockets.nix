# The relay's listeners. systemd owns them, so that no connection is refused while the relay restarts, and so that the
# relay needs no permission to bind.
{ config, lib, ... }:

let
  inherit (lib) mkOption types;

  cfg = config.services.atproto-relay;

  # A number without leading zeros, which some parsers read as octal.
  number = "(0|[1-9][0-9]{0,4})";
  isAddress =
    text:
    let
      ipv4 = builtins.match "${number}[.]${number}[.]${number}[.]${number}:${number}" text;
      ipv6 = builtins.match "[[][0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*[]]:${number}" text;
      within = most: digits: lib.toInt digits <= most;
    in
    if ipv4 != null then
      lib.all (within 255) (lib.init ipv4) && within 65535 (lib.last ipv4)
    else
      ipv6 != null && within 65535 (lib.last ipv6);
  address = types.addCheck types.str isAddress // {
    description = "address with a port, as in 127.0.0.1:2470 or [::1]:2470";
  };
  addresses = types.nonEmptyListOf address;

  port = listen: lib.toInt (lib.last (lib.splitString ":" listen));
  isLoopback = listen: lib.hasPrefix "127." listen || lib.hasPrefix "[::1]:" listen;

  # The addresses of a setting for systemd; a port alone means all addresses of the machine.
  addressesOf =
    setting: default:
    if setting == null then
      [ default ]
    else if lib.hasPrefix ":" setting then
      [
        "0.0.0.0${setting}"
        "[::]${setting}"
      ]
    else
      [ setting ];
  # Whether a setting names an address where systemd does not listen.
  contradicts =
    option: setting:
    setting != null && !lib.all (listen: lib.elem listen cfg.${option}) (addressesOf setting null);

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
    # Connections that can wait while the relay restarts; the kernel limits this to net.core.somaxconn.
    Backlog = 4096;
    # An address that is not configured yet is no error, for example when the network comes up late.
    FreeBind = true;
    # [::] is IPv6 only, so that 0.0.0.0 can have the same port.
    BindIPv6Only = "ipv6-only";
    # Accepted connections inherit it: the kernel detects peers that vanished (network.nix sets the times).
    KeepAlive = true;
  };
in
{
  options.services.atproto-relay = {
    listen = mkOption {
      type = addresses;
      default = addressesOf cfg.settings.listen "127.0.0.1:2470";
      defaultText = lib.literalMD "`settings.listen`, or `[ \"127.0.0.1:2470\" ]`";
      example = [
        "0.0.0.0:2470"
        "[::]:2470"
      ];
      description = ''
        Addresses of the firehose and the XRPC methods, in plain HTTP. Keep the loopback address and use a proxy with TLS
        ({option}`services.atproto-relay.proxy`). A proxy on another machine must be listed in
        `settings.trusted_proxies`: otherwise all consumers count as one address, which
        `settings.max_consumers_per_ip` limits.
      '';
    };

    metricsListen = mkOption {
      type = addresses;
      default = addressesOf cfg.settings.metrics_listen "127.0.0.1:2471";
      defaultText = lib.literalMD "`settings.metrics_listen`, or `[ \"127.0.0.1:2471\" ]`";
      description = "Addresses of `/metrics` and `/_health`. Keep them private.";
    };

    adminSocket = mkOption {
      type = types.path;
      default = "/run/atproto-relay-admin.sock";
      readOnly = true;
      description = ''
        Unix socket of the admin API. It needs no password: only root and the members of
        {option}`services.atproto-relay.group` can use it.
      '';
    };

    listeners = mkOption {
      type = types.attrsOf types.str;
      internal = true;
      readOnly = true;
      # The relay reports these addresses; it uses the listeners that systemd passes.
      default = {
        listen = lib.head cfg.listen;
        metrics_listen = lib.head cfg.metricsListen;
      };
      defaultText = lib.literalMD "the first of each";
      description = "Listeners as the configuration file names them.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether to open the ports of {option}`services.atproto-relay.listen` that are not on loopback or, with a proxy,
        those of HTTP and HTTPS. The port of the metrics stays closed.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    systemd.sockets = {
      atproto-relay = socket "public" "Firehose and XRPC of the AT Protocol relay" tcp // {
        listenStreams = cfg.listen;
      };
      atproto-relay-metrics = socket "metrics" "Metrics of the AT Protocol relay" tcp // {
        listenStreams = cfg.metricsListen;
      };
      atproto-relay-admin =
        socket "admin" "Admin API of the AT Protocol relay" {
          # Access is controlled by the mode of the socket.
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
        assertion = !contradicts "listen" cfg.settings.listen;
        message = ''
          services.atproto-relay.settings.listen is not among services.atproto-relay.listen, the addresses where systemd
          listens. Set only one of the two options.
        '';
      }
      {
        assertion = !contradicts "metricsListen" cfg.settings.metrics_listen;
        message = ''
          services.atproto-relay.settings.metrics_listen is not among services.atproto-relay.metricsListen, the addresses
          where systemd listens. Set only one of the two options.
        '';
      }
      {
        assertion = cfg.openFirewall && cfg.proxy.server == null -> !lib.all isLoopback cfg.listen;
        message = ''
          services.atproto-relay.openFirewall has no effect: the relay listens only on loopback. Set
          services.atproto-relay.proxy, or a public address in services.atproto-relay.listen.
        '';
      }
    ];
  };
}
