# The NixOS test of a scenario: a module for pkgs.testers.runNixOSTest, made from the scenario's folder. scenario.toml
# lists the machines. vm-tests/run reads the same scenario.toml and runs the same testScript.
#
# A machine is either a part of the devnet (`devnet` are the arguments of atproto-devnet), or the relay in a configuration of
# nixos/rendering/configurations (`relay`), with `listen`, `settings` and `secrets` for the test.
folder:
{ relayModule, devnet }:
{ lib, ... }:

let
  scenario = lib.importTOML (folder + "/scenario.toml");

  common =
    { config, pkgs, ... }:
    {
      imports = [ relayModule ];
      # The machines are alone on their network.
      networking.firewall.enable = false;
      environment.systemPackages =
        lib.optional (!config.services.atproto-relay.enable) config.services.atproto-relay.package
        ++ [
          devnet
          pkgs.curl
          pkgs.jq
          pkgs.netcat-openbsd
        ];
    };

  devnetPart = arguments: {
    systemd.services.devnet = {
      description = "Devnet: ${lib.head (lib.splitString " " arguments)}";
      wantedBy = [ "multi-user.target" ];
      after = [ "network.target" ];
      serviceConfig = {
        ExecStart = "${lib.getExe devnet} ${arguments}";
        Restart = "on-failure";
      };
    };
  };

  relay = machine: { config, ... }: {
    imports = [ (../nixos/rendering/configurations + "/${machine.relay}.nix") ];
    services.atproto-relay = {
      settings = lib.mapAttrsRecursive (_: lib.mkForce) (machine.settings or { });
      # Test machines are smaller than servers.
      database.memoryMiB = lib.mkForce 512;
      # The machines have no firewall, and some listen only on loopback.
      openFirewall = lib.mkForce false;
      monitoring.enable = lib.mkIf (machine.monitoring or false) true;
    }
    // lib.optionalAttrs (machine ? listen) { listen = lib.mkForce [ machine.listen ]; };
    # The script sends its queries to Prometheus.
    environment.etc = lib.mkIf (machine.monitoring or false) {
      "dashboard.json".source =
        "${config.services.atproto-relay.monitoring.dashboard}/atproto-relay.json";
    };
    # f+ writes the file with its mode before services start.
    systemd.tmpfiles.rules = lib.mapAttrsToList (
      name: secret: "f+ /run/secrets/${name} 0400 root root - ${secret}"
    ) (machine.secrets or { });
    # These machines cannot get certificates.
    services.caddy.virtualHosts = lib.mkIf (config.services.atproto-relay.proxy.server == "caddy") {
      ${config.services.atproto-relay.proxy.domain}.hostName = lib.mkForce "http://";
    };
    services.nginx.virtualHosts = lib.mkIf (config.services.atproto-relay.proxy.server == "nginx") {
      ${config.services.atproto-relay.proxy.domain} = {
        enableACME = lib.mkForce false;
        forceSSL = lib.mkForce false;
        default = true;
      };
    };
    virtualisation.memorySize = 2048;
    # For the log and PostgreSQL, if they have no separate disk.
    virtualisation.diskSize = 4096;
  };

  # A second system with other packages, and a command that switches to it and back, like `nixos-rebuild switch`.
  updated = { config, pkgs, ... }: {
    specialisation.updated.configuration = {
      services.atproto-relay.package = lib.mkForce (
        pkgs.symlinkJoin {
          name = "atproto-relay-updated";
          paths = [ config.services.atproto-relay.package ];
          meta.mainProgram = "atproto-relay";
        }
      );
      systemd.services = lib.mapAttrs' (
        role: _: lib.nameValuePair "atproto-relay-prepare-${role}" { path = [ pkgs.jq ]; }
      ) (lib.filterAttrs (_: volume: volume.format or false) config.services.atproto-relay.storage);
    };
    environment.systemPackages = [
      (pkgs.writeShellScriptBin "switch-to" ''
        case $1 in
        updated) system=/run/booted-system/specialisation/updated ;;
        *) system=/run/booted-system ;;
        esac
        exec $system/bin/switch-to-configuration test
      '')
    ];
  };

  # Empty NVMe devices, identified by serial number. Their content is kept while qemu runs: over a reboot, not over a
  # crash.
  disks = machine: { config, pkgs, ... }: {
    # A test machine mounts these volumes, and not the `fileSystems` of the configuration.
    virtualisation.fileSystems = lib.listToAttrs (
      map (
        volume:
        lib.nameValuePair volume.mountPoint {
          inherit (volume) device fsType options;
        }
      ) config.services.atproto-relay.storage.volumes
    );
    virtualisation.qemu.options = lib.concatLists (
      lib.mapAttrsToList (
        serial: megabytes:
        let
          empty = pkgs.runCommand "${serial}.qcow2" { nativeBuildInputs = [ pkgs.qemu-utils ]; } ''
            qemu-img create -f qcow2 $out ${toString megabytes}M
          '';
        in
        [
          "-drive file=${empty},if=none,id=${serial},format=qcow2,snapshot=on"
          "-device nvme,drive=${serial},serial=${serial}"
        ]
      ) machine.disks
    );
  };
in
{
  name = "atproto-relay-${baseNameOf folder}";

  nodes = lib.mapAttrs (_: machine: {
    imports = [
      common
    ]
    ++ lib.optional (machine ? devnet) (devnetPart machine.devnet)
    ++ lib.optional (machine ? relay) (relay machine)
    ++ lib.optional (machine ? disks) (disks machine)
    ++ lib.optional (machine.updated or false) updated;
  }) scenario.machines;

  testScript = builtins.readFile ./prelude.py + "\n" + builtins.readFile (folder + "/testScript.py");
}
