# Empty NVMe devices get their file systems once, are mounted with the module's options, and survive a reboot; a
# device with data on it is left unchanged.

LOG = "/var/lib/atproto-relay/log"
DATABASE = "/var/lib/postgresql"
LOG_DEVICE = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_relay-log"


def mounted(path, field):
    return relay.succeed(f"findmnt --noheadings --output {field} --mountpoint {path}").strip()


def uuid(path):
    return relay.succeed(
        f"blkid --probe --output value --match-tag UUID $(findmnt --noheadings --output SOURCE {path})"
    )


relay.start(allow_reboot=True)

with subtest("the empty devices have file systems, and are mounted"):
    relay.wait_for_unit("atproto-relay.service")
    assert mounted(LOG, "FSTYPE") == "xfs"
    assert mounted(DATABASE, "FSTYPE") == "ext4"

with subtest("with the options of the module"):
    for path in [LOG, DATABASE]:
        options = mounted(path, "OPTIONS").split(",")
        for option in ["noatime", "nodev", "nosuid", "noexec"]:
            assert option in options, (path, options)

with subtest("the relay and the database have their data there"):
    relay.succeed(f"find {LOG} -type f | grep .")
    relay.succeed(f"find {DATABASE} -name PG_VERSION | grep .")
    assert relay.succeed(f"stat --format=%U {LOG}").strip() == "atproto-relay"

with subtest("udev has set the devices' scheduler and read-ahead"):
    device = relay.succeed(f"basename $(readlink --canonicalize {LOG_DEVICE})").strip()
    assert relay.succeed(f"cat /sys/block/{device}/queue/read_ahead_kb").strip() == "256"
    # The scheduler belongs to the device or, where the kernel takes a drive for one of several ports, to its path.
    path = "c*n".join(device.rsplit("n", 1))
    assert "[none]" in relay.execute(f"cat /sys/block/{device}/queue/scheduler /sys/block/{path}/queue/scheduler")[1]
    # Where the module's rules are; udev would name a line that it could not follow.
    assert "99-local.rules" not in relay.succeed("journalctl --no-pager --boot --unit=systemd-udevd.service")

with subtest("a reboot formats nothing: the file systems and their content are the same"):
    before = (uuid(LOG), uuid(DATABASE))
    relay.succeed(f"touch {LOG}/kept && sync")
    relay.reboot()
    relay.wait_for_unit("atproto-relay.service")
    assert (uuid(LOG), uuid(DATABASE)) == before
    relay.succeed(f"test -e {LOG}/kept")

with subtest("a device with data is refused and left unchanged"):
    relay.succeed("systemctl stop atproto-relay.service", f"umount {LOG}", "systemctl stop atproto-relay-prepare-log")
    relay.succeed(f"wipefs --all --quiet {LOG_DEVICE}")
    relay.succeed(f"blkdiscard --force {LOG_DEVICE} || dd if=/dev/zero of={LOG_DEVICE} bs=1M count=64 conv=fsync")
    relay.succeed(f"echo somebody\\'s data | dd of={LOG_DEVICE} conv=notrunc,fsync")
    relay.fail("systemctl start atproto-relay-prepare-log.service")
    assert "left unchanged" in relay.succeed("journalctl --no-pager --unit=atproto-relay-prepare-log.service")
    relay.succeed(f"head --bytes=14 {LOG_DEVICE} | grep --quiet somebody")
    relay.fail(f"findmnt --mountpoint {LOG}")
