# Where the relay keeps hosts, accounts and bans: in a PostgreSQL on the same machine, in one elsewhere, or with neither
# in SQLite beside the log. The log is the truth, the database a view of it: what the last seconds before a power cut
# wrote may be missing, and is written again from the log.
{
  config,
  lib,
  ...
}:

let
  inherit (lib) mkDefault mkOption types;

  cfg = config.services.atproto-relay;
  database = cfg.database;
  memory = database.memoryMiB;

  # A part of the memory, between two bounds; PostgreSQL writes MiB as MB.
  part =
    divisor: least: most:
    "${toString (lib.max least (lib.min most (memory / divisor)))}MB";

  # The relay's own default, where the settings are silent.
  connections =
    if cfg.settings.database_connections == null then 12 else cfg.settings.database_connections;

  server = config.services.postgresql;
  localUrl = "postgres:///${database.name}?host=/run/postgresql&port=${toString server.settings.port}&user=${database.name}";
in
{
  options.services.atproto-relay.database = {
    createLocally = mkOption {
      type = types.bool;
      default = database.urlFile == null;
      defaultText = lib.literalExpression "config.services.atproto-relay.database.urlFile == null";
      description = ''
        Whether to run PostgreSQL on this machine, with a role and a database for the relay. The relay reaches it
        through its Unix socket, and is known there by its user: there is no password.

        With this off and no {option}`services.atproto-relay.database.urlFile` the relay keeps an SQLite database beside
        its log, which will do for some hundred thousand accounts.
      '';
    };

    name = mkOption {
      type = types.str;
      default = "atproto-relay";
      readOnly = true;
      description = "Database and role on this machine.";
    };

    urlFile = mkOption {
      type = types.nullOr (types.either types.path types.str);
      default = null;
      example = "/run/secrets/atproto-relay-database-url";
      description = ''
        File with the URL of a PostgreSQL database elsewhere, `postgres://USER:PASSWORD@HOST/NAME?sslmode=verify-full`,
        read by systemd and passed on as a credential.
      '';
    };

    tune = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether to give PostgreSQL the settings that suit the relay, from
        {option}`services.atproto-relay.database.memoryMiB`. Each of them is a default: what is set in
        {option}`services.postgresql.settings` wins. PostgreSQL has one value of each for all databases of the machine:
        none of these makes the data of another database less safe.
      '';
    };

    memoryMiB = mkOption {
      type = types.ints.between 512 (4 * 1024 * 1024);
      default = 4096;
      example = 16384;
      description = ''
        Memory of the machine that is PostgreSQL's, in MiB: a quarter of it for its own buffers, the rest for its
        sessions and the page cache of its files. Half of the machine's memory is a good value where the relay has the
        other half.
      '';
    };
  };

  config = lib.mkIf cfg.enable (
    lib.mkMerge [
      (lib.mkIf database.createLocally {
        services.postgresql = {
          enable = true;
          ensureDatabases = [ database.name ];
          ensureUsers = [
            {
              inherit (database) name;
              ensureDBOwnership = true;
            }
          ];
          # The role has the name of the database, the user may have another one.
          authentication = ''
            local ${database.name} ${database.name} peer map=atproto-relay
          '';
          identMap = ''
            atproto-relay ${cfg.user} ${database.name}
          '';
        };

        services.atproto-relay.settings.database_url = mkDefault localUrl;

        services.atproto-relay.warnings =
          lib.optional
            (cfg.settings.database_url != localUrl && !lib.hasInfix "/run/postgresql" cfg.settings.database_url)
            ''
              services.atproto-relay.settings.database_url names a database elsewhere, and PostgreSQL is set up on this
              machine all the same. Set services.atproto-relay.database.createLocally = false.
            '';

        # The target is reached when the role and the database are there, and not just the server. `wants`, not
        # `requires`: a relay that runs goes on while its database is away, so that stopping PostgreSQL must not stop it
        # (and would not for long: the next connection to the relay's sockets would start both); and one that could not
        # start because PostgreSQL took too long tries again, which a failed requirement would forbid.
        systemd.services.atproto-relay = {
          wants = [ "postgresql.target" ];
          after = [ "postgresql.target" ];
        };
      })

      (lib.mkIf (database.createLocally && database.tune) {
        services.postgresql.settings = lib.mapAttrs (_: mkDefault) {
          # The relay's own connections, and some for the exporter, backups and people.
          max_connections = connections + 60;

          # Memory. The table of accounts is hit all over; what is not in these buffers should be in the page cache.
          shared_buffers = part 4 128 32768;
          effective_cache_size = "${toString (memory * 3 / 4)}MB";
          # For vacuum and for building indexes, one at a time.
          maintenance_work_mem = part 16 64 2048;
          # The relay's statements sort nothing; this is for the page of hosts, and for people.
          work_mem = "16MB";
          # Fewer entries in the processor's tables of pages, where the machine has huge pages to give.
          huge_pages = "try";

          # The relay itself decides for each write whether the commit waits for the disk (synchronous_commit), so that
          # other databases keep what they have.
          # The log of PostgreSQL itself stays safe against half-written pages, and small.
          full_page_writes = true;
          wal_compression = true;

          # A hot table of upserts writes the same pages again and again: the rarer the checkpoints, the fewer whole pages
          # go to the log. Recovery after a crash takes longer, but within a minute on NVMe.
          checkpoint_timeout = "15min";
          checkpoint_completion_target = 0.9;
          max_wal_size = part 1 1024 16384;
          min_wal_size = part 4 256 2048;

          # NVMe: a random page costs nearly what the next one does, and many may be asked for at once.
          random_page_cost = 1.1;
          effective_io_concurrency = 200;

          # Every event of an account leaves a dead row behind. By the defaults, vacuum would wait for a fifth of the table
          # to be dead, and then crawl; here it comes often, does little each time, and may use what the disk can do.
          autovacuum_naptime = "15s";
          autovacuum_max_workers = 4;
          autovacuum_vacuum_scale_factor = 0.02;
          autovacuum_vacuum_insert_scale_factor = 0.05;
          autovacuum_analyze_scale_factor = 0.02;
          autovacuum_vacuum_cost_delay = "1ms";
          autovacuum_vacuum_cost_limit = 2000;

          # What an operator asks first when the database is slow.
          track_io_timing = true;
          log_checkpoints = true;
          log_lock_waits = true;
          log_autovacuum_min_duration = "10s";
        };
      })
    ]
  );
}
