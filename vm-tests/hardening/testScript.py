# What an attacker in the relay's process can reach: only its own writable paths, no secrets of others, no other privileges.
# And that other users of the machine cannot read the relay's secrets.

UNIT = "atproto-relay.service"
SECRETS = ["not-to-be-seen", "not-to-be-seen-either"]


def inside(command):
    """Runs a command in the mounts of the relay, as its user."""
    user = "setpriv --reuid=atproto-relay --regid=atproto-relay --clear-groups"
    return f"nsenter --target={pid} --mount --wd=/ {user} {command}"


start_all()
relay.wait_for_unit(UNIT)
pid = relay.get_unit_property(UNIT, "MainPID")

with subtest("systemd finds nothing wrong with its unit and its sockets"):
    units = f"{UNIT} atproto-relay.socket atproto-relay-metrics.socket atproto-relay-admin.socket"
    said = relay.succeed(f"systemd-analyze verify --man=no --recursive-errors=no {units} 2>&1")
    assert not said, said

with subtest("systemd scores its exposure 1.5 or better"):
    score = relay.succeed(f"systemd-analyze security --no-pager --threshold=15 {UNIT} | tail --lines=1")
    relay.log(score.strip())

with subtest("it runs as its own user, without capabilities and with no way to gain any"):
    status = relay.succeed(f"cat /proc/{pid}/status")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert fields["Uid"].split()[0] != "0"
    for kind in ["CapEff", "CapPrm", "CapBnd", "CapAmb"]:
        assert int(fields[kind], 16) == 0, (kind, fields[kind])
    assert fields["NoNewPrivs"].strip() == "1"
    assert fields["Seccomp"].strip() == "2"

with subtest("it can write only to its state, its runtime folder and its temporary folders"):
    found = relay.succeed(
        inside("find / -writable '(' -type d -o -type f ')' -not -path '/proc/*' 2>/dev/null || true"),
        inside("find /var/lib/atproto-relay /run/atproto-relay -maxdepth 0 -writable"),
    )
    own = ("/var/lib/atproto-relay", "/run/atproto-relay", "/tmp", "/var/tmp")
    # Writable for everybody, in memory; and the file through which systemd reports memory pressure.
    common = ("/dev/shm", "/dev/mqueue", "/run/lock", "/sys/fs/cgroup")
    strange = [path for path in found.split() if not path.startswith((*own, *common))]
    assert not [path for path in found.split() if "cgroup" in path and not path.endswith("/memory.pressure")], found
    assert not strange, strange
    relay.fail(inside("touch /etc/mine"), inside("touch /usr/mine"), inside("touch /var/mine"))

with subtest("it sees no home folders, no devices of the machine, and no processes of other users"):
    relay.fail(inside("ls /root"), inside("test -b /dev/vda"), inside("test -c /dev/kmsg"))
    mounts = relay.succeed(f"cat /proc/{pid}/mountinfo")
    assert "hidepid=invisible" in mounts or "hidepid=2" in mounts, mounts

with subtest("only the relay can read its secrets"):
    folder = f"/run/credentials/{UNIT}"
    relay.succeed(f"grep --quiet {SECRETS[0]} {folder}/admin-password")
    for secret in ["admin-password", "database-url"]:
        relay.fail(f"runuser -u nobody -- cat {folder}/{secret}")
        relay.fail(f"runuser -u nobody -- cat /run/secrets/atproto-relay-{secret.split('-password')[0]}")

with subtest("no secret is in its arguments, its environment, its unit, its log or its configuration"):
    for secret in SECRETS:
        relay.fail(f"tr '\\0' '\\n' < /proc/{pid}/cmdline | grep {secret}")
        relay.fail(f"tr '\\0' '\\n' < /proc/{pid}/environ | grep {secret}")
        relay.fail(f"systemctl show {UNIT} | grep {secret}")
        relay.fail(f"journalctl --unit={UNIT} | grep {secret}")
        relay.fail(f"grep --recursive {secret} /etc/atproto-relay /etc/systemd/system/atproto-relay*")

with subtest("the secrets are used: the database is at the URL, and the password opens the admin API"):
    relay.succeed("test -s /var/lib/atproto-relay/not-to-be-seen-either.sqlite")
    relay.fail("curl --silent --fail http://127.0.0.1:2470/admin/pds/list")
    relay.succeed("curl --silent --fail --user admin:not-to-be-seen http://127.0.0.1:2470/admin/pds/list")

with subtest("only its group can use the admin socket, without a password"):
    mode = relay.succeed("stat --format='%a %U %G' /run/atproto-relay-admin.sock").strip()
    assert mode == "660 root atproto-relay", mode
    ask_for_hosts = "curl --silent --fail --unix-socket /run/atproto-relay-admin.sock http://relay/admin/pds/list"
    relay.fail(f"runuser -u nobody -- {ask_for_hosts}")
    relay.succeed(f"runuser -u atproto-relay -- {ask_for_hosts}")
