# A relay behind nginx on the same machine.
{
  services.atproto-relay = {
    enable = true;
    proxy = {
      server = "nginx";
      domain = "relay.example.com";
    };
  };
}
