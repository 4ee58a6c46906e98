"""What makes a machine its own: its name and address, the devnet's part it plays, or the relay with the rendered
units, configuration and database settings of the NixOS module. Files only; how they get into a guest is the backend's.
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Where the module's rendering says that the package is.
PACKAGE = "/nix/store/00000000000000000000000000000000-atproto-relay"
UNITS = "/etc/systemd/system"
# The relay's public listener, as far as a scenario moves it away from loopback.
SOCKET = "atproto-relay.socket"
SERVICE = "atproto-relay.service"


# What stands behind the rendered lines: NixOS' own for pg_hba.conf, and less memory than a server has.
ADDED = {"pg_hba.conf": "local all all peer\n", "postgresql.conf": "shared_buffers = '128MB'\n"}


class Seed:
    """Files and links, with their modes."""

    def __init__(self):
        self.files = {}
        self.links = {}

    def file(self, path, content, mode=0o644):
        self.files[path] = (content.encode() if isinstance(content, str) else content, mode)

    def link(self, path, target):
        self.links[path] = target

    def unit(self, name, content, wanted_by=None):
        self.file(f"{UNITS}/{name}", content)
        if wanted_by:
            self.want(name, wanted_by)

    def want(self, name, by, how="WantedBy"):
        folder = "wants" if how == "WantedBy" else "requires"
        self.link(f"{UNITS}/{by}.{folder}/{name}", f"../{name}")

    def write_to(self, root):
        for path, (content, mode) in self.files.items():
            target = Path(f"{root}{path}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.write_bytes(content)
            target.chmod(mode)
        for path, target in self.links.items():
            link = Path(f"{root}{path}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    def write_tar(self, path):
        with tarfile.open(path, "w") as tar:
            for name, (content, mode) in self.files.items():
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.size, entry.mode = len(content), mode
                tar.addfile(entry, io.BytesIO(content))
            for name, target in self.links.items():
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                tar.addfile(entry)


def seed(name, machine, addresses, renderings):
    """The seed of the machine `name` of a scenario; `addresses` are those of all its machines."""
    seed = Seed()
    seed.file("/etc/hostname", f"{name}\n")
    hosts = "".join(f"{address} {other}\n" for other, address in addresses.items())
    seed.file("/etc/hosts", f"127.0.0.1 localhost\n::1 localhost\n{hosts}")
    seed.file("/etc/vm-tests-lan", f"{addresses[name]}/24\n")
    seed.file("/etc/machine-id", hashlib.md5(name.encode()).hexdigest() + "\n")
    for tool in ("atproto-relay", "atproto-devnet"):
        seed.link(f"/usr/local/bin/{tool}", f"{PACKAGE}/bin/{tool}")
    if "devnet" in machine:
        seed.unit("devnet.service", devnet_unit(machine["devnet"]), wanted_by="multi-user.target")
    if "relay" in machine:
        relay(seed, machine, renderings / machine["relay"])
    if machine.get("monitoring"):
        monitoring(seed, renderings / "appliance")
    return seed


def devnet_unit(arguments):
    return f"""\
[Unit]
Description=Devnet: {arguments.split()[0]}
After=network.target

[Service]
ExecStart=/usr/local/bin/atproto-devnet {arguments}
Restart=on-failure
"""


def relay(seed, machine, rendering):
    """The relay, its sockets and its database, word for word as the module renders them."""
    for unit in sorted((rendering / "units").iterdir()):
        text = unit.read_text()
        seed.unit(unit.name, text)
        if "PATH=/nix/store/" in text:
            seed.file(f"{UNITS}/{unit.name}.d/path.conf", f"[Service]\nEnvironment=PATH={PATH}\n")
        for line in text.splitlines():
            name, _, targets = line.partition("=")
            if name in ("WantedBy", "RequiredBy"):
                for target in targets.split():
                    seed.want(unit.name, target, name)
    etc = rendering / "etc"
    for path in sorted(etc.rglob("*")):
        if path.is_file():
            seed.file(f"/etc/{path.relative_to(etc)}", path.read_bytes())
    store(seed, rendering)
    database(seed, rendering)
    secrets = [
        f"f+ /run/secrets/{name} 0400 root root - {secret}" for name, secret in machine.get("secrets", {}).items()
    ]
    seed.file("/etc/tmpfiles.d/vm-tests.conf", "\n".join(["d /run/secrets 0755 root root -", *secrets, ""]))
    seed.file(f"{UNITS}/{SERVICE}.d/vm-tests.conf", environment(machine.get("settings", {})))
    if "listen" in machine:
        listen = f"[Socket]\nListenStream=\nListenStream={machine['listen']}\n"
        seed.file(f"{UNITS}/{SOCKET}.d/vm-tests.conf", listen)


def database(seed, rendering):
    """PostgreSQL with the module's settings; what NixOS itself adds to pg_hba.conf comes after them."""
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
        rendered = rendering / name
        if rendered.is_file():
            seed.file(f"/etc/postgresql-rendered/{name}", rendered.read_text() + ADDED.get(name, ""))


def monitoring(seed, rendering):
    """Prometheus with the module's configuration and alert rules; the exporters are Debian's."""
    seed.file("/etc/prometheus.yml", (rendering / "etc" / "prometheus.yml").read_bytes())
    seed.file("/etc/dashboard.json", (rendering / "grafana" / "dashboard.json").read_bytes())
    store(seed, rendering)
    for unit in ("prometheus", "prometheus-node-exporter", "prometheus-postgres-exporter"):
        seed.want(f"{unit}.service", "multi-user.target")


def store(seed, rendering):
    """Files that the rendering names by a path of Nix' store; those that are run are shell scripts."""
    for path in sorted((rendering / "store").glob("*")):
        text = path.read_text()
        if path.suffix:
            seed.file(f"/nix/store/{path.name}", text)
        else:
            seed.file(f"/nix/store/{path.name}", f"#!/bin/sh\n{text}", 0o755)


def environment(settings):
    """A scenario's settings as variables: they win over the rendered file, which stays as it is."""
    lines = [f'Environment="{variable(key)}={value(given)}"' for key, given in flatten(settings).items()]
    return "\n".join(["[Service]", *lines, ""])


def flatten(settings, prefix=""):
    flat = {}
    for key, given in settings.items():
        if isinstance(given, dict):
            flat |= flatten(given, f"{prefix}{key}.")
        else:
            flat[prefix + key] = given
    return flat


def variable(key):
    """The variable of a setting, by the rule of the README's table."""
    table, _, name = key.rpartition(".")
    return "_".join(["RELAY", *([{"limits": "LIMIT"}.get(table, table.upper())] if table else []), name.upper()])


def value(given):
    if isinstance(given, list):
        return ",".join(str(item) for item in given)
    return json.dumps(given) if isinstance(given, bool) else str(given)
