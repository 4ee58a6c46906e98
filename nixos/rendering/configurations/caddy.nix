# A relay behind Caddy on the same machine.
{
  services.atproto-relay = {
    enable = true;
    proxy = {
      server = "caddy";
      domain = "relay.example.com";
    };
  };
}
