# The relay's configuration file. Its known keys are typed from settings.json, which a test of the relay writes from its
# own table of settings; a key that this module does not know yet passes as it is, and the relay judges it.
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

  # By what stands for the value in the relay's --help.
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
  # Where that says too little.
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

        Where it is null, the relay's own default holds: ${setting.default}.
      '';
    };

  known = lib.foldl' (
    options: setting:
    lib.recursiveUpdate options (lib.setAttrByPath (lib.splitString "." setting.key) (option setting))
  ) { } (lib.importJSON ./settings.json);

  # Tables of the file are submodules too, so that an unknown key in one passes as well.
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

  # What is null is not written, nor a table in which everything is.
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
        The relay's configuration file, as its README lists it. `atproto-relay check-config` shows what it comes to.
        No secret belongs here: the file is in the Nix store, which everybody on the machine may read.
      '';
    };

    configFile = mkOption {
      type = types.path;
      internal = true;
      readOnly = true;
      description = "The file that {option}`services.atproto-relay.settings` comes to.";
    };
  };

  config = lib.mkIf cfg.enable {
    services.atproto-relay.configFile = format.generate "atproto-relay.toml" (
      written (cfg.settings // cfg.listeners)
    );

    # What this module lets pass, the relay judges: a word that it does not know fails the build, not the start.
    system.checks = lib.optional (pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform) (
      pkgs.runCommand "atproto-relay-check-config" { } ''
        ${lib.getExe cfg.package} check-config --config ${cfg.configFile} >$out
      ''
    );

    # At a fixed place, so that a reload finds the new file under the old name, and so that
    # `atproto-relay check-config --config /etc/atproto-relay/config.toml` is what the service reads.
    environment.etc."atproto-relay/config.toml".source = cfg.configFile;
  };
}
