# services.atproto-relay: a relay and the machine around it, split by concern. Nothing is set up but the relay and its
# database until an option asks for it.
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
