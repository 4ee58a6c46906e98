import ../scenario.nix ./.
