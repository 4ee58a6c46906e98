# The relay, or with `devnet` the devnet beside it. The crates contain their C sources (ring, libsecp256k1, SQLite), so
# that only the C library of the system is linked.
{
  lib,
  stdenv,
  rustPlatform,
  installShellFiles,
  devnet ? false,
}:

let
  manifest = (lib.importTOML ../Cargo.toml).package;
  name = if devnet then "atproto-devnet" else "atproto-relay";
in
rustPlatform.buildRustPackage {
  pname = name;
  inherit (manifest) version;

  # Only what cargo reads: a change of the module or of the README rebuilds nothing.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../src
      ../migrations
      # The relay serves these pages.
      ../docs
      # Named in Cargo.toml, so cargo requires them.
      ../benches
      ../tests
    ];
  };

  # The lock file has no git sources, so no hashes are needed.
  cargoLock.lockFile = ../Cargo.lock;

  buildNoDefaultFeatures = !devnet;
  cargoBuildFlags = [
    "--bin"
    name
  ];

  # The profile with link-time optimisation.
  buildType = "dist";
  nativeBuildInputs = [ installShellFiles ];

  # The tests need the devnet and take long: the flake's check `tests` runs them.
  doCheck = false;

  postInstall = lib.optionalString (!devnet && stdenv.buildPlatform.canExecute stdenv.hostPlatform) ''
    mkdir pages
    $out/bin/atproto-relay man --out-dir pages
    installManPage pages/*
    installShellCompletion --cmd atproto-relay \
      --bash <($out/bin/atproto-relay completions bash) \
      --fish <($out/bin/atproto-relay completions fish) \
      --zsh <($out/bin/atproto-relay completions zsh)
  '';

  meta = {
    description =
      if devnet then
        "A whole AT Protocol network in one process, for tests: PLC directory, PDSes, load, faults"
      else
        manifest.description;
    license = [
      lib.licenses.mit
      lib.licenses.asl20
    ];
    mainProgram = name;
    platforms = lib.platforms.linux;
  };
}
