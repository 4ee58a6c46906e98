"""A cgroup for each machine below the runner's, and their removal. Supports the unified and the hybrid hierarchy."""

import os
import time
from pathlib import Path

# Every name contains the runner's process id, so that a runner removes only its own cgroups.
PREFIX = "atproto-vm-tests"


def _hierarchies():
    """Folders of this process's cgroups that systemd-nspawn uses."""
    mounts = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, options, *_ = line.split()
        if kind == "cgroup2":
            mounts["0::"] = target
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            mounts["name=systemd:"] = target
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        for mark, target in mounts.items():
            if mark in line:
                yield Path(target + line.partition(mark)[2])


def _name(machine):
    return f"{PREFIX}-{os.environ['VM_TESTS_RUN']}-{machine}"


def create(machine):
    """Creates a machine's cgroup, and returns its folders."""
    folders = [hierarchy / _name(machine) for hierarchy in _hierarchies()]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    return folders


def enter(folders):
    """Moves the calling process into a cgroup."""
    for folder in folders:
        (folder / "cgroup.procs").write_text("0")


def remove(machine):
    """Removes a machine's cgroup."""
    _remove_all(_name(machine))


def remove_all(run):
    """Removes the cgroups that a run left behind."""
    _remove_all(f"{PREFIX}-{run}-")


def _remove_all(prefix):
    for hierarchy in _hierarchies():
        for folder in hierarchy.glob(f"{prefix}*"):
            _remove(folder)


def _remove(folder):
    # The kernel can still count processes that have just ended.
    for _ in range(50):
        for path, _, _ in os.walk(folder, topdown=False):
            try:
                os.rmdir(path)
            except OSError:
                break
        if not folder.exists():
            return
        time.sleep(0.05)
