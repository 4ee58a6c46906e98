# What is refused before anything is built, each with what to do about it: secrets that everybody could read, and options
# that say two things; and what is warned of.
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

  # A path literal is copied into the store as soon as something names it; a string in the store is there already.
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
          services.atproto-relay.${option} is a file in the Nix store, which everybody on the machine may read. Name one
          outside of it as a string, as in "/run/secrets/atproto-relay".
        '';
      }) secrets
      ++ [
        {
          assertion = cfg.settings.database_url == null || !hasPassword cfg.settings.database_url;
          message = ''
            services.atproto-relay.settings.database_url has a password in it, and the file of the settings is in the Nix
            store, which everybody on the machine may read. Write the URL into a file outside of it and name that with
            services.atproto-relay.database.urlFile.
          '';
        }
        {
          assertion = !(cfg.settings ? admin_password_file);
          message = ''
            services.atproto-relay.settings.admin_password_file cannot be read by the relay's user. Set
            services.atproto-relay.admin.passwordFile: systemd reads it, and passes it on as a credential.
          '';
        }
        {
          assertion = cfg.limits.openFiles >= consumers + 1024;
          message = ''
            services.atproto-relay.limits.openFiles is too low for ${toString consumers} consumers: allow ${toString (consumers + 1024)} or more, for hosts and files too.
          '';
        }
        {
          assertion = !(cfg.database.createLocally && cfg.database.urlFile != null);
          message = ''
            services.atproto-relay.database.createLocally and services.atproto-relay.database.urlFile contradict each
            other: the database is either on this machine or elsewhere.
          '';
        }
        {
          assertion = cfg.database.urlFile == null || cfg.settings.database_url == null;
          message = ''
            services.atproto-relay.database.urlFile and services.atproto-relay.settings.database_url both name a database.
            Set one of them.
          '';
        }
      ];
  };
}
