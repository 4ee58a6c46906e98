# Renders the module's results as text, for the configurations of this folder. Needs the tree of a nixpkgs, of which lib and
# nixos are enough; packages are stand-ins (packages.nix). nixos/check compares the result with nixos/expected.
{ nixpkgs }:

let
  lib = import (nixpkgs + "/lib");
  # A whole nixpkgs has the package attributes that its modules read.
  whole = lib.optionalAttrs (builtins.pathExists (nixpkgs + "/pkgs/top-level")) (
    import nixpkgs {
      system = "x86_64-linux";
      config = { };
      overlays = [ ];
    }
  );
  pkgs = import ./packages.nix { inherit lib whole; };

  evaluate =
    configuration:
    evaluateModules [
      configuration
      {
        fileSystems."/" = {
          device = "/dev/disk/by-label/nixos";
          fsType = "ext4";
        };
      }
    ];
  evaluateModules =
    modules:
    import (nixpkgs + "/nixos/lib/eval-config.nix") {
      inherit lib;
      system = null;
      modules = modules ++ [
        ../.
        {
          nixpkgs.pkgs = pkgs;
          nixpkgs.hostPlatform = "x86_64-linux";
          system.stateVersion = "24.05";
          networking.hostName = "relay";
          boot.loader.grub.enable = false;
          # Required for nginx' certificates.
          security.acme.acceptTerms = true;
          security.acme.defaults.email = "operator@example.com";
          # These parts of NixOS read more of a package than its name.
          documentation.enable = false;
          environment.stub-ld.enable = false;
          # promtool and nginx cannot check stand-ins.
          services.prometheus.checkConfig = false;
          services.nginx.validateConfigFile = false;
        }
      ];
    };

  # The module's definitions of an option that NixOS also defines, because the definitions of NixOS change with its version.
  ours =
    option:
    lib.filter (
      definition:
      lib.hasPrefix (toString ../. + "/") (toString definition.file)
      && !lib.hasPrefix (toString ./.) (toString definition.file)
    ) option.definitionsWithLocations;
  ourNames = option: lib.concatMap (definition: lib.attrNames definition.value) (ours option);
  ourPart =
    option: value:
    let
      isSet = definition: lib.isAttrs definition && !(definition ? _type);
      part =
        value:
        lib.mapAttrs (
          name: definition: if isSet definition then part value.${name} definition else value.${name}
        );
    in
    lib.foldl' lib.recursiveUpdate { } (map (definition: part value definition.value) (ours option));
  linesThat =
    select: text:
    lib.concatMapStrings (line: line + "\n") (lib.filter select (lib.splitString "\n" text));
  ourLines = linesThat (lib.hasInfix "atproto-relay");

  file =
    path: text:
    lib.optionalAttrs (text != "") {
      ${path} = text;
    };
  lines =
    line: attrs: lib.concatStrings (lib.mapAttrsToList (name: value: line name value + "\n") attrs);

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

  # The relay's part of nginx' configuration, from the options; NixOS adds the rest.
  nginx =
    config: domain:
    let
      inherit (config.services) nginx;
      host = nginx.virtualHosts.${domain};
      location =
        name: location:
        "location ${name} {\n"
        + lib.optionalString (location.proxyPass != null) "proxy_pass ${location.proxyPass};\n"
        + lib.optionalString location.proxyWebsockets ''
          proxy_http_version 1.1;
          proxy_set_header Upgrade $http_upgrade;
          proxy_set_header Connection $connection_upgrade;
        ''
        + lib.optionalString location.recommendedProxySettings ''
          proxy_set_header Host $host;
          proxy_set_header X-Real-IP $remote_addr;
          proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
          proxy_set_header X-Forwarded-Proto $scheme;
          proxy_set_header X-Forwarded-Host $host;
          proxy_set_header X-Forwarded-Server $hostname;
        ''
        + lib.optionalString (location.return != null) "return ${toString location.return};\n"
        + location.extraConfig
        + "}\n";
    in
    {
      "nginx/service.conf" =
        "[Service]\nLimitNOFILE=${toString config.systemd.services.nginx.serviceConfig.LimitNOFILE}\n";
      "nginx/events.conf" = nginx.eventsConfig;
      "nginx/append.conf" = nginx.appendConfig;
      "nginx/locations.conf" = lib.concatStrings (lib.mapAttrsToList location host.locations);
    };

  # The files of a configuration's machine, by their path in nixos/expected/<configuration>.
  render =
    evaluated:
    let
      inherit (evaluated) config options;

      failed = lib.filter (entry: !entry.assertion) config.assertions;

      units = lib.mapAttrs' (name: unit: lib.nameValuePair "units/${name}" unit.text) (
        lib.filterAttrs (name: _: lib.hasInfix "atproto" name) config.systemd.units
      );
      etc =
        path: as:
        lib.optionalAttrs (config.environment.etc ? ${path}) {
          "etc/${as}" = config.environment.etc.${path}.source.text;
        };
      relay = config.services.atproto-relay;

      # Prometheus' configuration with only our rules: some versions of NixOS add an empty file.
      prometheus =
        let
          written = builtins.fromJSON config.environment.etc."prometheus/prometheus.yaml".source.text;
        in
        builtins.toJSON (
          written // { rule_files = lib.filter (lib.hasInfix "atproto-relay") written.rule_files; }
        );

      # Files that units and settings refer to by store path.
      stored = derivation: { "store/${baseNameOf (toString derivation)}" = derivation.text; };
      isVolume = line: lib.any (path: lib.hasInfix " ${path} " line) (ourNames options.fileSystems);
    in
    if failed != [ ] then
      throw (lib.concatMapStringsSep "\n" (entry: entry.message) failed)
    else
      units
      // etc "atproto-relay/config.toml" "atproto-relay/config.toml"
      // lib.optionalAttrs relay.enable (stored relay.command)
      // lib.optionalAttrs (relay.bootstrap.relays != [ ]) (stored relay.bootstrapScript)
      // lib.optionalAttrs (relay.proxy.server == "nginx") (nginx config relay.proxy.domain)
      // file "etc/fstab" (linesThat isVolume config.environment.etc.fstab.text)
      // lib.optionalAttrs (lib.any (volume: volume != null && volume.format) relay.storage.volumes) (
        stored relay.storage.prepareDevice
      )
      // file "etc/udev/rules.d/99-local.rules" (
        lib.concatMapStrings (definition: definition.value) (ours options.services.udev.extraRules)
      )
      // lib.optionalAttrs (relay.proxy.server == "caddy") (
        file "Caddyfile" (
          lib.concatStrings (
            lib.mapAttrsToList (
              name: host: "${name} {\n${host.extraConfig}}\n"
            ) config.services.caddy.virtualHosts
          )
        )
      )
      // lib.optionalAttrs relay.monitoring.enable (
        file "etc/prometheus.yml" prometheus
        // stored relay.monitoring.rules
        // lib.optionalAttrs relay.monitoring.grafana.enable {
          "grafana/dashboard.json" = relay.monitoring.dashboard.text;
          "grafana/settings.json" = builtins.toJSON (
            ourPart options.services.grafana.settings config.services.grafana.settings
          );
        }
      )
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

  # Further text that a case can check.
  asides =
    config:
    {
      # One word per line.
      command = lib.replaceStrings [ " " "'" ] [ "\n" "" ] config.services.atproto-relay.command.text;
    }
    // lib.optionalAttrs config.services.grafana.enable (
      let
        inherit (config.services) grafana;
        source =
          source: "${source.name}: ${source.uid}${lib.optionalString source.isDefault ", the default"}";
      in
      {
        "grafana/secret-key" = grafana.settings.security.secret_key;
        "grafana/preStart" = config.systemd.services.grafana.preStart;
        "grafana/data-sources" =
          lib.concatMapStringsSep "\n" source
            grafana.provision.datasources.settings.datasources;
        "grafana/anonymous" = lib.boolToString grafana.settings."auth.anonymous".enabled;
      }
    )
    // lib.optionalAttrs config.services.prometheus.enable {
      "prometheus/jobs" = lib.concatMapStringsSep "\n" (
        job: job.job_name
      ) config.services.prometheus.scrapeConfigs;
    };

  configurations = lib.genAttrs [
    "minimal"
    "appliance"
    "caddy"
    "external-database"
    "nginx"
  ] (name: ./configurations + "/${name}.nix");

  enabled = relay: {
    services.atproto-relay = {
      enable = true;
    }
    // relay;
  };
  # `relay` are the relay's options, `machine` those of NixOS.
  evaluateCase =
    case:
    evaluate {
      imports = [
        (enabled case.relay)
        (case.machine or { })
      ];
    };
in
{
  rendered = lib.mapAttrs (_: configuration: render (evaluate configuration)) configurations;

  # Options of the module without a description.
  undocumented = map (option: option.name) (
    lib.filter (option: !option.internal && !(option ? description)) (
      lib.optionAttrSetToDocList (evaluate ./configurations/minimal.nix).options.services.atproto-relay
    )
  );

  # The machines of the VM tests, evaluated: the number of rendered files of each.
  machines =
    let
      folder = ../../vm-tests;
      isTest = name: kind: kind == "directory" && builtins.pathExists (folder + "/${name}/test.nix");
      scenarios = lib.attrNames (lib.filterAttrs isTest (builtins.readDir folder));
      test =
        name:
        import (folder + "/${name}/test.nix") {
          # `evaluateModules` imports it.
          relayModule = { };
          devnet = pkgs.atproto-devnet;
        } { inherit lib pkgs; };
      machine =
        module:
        let
          evaluated = evaluateModules [
            module
            (nixpkgs + "/nixos/modules/virtualisation/qemu-vm.nix")
          ];
          inherit (evaluated.config) fileSystems services;
          isMounted = volume: fileSystems.${volume.mountPoint}.device or null == volume.device;
        in
        # A test's machine mounts only `virtualisation.fileSystems`.
        assert lib.assertMsg (lib.all isMounted services.atproto-relay.storage.volumes)
          "a machine of the VM tests does not mount its volumes";
        let
          rendered = render evaluated;
        in
        # Forces all values, because evaluation can fail in each of them.
        builtins.deepSeq rendered (lib.length (lib.attrNames rendered));
    in
    lib.genAttrs scenarios (name: lib.mapAttrs (_: machine) (test name).nodes);

  # A change of a live setting does not restart the relay; a change of any other setting does.
  reloads =
    let
      triggers =
        settings:
        (evaluate (enabled {
          inherit settings;
        })).config.systemd.services.atproto-relay.restartTriggers;
    in
    triggers {
      limits.accounts = 500;
      replay_window = "24h";
    } == triggers { }
    && triggers { log.durability = "none"; } != triggers { };

  # Each must evaluate and contain the expected lines; the result is a list of problems in words.
  accepted = lib.mapAttrs (
    _: case:
    let
      evaluated = evaluateCase case;
      rendered = render evaluated;
      lacking = path: line: ''${path} has no "${line}"'';
      files = rendered // asides evaluated.config;
      text = path: files.${path} or "";
      wrong =
        map (path: "${path} is not rendered") (
          lib.filter (path: !(files ? ${path})) (lib.attrNames (case.has or { }))
        )
        ++ lib.concatLists (
          lib.mapAttrsToList (
            path: expected:
            map (lacking path) (lib.filter (line: !lib.elem line (lib.splitString "\n" (text path))) expected)
          ) (case.has or { })
        )
        ++ lib.concatLists (
          lib.mapAttrsToList (
            path: strange:
            map (part: ''${path} has "${part}"'') (lib.filter (part: lib.hasInfix part (text path)) strange)
          ) (case.lacks or { })
        );
      warnings = map (lib.replaceStrings [ "\n" ] [ " " ]) (
        evaluated.config.services.atproto-relay.warnings
      );
      warns = case.warns or [ ];
      isSaid = warning: lib.any (words: lib.hasInfix words warning) warns;
    in
    builtins.deepSeq rendered (
      wrong
      ++ lib.optional (
        lib.length warnings != lib.length warns || !lib.all isSaid warnings
      ) "warns of: ${toString warnings}"
    )
  ) (import ./accepted.nix);

  # Each must fail with these words.
  refused = lib.mapAttrs (_: case: {
    inherit (case) message;
    rendered = render (evaluateCase case);
  }) (import ./refusals.nix);
}
