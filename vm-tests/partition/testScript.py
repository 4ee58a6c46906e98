# A PDS is cut off from the network and comes back; then the directory is away.

pdses = [pds1, pds2]

start_all()

with subtest("the network stands, and both PDSes write"):
    wait_for_network(relay, consumer, pdses)
    for pds in pdses:
        write(pds, rate=10, accounts=5)
    wait_for_report(consumer, ".events > 100")

with subtest("a PDS is cut off: what it writes meanwhile stays with it, the other's goes on"):
    pds1.block()
    relay.wait_until_fails("nc -z -w 1 pds1 2583")
    before = report(consumer)
    wait_for_report(consumer, f".events > {before['events'] + 100}")
    relay.fail("nc -z -w 1 pds1 2583")

with subtest("it comes back: the relay goes on from its cursor, and nothing is missing"):
    pds1.unblock()
    relay.wait_until_succeeds("nc -z -w 1 pds1 2583", timeout=60)
    wait_for_hosts(relay, 2, timeout=180)
    for pds in pdses:
        write(pds, rate=0)
    compare(consumer, pdses, accounts=10, within=120)
    intact(report(consumer))

with subtest("the directory is away: accounts that are known go on"):
    plc.block()
    before = report(consumer)
    write(pds2, rate=10)
    wait_for_report(consumer, f".events > {before['events'] + 50}")

with subtest("no account can be made without it, and the relay has not lost its mind"):
    pds2.fail(
        "curl --silent --fail --max-time 20 -H 'content-type: application/json'"
        ' -d \'{"handle": "new.pds2.test"}\' http://pds2:2583/xrpc/com.atproto.server.createAccount'
    )
    relay.require_unit_state("atproto-relay.service")

with subtest("the directory is back: a new account comes through"):
    plc.unblock()
    pds2.wait_until_succeeds("nc -z -w 1 plc 2582", timeout=60)
    write(pds2, rate=10, accounts=6)
    write(pds2, rate=0)
    compare(consumer, pdses, accounts=11, within=120)
    intact(report(consumer))

with subtest("the relay's own cable is pulled: hosts and the consumer find it again"):
    relay.block()
    write(pds1, rate=10)
    pds1.wait_until_fails("nc -z -w 1 relay 2470")
    relay.unblock()
    wait_for_hosts(relay, 2, timeout=180)
    write(pds1, rate=0)
    compare(consumer, pdses, accounts=11, within=120)
    said = report(consumer)
    assert (said["gaps"], said["doubles"], said["bad"]) == (0, 0, 0), said
