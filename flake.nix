# The relay as a flake: packages, manual, container image, a NixOS module for the whole machine, and checks. One input.
{
  description = "A relay for the AT Protocol: subscribes to every PDS, verifies every event, emits one firehose";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];

      packagesFor = system: nixpkgs.legacyPackages.${system}.extend self.overlays.default;
      eachSystem = make: lib.genAttrs systems (system: make (packagesFor system));

      # Every folder of vm-tests/ that has a test.nix is a test.
      vmTests =
        let
          folder = ./vm-tests;
          entries = lib.optionalAttrs (builtins.pathExists folder) (builtins.readDir folder);
          isTest = name: kind: kind == "directory" && builtins.pathExists (folder + "/${name}/test.nix");
        in
        lib.attrNames (lib.filterAttrs isTest entries);

      vmTest =
        pkgs: name:
        pkgs.testers.runNixOSTest (
          import (./vm-tests + "/${name}/test.nix") {
            relayModule = self.nixosModules.default;
            devnet = pkgs.atproto-devnet;
          }
        );
    in
    {
      overlays.default = final: _previous: {
        atproto-relay = final.callPackage ./nixos/package.nix { };
        atproto-devnet = final.callPackage ./nixos/package.nix { devnet = true; };
      };

      packages = eachSystem (pkgs: {
        inherit (pkgs) atproto-relay atproto-devnet;
        default = pkgs.atproto-relay;
        container = pkgs.callPackage ./nixos/container.nix { };

        # The manual as a book of static pages.
        docs = pkgs.runCommand "atproto-relay-docs" { nativeBuildInputs = [ pkgs.mdbook ]; } ''
          mdbook build ${./docs} --dest-dir $out
        '';
      });

      nixosModules = {
        default = self.nixosModules.atproto-relay;
        atproto-relay = {
          _class = "nixos";
          # Importing the module twice, also under its two names, counts once.
          key = "${self}#nixosModules.atproto-relay";
          imports = [
            ./nixos
            (
              { pkgs, ... }:
              {
                # No overlay is needed on the machine. Another package can be set as usual.
                services.atproto-relay.package =
                  lib.mkDefault
                    self.packages.${pkgs.stdenv.hostPlatform.system}.atproto-relay;
              }
            )
          ];
        };
      };

      apps = eachSystem (
        pkgs:
        let
          app = name: package: command: description: {
            type = "app";
            program = lib.getExe (
              pkgs.writeShellApplication {
                inherit name;
                text = ''exec ${lib.getExe package} ${command} "$@"'';
              }
            );
            meta = { inherit description; };
          };
        in
        {
          default =
            app "atproto-relay-serve" pkgs.atproto-relay "serve"
              "The relay with its data in ./data: `nix run . -- --host pds.example.com`";
          demo =
            app "atproto-demo" pkgs.atproto-devnet "demo"
              "A PLC directory, three PDSes with traffic, and the relay; Ctrl-C ends it";
        }
      );

      checks = eachSystem (
        pkgs:
        {
          package = pkgs.atproto-relay;

          # All tests, including those that need PostgreSQL or the devnet.
          tests = pkgs.atproto-devnet.overrideAttrs (previous: {
            pname = "atproto-relay-tests";
            # Some tests compare documents, the module's settings and the seeds of the fuzz targets with the code.
            src = lib.cleanSource ./.;
            doCheck = true;
            # The profile of `cargo test`: link-time optimisation would take longer than the tests.
            cargoBuildType = "debug";
            cargoCheckType = "debug";
            nativeCheckInputs = (previous.nativeCheckInputs or [ ]) ++ [ pkgs.postgresql ];
          });

          clippy = pkgs.atproto-devnet.overrideAttrs (previous: {
            pname = "atproto-relay-clippy";
            src = lib.cleanSource ./.;
            nativeBuildInputs = previous.nativeBuildInputs ++ [ pkgs.clippy ];
            buildPhase = "cargo clippy --offline --locked --all-targets -- --deny warnings";
            installPhase = "touch $out";
            postInstall = "";
          });

          # The module imported under both of its names, as a configuration of several files can do.
          imports =
            let
              machine = lib.nixosSystem {
                modules = lib.attrValues self.nixosModules ++ [
                  {
                    nixpkgs.hostPlatform = pkgs.stdenv.hostPlatform.system;
                    services.atproto-relay.enable = true;
                  }
                ];
              };
            in
            pkgs.writeText "atproto-relay-imports" "${machine.config.services.atproto-relay.package}";

          # The module evaluated with this nixpkgs: renderings equal to the committed ones, refusals, option descriptions.
          module = import ./nixos/rendering/check.nix { inherit nixpkgs pkgs; };
        }
        // lib.listToAttrs (map (name: lib.nameValuePair "vm-${name}" (vmTest pkgs name)) vmTests)
      );

      devShells = eachSystem (pkgs: {
        default = pkgs.mkShell {
          inputsFrom = [ pkgs.atproto-devnet ];
          packages = [
            pkgs.cargo-fuzz
            pkgs.clippy
            pkgs.deadnix
            pkgs.jq
            pkgs.mdbook
            pkgs.nixfmt
            pkgs.postgresql
            pkgs.prometheus.cli
            pkgs.rust-analyzer
            pkgs.rustfmt
            pkgs.shellcheck
          ];
        };
      });

      formatter = eachSystem (pkgs: pkgs.nixfmt-tree);
    };
}
