# The relay's configuration file. Known keys have types from settings.json, which a test generates from the relay's table
# of settings. Unknown keys are passed on, and the relay checks them.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.atproto-relay;
  format = pkgs.formats.toml { };

  size =
    types.either types.ints.unsigned (types.strMatching "[0-9]+([.][0-9]*)? *(([kKmMgGtT][iI]?)?[bB])?")
    // {
      description = "size, in bytes or with a unit as in \"64GiB\"";
    };
  time = types.strMatching "([0-9]+([.][0-9]+)?(ms|s|m|h|d|w))+" // {
    description = "time with a unit, as in \"90s\" or \"72h\"";
  };
  rate = types.numbers.nonnegative;
  domain = types.strMatching "([*][.])?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?" // {
    description = "domain, or *.DOMAIN for all below it";
  };

  # Types by the placeholder of the value in the relay's --help.
  typeOf = {
    "" = types.bool;
    ADDRESS = types.str;
    BOOL = types.bool;
    COUNT = types.ints.unsigned;
    DOMAIN = domain;
    FOLDER = types.path;
    HOST = types.str;
    LEVEL = types.str;
    RATE = rate;
    SIZE = size;
    TIME = time;
    URL = types.str;
  };
  # Settings whose placeholder is not specific enough.
  typeOfKey = {
    "log.durability" = types.enum [
      "sync"
      "interval"
      "none"
    ];
    "log.min_free_bytes" = types.either (types.enum [
      "auto"
      "shared"
    ]) size;
    log_format = types.enum [
      "text"
      "json"
    ];
    validation = types.enum [
      "strict"
      "ratchet"
      "lenient"
    ];
  };

  option =
    setting:
    let
      one = typeOfKey.${setting.key} or typeOf.${setting.placeholder};
    in
    mkOption {
      type = types.nullOr (if setting.list then types.listOf one else one);
      default = null;
      description = ''
        ${setting.help}.

        If null, the relay's default applies: ${setting.default}.
      '';
    };

  known = lib.foldl' (
    options: setting:
    lib.recursiveUpdate options (lib.setAttrByPath (lib.splitString "." setting.key) (option setting))
  ) { } (lib.importJSON ./settings.json);

  # Tables of the file are submodules too, so that they accept unknown keys.
  submodule =
    options:
    types.submodule {
      freeformType = format.type;
      options = lib.mapAttrs (
        _: entry:
        if lib.isOption entry then
          entry
        else
          mkOption {
            type = submodule entry;
            default = { };
            description = "Table of the configuration file.";
          }
      ) options;
    };

  # Null values and empty tables are not written.
  written =
    settings:
    lib.filterAttrs (_: value: value != null && value != { }) (
      lib.mapAttrs (_: value: if lib.isAttrs value then written value else value) settings
    );
in
{
  options.services.atproto-relay = {
    settings = mkOption {
      type = submodule known;
      default = { };
      example = lib.literalExpression ''
        {
          replay_window = "48h";
          log.max_bytes = "500GB";
          limits.events_per_second = 100;
        }
      '';
      description = ''
        The relay's configuration file; the manual lists all settings. `atproto-relay check-config` shows the result.
        Do not put secrets here: the file is in the Nix store, which every user of the machine can read.
      '';
    };

    configFile = mkOption {
      type = types.path;
      internal = true;
      readOnly = true;
      description = "The file generated from {option}`services.atproto-relay.settings`.";
    };
  };

  config = lib.mkIf cfg.enable {
    services.atproto-relay.configFile = format.generate "atproto-relay.toml" (
      written (cfg.settings // cfg.listeners)
    );

    # The relay checks the file at build time, so that an unknown key fails the build and not the start.
    system.checks = lib.optional (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) (
      pkgs.runCommand "atproto-relay-check-config" { } ''
        ${lib.getExe cfg.package} check-config --config ${cfg.configFile} >$out
      ''
    );

    # At a fixed path, so that a reload finds the new file under the same name, and so that
    # `atproto-relay check-config --config /etc/atproto-relay/config.toml` reads the service's file.
    environment.etc."atproto-relay/config.toml".source = cfg.configFile;
  };
}
