# The relay restarts, is upgraded, crashes and reloads under load; the consumer's one connection goes through all of it.

pdses = [pds1, pds2]
UNIT = "atproto-relay.service"


def main_pid():
    return relay.get_unit_property(UNIT, "MainPID")


def forget_pause():
    ask(consumer, f"{CONSUMER}/forget-pause", {})


def went_on(before):
    """Events come again, on the connection there was; how long none came, as the consumer saw it."""
    wait_for_report(consumer, f".events > {before['events'] + 100}")
    said = report(consumer)
    intact(said)
    return said["longestPauseMillis"]


start_all()

with subtest("the network stands and writes forty records a second"):
    wait_for_network(relay, consumer, pdses)
    for pds in pdses:
        write(pds, rate=20, accounts=5)
    wait_for_report(consumer, ".events > 100")

with subtest("a restart leaves the consumer connected, without a gap or a double"):
    before, pid = report(consumer), main_pid()
    forget_pause()
    relay.succeed(f"systemctl restart {UNIT}")
    assert main_pid() != pid
    pause = went_on(before)
    relay.log(f"restart: {pause} ms without an event at the consumer")

with subtest("nobody is refused a connection while it restarts"):
    consumer.succeed(
        f"(for n in $(seq 150); do curl --silent --show-error --fail --max-time 20 {RELAY}/xrpc/_health"
        " --output /dev/null || echo refused; done; touch /tmp/knocked) > /tmp/knocks 2>&1 &"
    )
    before = report(consumer)
    relay.succeed(f"systemctl restart {UNIT}")
    went_on(before)
    consumer.wait_until_succeeds("test -e /tmp/knocked")
    assert "refused" not in consumer.succeed("cat /tmp/knocks")

with subtest("an upgrade, systemd reading its units anew and restarting, is no different"):
    before = report(consumer)
    relay.succeed("systemctl daemon-reload", f"systemctl restart {UNIT}")
    went_on(before)

with subtest("three restarts in a row are no different"):
    before = report(consumer)
    for _ in range(3):
        relay.succeed(f"systemctl restart {UNIT}")
    went_on(before)

with subtest("killed without warning, it is started again and takes the consumer up"):
    before, pid = report(consumer), main_pid()
    forget_pause()
    relay.succeed(f"kill -KILL {pid}")
    relay.wait_until_succeeds(f"systemctl is-active {UNIT} && [ $(systemctl show --value -p MainPID {UNIT}) != {pid} ]")
    pause = went_on(before)
    relay.log(f"kill: {pause} ms without an event at the consumer")

with subtest("a reload applies the configuration in the same process"):
    pid = main_pid()
    relay.succeed(f"systemctl reload {UNIT}")
    relay.require_unit_state(UNIT)
    assert main_pid() == pid

with subtest("it stops within two seconds under load"):
    before = report(consumer)
    took = relay.succeed(
        f"start=$(date +%s%N); systemctl stop {UNIT} 2> /dev/null; echo $(( ($(date +%s%N) - start) / 1000000 ))"
    )
    assert int(took) < 2000, took
    relay.log(f"stop: {took.strip()} ms")
    relay.succeed(f"systemctl start {UNIT}")

with subtest("what the PDSes have is what the consumer has"):
    wait_for_report(consumer, f".events > {before['events'] + 100}")
    for pds in pdses:
        write(pds, rate=0)
    compare(consumer, pdses, accounts=10)
    said = report(consumer)
    assert (said["gaps"], said["doubles"], said["bad"]) == (0, 0, 0), said
