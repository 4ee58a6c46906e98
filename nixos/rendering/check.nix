# The same as nixos/check for the flake's checks, evaluated with the flake's nixpkgs: it builds only if everything holds.
{ nixpkgs, pkgs }:

let
  inherit (nixpkgs) lib;
  result = import ./. { nixpkgs = nixpkgs.outPath; };

  isJson = path: lib.hasSuffix ".json" path || lib.hasSuffix "/prometheus.yml" path;
  # Lines that NixOS adds to every unit, which depend on its version.
  isOurs =
    line:
    builtins.match ''Environment="(LOCALE_ARCHIVE|TZDIR)=.*|X-(Restart|Reload)-Triggers=.*|'' line
    == null;
  read =
    path: text:
    if isJson path then
      builtins.fromJSON text
    else if lib.hasPrefix "units/" path then
      lib.filter isOurs (lib.splitString "\n" text)
    else
      text;

  folder = configuration: ../expected + "/${configuration}";
  committed =
    configuration:
    map (file: lib.removePrefix (toString (folder configuration) + "/") (toString file)) (
      lib.filesystem.listFilesRecursive (folder configuration)
    );
  differs =
    configuration: files: path:
    !(files ? ${path})
    || !lib.elem path (committed configuration)
    || read path files.${path} != read path (builtins.readFile (folder configuration + "/${path}"));

  different = lib.concatLists (
    lib.mapAttrsToList (
      configuration: files:
      map (path: "${configuration}/${path}") (
        lib.filter (differs configuration files) (
          lib.unique (lib.attrNames files ++ committed configuration)
        )
      )
    ) result.rendered
  );
  accepted = lib.attrNames (
    lib.filterAttrs (
      _: case: (builtins.tryEval (builtins.deepSeq case.rendered true)).success
    ) result.refused
  );
  wrong = lib.concatLists (
    lib.mapAttrsToList (name: map (problem: "${name}: ${problem}")) result.accepted
  );
in
assert lib.assertMsg (different == [ ])
  "The module renders differently from nixos/expected: ${toString different}. NIXPKGS=… nixos/check --write updates it.";
assert lib.assertMsg (
  accepted == [ ]
) "Configurations that must be refused are accepted: ${toString accepted}";
assert lib.assertMsg (
  result.undocumented == [ ]
) "Options without a description: ${toString result.undocumented}";
assert lib.assertMsg (
  wrong == [ ]
) "Accepted configurations render wrongly: ${lib.concatStringsSep "; " wrong}";
assert lib.assertMsg result.reloads
  "A change of a live setting restarts the relay, or a change of another setting does not";
builtins.deepSeq result.machines (pkgs.runCommand "atproto-relay-module" { } "touch $out")
