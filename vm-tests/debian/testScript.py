# The relay installed with contrib/systemd/install, without Nix: it starts, restarts and upgrades without dropping a
# consumer, reloads, and reads its secrets from systemd's credential store.

UNIT = "atproto-relay.service"
UNITS = f"{UNIT} atproto-relay.socket atproto-relay-metrics.socket atproto-relay-admin.socket"
INSTALL = "/usr/local/src/contrib/systemd/install $(readlink --canonicalize /usr/local/bin/atproto-relay)"
CONFIG = "/etc/atproto-relay/config.toml"
# A test network's: hosts without TLS at private addresses.
SETTINGS = """\
plc_host = "http://plc:2582"
hosts = ["http://pds1:2583"]
allow_private_hosts = true
limits.events_per_hour = 1000000
limits.events_per_day = 1000000
"""


def main_pid():
    return relay.get_unit_property(UNIT, "MainPID")


def connected_through(before):
    wait_for_report(consumer, f".events > {before['events'] + 60}")
    intact(report(consumer))


start_all()

with subtest("the install script creates the user, the units and the configuration, and starts nothing"):
    # The guest's image has the user for the scenarios with NixOS' units.
    relay.succeed("userdel atproto-relay; ! getent passwd atproto-relay")
    relay.succeed(INSTALL)
    relay.succeed("getent passwd atproto-relay", "getent group atproto-relay")
    relay.fail(f"systemctl --quiet is-active {UNIT}")
    relay.succeed(f"systemctl --quiet is-enabled {UNITS}")

with subtest("systemd finds nothing wrong with the units, and scores the exposure of the service 1.5 or better"):
    said = relay.succeed(f"systemd-analyze verify --man=no --recursive-errors=no {UNITS} 2>&1")
    assert not said, said
    relay.succeed(f"systemd-analyze security --no-pager --threshold=15 {UNIT}")

with subtest("the relay starts, reports that it is ready, and is followed by a consumer"):
    relay.succeed(f"{{ echo {shlex.quote(SETTINGS)}; cat {CONFIG}; }} > /tmp/config && cat /tmp/config > {CONFIG}")
    relay.succeed(
        "mkdir /etc/systemd/system/atproto-relay.socket.d",
        "printf '[Socket]\\nListenStream=\\nListenStream=0.0.0.0:2470\\n'"
        " > /etc/systemd/system/atproto-relay.socket.d/listen.conf",
        "systemctl daemon-reload",
        f"systemctl start {UNIT}",
    )
    assert relay.get_unit_property(UNIT, "Type") == "notify-reload"
    wait_for_network(relay, consumer, [pds1])
    write(pds1, rate=20, accounts=5)
    wait_for_report(consumer, ".events > 60", timeout=120)

with subtest("a restart leaves the consumer connected, without a gap or a double"):
    before, pid = report(consumer), main_pid()
    relay.succeed(f"systemctl restart {UNIT}")
    assert main_pid() != pid
    connected_through(before)

with subtest("so does an upgrade: the install script again, and a restart"):
    before = report(consumer)
    relay.succeed(INSTALL, f"systemctl restart {UNIT}")
    relay.succeed(f"grep --quiet allow_private_hosts {CONFIG}")
    connected_through(before)

with subtest("a reload applies a changed setting in the same process"):
    pid = main_pid()
    relay.succeed(f"sed -i '1i max_consumers = 7' {CONFIG}", f"systemctl reload {UNIT}")
    assert main_pid() == pid
    applied = 'relay_config_reloads_total{outcome="applied"}'
    assert metrics(relay)[applied] == 1, metrics(relay)

with subtest("an admin password in the credential store opens the admin API on the public listener"):
    relay.fail("curl --silent --fail --user admin:not-to-be-seen http://127.0.0.1:2470/admin/pds/list")
    relay.succeed(
        "install -d --mode 700 /etc/credstore",
        "(umask 077; echo not-to-be-seen > /etc/credstore/atproto-relay.admin-password)",
        f"systemctl restart {UNIT}",
        "curl --silent --fail --user admin:not-to-be-seen http://127.0.0.1:2470/admin/pds/list",
    )

with subtest("without a password, the admin socket is for root and the relay's group"):
    ask_for_hosts = "curl --silent --fail --unix-socket /run/atproto-relay-admin.sock http://relay/admin/pds/list"
    relay.succeed(ask_for_hosts)
    relay.fail(f"runuser -u nobody -- {ask_for_hosts}")

with subtest("the consumer has what the PDS has"):
    write(pds1, rate=0)
    compare(consumer, [pds1], accounts=5)
    intact(report(consumer))
