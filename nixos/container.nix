# The relay as an OCI image: the program, the roots of TLS, and nothing else, not even a shell. Its data is in the volume
# /data. `nix build .#container && podman load < result`. For machines without Nix there is the Containerfile.
{
  lib,
  dockerTools,
  atproto-relay,
}:

let
  user = "2470:2470";
in
dockerTools.buildLayeredImage {
  name = "atproto-relay";
  tag = atproto-relay.version;
  contents = [
    dockerTools.caCertificates
    # /etc/nsswitch.conf, so that names are resolved by DNS.
    dockerTools.fakeNss
  ];
  fakeRootCommands = ''
    install --directory --mode=1777 tmp
    install --directory --mode=750 data
    chown ${user} data
  '';
  config = {
    Entrypoint = [ (lib.getExe atproto-relay) ];
    Cmd = [ "serve" ];
    User = user;
    WorkingDir = "/data";
    Volumes."/data" = { };
    ExposedPorts = {
      "2470/tcp" = { };
      "2471/tcp" = { };
    };
    Env = [
      "RELAY_DATA_DIR=/data"
      # Listeners are the container's; publish 2471 to a private address only.
      "RELAY_LISTEN=:2470"
      "RELAY_METRICS_LISTEN=:2471"
    ];
    # The relay stops within two seconds.
    StopSignal = "SIGTERM";
    Labels = {
      "org.opencontainers.image.title" = "atproto-relay";
      "org.opencontainers.image.description" = "A relay for the AT Protocol";
      "org.opencontainers.image.licenses" = "MIT OR Apache-2.0";
      "org.opencontainers.image.version" = atproto-relay.version;
      # No program in the image can ask for it: the orchestrator's HTTP check does.
      "atproto-relay.health" = "http://127.0.0.1:2471/_health";
    };
  };
}
