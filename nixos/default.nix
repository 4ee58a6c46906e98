# services.atproto-relay: a relay and the machine around it, one file per concern. By default only the relay and its
# database are set up.
{
  imports = [
    ./assertions.nix
    ./command.nix
    ./database.nix
    ./hardening.nix
    ./monitoring
    ./network.nix
    ./proxy.nix
    ./service.nix
    ./settings.nix
    ./sockets.nix
    ./storage
  ];
}
