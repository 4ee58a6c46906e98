# The relay's unit, user and resource limits. Listeners are in sockets.nix, the sandbox in hardening.nix.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.atproto-relay;

  # The relay's default applies if the setting is null.
  maxConsumers = if cfg.settings.max_consumers == null then 1000 else cfg.settings.max_consumers;

  # Most consumers that a restart keeps connected (MAX_KEPT in src/firehose): systemd passes no more names.
  mostKept = 8000;

  # `systemctl reload` applies these settings; a change of any other one restarts the relay.
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
      It had no effect: the kernel divides a disk by weight only with the scheduler BFQ or a cost model, and NVMe drives
      use neither.
    '')
  ];

  options.services.atproto-relay = {
    enable = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether to enable a relay for the AT Protocol, with its database on the same machine. The defaults suit a machine
        with at least 8 GiB of memory. With less, lower {option}`services.atproto-relay.database.memoryMiB` and
        `settings.account_cache`.
      '';
    };

    package = lib.mkPackageOption pkgs "atproto-relay" { };

    user = mkOption {
      type = types.str;
      default = "atproto-relay";
      description = ''
        User that the relay runs as. The default user is created; another one must be declared. It is a static user
        because PostgreSQL authenticates the relay by its user name on the Unix socket.
      '';
    };

    group = mkOption {
      type = types.str;
      default = "atproto-relay";
      description = ''
        Group that the relay runs as. Its members can use the admin API through {file}`/run/atproto-relay-admin.sock`.
      '';
    };

    stateDir = mkOption {
      type = types.path;
      default = "/var/lib/atproto-relay";
      readOnly = true;
      description = ''
        Folder of the event log. To place it on another disk, mount a file system here or set
        {option}`services.atproto-relay.storage.log`.
      '';
    };

    hosts = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "pds.example.com" ];
      description = ''
        Hosts to subscribe to. Hosts stay in the database: removing one from this list does not unsubscribe it.
        `atproto-relay hosts pull` imports the host list of another relay.
      '';
    };

    trustedDomains = mkOption {
      type = types.listOf types.str;
      default = [ "*.host.bsky.network" ];
      description = ''
        Hosts with the large account quota: a name, or `*.DOMAIN` for all its subdomains. `settings.trusted_domains`
        replaces this list.
      '';
    };

    bannedDomains = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "spam.example" ];
      description = "Domains whose hosts, including those in subdomains, are never subscribed to.";
    };

    logLevel = mkOption {
      type = types.str;
      default = "info";
      example = "info,atproto_relay::upstream=debug";
      description = ''
        Level of the lines that go to the journal: error, warn, info, debug or trace, or directives for single modules.
      '';
    };

    admin.passwordFile = mkOption {
      type = types.nullOr (types.either types.path types.str);
      default = null;
      example = "/run/secrets/atproto-relay-admin";
      description = ''
        File with the password of the admin API on the public listener. systemd reads the file and passes it as a
        credential. If null, the admin API is available only on its Unix socket, protected by the mode of the socket.
      '';
    };

    limits = {
      memoryHigh = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "8G";
        description = ''
          Memory above which the kernel slows the relay down and asks it to shrink its caches (MemoryHigh=); null is no
          limit. The page cache of the log counts, so set it well above `account_cache`.
        '';
      };

      memoryMax = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "12G";
        description = "Memory above which the kernel kills the relay (MemoryMax=); null is no limit.";
      };

      cpuWeight = mkOption {
        type = types.ints.between 1 10000;
        default = 200;
        description = ''
          Share of the processor under contention (CPUWeight=); other services have 100. The relay must keep up while a
          query or a backup runs.
        '';
      };

      openFiles = mkOption {
        type = types.ints.positive;
        default = 524288;
        description = ''
          Limit of open files (LimitNOFILE=). Each consumer and each host needs one. The relay raises its soft limit to
          this value.
        '';
      };
    };

    slice = mkOption {
      type = types.strMatching "[A-Za-z0-9:_.-]+[.]slice";
      default = "system-atproto.slice";
      description = ''
        Control group slice of the relay, to limit it together with other AT Protocol services on the same machine.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    # Defaults: the operator's settings take precedence; a list replaces the whole list.
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
          services.atproto-relay.settings.data_dir is a folder that the relay cannot write to. To place the data on
          another disk, mount a file system at ${cfg.stateDir}.
        '';
      }
      {
        assertion = config.users.users ? ${cfg.user};
        message = ''
          services.atproto-relay.user is "${cfg.user}", and users.users has no such user, so the relay cannot start.
          Declare the user with isSystemUser and the group services.atproto-relay.group.
        '';
      }
      {
        assertion = config.users.groups ? ${cfg.group};
        message = ''
          services.atproto-relay.group is "${cfg.group}", and users.groups has no such group, so the relay cannot start.
          Declare the group.
        '';
      }
    ];

    services.atproto-relay.warnings = lib.optional (maxConsumers > mostKept) ''
      services.atproto-relay.settings.max_consumers is ${toString maxConsumers}: a restart of the relay keeps the
      connections of ${toString mostKept} consumers and closes the others.
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
      # Host names must resolve: without DNS every first attempt fails.
      wants = [ "network-online.target" ];
      after = [ "network-online.target" ];

      # A disk or a database that is unavailable for long must not keep the relay down: systemd retries without limit, at
      # growing intervals (RestartSteps=, RestartMaxDelaySec=).
      startLimitIntervalSec = 0;

      # An upgrade restarts in one step: meanwhile consumers' sockets are in the descriptor store, and new connections wait
      # in the listeners' queues. Stopping first and starting later would also stop the listeners.
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

        # systemd creates these folders for the user; storage/ adds those that are separate file systems.
        StateDirectory = [ "atproto-relay" ];
        StateDirectoryMode = "0750";
        RuntimeDirectory = "atproto-relay";
        RuntimeDirectoryMode = "0750";

        LoadCredential =
          lib.optional (cfg.admin.passwordFile != null) "admin-password:${toString cfg.admin.passwordFile}"
          ++ lib.optional (cfg.database.urlFile != null) "database-url:${toString cfg.database.urlFile}";

        # Consumers' sockets and the table of their positions are stored here during a restart and after a crash. Eight
        # more than consumers: for the table, and for sockets of consumers that have just disconnected.
        FileDescriptorStoreMax = lib.min maxConsumers mostKept + 8;

        # The relay pings only when the shards, the sequencer and the runtime make progress.
        WatchdogSec = 60;
        # Recovery of a long log extends this time while it makes progress (EXTEND_TIMEOUT_USEC=).
        TimeoutStartSec = 90;
        # The relay stops within two seconds; database writes that are pending then are recovered from the log.
        TimeoutStopSec = 30;
        Restart = "always";
        RestartSec = "250ms";
        RestartSteps = 8;
        RestartMaxDelaySec = "30s";

        Slice = cfg.slice;
        CPUWeight = cfg.limits.cpuWeight;
        LimitNOFILE = cfg.limits.openFiles;
        # The relay shrinks its caches when the kernel reports memory pressure.
        MemoryPressureWatch = "on";
      }
      // lib.optionalAttrs (cfg.limits.memoryHigh != null) { MemoryHigh = cfg.limits.memoryHigh; }
      // lib.optionalAttrs (cfg.limits.memoryMax != null) { MemoryMax = cfg.limits.memoryMax; };
    };
  };
}
