# Disks for the log, the mirror and the database: how they are mounted, and made a file system on if that is asked for.
# Devices alone are never written to; see prepare-device.sh.
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:

let
  inherit (lib) mkOption types;

  cfg = config.services.atproto-relay;
  storage = cfg.storage;

  # What each volume is for, and where it belongs.
  roles = {
    data = {
      description = "The whole folder of the relay: log, mirror, and SQLite where that is the database";
      label = "relay-data";
      mountPoint = cfg.stateDir;
    };
    log = {
      description = "The event log. Every event waits for this disk, so it should be one of its own";
      label = "relay-log";
      mountPoint = "${cfg.stateDir}/log";
    };
    mirror = {
      description = "The mirror of repositories: large, and read at random";
      label = "relay-mirror";
      mountPoint = "${cfg.stateDir}/mirror";
    };
    database = {
      description = "PostgreSQL's data and its own log";
      label = "relay-db";
      mountPoint = "/var/lib/postgresql";
    };
  };
  volumes = lib.filterAttrs (_: volume: volume != null) (lib.getAttrs (lib.attrNames roles) storage);

  prepareDevice = pkgs.writeShellScript "atproto-relay-prepare-device" (
    builtins.readFile ./prepare-device.sh
  );
  prepareUnit = role: "atproto-relay-prepare-${role}.service";
  formatted = lib.filterAttrs (_: volume: volume.format) volumes;

  volumeOptions =
    role:
    types.submodule (
      { config, ... }:
      {
        options = {
          device = mkOption {
            type = types.strMatching "/dev/.+";
            example = "/dev/disk/by-id/nvme-SAMSUNG_MZQL23T8HCLS-00A07_S64HNE0T500123";
            description = ''
              Device or partition. Name it by `/dev/disk/by-id` or `/dev/disk/by-partuuid`: names as `/dev/nvme0n1` are
              given anew at each boot.
            '';
          };

          fsType = mkOption {
            type = types.enum [
              "xfs"
              "ext4"
            ];
            default = "xfs";
            description = ''
              File system. XFS reserves a segment of the log in one piece, punches redacted frames out of it, and lets
              several threads write to it at once. Both are tested; copy-on-write file systems are not offered, because
              each small synced write would be several there.
            '';
          };

          label = mkOption {
            type = types.strMatching "[A-Za-z0-9._-]+";
            default = roles.${role}.label;
            description = "Label of the file system, at most 12 characters with XFS and 16 with ext4.";
          };

          format = mkOption {
            type = types.bool;
            default = false;
            description = ''
              Whether to make the file system if the device is empty. A device that bears any signature (a file system, a
              partition table, RAID, LVM, encryption), or anything but zeros where data begins and ends, is left as it
              is: the unit fails, the volume is not mounted, and the relay does not start. A volume that has the file
              system and the label named here is mounted as it is.
            '';
          };

          discard = mkOption {
            type = types.enum [
              "weekly"
              "online"
              "never"
            ];
            default = "weekly";
            description = ''
              How the drive learns what is free: by fstrim once a week; at each deletion; or never. Online discards stand
              in the drive's queue between the log's writes, and the log deletes 128 MiB at a time.
            '';
          };

          mountOptions = mkOption {
            type = types.listOf types.str;
            default = [ ];
            description = "Mount options in addition to those that the module sets.";
          };

          mountPoint = mkOption {
            type = types.path;
            default = roles.${role}.mountPoint;
            readOnly = true;
            description = "Where the volume is mounted.";
          };

          options = mkOption {
            type = types.listOf types.str;
            internal = true;
            readOnly = true;
            description = "All mount options.";
            default = [
              # Reading an event must not write to the disk.
              "noatime"
              # The relay never stores programs or devices.
              "nodev"
              "nosuid"
              "noexec"
              # A machine whose data disk is missing must still come up, so that somebody can look at it. The relay
              # requires the mount, and stays down.
              "nofail"
              "x-systemd.device-timeout=30s"
            ]
            ++ lib.optionals (config.fsType == "xfs") [
              # Log buffers of 256 KiB: synced writes of several threads share one write of the journal.
              "logbsize=256k"
            ]
            ++ lib.optional (config.discard == "online") "discard"
            ++ lib.optional config.format "x-systemd.requires=${prepareUnit role}"
            ++ config.mountOptions;
          };
        };
      }
    );

  devices = lib.mapAttrsToList (_: volume: volume.device) volumes;
  mostLabel = {
    xfs = 12;
    ext4 = 16;
  };
  # Names that are given in the order in which the kernel found the devices.
  isPassing =
    device:
    builtins.match "/dev/((nvme[0-9]+n|mmcblk|md|loop|nbd)[0-9]+(p[0-9]+)?|dm-[0-9]+|(xv|[shv])d[a-z]+[0-9]*)" device
    != null;
  # Names that come from what is on the device, so that an empty one has none.
  isFromContent = device: builtins.match "/dev/disk/by-(label|uuid)/.*" device != null;
  # With these, what was synced is not on the disk.
  unsafe = [
    "nobarrier"
    "barrier=0"
    "data=writeback"
    "norecovery"
    "noload"
  ];
in
{
  options.services.atproto-relay.storage =
    lib.mapAttrs (
      role:
      { description, mountPoint, ... }:
      mkOption {
        type = types.nullOr (volumeOptions role);
        default = null;
        description = "${description}. Mounted at {file}`${mountPoint}`.";
      }
    ) roles
    // {
      volumes = mkOption {
        type = types.listOf types.raw;
        internal = true;
        readOnly = true;
        default = lib.attrValues volumes;
        defaultText = lib.literalMD "the volumes that are set";
        description = "The volumes that are set.";
      };

      prepareDevice = mkOption {
        type = types.package;
        internal = true;
        readOnly = true;
        default = prepareDevice;
        defaultText = lib.literalMD "prepare-device.sh";
        description = "Program that makes a file system on an empty device.";
      };

      tune = mkOption {
        type = types.bool;
        default = true;
        description = ''
          Whether to set the kernel's limits of unwritten data and, where a volume is set, the queues of the machine's
          NVMe drives. Each kernel setting is a default: what is set in {option}`boot.kernel.sysctl` wins.
        '';
      };

      readAheadKiB = mkOption {
        type = types.ints.between 0 65536;
        default = 256;
        description = ''
          How far the kernel reads ahead on NVMe drives, in KiB. Replays read the log in long stretches and ask for them
          themselves; PostgreSQL reads single pages, for which more would be wasted.
        '';
      };
    };

  config = lib.mkIf cfg.enable (
    lib.mkMerge [
      {
        # Where the log is on the disk of the system, the next versions of the system need room beside it.
        services.atproto-relay.settings.log.min_free_bytes = lib.mkIf (
          storage.data == null
          && storage.log == null
          && !(config.fileSystems ? ${roles.data.mountPoint})
          && !(config.fileSystems ? ${roles.log.mountPoint})
        ) (lib.mkDefault "shared");

        fileSystems = lib.mapAttrs' (
          _: volume:
          lib.nameValuePair volume.mountPoint {
            inherit (volume) device fsType options;
          }
        ) volumes;

        # The file system of a volume has its owner from the first start on, because systemd makes what is named here.
        systemd.services.atproto-relay = {
          unitConfig.RequiresMountsFor =
            lib.optional (storage.log != null) roles.log.mountPoint
            ++ lib.optional (storage.mirror != null) roles.mirror.mountPoint;
          serviceConfig.StateDirectory =
            lib.optional (storage.log != null) "atproto-relay/log"
            ++ lib.optional (storage.mirror != null) "atproto-relay/mirror";
        };

        services.fstrim.enable = lib.mkIf (lib.any (volume: volume.discard == "weekly") (
          lib.attrValues volumes
        )) (lib.mkDefault true);

        assertions = [
          {
            assertion = lib.allUnique devices;
            message = ''
              services.atproto-relay.storage names a device twice: each volume needs a device or a partition of its own.
            '';
          }
          {
            assertion = storage.database != null -> cfg.database.createLocally;
            message = ''
              services.atproto-relay.storage.database is a volume for PostgreSQL on this machine, and
              services.atproto-relay.database.createLocally is off.
            '';
          }
          {
            assertion =
              storage.database != null && cfg.database.createLocally
              -> lib.hasPrefix "${roles.database.mountPoint}/" config.services.postgresql.dataDir;
            message = ''
              services.atproto-relay.storage.database is mounted at ${roles.database.mountPoint}, and
              services.postgresql.dataDir is ${config.services.postgresql.dataDir}: the database would not be on that
              volume.
            '';
          }
        ]
        ++ lib.concatLists (
          lib.mapAttrsToList (
            role: volume:
            let
              option = "services.atproto-relay.storage.${role}";
            in
            [
              {
                assertion = volume.format -> !isPassing volume.device;
                message = ''
                  ${option}.format needs a name that stays with the device: ${volume.device} may be another one after the
                  next boot. Take one of /dev/disk/by-id.
                '';
              }
              {
                assertion = volume.format -> !isFromContent volume.device;
                message = ''
                  ${option}.format needs a name of the device itself: ${volume.device} exists only once there is a file
                  system. Take one of /dev/disk/by-id.
                '';
              }
              {
                assertion = lib.stringLength volume.label <= mostLabel.${volume.fsType};
                message = ''
                  ${option}.label is too long: ${volume.fsType} takes ${
                    toString mostLabel.${volume.fsType}
                  } characters.
                '';
              }
              {
                assertion = lib.intersectLists unsafe volume.mountOptions == [ ];
                message = ''
                  ${option}.mountOptions has ${toString (lib.intersectLists unsafe volume.mountOptions)}: events that
                  consumers have seen would not be on the disk after a power cut. Relax `log.durability` instead, which
                  knows what it loses.
                '';
              }
            ]
          ) volumes
        );
      }

      (lib.mkIf (formatted != { }) {
        systemd.services = lib.mapAttrs' (
          role: volume:
          let
            device = utils.escapeSystemdPath volume.device;
          in
          lib.nameValuePair (lib.removeSuffix ".service" (prepareUnit role)) {
            description = "File system for the ${role} of the AT Protocol relay, if the device is empty";
            # The mount requires it (x-systemd.requires=), and a check of what is not there yet would fail.
            before = [
              "systemd-fsck@${device}.service"
              "shutdown.target"
            ];
            conflicts = [ "shutdown.target" ];
            bindsTo = [ "${device}.device" ];
            after = [ "${device}.device" ];
            # It runs before the file systems are mounted, and so before everything that services wait for.
            unitConfig.DefaultDependencies = false;
            # A switch to another system leaves it alone. Stopping it would stop the mount that requires it, and with that
            # the relay and the database; there is nothing that a second run could do while the volume is mounted.
            restartIfChanged = false;
            path = [
              # cmp
              pkgs.diffutils
              # blkid, blockdev, wipefs
              pkgs.util-linux
              pkgs.${if volume.fsType == "xfs" then "xfsprogs" else "e2fsprogs"}
            ];
            serviceConfig = {
              Type = "oneshot";
              RemainAfterExit = true;
              ExecStart = utils.escapeSystemdExecArgs [
                prepareDevice
                volume.device
                volume.fsType
                volume.label
              ];
              # It writes to one device, and to nothing else.
              ProtectSystem = "strict";
              ProtectHome = true;
              PrivateNetwork = true;
              DevicePolicy = "closed";
              DeviceAllow = [ "${volume.device} rw" ];
              # For the ioctls of block devices. The device is root's, so that no permission has to be overridden.
              CapabilityBoundingSet = [ "CAP_SYS_ADMIN" ];
              IPAddressDeny = "any";
              KeyringMode = "private";
              PrivateMounts = true;
              PrivateTmp = true;
              ProtectClock = true;
              ProtectProc = "invisible";
              RemoveIPC = true;
              SystemCallFilter = [
                "@system-service"
                "~@resources"
              ];
              SystemCallErrorNumber = "EPERM";
              NoNewPrivileges = true;
              LockPersonality = true;
              MemoryDenyWriteExecute = true;
              ProtectControlGroups = true;
              ProtectHostname = true;
              ProtectKernelLogs = true;
              ProtectKernelModules = true;
              ProtectKernelTunables = true;
              RestrictAddressFamilies = "none";
              RestrictNamespaces = true;
              RestrictRealtime = true;
              RestrictSUIDSGID = true;
              SystemCallArchitectures = "native";
              UMask = "0077";
            };
          }
        ) formatted;
      })

      (lib.mkIf storage.tune {
        # A volume has an NVMe drive of its own; without one, the drives of the machine are left as they are.
        services.udev.extraRules = lib.mkIf (volumes != { }) ''
          # NVMe drives of a machine with volumes of the AT Protocol relay: the kernel reads ahead by little, and the drive
          # orders its queues itself. A drive with several ports is a device without a scheduler.
          ACTION=="add|change", SUBSYSTEM=="block", ENV{DEVTYPE}=="disk", KERNEL=="nvme[0-9]*n[0-9]*", ATTR{queue/read_ahead_kb}="${toString storage.readAheadKiB}"
          ACTION=="add|change", SUBSYSTEM=="block", ENV{DEVTYPE}=="disk", KERNEL=="nvme[0-9]*n[0-9]*", TEST=="queue/scheduler", ATTR{queue/scheduler}="none"
        '';

        boot.kernel.sysctl = lib.mapAttrs (_: lib.mkDefault) {
          # Unwritten data of the database must not pile up to gigabytes and then stand before the log's next sync: the
          # kernel begins to write it at 256 MiB, and makes the writer wait at 1 GiB.
          "vm.dirty_background_bytes" = 268435456;
          "vm.dirty_bytes" = 1073741824;
          # The caches of the relay and of PostgreSQL are there to be in memory; the page cache goes first.
          "vm.swappiness" = 10;
        };
      })
    ]
  );
}
