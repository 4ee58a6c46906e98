# A PDS is disconnected from the network and reconnected, then the directory, then the relay.

pdses = [pds1, pds2]

start_all()

with subtest("all machines are connected, and both PDSes write"):
    wait_for_network(relay, consumer, pdses)
    for pds in pdses:
        write(pds, rate=10, accounts=5)
    wait_for_report(consumer, ".events > 100")

with subtest("a PDS is disconnected: events of the other one continue"):
    pds1.block()
    relay.wait_until_fails("nc -z -w 1 pds1 2583")
    before = report(consumer)
    wait_for_report(consumer, f".events > {before['events'] + 100}")
    relay.fail("nc -z -w 1 pds1 2583")

with subtest("it is reconnected: the relay resumes from its cursor, and nothing is missing"):
    pds1.unblock()
    relay.wait_until_succeeds("nc -z -w 1 pds1 2583", timeout=60)
    wait_for_hosts(relay, 2, timeout=180)
    for pds in pdses:
        write(pds, rate=0)
    compare(consumer, pdses, accounts=10, within=120)
    intact(report(consumer))

with subtest("the directory is unreachable: events of known accounts continue"):
    plc.block()
    before = report(consumer)
    write(pds2, rate=10)
    wait_for_report(consumer, f".events > {before['events'] + 50}")

with subtest("no account can be created without it, and the relay stays up"):
    pds2.fail(
        "curl --silent --fail --max-time 20 -H 'content-type: application/json'"
        ' -d \'{"handle": "new.pds2.test"}\' http://pds2:2583/xrpc/com.atproto.server.createAccount'
    )
    relay.require_unit_state("atproto-relay.service")

with subtest("the directory is reachable: events of a new account are forwarded"):
    plc.unblock()
    pds2.wait_until_succeeds("nc -z -w 1 plc 2582", timeout=60)
    write(pds2, rate=10, accounts=6)
    write(pds2, rate=0)
    compare(consumer, pdses, accounts=11, within=120)
    intact(report(consumer))

with subtest("the relay is disconnected and reconnected: it reaches its hosts, and the consumer reaches it"):
    relay.block()
    write(pds1, rate=10)
    pds1.wait_until_fails("nc -z -w 1 relay 2470")
    relay.unblock()
    wait_for_hosts(relay, 2, timeout=180)
    write(pds1, rate=0)
    compare(consumer, pdses, accounts=11, within=120)
    said = report(consumer)
    assert (said["gaps"], said["doubles"], said["bad"]) == (0, 0, 0), said
