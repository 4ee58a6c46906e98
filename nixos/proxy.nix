# A proxy with TLS in front of the relay. It passes only the firehose, the XRPC methods and the pages of the relay: the
# admin API, the metrics and the health page stay on the machine.
{
  config,
  lib,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.atproto-relay;
  proxy = cfg.proxy;

  # The loopback address where the proxy reaches a listener: its own address, or that of a listener on all addresses.
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

  # The relay's default applies if the setting is null.
  consumers = if cfg.settings.max_consumers == null then 1000 else cfg.settings.max_consumers;
  # Two for each consumer, and some for requests. The minimum is enough for all consumers that the relay keeps over a
  # restart (8,000), so that a change of `max_consumers` does not restart nginx.
  connections = lib.max 32768 (2 * consumers + 1024);

  # Whether nginx listens on the ports of HTTP and HTTPS.
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

  # A location of nginx that is proxied to the relay.
  passed = {
    proxyPass = "http://${upstream}";
    proxyWebsockets = true;
    # The relay counts consumers by the address in the headers of a proxy on the same machine.
    recommendedProxySettings = true;
    extraConfig = ''
      # Pass frames without delay.
      proxy_buffering off;
      # A firehose can be quiet for long. The relay pings every 30 seconds and disconnects clients that do not answer.
      proxy_read_timeout 1d;
      proxy_send_timeout 1d;
      # While the relay restarts, new connections wait in the listener's queue.
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
        Reverse proxy with TLS on this machine. Caddy obtains its certificates itself; nginx uses {option}`security.acme`,
        whose terms you must accept there. The worker settings of nginx are derived from `max_consumers`, as defaults. If
        the proxy is on another machine, leave this null and set `settings.trusted_proxies`.
      '';
    };

    domain = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "relay.example.com";
      description = "Public domain name of the relay.";
    };
  };

  config = lib.mkIf (cfg.enable && proxy.server != null) (
    lib.mkMerge [
      {
        assertions = [
          {
            assertion = proxy.domain != null;
            message = ''
              services.atproto-relay.proxy.server needs services.atproto-relay.proxy.domain, the name in the certificate.
            '';
          }
          {
            assertion = upstreams != [ ];
            message = ''
              services.atproto-relay.proxy.server connects to the relay on loopback, and services.atproto-relay.listen
              includes no loopback address: all consumers would count as the address of the proxy. Add "127.0.0.1:2470".
            '';
          }
          {
            assertion = proxy.server == "caddy" -> !nginxAtPublicPorts;
            message = ''
              services.atproto-relay.proxy.server is "caddy", but nginx already listens on port 80 or 443 of this machine.
              Set it to "nginx", or give nginx other ports.
            '';
          }
          {
            assertion = proxy.server == "nginx" -> !caddyAtPublicPorts;
            message = ''
              services.atproto-relay.proxy.server is "nginx", but Caddy already listens on port 80 and 443 of this machine.
              Set it to "caddy", or give Caddy other ports (http_port and https_port in its globalConfig).
            '';
          }
        ];

        networking.firewall = lib.mkIf cfg.openFirewall {
          allowedTCPPorts = [
            80
            443
          ];
          # HTTP/3, which nginx does not serve here.
          allowedUDPPorts = lib.optional (proxy.server == "caddy") 443;
        };
      }

      (lib.mkIf (proxy.server == "caddy" && proxy.domain != null) {
        services.caddy = {
          enable = true;
          virtualHosts.${proxy.domain}.extraConfig = ''
            # The public paths. Everything else is answered here: the metrics have their own listener, and the admin API
            # has a Unix socket.
            @public path / /docs /docs/* /xrpc/*
            handle @public {
              reverse_proxy ${upstream} {
                # Pass frames without delay.
                flush_interval -1
                # Consumers stay connected for a day when the proxy's configuration changes.
                stream_close_delay 24h
                # While the relay restarts, new connections wait in the listener's queue.
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
          # By default nginx has one worker with 512 connections, enough for 255 consumers. Defaults as a whole, because
          # nginx rejects duplicate directives.
          eventsConfig = lib.mkDefault "worker_connections ${toString connections};";
          appendConfig = lib.mkDefault "worker_processes auto;";
          virtualHosts.${proxy.domain} = {
            enableACME = lib.mkDefault true;
            forceSSL = lib.mkDefault true;
            # The public paths. Everything else is answered here: the metrics have their own listener, and the admin API
            # has a Unix socket.
            locations = {
              "= /" = passed;
              "/docs" = passed;
              "/xrpc/" = passed;
              "/".return = "404";
            };
          };
        };
        # Each connection is a file, and a proxied client needs two.
        systemd.services.nginx.serviceConfig.LimitNOFILE = lib.mkDefault (2 * connections);
      })
    ]
  );
}
