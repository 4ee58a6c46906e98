"""Machines under qemu: each has its own kernel, an overlay over the guest's disk, NVMe devices, and an interface on the
bridge.

A power cut ends qemu: data that the guest had not flushed to its disks is lost.
"""

import base64
import os
import socket
import subprocess
import threading
import time

from .machine import Machine, MachineError

# Timeout until the guest's shell answers.
BOOT = 60
HALT = 60
# Factor on all timeouts for an emulated processor.
TCG_SLOWNESS = 4
MEMORY = 1536
# Timeout of a kernel's boot under KVM, after which KVM counts as not working.
KVM_PROBE = 15


def accelerator(image):
    """KVM if a kernel really boots under it, which takes a second; otherwise an emulated processor."""
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        command = ["qemu-system-x86_64", "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults"]
        command += ["-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(image.kernel())]
        probe = subprocess.Popen(
            [*command, "-append", "console=ttyS0 panic=-1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        watch = threading.Timer(KVM_PROBE, probe.kill)
        watch.start()
        # Without a root file system the kernel panics and ends, which is proof enough.
        said = probe.communicate()[0]
        watch.cancel()
        if b"Kernel panic" in said:
            return "kvm"
    return "tcg,thread=multi"


class Qemu(Machine):
    """A machine with its own kernel."""

    def __init__(self, name, report, image, folder, seed, bridge, number, disks, accelerator):
        super().__init__(name, report, image, folder, seed, bridge)
        self.number = number
        self.disks = disks
        self.accelerator = accelerator
        self.console = None
        if accelerator != "kvm":
            self.slowness = TCG_SLOWNESS

    def power_on(self):
        if not self.folder.is_dir():
            self._make_disks()
        tap = f"vt-{self.name}"
        subprocess.run(["ip", "tuntap", "add", "dev", tap, "mode", "tap"], check=True)
        subprocess.run(["ip", "link", "set", tap, "master", self.bridge, "up"], check=True)
        shell = self.folder / "shell"
        # No user network and no monitor: only the tap and the virtconsole.
        command = ["qemu-system-x86_64", "-machine", "q35", "-accel", self.accelerator, "-m", str(MEMORY), "-smp", "2"]
        command += ["-cpu", "host" if self.accelerator == "kvm" else "max"]
        command += ["-nodefaults", "-display", "none", "-no-user-config", "-no-reboot"]
        command += ["-kernel", str(self.image.kernel()), "-initrd", str(self.image.initrd())]
        command += [
            "-append",
            "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet systemd.show_status=0 mitigations=off",
        ]
        command += ["-serial", f"file:{self.folder / 'console'}"]
        command += ["-drive", f"file={self.folder / 'root.qcow2'},if=virtio,format=qcow2,cache=writeback,discard=unmap"]
        command += ["-drive", f"file={self.folder / 'seed.tar'},if=virtio,format=raw,readonly=on"]
        for serial in self.disks:
            drive = f"file={self._disk(serial)},if=none,id={serial},format=raw,cache=writeback,discard=unmap"
            command += ["-drive", drive, "-device", f"nvme,drive={serial},serial={serial}"]
        command += ["-netdev", f"tap,id=lan,ifname={tap},script=no,downscript=no"]
        command += ["-device", f"virtio-net-pci,netdev=lan,mac=52:54:00:12:34:{self.number:02x}"]
        command += ["-device", "virtio-rng-pci", "-device", "virtio-serial"]
        command += [
            "-chardev",
            f"socket,id=shell,path={shell},server=on,wait=off",
            "-device",
            "virtconsole,chardev=shell",
        ]
        with open(self.folder / "qemu", "ab") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._connect(shell)

    def _disk(self, serial):
        return self.folder / f"{serial}.raw"

    def _make_disks(self):
        self.folder.mkdir(parents=True)
        overlay = ["-b", str(self.image.disk), "-F", "raw", str(self.folder / "root.qcow2")]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *overlay], check=True)
        self.seed.write_tar(self.folder / "seed.tar")
        for serial, megabytes in self.disks.items():
            with open(self._disk(serial), "wb") as disk:
                disk.truncate(megabytes << 20)

    def _connect(self, shell):
        deadline = time.monotonic() + BOOT * self.slowness
        while not shell.exists():
            if not self.running() or time.monotonic() > deadline:
                raise MachineError(f"{self.name}: qemu does not start:\n{self._said()}")
            time.sleep(0.05)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(shell))
        connection.settimeout(1)
        self.console = connection
        self.unread = b""
        while True:
            if self._line(deadline, "the boot") == "ready":
                return

    def _line(self, deadline, doing):
        while b"\n" not in self.unread:
            if time.monotonic() > deadline:
                raise MachineError(f"{self.name}: {doing} took too long:\n{self._said()}")
            try:
                got = self.console.recv(1 << 16)
            except TimeoutError:
                got = None
            if got == b"" or not self.running():
                raise MachineError(f"{self.name}: it ended during {doing}:\n{self._said()}")
            self.unread += got or b""
        line, _, self.unread = self.unread.partition(b"\n")
        return line.decode(errors="replace").strip()

    def _said(self):
        said = ""
        for name in ("qemu", "console"):
            path = self.folder / name
            if path.is_file():
                said += "\n".join(path.read_text(errors="replace").splitlines()[-20:]) + "\n"
        return said

    def shell(self, script, timeout):
        if not self.running():
            raise MachineError(f"{self.name}: it is not running")
        line = f"{timeout} {base64.b64encode(script.encode()).decode()}\n"
        self.console.settimeout(None)
        self.console.sendall(line.encode())
        self.console.settimeout(1)
        doing = f"`{script}`"
        status, _, output = self._line(time.monotonic() + timeout + 30, doing).partition(" ")
        output = base64.b64decode(output).decode(errors="replace")
        if status == "124":
            raise MachineError(f"{self.name}: {doing} took over {timeout} s:\n{output.rstrip()}")
        return int(status), output

    def power_off(self):
        if self.running():
            self.process.kill()
        self._gone()

    def halt(self):
        self.console.sendall(f"10 {base64.b64encode(b'systemctl poweroff').decode()}\n".encode())
        self._gone()

    def _gone(self):
        if self.process is None:
            return
        try:
            self.process.wait(HALT * self.slowness)
        except subprocess.TimeoutExpired:
            raise MachineError(f"{self.name}: it does not stop within {HALT * self.slowness} s") from None
        self.process = None
        self.console.close()
        (self.folder / "shell").unlink(missing_ok=True)
        subprocess.run(["ip", "link", "delete", f"vt-{self.name}"], check=True)

    def plug(self, plugged):
        subprocess.run(["ip", "link", "set", f"vt-{self.name}", "up" if plugged else "down"], check=True)
