# The relay, or with `devnet` the devnet beside it. The crates bring their C sources along (ring, libsecp256k1,
# SQLite), so that nothing of the system is linked but the C library.
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

  # What cargo reads, and no more: a change of the module or of the README builds nothing anew.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../src
      ../migrations
      # Named in Cargo.toml: cargo wants to find them.
      ../benches
      ../tests
    ];
  };

  # The lock file has no git sources, so it is all that is needed.
  cargoLock.lockFile = ../Cargo.lock;

  buildNoDefaultFeatures = !devnet;
  cargoBuildFlags = [
    "--bin"
    name
  ];

  # The profile that is optimised across crates.
  buildType = "dist";
  nativeBuildInputs = [ installShellFiles ];

  # The tests need the devnet, and half an hour: the flake's check `tests` runs them.
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
