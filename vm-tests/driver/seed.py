"""The files that distinguish a machine: its name and address, its part of the devnet, or the relay with the rendered units,
configuration and database settings of the NixOS module. The backend puts the files into the guest.
"""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Path prefix of packages in the module's renderings, and the one for a second set of packages.
STORE = "/nix/store/00000000000000000000000000000000-"
UPDATED_STORE = "/nix/store/11111111111111111111111111111111-"
PACKAGE = f"{STORE}atproto-relay"
UPDATED_PACKAGE = f"{UPDATED_STORE}atproto-relay"
UNITS = "/etc/systemd/system"
# Units whose settings scenarios change.
SOCKET = "atproto-relay.socket"
SERVICE = "atproto-relay.service"


# The systems between which `switch-to` switches.
SYSTEMS = "/etc/vm-tests/systems"
# Mount options that tmpfs does not support.
OF_DISKS = ("x-systemd.device-timeout", "logbsize", "discard")

# A minute between evaluations and two minutes until an alert fires are most of what a scenario would wait for.
PROMETHEUS_INTERVAL = "2s"
ALERTS_AFTER = "10s"

# Appended to rendered files: the lines of NixOS in pg_hba.conf, and less memory than on a server.
ADDED = {"pg_hba.conf": "local all all peer\n", "postgresql.conf": "shared_buffers = '128MB'\n"}


# The part of nginx' configuration that NixOS adds to the module's.
NGINX = """\
pid /run/nginx.pid;
error_log stderr;
{append}
events {{
{events}
}}
http {{
    access_log off;
    map $http_upgrade $connection_upgrade {{
        default upgrade;
        '' close;
    }}
    server {{
        listen 80 default_server;
{locations}
    }}
}}
"""


class Seed:
    """Files with their modes, and links."""

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
    if machine.get("contrib"):
        contrib(seed, renderings.parent.parent / "contrib")
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
    """The relay, its sockets and its database, exactly as the module renders them."""
    in_memory = not machine.get("kernel")
    for unit in sorted((rendering / "units").iterdir()):
        text = unit.read_text()
        if in_memory:
            text = without_device(text)
        seed.unit(unit.name, text)
        if machine.get("updated"):
            seed.file(f"{SYSTEMS}/former/{unit.name}", text)
            seed.file(f"{SYSTEMS}/updated/{unit.name}", text.replace(STORE, UPDATED_STORE))
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
    if in_memory and (etc / "fstab").is_file():
        seed.file("/etc/fstab", volumes_in_memory((etc / "fstab").read_text()))
    store(seed, rendering)
    command(seed)
    proxy(seed, rendering)
    database(seed, rendering)
    secrets = [
        f"f+ /run/secrets/{name} 0400 root root - {secret}" for name, secret in machine.get("secrets", {}).items()
    ]
    seed.file("/etc/tmpfiles.d/vm-tests.conf", "\n".join(["d /run/secrets 0755 root root -", *secrets, ""]))
    seed.file(f"{UNITS}/{SERVICE}.d/vm-tests.conf", environment(machine.get("settings", {})))
    if "listen" in machine:
        listen = f"[Socket]\nListenStream=\nListenStream={machine['listen']}\n"
        seed.file(f"{UNITS}/{SOCKET}.d/vm-tests.conf", listen)


def contrib(seed, folder):
    """The files that an operator without Nix installs from."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            seed.file(f"/usr/local/src/contrib/{path.relative_to(folder)}", path.read_bytes(), path.stat().st_mode & 0o777)


def without_device(unit):
    """The rendered unit without its device."""
    lines = [line for line in unit.splitlines(keepends=True) if not line.startswith(("BindsTo=dev-", "After=dev-"))]
    return "".join("ExecStart=/bin/true\n" if "prepare-device" in line else line for line in lines)


def volumes_in_memory(fstab):
    """The rendered mounts as tmpfs."""
    lines = []
    for line in fstab.splitlines():
        _, place, _, options, *_ = line.split()
        kept = [option for option in options.split(",") if not option.startswith(OF_DISKS)]
        lines.append(f"tmpfs {place} tmpfs {','.join(kept)} 0 0\n")
    return "".join(lines)


def command(seed):
    """The operator's command, in PATH as with the module."""
    seed.link("/usr/local/bin/atproto-relay", f"{STORE}atproto-relay-command")
    seed.link(f"{STORE}systemd/bin/systemd-run", "/usr/bin/systemd-run")


def proxy(seed, rendering):
    """Caddy or nginx with the module's site, without TLS because this machine cannot get certificates."""
    caddyfile = rendering / "Caddyfile"
    if caddyfile.is_file():
        # Debian's Caddy does not know this option.
        lines = [line for line in caddyfile.read_text().splitlines() if "stream_close_delay" not in line]
        seed.file("/etc/caddy/Caddyfile", "\n".join(["http:// {", *lines[1:], ""]))
        seed.link(f"{UNITS}/multi-user.target.wants/caddy.service", "/usr/lib/systemd/system/caddy.service")
    nginx = rendering / "nginx"
    if nginx.is_dir():
        part = {path.stem: path.read_text() for path in nginx.iterdir()}
        seed.file("/etc/nginx/nginx.conf", NGINX.format(**part))
        seed.file(f"{UNITS}/nginx.service.d/module.conf", part["service"])
        seed.link(f"{UNITS}/multi-user.target.wants/nginx.service", "/usr/lib/systemd/system/nginx.service")


def database(seed, rendering):
    """PostgreSQL with the module's settings, followed by the lines that NixOS adds to pg_hba.conf."""
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
        rendered = rendering / name
        if rendered.is_file():
            seed.file(f"/etc/postgresql-rendered/{name}", rendered.read_text() + ADDED.get(name, ""))


def monitoring(seed, rendering):
    """Prometheus with the module's configuration and alert rules, but shorter intervals; the exporters are Debian's."""
    prometheus = json.loads((rendering / "etc" / "prometheus.yml").read_text())
    prometheus["global"]["evaluation_interval"] = PROMETHEUS_INTERVAL
    for job in prometheus["scrape_configs"]:
        job["scrape_interval"] = PROMETHEUS_INTERVAL
    seed.file("/etc/prometheus.yml", json.dumps(prometheus))
    seed.file("/etc/dashboard.json", (rendering / "grafana" / "dashboard.json").read_bytes())
    store(seed, rendering)
    for path in prometheus["rule_files"]:
        rules = (rendering / "store" / Path(path).name).read_text()
        seed.file(path, re.sub(r"(?m)^( +for: ).*$", rf"\g<1>{ALERTS_AFTER}", rules))
    for unit in ("prometheus", "prometheus-node-exporter", "prometheus-postgres-exporter"):
        seed.want(f"{unit}.service", "multi-user.target")


def store(seed, rendering):
    """Files that the rendering refers to by store path; those without a suffix are shell scripts."""
    for path in sorted((rendering / "store").glob("*")):
        text = path.read_text()
        if path.suffix:
            seed.file(f"/nix/store/{path.name}", text)
        else:
            seed.file(f"/nix/store/{path.name}", f"#!/bin/sh\n{text}", 0o755)


def environment(settings):
    """A scenario's settings as environment variables, which take precedence over the unchanged rendered file."""
    # The guest's disk is the host's, which can be nearly full.
    flat = {"log.min_free_bytes": "auto"} | flatten(settings)
    lines = [f'Environment="{variable(key)}={value(given)}"' for key, given in flat.items()]
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
    """The environment variable of a setting."""
    table, _, name = key.rpartition(".")
    return "_".join(["RELAY", *([{"limits": "LIMIT"}.get(table, table.upper())] if table else []), name.upper()])


def value(given):
    if isinstance(given, list):
        return ",".join(str(item) for item in given)
    return json.dumps(given) if isinstance(given, bool) else str(given)
