"""What this machine can do, found out by doing it: each answer is None, or the reason why not."""

import os
import shutil
import subprocess
from pathlib import Path

from .machine import MachineError
from .nspawn import Nspawn
from .seed import Seed

# Where each tool comes from on Debian.
NSPAWN_TOOLS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
}
QEMU_TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "mkfs.ext4": "e2fsprogs"}


def _missing(tools):
    missing = [f"{tool} (package {package})" for tool, package in tools.items() if not shutil.which(tool)]
    return f"not installed here: {', '.join(missing)}" if missing else None


def host():
    """The reason why guests cannot run here, or None."""
    if os.geteuid() != 0:
        return "it needs root, for namespaces, mounts and network interfaces"
    if os.uname().machine != "x86_64":
        return f"tried on x86-64 only, not on {os.uname().machine}"
    return _missing(NSPAWN_TOOLS)


def namespaces():
    """The reason why the namespaces and mounts of a run are not possible here, or None."""
    script = "mount -t tmpfs tmpfs /run && ip link add probe type bridge && mkdir -p /run/a /run/b /run/c /run/d"
    script += " && mount -t overlay overlay -o lowerdir=/run/a,upperdir=/run/b,workdir=/run/c /run/d"
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--propagation", "private"]
    done = subprocess.run([*command, "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return f"namespaces, a bridge and an overlay are not allowed here: {done.stderr.strip().splitlines()[-1:]}"


def qemu():
    """The reason why machines with their own kernel cannot run here, or None."""
    missing = _missing(QEMU_TOOLS)
    if missing:
        return missing
    return None if Path("/dev/net/tun").exists() else "there is no /dev/net/tun"


def guest(image, folder, report, bridge, binaries):
    """Boots an empty guest under systemd-nspawn and runs the binaries in it; returns the reason if that fails."""
    seed = Seed()
    seed.file("/etc/hostname", "probe\n")
    seed.file("/etc/vm-tests-lan", "192.168.1.254/24\n")
    seed.file("/etc/machine-id", "0" * 31 + "1\n")
    machine = Nspawn("probe", report, image, folder, seed, bridge, {"/opt": binaries})
    try:
        machine.power_on()
        status, said = machine.shell("/opt/atproto-relay --version && /opt/atproto-devnet --version", 30)
        if status != 0:
            return f"the binaries do not run in the guest: {said.strip()}"
        machine.wait_for_unit("multi-user.target", timeout=60)
        return None
    except (MachineError, OSError, subprocess.SubprocessError) as error:
        return f"a guest does not boot under systemd-nspawn: {error}"
    finally:
        machine.power_off()
