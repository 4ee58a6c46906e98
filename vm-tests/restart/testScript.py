# The relay restarts, is upgraded, crashes and reloads under load; the consumer keeps one connection throughout.

pdses = [pds1, pds2]
UNIT = "atproto-relay.service"


def main_pid():
    return relay.get_unit_property(UNIT, "MainPID")


def forget_pause():
    ask(consumer, f"{CONSUMER}/forget-pause", {})


def went_on(before):
    """Asserts that events continue on the same connection; returns the consumer's longest pause in milliseconds."""
    wait_for_report(consumer, f".events > {before['events'] + 100}")
    said = report(consumer)
    intact(said)
    return said["longestPauseMillis"]


start_all()

with subtest("all machines are connected, and the PDSes write forty records a second"):
    wait_for_network(relay, consumer, pdses)
    for pds in pdses:
        write(pds, rate=20, accounts=5)
    wait_for_report(consumer, ".events > 100")

with subtest("a restart leaves the consumer connected, without a gap or a duplicate"):
    before, pid = report(consumer), main_pid()
    forget_pause()
    relay.succeed(f"systemctl restart {UNIT}")
    assert main_pid() != pid
    pause = went_on(before)
    relay.log(f"restart: {pause} ms without an event at the consumer")

with subtest("no connection is refused during a restart"):
    consumer.succeed(
        f"(for n in $(seq 150); do curl --silent --show-error --fail --max-time 20 {RELAY}/xrpc/_health"
        " --output /dev/null || echo refused; done; touch /tmp/knocked) > /tmp/knocks 2>&1 &"
    )
    before = report(consumer)
    relay.succeed(f"systemctl restart {UNIT}")
    went_on(before)
    consumer.wait_until_succeeds("test -e /tmp/knocked")
    assert "refused" not in consumer.succeed("cat /tmp/knocks")

with subtest("so does an upgrade: systemd reloads its units, and the relay restarts"):
    before = report(consumer)
    relay.succeed("systemctl daemon-reload", f"systemctl restart {UNIT}")
    went_on(before)

with subtest("so do three restarts in a row"):
    before = report(consumer)
    for _ in range(3):
        relay.succeed(f"systemctl restart {UNIT}")
    went_on(before)

with subtest("after kill -9, systemd starts it again, and it resumes the consumer"):
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

with subtest("the consumer has the same records as the PDSes"):
    wait_for_report(consumer, f".events > {before['events'] + 100}")
    for pds in pdses:
        write(pds, rate=0)
    compare(consumer, pdses, accounts=10)
    said = report(consumer)
    assert (said["gaps"], said["doubles"], said["bad"]) == (0, 0, 0), said
