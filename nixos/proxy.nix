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
  upstream = lib.head cfg.listen;

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
        Server that stands in front of the relay with TLS. Caddy gets its certificates by itself; for nginx they come
        from {option}`security.acme`, whose terms must be accepted there.
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
      })
    ]
  );
}
