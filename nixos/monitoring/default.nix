{ lib, ... }:
{
  options.services.atproto-relay.monitoring.grafana.secretKeyFile = lib.mkOption {
    type = lib.types.nullOr (lib.types.either lib.types.path lib.types.str);
    default = null;
    description = "File with the key.";
  };
}
