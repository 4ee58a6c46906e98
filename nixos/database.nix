# The database of hosts, accounts and bans: PostgreSQL on this machine, PostgreSQL on another one, or SQLite beside the
# log. The log is authoritative: writes of the last seconds before a power cut are repeated from it.
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

  # A fraction of the memory, between two bounds; PostgreSQL writes MiB as MB.
  part =
    divisor: least: most:
    "${toString (lib.max least (lib.min most (memory / divisor)))}MB";

  # The relay's default applies if the setting is null.
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
        Whether to run PostgreSQL on this machine, with a role and a database for the relay. The relay connects through
        the Unix socket and is authenticated by its user, without a password.

        If this is off and {option}`services.atproto-relay.database.urlFile` is null, the relay uses an SQLite database
        beside its log, which suits some hundred thousand accounts.
      '';
    };

    name = mkOption {
      type = types.str;
      default = "atproto-relay";
      readOnly = true;
      description = "Name of the database and of the role on this machine.";
    };

    urlFile = mkOption {
      type = types.nullOr (types.either types.path types.str);
      default = null;
      example = "/run/secrets/atproto-relay-database-url";
      description = ''
        File with the URL of a PostgreSQL database on another machine,
        `postgres://USER:PASSWORD@HOST/NAME?sslmode=verify-full`. systemd reads the file and passes it as a credential.
      '';
    };

    tune = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether to tune PostgreSQL for the relay, based on {option}`services.atproto-relay.database.memoryMiB`. Each
        setting is a default: a value in {option}`services.postgresql.settings` takes precedence. The settings apply to
        all databases of the machine; none of them reduces the durability of another database.
      '';
    };

    memoryMiB = mkOption {
      type = types.ints.between 512 (4 * 1024 * 1024);
      default = 4096;
      example = 16384;
      description = ''
        Memory for PostgreSQL in MiB: a quarter of it for shared buffers, the rest for sessions and the page cache. Half
        of the machine's memory is a good value if PostgreSQL and the relay share the machine.
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
          # The role is named like the database; the system user can have another name.
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
              services.atproto-relay.settings.database_url names a database on another machine, but PostgreSQL is set up
              on this machine as well. Set services.atproto-relay.database.createLocally = false.
            '';

        # The target includes the creation of the role and the database. `wants` instead of `requires`: a running relay
        # continues while its database is unavailable, so stopping PostgreSQL must not stop the relay (the next connection
        # to its sockets would start both again). A relay that could not start because PostgreSQL was too slow retries,
        # which a failed requirement would prevent.
        systemd.services.atproto-relay = {
          wants = [ "postgresql.target" ];
          after = [ "postgresql.target" ];
        };
      })

      (lib.mkIf (database.createLocally && database.tune) {
        services.postgresql.settings = lib.mapAttrs (_: mkDefault) {
          # The relay's connections, and some for the exporter, backups and people.
          max_connections = connections + 60;

          # Accesses to the accounts table are random: pages outside these buffers should be in the page cache.
          shared_buffers = part 4 128 32768;
          effective_cache_size = "${toString (memory * 3 / 4)}MB";
          # For vacuum and index builds, one at a time.
          maintenance_work_mem = part 16 64 2048;
          # The relay's statements do not sort; this is for lists of hosts and for people.
          work_mem = "16MB";
          # Fewer page table entries, if the machine has huge pages.
          huge_pages = "try";

          # The relay sets synchronous_commit for each of its writes, so that other databases keep their setting.
          # The write-ahead log stays safe against torn pages, and small.
          full_page_writes = true;
          wal_compression = true;

          # Upserts rewrite the same pages: with fewer checkpoints, fewer full pages go to the write-ahead log. Recovery
          # after a crash takes longer, but less than a minute on NVMe.
          checkpoint_timeout = "15min";
          checkpoint_completion_target = 0.9;
          max_wal_size = part 1 1024 16384;
          min_wal_size = part 4 256 2048;

          # NVMe: random reads cost little more than sequential ones, and many can be in flight.
          random_page_cost = 1.1;
          effective_io_concurrency = 200;

          # Every event of an account leaves a dead row. By default, vacuum waits until a fifth of the table is dead and is
          # throttled; here it runs often, does little each time, and uses the speed of the disk.
          autovacuum_naptime = "15s";
          autovacuum_max_workers = 4;
          autovacuum_vacuum_scale_factor = 0.02;
          autovacuum_vacuum_insert_scale_factor = 0.05;
          autovacuum_analyze_scale_factor = 0.02;
          autovacuum_vacuum_cost_delay = "1ms";
          autovacuum_vacuum_cost_limit = 2000;

          # The first questions when the database is slow.
          track_io_timing = true;
          log_checkpoints = true;
          log_lock_waits = true;
          log_autovacuum_min_duration = "10s";
        };
      })
    ]
  );
}
