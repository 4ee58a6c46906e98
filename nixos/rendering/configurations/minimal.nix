# The minimal configuration: a relay with its database, on loopback.
{
  services.atproto-relay.enable = true;
}
