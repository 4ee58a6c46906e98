# Disks for the log and the database: mounts and, on request, the creation of file systems on empty devices. A device with
# any data on it is never written to; see prepare-device.sh.
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

  # The purpose of each volume, and where it is mounted.
  roles = {
    data = {
      description = "The whole folder of the relay: the log, and the database if that is SQLite";
      label = "relay-data";
      mountPoint = cfg.stateDir;
    };
    log = {
      description = "The event log. Every event waits for a sync of this disk, so it should be a separate disk";
      label = "relay-log";
      mountPoint = "${cfg.stateDir}/log";
    };
    database = {
      description = "PostgreSQL's data and its write-ahead log";
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
              Device or partition. Use a path in `/dev/disk/by-id` or `/dev/disk/by-partuuid`: names like `/dev/nvme0n1`
              can change at each boot.
            '';
          };

          fsType = mkOption {
            type = types.enum [
              "xfs"
              "ext4"
            ];
            default = "xfs";
            description = ''
              File system. XFS allocates a segment of the log in one extent, punches holes for redacted frames, and allows
              concurrent writes. Both file systems are tested. Copy-on-write file systems are not offered, because they
              turn each small synced write into several.
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
              Whether to create the file system if the device is empty. A device with a signature (a file system, a
              partition table, RAID, LVM, encryption), or with anything but zeros at its start or end, is not touched: the
              unit fails, the volume is not mounted, and the relay does not start. A device that already has this file
              system and label is mounted.
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
              When free blocks are discarded: once a week by fstrim, at each deletion, or never. Online discards compete
              with the log's writes in the drive's queue; the log deletes 128 MiB at a time.
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
              # Reads must not write to the disk.
              "noatime"
              # The relay never stores programs or devices.
              "nodev"
              "nosuid"
              "noexec"
              # A machine without its data disk must still boot, so that an operator can log in. The relay requires the
              # mount, and does not start.
              "nofail"
              "x-systemd.device-timeout=30s"
            ]
            ++ lib.optionals (config.fsType == "xfs") [
              # Log buffers of 256 KiB: concurrent synced writes share one write of the journal.
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
  # Names assigned in the order in which the kernel found the devices.
  isPassing =
    device:
    builtins.match "/dev/((nvme[0-9]+n|mmcblk|md|loop|nbd)[0-9]+(p[0-9]+)?|dm-[0-9]+|(xv|[shv])d[a-z]+[0-9]*)" device
    != null;
  # Names derived from the content of the device, which an empty one does not have.
  isFromContent = device: builtins.match "/dev/disk/by-(label|uuid)/.*" device != null;
  # With these, synced data can be missing after a power cut.
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
          Whether to tune the kernel's limits of dirty pages and, if a volume is set, the queues of the machine's NVMe
          drives. Each kernel setting is a default: a value in {option}`boot.kernel.sysctl` takes precedence.
        '';
      };

      readAheadKiB = mkOption {
        type = types.ints.between 0 65536;
        default = 256;
        description = ''
          Read-ahead of the kernel on NVMe drives, in KiB. Replays of the log request their own read-ahead; PostgreSQL
          reads single pages, which a higher value would slow down.
        '';
      };
    };

  config = lib.mkIf cfg.enable (
    lib.mkMerge [
      {
        # On the system's disk, the log leaves space for future system generations.
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

        # systemd creates these folders and sets their owner, also on a new file system.
        systemd.services.atproto-relay = {
          unitConfig.RequiresMountsFor = lib.optional (storage.log != null) roles.log.mountPoint;
          serviceConfig.StateDirectory = lib.optional (storage.log != null) "atproto-relay/log";
        };

        services.fstrim.enable = lib.mkIf (lib.any (volume: volume.discard == "weekly") (
          lib.attrValues volumes
        )) (lib.mkDefault true);

        assertions = [
          {
            assertion = lib.allUnique devices;
            message = ''
              services.atproto-relay.storage names a device twice: each volume needs its own device or partition.
            '';
          }
          {
            assertion = storage.database != null -> cfg.database.createLocally;
            message = ''
              services.atproto-relay.storage.database is a volume for PostgreSQL on this machine, but
              services.atproto-relay.database.createLocally is off. Remove the volume or set createLocally.
            '';
          }
          {
            assertion =
              storage.database != null && cfg.database.createLocally
              -> lib.hasPrefix "${roles.database.mountPoint}/" config.services.postgresql.dataDir;
            message = ''
              services.atproto-relay.storage.database is mounted at ${roles.database.mountPoint}, but
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
                  ${option}.format needs a stable device name: ${volume.device} can be another device after the next boot.
                  Use a path in /dev/disk/by-id.
                '';
              }
              {
                assertion = volume.format -> !isFromContent volume.device;
                message = ''
                  ${option}.format needs a name of the device itself: ${volume.device} exists only after a file system was
                  created. Use a path in /dev/disk/by-id.
                '';
              }
              {
                assertion = lib.stringLength volume.label <= mostLabel.${volume.fsType};
                message = ''
                  ${option}.label is too long: ${volume.fsType} allows ${
                    toString mostLabel.${volume.fsType}
                  } characters.
                '';
              }
              {
                assertion = lib.intersectLists unsafe volume.mountOptions == [ ];
                message = ''
                  ${option}.mountOptions contains ${toString (lib.intersectLists unsafe volume.mountOptions)}: after a power
                  cut, events that consumers have received would be missing on the disk. To trade durability for speed,
                  set `log.durability` instead.
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
            description = "Creation of the file system for the ${role} of the AT Protocol relay on an empty device";
            # The mount requires it (x-systemd.requires=), and fsck would fail without a file system.
            before = [
              "systemd-fsck@${device}.service"
              "shutdown.target"
            ];
            conflicts = [ "shutdown.target" ];
            bindsTo = [ "${device}.device" ];
            after = [ "${device}.device" ];
            # It runs before the file systems are mounted, and so before the default dependencies.
            unitConfig.DefaultDependencies = false;
            # A switch to another system does not restart it: stopping it would stop the mount that requires it, and with
            # the mount the relay and the database. A second run has nothing to do while the volume is mounted.
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
              # It writes only to one device.
              ProtectSystem = "strict";
              ProtectHome = true;
              PrivateNetwork = true;
              DevicePolicy = "closed";
              DeviceAllow = [ "${volume.device} rw" ];
              # For the ioctls of block devices. Root owns the device, so no permission has to be overridden.
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
        # Volumes are on dedicated NVMe drives; without volumes, the machine's drives keep their settings.
        services.udev.extraRules = lib.mkIf (volumes != { }) ''
          # NVMe drives of a machine with volumes of the AT Protocol relay: little read-ahead, and no scheduler. The device
          # of a drive with several ports has no scheduler to set.
          ACTION=="add|change", SUBSYSTEM=="block", ENV{DEVTYPE}=="disk", KERNEL=="nvme[0-9]*n[0-9]*", ATTR{queue/read_ahead_kb}="${toString storage.readAheadKiB}"
          ACTION=="add|change", SUBSYSTEM=="block", ENV{DEVTYPE}=="disk", KERNEL=="nvme[0-9]*n[0-9]*", TEST=="queue/scheduler", ATTR{queue/scheduler}="none"
        '';

        boot.kernel.sysctl = lib.mapAttrs (_: lib.mkDefault) {
          # Dirty pages of the database must not accumulate to gigabytes and delay the log's next sync: the kernel starts
          # writeback at 256 MiB and blocks writers at 1 GiB.
          "vm.dirty_background_bytes" = 268435456;
          "vm.dirty_bytes" = 1073741824;
          # The caches of the relay and of PostgreSQL should stay in memory; the kernel reclaims the page cache first.
          "vm.swappiness" = 10;
        };
      })
    ]
  );
}
