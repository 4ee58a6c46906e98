# The relay itself: its unit, its user, what it may take of the machine. How it listens is in sockets.nix, what it is
# kept from in hardening.nix.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.atproto-relay;

  # The relay's own default, where the settings are silent.
  maxConsumers = if cfg.settings.max_consumers == null then 1000 else cfg.settings.max_consumers;

  # What the relay keeps over a restart (MAX_KEPT in src/firehose/handover): systemd passes on no more names.
  mostKept = 8000;

  # What systemctl reload applies leaves the relay running; a change of anything else needs a restart.
  live = map (setting: setting.key) (
    lib.filter (setting: setting.live) (lib.importJSON ./settings.json)
  );
  removeKey =
    settings: key:
    let
      path = lib.splitString "." key;
      table = lib.head path;
    in
    if lib.length path == 1 then
      removeAttrs settings [ table ]
    else
      settings // { ${table} = removeAttrs (settings.${table} or { }) (lib.tail path); };
  needsRestart = lib.foldl' removeKey (cfg.settings // cfg.listeners) live;
in
{
  imports = [
    (lib.mkRemovedOptionModule [ "services" "atproto-relay" "limits" "ioWeight" ] ''
      It had no effect: the kernel shares out a disk by weight only with a scheduler (BFQ) or a cost model, and NVMe drives
      have neither.
    '')
  ];

  options.services.atproto-relay = {
    enable = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether to enable a relay for the AT Protocol, with its database on the same machine. The defaults are for a
        machine with 8 GiB of memory or more: with less, lower
        {option}`services.atproto-relay.database.memoryMiB` (a quarter of it are PostgreSQL's own buffers) and
        `settings.account_cache`.
      '';
    };

    package = lib.mkPackageOption pkgs "atproto-relay" { };

    user = mkOption {
      type = types.str;
      default = "atproto-relay";
      description = ''
        User that the relay runs as. It is made unless another name is given. It is a fixed one, not a dynamic one,
        because PostgreSQL knows the relay by its name on the Unix socket.
      '';
    };

    group = mkOption {
      type = types.str;
      default = "atproto-relay";
      description = ''
        Group that the relay runs as. Its members may use the admin API through {file}`/run/atproto-relay-admin.sock`.
      '';
    };

    stateDir = mkOption {
      type = types.path;
      default = "/var/lib/atproto-relay";
      readOnly = true;
      description = ''
        Folder of the event log. It is always this one: mount a file system here, or with
        {option}`services.atproto-relay.storage.log`, to have it elsewhere.
      '';
    };

    hosts = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "pds.example.com" ];
      description = ''
        Hosts to subscribe to. A host once added stays in the database; taking it off this list does not remove it.
        `atproto-relay hosts pull` takes over the hosts that another relay knows.
      '';
    };

    trustedDomains = mkOption {
      type = types.listOf types.str;
      default = [ "*.host.bsky.network" ];
      description = ''
        Hosts with the large quota of accounts: a name, or `*.DOMAIN` for all below it. What is in
        `settings.trusted_domains` takes the place of this list.
      '';
    };

    bannedDomains = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "spam.example" ];
      description = "Domains that are never subscribed to, with all below them.";
    };

    logLevel = mkOption {
      type = types.str;
      default = "info";
      example = "info,atproto_relay::upstream=debug";
      description = ''
        Which lines go to the journal: error, warn, info, debug or trace, or directives for parts of the relay.
      '';
    };

    admin.passwordFile = mkOption {
      type = types.nullOr (types.either types.path types.str);
      default = null;
      example = "/run/secrets/atproto-relay-admin";
      description = ''
        File with the password of the admin API on the public listener, read by systemd and passed on as a credential.
        Without one the admin API answers on its Unix socket alone, where the file's mode decides.
      '';
    };

    limits = {
      memoryHigh = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "8G";
        description = ''
          Memory above which the kernel slows the relay down and tells it to shrink its caches (MemoryHigh=). Null:
          no limit. The page cache of the log counts too, so leave room above `account_cache`.
        '';
      };

      memoryMax = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "12G";
        description = "Memory above which the relay is killed (MemoryMax=). Null: no limit.";
      };

      cpuWeight = mkOption {
        type = types.ints.between 1 10000;
        default = 200;
        description = ''
          Share of the processor where it is short (CPUWeight=); other services have 100. The relay is what the
          machine is for, and it must go on while a query or a backup runs.
        '';
      };

      openFiles = mkOption {
        type = types.ints.positive;
        default = 524288;
        description = ''
          Most open files (LimitNOFILE=): every consumer and every host is one. The relay raises its soft limit to this
          by itself.
        '';
      };
    };

    slice = mkOption {
      type = types.strMatching "[A-Za-z0-9:_.-]+[.]slice";
      default = "system-atproto.slice";
      description = ''
        Slice of control groups that the relay runs in, to give limits to it together with other services of the
        AT Protocol on the same machine.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    # Defaults: what the operator writes into the settings wins, a list as a whole.
    services.atproto-relay.settings = lib.mapAttrs (_: lib.mkDefault) {
      data_dir = cfg.stateDir;
      inherit (cfg) hosts;
      trusted_domains = cfg.trustedDomains;
      banned_domains = cfg.bannedDomains;
      log_level = cfg.logLevel;
    };

    assertions = [
      {
        assertion = cfg.settings.data_dir == cfg.stateDir;
        message = ''
          services.atproto-relay.settings.data_dir is a folder that the relay may not write to. Mount a file system at
          ${cfg.stateDir} to have the data elsewhere.
        '';
      }
      {
        assertion = config.users.users ? ${cfg.user};
        message = ''
          services.atproto-relay.user is "${cfg.user}", and users.users has no such user: the relay could not be started.
          Declare it, with isSystemUser and the group services.atproto-relay.group.
        '';
      }
      {
        assertion = config.users.groups ? ${cfg.group};
        message = ''
          services.atproto-relay.group is "${cfg.group}", and users.groups has no such group: the relay could not be
          started. Declare it.
        '';
      }
    ];

    services.atproto-relay.warnings = lib.optional (maxConsumers > mostKept) ''
      services.atproto-relay.settings.max_consumers is ${toString maxConsumers}: a restart of the relay keeps the
      connections of ${toString mostKept} consumers, and closes the others.
    '';

    users.users = lib.mkIf (cfg.user == "atproto-relay") {
      atproto-relay = {
        isSystemUser = true;
        inherit (cfg) group;
        home = cfg.stateDir;
        description = "Relay of the AT Protocol";
      };
    };
    users.groups = lib.mkIf (cfg.group == "atproto-relay") { atproto-relay = { }; };

    systemd.slices = {
      ${lib.removeSuffix ".slice" cfg.slice}.description = "Services of the AT Protocol";
    };

    systemd.services.atproto-relay = {
      description = "AT Protocol relay";
      documentation = [ "man:atproto-relay(1)" ];
      wantedBy = [ "multi-user.target" ];
      # Hosts are names: without a resolver every first attempt would fail.
      wants = [ "network-online.target" ];
      after = [ "network-online.target" ];

      # A disk or a database that comes back late must not leave the relay down for good: it tries for ever, at growing
      # intervals (RestartSteps=, RestartMaxDelaySec=).
      startLimitIntervalSec = 0;

      # An upgrade restarts, in one step: consumers wait in the descriptor store and in the sockets' queues meanwhile.
      # Stopping first and starting later would stop the sockets as well.
      stopIfChanged = false;
      restartTriggers = [ (builtins.toJSON needsRestart) ];
      reloadTriggers = [ cfg.configFile ];

      unitConfig.RequiresMountsFor = [ cfg.stateDir ];

      serviceConfig = {
        Type = "notify-reload";
        NotifyAccess = "main";
        ExecStart = "${lib.getExe cfg.package} serve --config /etc/atproto-relay/config.toml";
        User = cfg.user;
        Group = cfg.group;

        # systemd makes these and gives them to the user; storage/ adds the folders that are file systems of their own.
        StateDirectory = [ "atproto-relay" ];
        StateDirectoryMode = "0750";
        RuntimeDirectory = "atproto-relay";
        RuntimeDirectoryMode = "0750";

        LoadCredential =
          lib.optional (cfg.admin.passwordFile != null) "admin-password:${toString cfg.admin.passwordFile}"
          ++ lib.optional (cfg.database.urlFile != null) "database-url:${toString cfg.database.urlFile}";

        # Consumers' sockets and the table of their positions wait here while the relay restarts, and after a crash.
        # Eight more than consumers: the table, and sockets of consumers that have just left.
        FileDescriptorStoreMax = lib.min maxConsumers mostKept + 8;

        # The relay pings when the shards, the sequencer and the runtime have moved, not by a clock.
        WatchdogSec = 60;
        # Recovery of a long log asks for more time while it goes on (EXTEND_TIMEOUT_USEC=).
        TimeoutStartSec = 90;
        # It takes two seconds at most; what is not written by then is in the log, and recovered from it.
        TimeoutStopSec = 30;
        Restart = "always";
        RestartSec = "250ms";
        RestartSteps = 8;
        RestartMaxDelaySec = "30s";

        Slice = cfg.slice;
        CPUWeight = cfg.limits.cpuWeight;
        LimitNOFILE = cfg.limits.openFiles;
        # The relay shrinks its caches when the kernel says that memory is short.
        MemoryPressureWatch = "on";
      }
      // lib.optionalAttrs (cfg.limits.memoryHigh != null) { MemoryHigh = cfg.limits.memoryHigh; }
      // lib.optionalAttrs (cfg.limits.memoryMax != null) { MemoryMax = cfg.limits.memoryMax; };
    };
  };
}
