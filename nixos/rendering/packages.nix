# Stand-ins for the packages that a configuration uses, so that evaluation alone can render it: nothing is built or fetched,
# and a rendering does not depend on the versions of packages. A package has the path /nix/store/000…-NAME; a generated file
# keeps its text. With a whole nixpkgs, the other attributes of a stand-in are those of the real package, because modules
# read them.
{
  lib,
  # The packages of a whole nixpkgs, or none.
  whole ? { },
}:

let
  store = "/nix/store/${lib.concatStrings (lib.genList (_: "0") 32)}-";

  derivation =
    name: more:
    lib.fix (
      self:
      {
        type = "derivation";
        inherit name;
        pname = name;
        version = "0";
        system = "x86_64-linux";
        outPath = store + name;
        drvPath = store + name + ".drv";
        outputName = "out";
        outputs = [ "out" ];
        out = self;
        override = _: self;
        overrideAttrs = _: self;
        meta = {
          mainProgram = name;
          available = true;
          priority = 5;
        };
        passthru = { };
      }
      // lib.genAttrs [
        "bin"
        "dev"
        "lib"
        "man"
        "doc"
        "cli"
      ] (_: self)
      // more
    );
  package = name: derivation name { };

  # A package of the whole nixpkgs, with all paths replaced.
  replaced =
    name:
    let
      real = whole.${name};
      standIn = package name;
      outputs = lib.genAttrs (real.outputs or [ "out" ] ++ kept) (_: self);
      kept = [
        "bin"
        "dev"
        "lib"
        "man"
        "cli"
      ];
      self =
        real
        // outputs
        // {
          inherit (standIn) outPath drvPath;
          out = self;
          override = _: self;
          overrideAttrs = _: self;
          # The program's name is part of a rendering.
          meta = real.meta or { } // {
            mainProgram = real.meta.mainProgram or name;
          };
        };
    in
    self;
  standIn = name: if whole ? ${name} then replaced name else package name;

  # A file with this text.
  file = name: text: derivation name { inherit text; };
  generate =
    print: name: value:
    file name (print value);

  # The part of TOML that the settings use: tables with values that JSON writes the same way.
  toml =
    let
      isTable = value: lib.isAttrs value;
      line = key: value: "${key} = ${builtins.toJSON value}\n";
      table =
        path: attrs:
        lib.optionalString (path != [ ]) "[${lib.concatStringsSep "." path}]\n"
        + lib.concatStrings (lib.mapAttrsToList line (lib.filterAttrs (_: value: !isTable value) attrs))
        + lib.concatStrings (
          lib.mapAttrsToList (key: value: "\n" + table (path ++ [ key ]) value) (
            lib.filterAttrs (_: isTable) attrs
          )
        );
    in
    table [ ];

  atom = lib.types.nullOr (
    lib.types.oneOf [
      lib.types.bool
      lib.types.int
      lib.types.float
      lib.types.str
      lib.types.path
    ]
  );
  value =
    lib.types.oneOf [
      atom
      (lib.types.attrsOf value)
      (lib.types.listOf value)
    ]
    // {
      description = "value of the format";
    };
  format = print: _: {
    type = value;
    generate = generate print;
  };
  # JSON is valid YAML.
  json = format builtins.toJSON;

  platform = lib.systems.elaborate "x86_64-linux";

  named = lib.genAttrs [
    "kexec-tools"
    "fish"
    "xonsh"
    "zsh"
    "glibcLocales"
    "mailcap"
    "acl"
    "attr"
    "bash"
    "bashInteractive"
    "bzip2"
    "caddy"
    "coreutils"
    "coreutils-full"
    "cpio"
    "curl"
    "dbus"
    "diffutils"
    "dosfstools"
    "e2fsprogs"
    "findutils"
    "gawk"
    "getent"
    "glibc"
    "gnugrep"
    "gnused"
    "gnutar"
    "gzip"
    "jq"
    "kmod"
    "less"
    "libcap"
    "linux-pam"
    "nano"
    "ncurses"
    "netcat-openbsd"
    "openresty"
    "tengine"
    "nix"
    "openssh"
    "perl"
    "procps"
    "prometheus"
    "prometheus-node-exporter"
    "prometheus-postgres-exporter"
    "grafana"
    "rsync"
    "shadow"
    "strace"
    "su"
    "sudo"
    "systemd"
    "systemdMinimal"
    "time"
    "tzdata"
    "udev"
    "util-linux"
    "which"
    "xfsprogs"
    "xz"
    "zstd"
  ] standIn;
  # NixOS reads nginx' modules and PostgreSQL's schema version.
  nginx = lib.genAttrs [ "nginx" "nginxStable" ] (
    name: if whole ? ${name} then standIn name else derivation name { modules = [ ]; }
  );
  postgresql =
    lib.genAttrs
      [
        "postgresql_14"
        "postgresql_15"
        "postgresql_16"
        "postgresql_17"
      ]
      (
        name:
        if whole ? ${name} then
          standIn name
        else
          derivation name { psqlSchema = lib.removePrefix "postgresql_" name; }
      );
  # Packages that the whole nixpkgs does not have.
  added = lib.genAttrs [
    "atproto-relay"
    "atproto-devnet"
  ] package;
  # What the evaluation of NixOS needs if there is no whole nixpkgs.
  base = {
    inherit lib;
    _type = "pkgs";
    config = { };
    overlays = [ ];
    __splicedPackages = packages;
    system = "x86_64-linux";
    path = "/nixpkgs";
    stdenv = platform // {
      hostPlatform = platform;
      buildPlatform = platform;
      targetPlatform = platform;
      cc = package "cc";
    };
    linuxPackages = lib.fix (self: {
      extend = _: self;
      kernel = derivation "linux" {
        version = "6.12";
        modDirVersion = "6.12";
        features = { };
        config = { };
        configfile = package "linux-config";
        isModular = true;
      };
    });
  };
  generated = {
    # Overlays change packages, which a rendering does not have.
    appendOverlays = _: packages;
    runtimeShell = "${store}bash/bin/bash";
    writeText = file;
    writeTextDir = path: text: file (baseNameOf path) text;
    writeTextFile = { name, text, ... }: file name text;
    writeScript = file;
    writeShellScript = name: text: file name text;
    writeScriptBin = file;
    writeShellScriptBin = file;
    writeShellApplication = { name, ... }: package name;
    runCommand =
      name: _: _:
      package name;
    runCommandLocal =
      name: _: _:
      package name;
    symlinkJoin = { name, ... }: package name;
    buildEnv = { name, ... }: package name;
    formats = whole.formats or { } // {
      inherit json;
      toml = format toml;
      yaml = json;
      ini = json;
      keyValue = json;
    };
  };
  packages = base // whole // named // nginx // postgresql // added // generated;
in
packages
