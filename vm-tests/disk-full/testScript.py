# Other files fill the log's disk. The relay holds its events back, reports it, and continues by itself when there is space:
# consumers only see a pause.

LOG = "/var/lib/atproto-relay/log"

start_all()

with subtest("all machines are connected, and the PDS writes"):
    wait_for_network(relay, consumer, [pds1])
    write(pds1, rate=10, accounts=5)
    wait_for_report(consumer, ".events > 50", timeout=120)

with subtest("the disk is full: the relay accepts no more events, reports it, and stays up"):
    relay.execute(
        f"dd if=/dev/zero of={LOG}/filler bs=1M; dd if=/dev/zero of={LOG}/filler bs=4k oflag=append conv=notrunc"
    )
    write(pds1, rate=100)
    relay.wait_until_succeeds(f"curl --silent {METRICS}/metrics | grep -qx 'relay_log_failing 1'", timeout=300)
    relay.fail(f"curl --silent --fail {METRICS}/_health")
    relay.require_unit_state("atproto-relay.service")
    assert report(consumer)["connected"]

with subtest("there is space again: the relay continues by itself, on the same connection"):
    before = report(consumer)
    write(pds1, rate=10)
    relay.succeed(f"rm {LOG}/filler")
    wait_for_report(consumer, f".events > {before['events'] + 100}", timeout=120)
    # A problem ends when it has not been seen for five seconds.
    relay.wait_until_succeeds(f"curl --silent --fail {METRICS}/_health", timeout=30)

with subtest("no event was lost or duplicated"):
    write(pds1, rate=0)
    compare(consumer, [pds1], accounts=5, within=180)
    intact(report(consumer))
    assert relay.get_unit_property("atproto-relay.service", "NRestarts") == "0"
