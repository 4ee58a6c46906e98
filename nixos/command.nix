# The operator's command. `atproto-relay` in PATH reads the service's configuration. Called by root, it runs as the
# service's user with the service's credentials, so that it works on the service's database.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.atproto-relay;
  configFile = "/etc/atproto-relay/config.toml";
  program = lib.getExe cfg.package;

  # Quoted words of a shell. lib.escapeShellArgs omits some quotes, depending on the version of nixpkgs.
  words = lib.concatMapStringsSep " " (word: "'${lib.replaceStrings [ "'" ] [ "'\\''" ] word}'");

  credentials = map (
    credential: "--property=LoadCredential=${credential}"
  ) config.systemd.services.atproto-relay.serviceConfig.LoadCredential;
  asService = [
    "${config.systemd.package}/bin/systemd-run"
    "--quiet"
    "--collect"
    "--wait"
    # A terminal if there is one, otherwise the caller's input and output.
    "--pty"
    "--pipe"
    "--uid=${cfg.user}"
    "--gid=${cfg.group}"
    "--setenv=RELAY_CONFIG=${configFile}"
    "--property=UMask=0077"
    "--property=WorkingDirectory=${cfg.stateDir}"
  ]
  ++ credentials;

  command = pkgs.writeShellScript "atproto-relay-command" ''
    # These commands read the configuration, the database or the log. The others need neither the user nor secrets.
    case "''${1:-}" in
    hosts | log | check-config) needs_service=true ;;
    *) needs_service=false ;;
    esac
    # With --config the caller reads another configuration as itself.
    case " $* " in
    *" --config"*) needs_service=false ;;
    esac
    if $needs_service && [ "$(id -u)" = 0 ]; then
      exec ${words asService} ${program} "$@"
    fi
    export RELAY_CONFIG="''${RELAY_CONFIG-${configFile}}"
    exec ${program} "$@"
  '';

  # Man pages and completions come from the package.
  inPath = pkgs.runCommand "atproto-relay-in-path" { } ''
    mkdir -p $out/bin
    ln -s ${command} $out/bin/atproto-relay
    if [ -d ${cfg.package}/share ]; then ln -s ${cfg.package}/share $out/share; fi
  '';

  relays = cfg.bootstrap.relays;
  bootstrap = pkgs.writeShellScript "atproto-relay-bootstrap" ''
    # Each relay is asked once, so that hosts removed later are not added again.
    for relay in ${words relays}; do
      asked=$STATE_DIRECTORY/$(printf %s "$relay" | sha256sum | cut -c 1-32)
      [ -e "$asked" ] && continue
      ${program} hosts pull "$relay" --to unix:${cfg.adminSocket} || exit
      printf '%s\n' "$relay" >"$asked"
    done
  '';
in
{
  options.services.atproto-relay = {
    bootstrap.relays = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "https://relay1.us-east.bsky.network" ];
      description = ''
        Relays whose host lists are imported once, after the first start, because a new relay has no hosts. The import
        is retried until each relay has answered. `atproto-relay hosts pull` does the same by hand.
      '';
    };

    command = mkOption {
      type = types.package;
      internal = true;
      readOnly = true;
      default = command;
      defaultText = lib.literalMD "the command";
      description = "The program `atproto-relay` in PATH.";
    };

    bootstrapScript = mkOption {
      type = types.package;
      internal = true;
      readOnly = true;
      default = bootstrap;
      defaultText = lib.literalMD "the script";
      description = "Script that the unit of {option}`services.atproto-relay.bootstrap.relays` runs.";
    };
  };

  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ inPath ];

    systemd.services.atproto-relay-bootstrap = lib.mkIf (relays != [ ]) {
      description = "Import of other relays' hosts for the AT Protocol relay";
      wantedBy = [ "multi-user.target" ];
      wants = [
        "network-online.target"
        "atproto-relay.service"
      ];
      after = [
        "network-online.target"
        "atproto-relay.service"
      ];
      startLimitIntervalSec = 0;
      environment.RELAY_CONFIG = configFile;
      serviceConfig = {
        # The boot does not wait for it: another relay can be unreachable.
        Type = "exec";
        RemainAfterExit = true;
        ExecStart = bootstrap;
        Restart = "on-failure";
        RestartSec = 60;
        User = cfg.user;
        Group = cfg.group;
        StateDirectory = "atproto-relay-bootstrap";
        Slice = cfg.slice;

        CapabilityBoundingSet = "";
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        NoNewPrivileges = true;
        PrivateDevices = true;
        PrivateTmp = true;
        PrivateUsers = true;
        ProcSubset = "pid";
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHome = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        ProtectProc = "invisible";
        ProtectSystem = "strict";
        RestrictAddressFamilies = [
          "AF_INET"
          "AF_INET6"
          "AF_UNIX"
        ];
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        SystemCallFilter = [
          "@system-service"
          "~@privileged @resources"
        ];
        SystemCallErrorNumber = "EPERM";
        UMask = "0077";
      };
    };
  };
}
