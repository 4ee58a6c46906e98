"""The guest: Debian trixie with systemd, PostgreSQL and Prometheus, built once and kept in the cache.

Its key is a hash over everything it is made of, so that a change builds a new one and drops the old.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

SUITE = "trixie"
MIRROR = os.environ.get("VM_TESTS_MIRROR", "http://deb.debian.org/debian")
PACKAGES = [
    "systemd", "systemd-sysv", "udev", "dbus", "kmod", "procps", "iproute2", "netcat-openbsd", "curl", "jq",
    "ca-certificates", "e2fsprogs", "xfsprogs", "initramfs-tools", "busybox", "linux-image-cloud-amd64", "postgresql",
    "prometheus", "prometheus-node-exporter", "prometheus-postgres-exporter", "caddy", "nginx-light",
]  # fmt: skip
# What Debian starts by itself and no test wants; each test enables what it needs.
UNWANTED = [
    "postgresql.service", "prometheus.service", "prometheus-node-exporter.service",
    "prometheus-postgres-exporter.service", "caddy.service", "nginx.service", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer",
    "e2scrub_all.timer", "e2scrub_reap.service", "xfs_scrub_all.timer", "fstrim.timer", "systemd-pstore.service",
]  # fmt: skip
MASKED = [
    "serial-getty@hvc0.service",
    "getty@tty1.service",
    "console-getty.service",
    "systemd-networkd-wait-online.service",
]
WANTED = ["lan.service", "backdoor.service"]
# Bytes of the disk of a machine under qemu; sparse.
DISK = 6 << 30
# Longest the build may take: a slow mirror is a reason to skip, not to hang.
BUILD_TIME = 600


class ImageError(Exception):
    """The guest cannot be built here."""


class Image:
    """The cached guest."""

    def __init__(self, cache, guest):
        self.cache = cache
        self.guest = guest
        self.folder = cache / f"guest-{self._key()}"
        self.rootfs = self.folder / "rootfs"
        self.disk = self.folder / "disk.raw"

    def _key(self):
        digest = hashlib.sha256(Path(__file__).read_bytes())
        for path in sorted(self.guest.rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(self.guest)).encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]

    def built(self):
        return self.rootfs.is_dir()

    def build(self, say):
        """Builds the guest if it is not in the cache."""
        if self.built():
            return
        say(f"building the guest (Debian {SUITE} from {MIRROR}), once")
        for old in self.cache.glob("guest-*"):
            shutil.rmtree(old)
        partial = self.folder / "partial"
        partial.mkdir(parents=True)
        log = self.folder / "build.log"
        hooks = [
            f"--essential-hook=sync-in {self.guest} /",
            '--customize-hook=chroot "$1" groupadd --system atproto-relay',
            '--customize-hook=chroot "$1" useradd --system --gid atproto-relay --no-create-home'
            " --home-dir /var/lib/atproto-relay --shell /usr/sbin/nologin atproto-relay",
            f'--customize-hook=systemctl --quiet --root="$1" disable {" ".join(UNWANTED)}',
            f'--customize-hook=systemctl --quiet --root="$1" mask {" ".join(MASKED)}',
            f'--customize-hook=cd "$1/etc/systemd/system" && mkdir -p basic.target.wants'
            f" && ln -s {' '.join(f'../{unit}' for unit in WANTED)} basic.target.wants/",
            # The cluster that Debian's package makes; ours is made at the first start.
            '--customize-hook=rm -rf "$1"/var/lib/postgresql/* "$1"/etc/postgresql/*',
            '--customize-hook=rm -f "$1"/etc/resolv.conf "$1"/etc/hostname',
        ]
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", *hooks]
        with open(log, "wb") as output:
            try:
                done = subprocess.run(
                    [*command, SUITE, str(partial), MIRROR],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    timeout=BUILD_TIME,
                )
            except subprocess.TimeoutExpired:
                raise ImageError(f"mmdebstrap took over {BUILD_TIME} s (see {log})") from None
        if done.returncode != 0:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise ImageError(f"mmdebstrap failed: {' '.join(last)} (see {log})")
        partial.rename(self.rootfs)

    def build_disk(self, say):
        """Writes the guest into a file system that machines under qemu boot from."""
        if self.disk.is_file():
            return
        say("writing the guest's disk, once")
        partial = self.folder / "disk.partial"
        with open(partial, "wb") as disk:
            disk.truncate(DISK)
        command = ["mkfs.ext4", "-q", "-F", "-L", "root", "-d", str(self.rootfs), str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ImageError(f"mkfs.ext4 failed: {done.stderr.strip()}")
        partial.rename(self.disk)

    def kernel(self):
        return self._boot_file("vmlinuz-*")

    def initrd(self):
        return self._boot_file("initrd.img-*")

    def _boot_file(self, pattern):
        found = sorted((self.rootfs / "boot").glob(pattern))
        if not found:
            raise ImageError(f"the guest has no /boot/{pattern}")
        return found[-1]
