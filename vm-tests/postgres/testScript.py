# The local database: its setup, and what the relay does while it is unavailable.

pdses = [pds1, pds2]


def query(text):
    return relay.succeed(
        f'runuser -u postgres -- psql --tuples-only --no-align --command="{text}" atproto-relay'
    ).strip()


start_all()

with subtest("role and database exist, and the relay has migrated its tables"):
    wait_for_network(relay, consumer, pdses)
    assert query("SELECT rolname FROM pg_roles WHERE rolname = 'atproto-relay'") == "atproto-relay"
    assert int(query("SELECT count(*) FROM _sqlx_migrations WHERE success")) > 0

with subtest("only the relay's user can connect, over the socket, without a password"):
    peer = "psql --host=/run/postgresql --username=atproto-relay --tuples-only --no-align atproto-relay"
    relay.succeed(f"runuser -u atproto-relay -- {peer} --command='SELECT 1'")
    relay.fail(f"runuser -u nobody -- {peer} --no-password --command='SELECT 1'")

with subtest("the settings of the module are in effect"):
    # Other databases keep their durability; the relay sets a lower one for the writes that allow it.
    assert query("SHOW synchronous_commit") == "on"
    assert query("SHOW wal_compression") not in ("off", "")
    assert float(query("SHOW autovacuum_vacuum_scale_factor")) < 0.1

with subtest("hosts and accounts are stored"):
    for pds in pdses:
        write(pds, rate=20, accounts=5)
    relay.wait_until_succeeds(
        "[ $(runuser -u postgres -- psql -Atc 'SELECT count(*) FROM accounts' atproto-relay) -ge 10 ]", timeout=60
    )
    assert int(query("SELECT count(*) FROM hosts")) == 2

with subtest("the database restarts under load: events continue, and none is lost"):
    before = report(consumer)
    relay.succeed("systemctl restart postgresql.service")
    wait_for_report(consumer, f".events > {before['events'] + 100}")
    relay.require_unit_state("atproto-relay.service")
    intact(report(consumer))

with subtest("the database is stopped for a while: the relay reports it, continues, and catches up by itself"):
    relay.succeed("systemctl stop postgresql.service")
    before = report(consumer)
    relay.wait_until_fails(f"curl --silent --fail {METRICS}/_health", timeout=60)
    wait_for_report(consumer, f".events > {before['events'] + 100}")
    relay.succeed("systemctl start postgresql.service")
    relay.wait_until_succeeds(f"curl --silent --fail {METRICS}/_health", timeout=90)
    relay.require_unit_state("atproto-relay.service")

with subtest("the consumer has the same records as the PDSes"):
    for pds in pdses:
        write(pds, rate=0)
    compare(consumer, pdses, accounts=10)
    intact(report(consumer))

with subtest("the database has the same accounts"):
    wait_for_accounts(relay, pdses)
    assert int(query("SELECT count(*) FROM accounts")) == 10
