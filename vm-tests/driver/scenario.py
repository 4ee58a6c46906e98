"""One scenario: its machines and its testScript, with a line of output for each step."""

import contextlib
import signal
import time
import tomllib
import traceback
from pathlib import Path

from .machine import MachineError
from .nspawn import Nspawn
from .qemu import Qemu
from .seed import PACKAGE, UPDATED_PACKAGE, seed

BRIDGE = "lan"
# Prefix of a testScript's log line if this machine lacks what a step needs.
SKIPPED = "skipped: "
# Timeout of a scenario.
SCENARIO_TIME = 420


class Scenario:
    """The content of `scenario.toml`."""

    def __init__(self, folder):
        self.folder = folder
        self.name = folder.name
        with open(folder / "scenario.toml", "rb") as file:
            described = tomllib.load(file)
        self.machines = described["machines"]
        self.prelude = folder.parent / "prelude.py"
        self.script = folder / "testScript.py"

    def kernels(self):
        """Machines that need their own kernel."""
        return [name for name, machine in self.machines.items() if machine.get("kernel")]

    def addresses(self):
        """Addresses as in NixOS' tests: numbered in the order of the names."""
        return {name: f"192.168.1.{number}" for number, name in enumerate(sorted(self.machines), start=1)}


class Report:
    """Prints and counts the results of steps."""

    def __init__(self, verbose):
        self.verbose = verbose
        self.passed = self.failed = self.skipped = 0
        self.started = time.monotonic()

    def line(self, word, text, seconds=None):
        took = f"{seconds:7.1f} s" if seconds is not None else " " * 9
        print(f"  {word:<7} {took}  {text}", flush=True)

    def step(self, word, text, seconds):
        setattr(self, word, getattr(self, word) + 1)
        self.line({"passed": "ok", "failed": "FAILED", "skipped": "skipped"}[word], text, seconds)

    def note(self, text):
        _, mark, reason = text.partition(SKIPPED)
        if mark:
            self.step("skipped", reason, None)
        elif self.verbose:
            self.line("", text)


class TimeUp(Exception):
    pass


class Run:
    """A running scenario."""

    def __init__(self, scenario, backend, image, folder, binaries, renderings, accelerator, report):
        self.scenario = scenario
        self.report = report
        self.machines = {}
        addresses = scenario.addresses()
        for number, name in enumerate(sorted(scenario.machines), start=1):
            described = scenario.machines[name]
            its = seed(name, described, addresses, renderings)
            packages = [PACKAGE, UPDATED_PACKAGE] if described.get("updated") else [PACKAGE]
            if backend == "qemu" or described.get("kernel"):
                for tool in sorted(binaries.iterdir()):
                    for package in packages:
                        its.file(f"{package}/bin/{tool.name}", tool.read_bytes(), 0o755)
                disks = described.get("disks", {})
                self.machines[name] = Qemu(name, report, image, folder, its, BRIDGE, number, disks, accelerator)
            else:
                binds = {f"{package}/bin": binaries for package in packages}
                self.machines[name] = Nspawn(name, report, image, folder, its, BRIDGE, binds)

    def names(self):
        """Names that are defined in a testScript."""
        machines = list(self.machines.values())
        return {name.replace("-", "_"): machine for name, machine in self.machines.items()} | {
            "__name__": "testScript",
            "start_all": lambda: [machine.start() for machine in machines],
            "subtest": self.subtest,
        }

    @contextlib.contextmanager
    def subtest(self, name):
        started = time.monotonic()
        skipped = self.report.skipped
        try:
            yield
        except Exception as error:
            self.report.step("failed", name, time.monotonic() - started)
            error.told = True
            raise
        if self.report.skipped == skipped:
            self.report.step("passed", name, time.monotonic() - started)

    def run(self):
        signal.signal(signal.SIGALRM, self._time_up)
        slowness = max(machine.slowness for machine in self.machines.values())
        signal.alarm(SCENARIO_TIME * min(slowness, 3))
        try:
            names = self.names()
            for path in (self.scenario.prelude, self.scenario.script):
                exec(compile(path.read_text(), str(path), "exec"), names)
            return True
        except Exception as error:
            if not getattr(error, "told", False):
                self.report.step("failed", "the testScript, outside of its steps", None)
            self._explain(error)
            return False
        finally:
            signal.alarm(0)
            for machine in self.machines.values():
                machine.power_off()

    def _time_up(self, *_):
        raise TimeUp("the scenario takes too long")

    def _explain(self, error):
        script = str(self.scenario.script)
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == script:
                print(f"    {Path(script).name}:{frame.lineno}: {frame.line}")
        words = str(error) if isinstance(error, (MachineError, TimeUp, AssertionError)) else traceback.format_exc()
        print("\n".join(f"    {line}" for line in words.splitlines()))
        for machine in self.machines.values():
            if machine.running():
                self._last_words(machine)

    def _last_words(self, machine):
        try:
            _, said = machine.execute(
                "journalctl --no-pager --output=short-monotonic --lines=15 --unit='devnet*' --unit='atproto-relay*'"
                " --unit='postgresql*' --unit='prometheus*'",
                timeout=20,
            )
        except (MachineError, OSError):
            return
        print("\n".join(f"    {machine.name} | {line}" for line in said.splitlines()), flush=True)
