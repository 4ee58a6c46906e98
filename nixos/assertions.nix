# Configurations that are refused before anything is built: secrets that every user could read, and options that
# contradict each other. Each message says what to do. Also the module's warnings.
{
  config,
  lib,
  ...
}:

let
  cfg = config.services.atproto-relay;

  secrets = {
    "admin.passwordFile" = cfg.admin.passwordFile;
    "database.urlFile" = cfg.database.urlFile;
    "monitoring.grafana.secretKeyFile" = cfg.monitoring.grafana.secretKeyFile;
  };

  # A path literal is copied into the store when something refers to it; a string may name a file already there.
  inStore = file: builtins.isPath file || lib.hasPrefix builtins.storeDir (toString file);
  consumers = if cfg.settings.max_consumers == null then 1000 else cfg.settings.max_consumers;
  hasPassword = url: builtins.match "[^:]+://[^/@]*:[^/@]*@.*" url != null;
in
{
  options.services.atproto-relay.warnings = lib.mkOption {
    type = lib.types.listOf lib.types.str;
    internal = true;
    default = [ ];
    description = "Warnings of this module.";
  };

  config = lib.mkIf cfg.enable {
    inherit (cfg) warnings;

    assertions =
      lib.mapAttrsToList (option: file: {
        assertion = file == null || !inStore file;
        message = ''
          services.atproto-relay.${option} is a file in the Nix store, which every user of the machine can read. Give
          the path of a file outside the store as a string, for example "/run/secrets/atproto-relay".
        '';
      }) secrets
      ++ [
        {
          assertion = cfg.settings.database_url == null || !hasPassword cfg.settings.database_url;
          message = ''
            services.atproto-relay.settings.database_url contains a password, and the settings are written to the Nix
            store, which every user of the machine can read. Write the URL to a file outside the store and set
            services.atproto-relay.database.urlFile to its path.
          '';
        }
        {
          assertion = !(cfg.settings ? admin_password_file);
          message = ''
            services.atproto-relay.settings.admin_password_file cannot be read by the relay's user. Set
            services.atproto-relay.admin.passwordFile: systemd reads the file and passes it as a credential.
          '';
        }
        {
          assertion = cfg.limits.openFiles >= consumers + 1024;
          message = ''
            services.atproto-relay.limits.openFiles is too low for ${toString consumers} consumers: set ${toString (consumers + 1024)} or more, which includes hosts and files.
          '';
        }
        {
          assertion = !(cfg.database.createLocally && cfg.database.urlFile != null);
          message = ''
            services.atproto-relay.database.createLocally and services.atproto-relay.database.urlFile contradict each
            other: set one of them. The database is either on this machine or on another one.
          '';
        }
        {
          assertion = cfg.database.urlFile == null || cfg.settings.database_url == null;
          message = ''
            services.atproto-relay.database.urlFile and services.atproto-relay.settings.database_url both name a database:
            set one of them.
          '';
        }
      ];
  };
}
