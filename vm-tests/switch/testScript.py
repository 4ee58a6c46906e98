# `nixos-rebuild switch` to a system with other packages, and back: the disks stay mounted, the database keeps running, and
# the consumer keeps its connection. The earlier release runs on a database that the later one has migrated.

UNIT = "atproto-relay.service"
VOLUMES = {"/var/lib/atproto-relay/log": "log", "/var/lib/postgresql": "database"}
LATER = """
ALTER TABLE hosts ADD COLUMN of_a_later_release TEXT;
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
VALUES (9000, 'of a later release', TRUE, '', 0);
"""


def main_pid(unit):
    return relay.get_unit_property(unit, "MainPID")


def program():
    return relay.get_unit_property(UNIT, "ExecStart").split("path=")[1].split(" ")[0]


def mounts():
    """The kernel's ID of each mount, which is new for each mount operation."""
    return [relay.succeed(f"findmnt --noheadings --output ID --mountpoint {path}").strip() for path in VOLUMES]


def switch(system):
    """Switches to a system, and asserts that the relay is that system's and everything else is unchanged."""
    said, disks, pid, at = report(consumer), mounts(), main_pid(UNIT), program()
    database = main_pid("postgresql.service")
    prepared = [relay.get_unit_property(f"atproto-relay-prepare-{role}", "InvocationID") for role in VOLUMES.values()]
    relay.succeed(f"switch-to {system}", timeout=120)
    relay.wait_for_unit(UNIT)
    assert program() != at, at
    assert main_pid(UNIT) != pid
    assert mounts() == disks
    assert main_pid("postgresql.service") == database
    for role, invocation in zip(VOLUMES.values(), prepared):
        unit = f"atproto-relay-prepare-{role}"
        relay.require_unit_state(f"{unit}.service")
        assert relay.get_unit_property(unit, "InvocationID") == invocation
    wait_for_report(consumer, f".events > {said['events'] + 40}")
    intact(report(consumer))


start_all()

with subtest("all machines are connected, and the PDS writes twenty records a second; the disks are prepared"):
    wait_for_network(relay, consumer, [pds1])
    write(pds1, rate=20, accounts=5)
    wait_for_report(consumer, ".events > 40")
    for unit in ["atproto-relay-prepare-log", "atproto-relay-prepare-database"]:
        relay.require_unit_state(f"{unit}.service")
    assert len(mounts()) == 2

with subtest("a switch to other packages restarts only the relay: disks, database and consumer stay connected"):
    switch("updated")

with subtest("the earlier release runs on a database that the later one has migrated"):
    relay.succeed(f'runuser -u postgres -- psql --quiet --set=ON_ERROR_STOP=1 --command="{LATER}" atproto-relay')
    switch("former")

with subtest("the operator's command uses the configuration, the user and the socket of the service"):
    relay.succeed(
        "cd / && atproto-relay check-config | grep --quiet 'data_dir = \"/var/lib/atproto-relay\"'",
        "cd / && atproto-relay check-config | grep --quiet 'admin API: on'",
    )
    relay.fail("ls /data")

with subtest("the consumer has the same records as the PDS"):
    write(pds1, rate=0)
    compare(consumer, [pds1], accounts=5)
    intact(report(consumer))
