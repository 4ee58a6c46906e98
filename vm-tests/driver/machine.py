"""One machine as a testScript sees it: the subset of the NixOS test driver's API that the scenarios use.

The differences between systemd-nspawn and qemu are in `nspawn.py` and `qemu.py`. Names, arguments and meanings are those of
NixOS' driver, so that a testScript runs under both. Scenarios can use only this subset.
"""

import shlex
import time

# Interval between two checks of an awaited condition.
LOOK_AGAIN = 0.2
# Default timeout of a command or a wait. NixOS' driver waits longer.
PATIENCE = 60


class MachineError(Exception):
    """A machine did not do what the testScript requires."""


class Machine:
    """A guest. The backend provides `shell`, `power_on`, `power_off`, `halt` and `plug`, and sets `process`."""

    # Factor on all timeouts: an emulated processor is slow.
    slowness = 1

    def __init__(self, name, report, image, folder, seed, bridge):
        self.name = name
        self.report = report
        self.image = image
        self.folder = folder / name
        self.seed = seed
        self.bridge = bridge
        self.process = None

    def running(self):
        return self.process is not None and self.process.poll() is None

    # Provided by the backend.

    def power_on(self):
        raise NotImplementedError

    def power_off(self):
        """Cuts the power: nothing is written any more."""
        raise NotImplementedError

    def shell(self, script, timeout):
        """Runs a script as root, and returns its status and its combined stdout and stderr.

        NixOS' driver returns only stdout: a testScript that uses the output redirects stderr.
        """
        raise NotImplementedError

    def plug(self, plugged):
        """Connects or disconnects the network cable."""
        raise NotImplementedError

    # The API of testScripts.

    def log(self, text):
        self.report.note(f"{self.name}: {text}")

    def start(self, allow_reboot=True):
        if not self.running():
            self.power_on()

    def crash(self):
        self.power_off()

    def shutdown(self):
        if self.running():
            self.halt()

    def halt(self):
        raise NotImplementedError

    def reboot(self):
        self.shutdown()
        self.start()

    def block(self):
        self.plug(False)

    def unblock(self):
        self.plug(True)

    def execute(self, command, check_return=True, timeout=PATIENCE):
        self.start()
        status, output = self.shell(command, timeout * self.slowness)
        return (status if check_return else -1), output

    def succeed(self, *commands, timeout=PATIENCE):
        output = ""
        for command in commands:
            status, said = self.execute(f"set -euo pipefail; {command}", timeout=timeout)
            if status != 0:
                raise MachineError(f"{self.name}: `{command}` failed with status {status}:\n{said.rstrip()}")
            output += said
        return output

    def fail(self, *commands, timeout=PATIENCE):
        output = ""
        for command in commands:
            status, said = self.execute(f"set -euo pipefail; {command}", timeout=timeout)
            if status == 0:
                raise MachineError(f"{self.name}: `{command}` succeeded, against expectation:\n{said.rstrip()}")
            output += said
        return output

    def wait_until_succeeds(self, command, timeout=PATIENCE):
        return self._wait_for_status(command, timeout, wanted=True)

    def wait_until_fails(self, command, timeout=PATIENCE):
        return self._wait_for_status(command, timeout, wanted=False)

    def _wait_for_status(self, command, timeout, wanted):
        deadline = time.monotonic() + timeout * self.slowness
        while True:
            status, said = self.execute(f"set -euo pipefail; {command}", timeout=timeout)
            if (status == 0) == wanted:
                return said
            if time.monotonic() > deadline:
                verb = "succeed" if wanted else "fail"
                raise MachineError(
                    f"{self.name}: `{command}` did not {verb} within {timeout} s; last:\n{said.rstrip()}"
                )
            time.sleep(LOOK_AGAIN)

    def get_unit_property(self, unit, name):
        value = self.succeed(f"systemctl show --value --property={shlex.quote(name)} {shlex.quote(unit)}")
        return value.rstrip("\n")

    def wait_for_unit(self, unit, timeout=PATIENCE):
        deadline = time.monotonic() + timeout * self.slowness
        while True:
            _, state = self.execute(f"systemctl show --value --property=ActiveState {shlex.quote(unit)}")
            state = state.strip()
            if state == "active":
                return
            if state == "failed" or time.monotonic() > deadline:
                raise MachineError(f"{self.name}: {unit} is {state or 'unknown'}:\n{self.journal(unit)}")
            time.sleep(LOOK_AGAIN)

    def journal(self, unit, lines=30):
        return self.execute(f"journalctl --no-pager --output=cat --lines={lines} --unit={shlex.quote(unit)}")[1]

    def require_unit_state(self, unit, require_state="active"):
        state = self.get_unit_property(unit, "ActiveState")
        if state != require_state:
            raise MachineError(f"{self.name}: {unit} is {state}, not {require_state}")

    def wait_for_open_port(self, port, addr="localhost", timeout=PATIENCE):
        self.wait_until_succeeds(f"nc -z {addr} {port}", timeout=timeout)
