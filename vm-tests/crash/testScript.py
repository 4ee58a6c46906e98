# The power of the relay's machine is cut under load, again and again: what a consumer was given is still in the log,
# and nothing is lost or given twice.

pdses = [pds1, pds2]

start_all()

with subtest("the network stands and writes"):
    wait_for_network(relay, consumer, pdses)
    for pds in pdses:
        write(pds, rate=10, accounts=5)
    wait_for_report(consumer, ".events > 100", timeout=120)

for cut in ["first", "second"]:
    with subtest(f"the {cut} power cut, under load: the machine comes back and goes on where consumers are"):
        before = report(consumer)
        relay.crash()
        relay.start()
        relay.wait_for_unit("atproto-relay.service")
        wait_for_report(consumer, f".connected and .events > {before['events'] + 100}", timeout=180)

with subtest("the log is whole: every byte of it can be read back"):
    verified = relay.succeed("atproto-relay log verify --data-dir /var/lib/atproto-relay")
    relay.log(verified.strip().splitlines()[-1])

with subtest("the consumer, which came back with its cursor each time, has neither a gap nor a double"):
    intact(report(consumer), connections=report(consumer)["connections"])
    assert report(consumer)["connections"] >= 3

with subtest("what the PDSes have is what the consumer has: nothing was lost"):
    for pds in pdses:
        write(pds, rate=0)
    compare(consumer, pdses, accounts=10, within=180)
    intact(report(consumer), connections=report(consumer)["connections"])

with subtest("the database came back too, and agrees"):
    wait_for_accounts(relay, pdses)
