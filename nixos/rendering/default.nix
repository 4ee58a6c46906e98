# What the module comes to, as text, for the configurations of this folder. It takes the tree of a nixpkgs, of which only
# lib and nixos are read; packages are stand-ins (packages.nix). nixos/check compares the result with nixos/expected.
{ nixpkgs }:

let
  lib = import (nixpkgs + "/lib");
  pkgs = import ./packages.nix { inherit lib; };

  evaluate =
    configuration:
    import (nixpkgs + "/nixos/lib/eval-config.nix") {
      inherit lib;
      system = null;
      modules = [
        ../.
        configuration
        {
          nixpkgs.pkgs = pkgs;
          nixpkgs.hostPlatform = "x86_64-linux";
          system.stateVersion = "24.05";
          boot.loader.grub.enable = false;
          fileSystems."/" = {
            device = "/dev/disk/by-label/nixos";
            fsType = "ext4";
          };
          # Parts of a NixOS that need more of a package than a name.
          documentation.enable = false;
          environment.stub-ld.enable = false;
          # promtool cannot look at a stand-in.
          services.prometheus.checkConfig = false;
        }
      ];
    };

  # What this module defines in an option that others define as well: theirs changes with the version of nixpkgs.
  ours = option: lib.filter (definition: lib.hasPrefix (toString ../.) (toString definition.file)) option.definitionsWithLocations;
  ourNames = option: lib.concatMap (definition: lib.attrNames definition.value) (ours option);
  ourPart = option: value: lib.getAttrs (lib.unique (ourNames option)) value;
  ourLines =
    text:
    lib.concatMapStrings (line: line + "\n") (
      lib.filter (lib.hasInfix "atproto-relay") (lib.splitString "\n" text)
    );

  file =
    path: text:
    lib.optionalAttrs (text != "") {
      ${path} = text;
    };
  lines = line: attrs: lib.concatStrings (lib.mapAttrsToList (name: value: line name value + "\n") attrs);

  postgresqlValue =
    value:
    if value == true then
      "yes"
    else if value == false then
      "no"
    else if lib.isString value then
      "'${value}'"
    else
      toString value;

  # The files that the machine of a configuration would have, by their path in nixos/expected/<configuration>.
  render =
    configuration:
    let
      inherit (evaluate configuration) config options;

      failed = lib.filter (entry: !entry.assertion) config.assertions;

      units = lib.mapAttrs' (name: unit: lib.nameValuePair "units/${name}" unit.text) (
        lib.filterAttrs (name: _: lib.hasInfix "atproto" name) config.systemd.units
      );
      etc =
        path:
        lib.optionalAttrs (config.environment.etc ? ${path}) {
          "etc/${path}" = config.environment.etc.${path}.source.text;
        };
    in
    if failed != [ ] then
      throw (lib.concatMapStringsSep "\n" (entry: entry.message) failed)
    else
      units
      // etc "atproto-relay/config.toml"
      // file "etc/sysctl.d/60-nixos.conf" (
        lines (name: value: "${name}=${toString value}") (
          ourPart options.boot.kernel.sysctl config.boot.kernel.sysctl
        )
      )
      // lib.optionalAttrs config.services.postgresql.enable (
        file "postgresql.conf" (
          lines (name: value: "${name} = ${postgresqlValue value}") (
            ourPart options.services.postgresql.settings config.services.postgresql.settings
          )
        )
        // file "pg_hba.conf" (ourLines config.services.postgresql.authentication)
        // file "pg_ident.conf" (ourLines config.services.postgresql.identMap)
      );

  configurations = lib.genAttrs [
    "minimal"
    "appliance"
    "external-database"
  ] (name: ./configurations + "/${name}.nix");
in
{
  rendered = lib.mapAttrs (_: render) configurations;
}
