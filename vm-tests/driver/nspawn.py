"""Machines under systemd-nspawn: each has an overlay over the guest image, a cgroup, and an interface on the bridge.

They share the host's kernel, so a crash ends their processes, but dirty pages stay in the kernel's cache.
"""

import os
import socket
import subprocess
import time

from . import cgroup
from .machine import Machine, MachineError
from .seed import PATH

# Timeout until the guest's systemd accepts commands.
BOOT = 60
# Timeout of an orderly shutdown.
HALT = 60


class Nspawn(Machine):
    """A machine that shares the host's kernel."""

    def __init__(self, name, report, image, folder, seed, bridge, binds):
        super().__init__(name, report, image, folder, seed, bridge)
        self.root = self.folder / "root"
        self.binds = binds
        self.leader = None

    def power_on(self):
        if not self.root.is_dir():
            self._make_disk()
        address = str(self.folder / "notify")
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind(address)
        environment = os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "NOTIFY_SOCKET": address}
        command = ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--private-network"]
        command += [f"--network-bridge={self.bridge}", f"--machine={self.name}", f"--directory={self.root}"]
        command += ["--console=pipe", "--notify-ready=yes", "--link-journal=no"]
        command += [f"--bind-ro={source}:{target}" for target, source in self.binds.items()]
        group = cgroup.create(self.name)
        with open(self.folder / "console", "ab") as console:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=environment,
                preexec_fn=lambda: cgroup.enter(group),
            )
        try:
            self.leader = self._wait_for_leader(notify)
        finally:
            notify.close()
            os.unlink(address)
        self._wait_for_systemd()

    def _make_disk(self):
        upper, work = self.folder / "upper", self.folder / "work"
        for folder in (upper, work, self.root):
            folder.mkdir(parents=True)
        layers = f"lowerdir={self.image.rootfs},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], check=True)
        self.seed.write_to(self.root)

    def _wait_for_leader(self, notify):
        notify.settimeout(1)
        deadline = time.monotonic() + BOOT
        while time.monotonic() < deadline and self.running():
            try:
                message = notify.recv(4096).decode(errors="replace")
            except TimeoutError:
                continue
            for line in message.splitlines():
                if line.startswith("X_NSPAWN_LEADER_PID="):
                    return int(line.partition("=")[2])
        raise MachineError(f"{self.name}: systemd-nspawn does not start it:\n{self.console()}")

    def _wait_for_systemd(self):
        deadline = time.monotonic() + BOOT
        while time.monotonic() < deadline and self.running():
            if self.shell("test -S /run/systemd/private && systemctl is-system-running | grep -qv offline", 10)[0] == 0:
                return
            time.sleep(0.05)
        raise MachineError(f"{self.name}: its systemd does not come up:\n{self.console()}")

    def console(self):
        text = (self.folder / "console").read_text(errors="replace")
        return "\n".join(text.splitlines()[-20:])

    def power_off(self):
        if self.running():
            os.kill(self.leader or self.process.pid, 9)
        self._gone()

    def halt(self):
        # The signal that systemd-nspawn sends its guest for an orderly shutdown (SIGRTMIN+3: halt.target).
        os.kill(self.leader, 37)
        self._gone()

    def _gone(self):
        if self.process is None:
            return
        try:
            self.process.wait(HALT)
        except subprocess.TimeoutExpired:
            raise MachineError(f"{self.name}: it does not stop within {HALT} s") from None
        self.process = self.leader = None
        cgroup.remove(self.name)

    def _enter(self):
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"]
        command = ["nsenter", "--target", str(self.leader), *namespaces, "--", "/usr/bin/env", "-i"]
        return [*command, f"PATH={PATH}", "HOME=/root", "LANG=C.UTF-8"]

    def shell(self, script, timeout):
        if not self.running():
            raise MachineError(f"{self.name}: it is not running")
        command = [*self._enter(), "timeout", "--kill-after=5", str(timeout), "/bin/bash", "-c", script]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = done.stdout.decode(errors="replace")
        if done.returncode == 124:
            raise MachineError(f"{self.name}: `{script}` took over {timeout} s:\n{output.rstrip()}")
        return done.returncode, output

    def plug(self, plugged):
        subprocess.run(["ip", "link", "set", f"vb-{self.name}", "up" if plugged else "down"], check=True)
