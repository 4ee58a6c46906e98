# The power of the relay's machine is cut twice under load: every event that a consumer received is still in the log, and no
# event is lost or duplicated.

pdses = [pds1, pds2]

start_all()

with subtest("all machines are connected, and the PDSes write"):
    wait_for_network(relay, consumer, pdses)
    for pds in pdses:
        write(pds, rate=10, accounts=5)
    wait_for_report(consumer, ".events > 100", timeout=120)

for cut in ["first", "second"]:
    with subtest(f"the {cut} power cut, under load: the relay restarts and continues after the consumer's last event"):
        before = report(consumer)
        relay.crash()
        relay.start()
        relay.wait_for_unit("atproto-relay.service")
        wait_for_report(consumer, f".connected and .events > {before['events'] + 100}", timeout=180)

with subtest("the log is intact: all of it can be read"):
    verified = relay.succeed("atproto-relay log verify --data-dir /var/lib/atproto-relay")
    relay.log(verified.strip().splitlines()[-1])

with subtest("the consumer, which reconnected with its cursor each time, has neither a gap nor a duplicate"):
    intact(report(consumer), connections=report(consumer)["connections"])
    assert report(consumer)["connections"] >= 3

with subtest("the consumer has the same records as the PDSes: nothing was lost"):
    for pds in pdses:
        write(pds, rate=0)
    compare(consumer, pdses, accounts=10, within=180)
    intact(report(consumer), connections=report(consumer)["connections"])

with subtest("the database recovered, and agrees"):
    wait_for_accounts(relay, pdses)
