# A proxy with TLS in front of the relay. It passes the firehose and the XRPC methods, and nothing else: the admin API,
# the metrics and the health page stay on the machine.
{
  config,
  lib,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.atproto-relay;
  proxy = cfg.proxy;

  # The proxy dials the relay at loopback: an address there, or a listener at all addresses.
  atLoopback =
    listen:
    let
      port = lib.last (lib.splitString ":" listen);
    in
    if lib.hasPrefix "127." listen || lib.hasPrefix "[::1]:" listen then
      listen
    else if lib.hasPrefix "0.0.0.0:" listen then
      "127.0.0.1:${port}"
    else if lib.hasPrefix "[::]:" listen then
      "[::1]:${port}"
    else
      null;
  upstreams = lib.filter (listen: listen != null) (map atLoopback cfg.listen);
  upstream = if upstreams == [ ] then lib.head cfg.listen else lib.head upstreams;

  # The relay's own default, where the settings are silent.
  consumers = if cfg.settings.max_consumers == null then 1000 else cfg.settings.max_consumers;
  # Two for each consumer, and some for requests. The least is enough for all consumers that the relay keeps over a restart
  # (8,000), so that nginx need not be restarted for a change of `max_consumers`.
  connections = lib.max 32768 (2 * consumers + 1024);

  # Whether nginx listens where browsers and consumers come.
  nginxAtPublicPorts =
    let
      inherit (config.services) nginx;
      ports =
        host:
        if host.listen or [ ] == [ ] then
          [
            nginx.defaultHTTPListenPort
            nginx.defaultSSLListenPort
          ]
        else
          map (listen: listen.port) host.listen;
    in
    nginx.enable
    && lib.any (host: lib.intersectLists (ports host) publicPorts != [ ]) (
      lib.attrValues nginx.virtualHosts
    );
  caddyAtPublicPorts =
    config.services.caddy.enable
    && !(
      lib.hasInfix "http_port" config.services.caddy.globalConfig
      && lib.hasInfix "https_port" config.services.caddy.globalConfig
    );
  publicPorts = [
    80
    443
  ];

  # A location of nginx that is passed to the relay.
  passed = {
    proxyPass = "http://${upstream}";
    proxyWebsockets = true;
    # The relay counts consumers by the address that a proxy on the same machine tells it.
    recommendedProxySettings = true;
    extraConfig = ''
      # Frames leave as they come.
      proxy_buffering off;
      # A firehose may be quiet for long. The relay pings every 30 seconds, and cuts who does not answer.
      proxy_read_timeout 1d;
      proxy_send_timeout 1d;
      # While the relay restarts, a new connection waits in its socket.
      proxy_connect_timeout 5s;
    '';
  };
in
{
  options.services.atproto-relay.proxy = {
    server = mkOption {
      type = types.nullOr (
        types.enum [
          "caddy"
          "nginx"
        ]
      );
      default = null;
      description = ''
        Server that stands in front of the relay with TLS, on this machine. Caddy gets its certificates by itself; for
        nginx they come from {option}`security.acme`, whose terms must be accepted there. nginx' workers and their
        connections are set for `max_consumers`, as defaults. A proxy on another machine needs none of this, but a line
        in `settings.trusted_proxies`.
      '';
    };

    domain = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "relay.example.com";
      description = "Name under which the relay is reached.";
    };
  };

  config = lib.mkIf (cfg.enable && proxy.server != null) (
    lib.mkMerge [
      {
        assertions = [
          {
            assertion = proxy.domain != null;
            message = ''
              services.atproto-relay.proxy.server needs services.atproto-relay.proxy.domain, the name that the
              certificate is for.
            '';
          }
          {
            assertion = upstreams != [ ];
            message = ''
              services.atproto-relay.proxy.server reaches the relay at loopback, and services.atproto-relay.listen has
              neither a loopback address nor all addresses: all consumers would have the address of the proxy. Add
              "127.0.0.1:2470".
            '';
          }
          {
            assertion = proxy.server == "caddy" -> !nginxAtPublicPorts;
            message = ''
              services.atproto-relay.proxy.server is "caddy", and nginx listens on port 80 or 443 of this machine already.
              Set it to "nginx", or give nginx other ports.
            '';
          }
          {
            assertion = proxy.server == "nginx" -> !caddyAtPublicPorts;
            message = ''
              services.atproto-relay.proxy.server is "nginx", and Caddy listens on port 80 and 443 of this machine
              already. Set it to "caddy", or give Caddy other ports (http_port and https_port in its globalConfig).
            '';
          }
        ];

        networking.firewall = lib.mkIf cfg.openFirewall {
          allowedTCPPorts = [
            80
            443
          ];
          # HTTP/3; nginx does not speak it here.
          allowedUDPPorts = lib.optional (proxy.server == "caddy") 443;
        };
      }

      (lib.mkIf (proxy.server == "caddy" && proxy.domain != null) {
        services.caddy = {
          enable = true;
          virtualHosts.${proxy.domain}.extraConfig = ''
            # What is for the public. All else is answered here: the metrics have a listener of their own, and the admin
            # API is for the machine's own Unix socket.
            @public path / /xrpc/*
            handle @public {
              reverse_proxy ${upstream} {
                # Frames leave as they come.
                flush_interval -1
                # A consumer that is connected when the proxy's configuration changes goes on for a day.
                stream_close_delay 24h
                # While the relay restarts, a new connection waits in its socket.
                transport http {
                  dial_timeout 5s
                  response_header_timeout 60s
                }
              }
            }
            handle {
              respond 404
            }
          '';
        };
      })

      (lib.mkIf (proxy.server == "nginx" && proxy.domain != null) {
        services.nginx = {
          enable = true;
          recommendedTlsSettings = lib.mkDefault true;
          # nginx has one worker by default, with 512 connections: 255 consumers. Defaults as a whole, because nginx refuses
          # a directive that is there twice.
          eventsConfig = lib.mkDefault "worker_connections ${toString connections};";
          appendConfig = lib.mkDefault "worker_processes auto;";
          virtualHosts.${proxy.domain} = {
            enableACME = lib.mkDefault true;
            forceSSL = lib.mkDefault true;
            # What is for the public. All else is answered here: the metrics have a listener of their own, and the admin
            # API is for the machine's own Unix socket.
            locations = {
              "= /" = passed;
              "/xrpc/" = passed;
              "/".return = "404";
            };
          };
        };
        # Each connection is a file, and a relayed one is two connections.
        systemd.services.nginx.serviceConfig.LimitNOFILE = lib.mkDefault (2 * connections);
      })
    ]
  );
}
