# Hosts that forge, stall, replay and flood: the firehose has no forged event, and every true one once and in order.

start_all()

with subtest("the relay is ready; its hosts are not up yet"):
    relay.wait_for_unit("atproto-relay.service")
    hosts.wait_for_open_port(2470, addr="relay")

with subtest("five hosts with every fault: the firehose has exactly the events that it must have"):
    # The load records every event that it sends and its expected outcome, and reads the firehose itself.
    figures = hosts.succeed(
        "atproto-devnet load --relay http://$(getent ahostsv4 relay | head -n1 | cut -d ' ' -f 1):2470 --listen 0.0.0.0:3000 --name hosts --hosts 4 --accounts 80"
        " --events 2000 --rate 100 --fault all --fault-share 0.05 --interruptions 6 --records 20 --json",
        timeout=600,
    )
    found = json.loads(figures.strip().splitlines()[-1])
    assert found["clean"], found["report"]
    assert found["faults"] > 50, found
    hosts.log(found["report"])

with subtest("dropped events are counted under the rules that they broke"):
    counted = drops(relay)
    for rule in ["signature", "block_hash", "inversion", "wrong_host", "rev_order"]:
        assert counted.get(rule, 0) > 0, counted
    relay.log(f"dropped: {counted}")

with subtest("the relay is healthy: one process, no error in its journal"):
    assert relay.get_unit_property("atproto-relay.service", "NRestarts") == "0"
    relay.succeed(f"curl --silent --fail {METRICS}/_health")
    relay.fail("journalctl --unit=atproto-relay.service --priority=err --quiet | grep .")

with subtest("the admin API is closed to others: without a password, and on the port of the metrics"):
    hosts.fail(f"curl --silent --fail {RELAY}/admin/pds/list")
    hosts.fail(f"curl --silent --fail --user admin: {RELAY}/admin/pds/list")
    hosts.fail("nc -z -w 2 relay 2471")

with subtest("invalid and unfinished requests do not keep it from serving"):
    # Bash's connections fail if they cannot be opened.
    connect = "exec 3<> /dev/tcp/relay/2470"
    answer = hosts.succeed(f"{connect}; printf '\\x01\\x02 no request\\r\\n\\r\\n' >&3; timeout 10 head --lines=1 <&3")
    assert " 400 " in answer, answer
    hosts.succeed(f"{connect}; head --bytes=100000 /dev/urandom >&3 2> /dev/null || true")
    half = f"{connect}; printf 'GET /xrpc/' >&3; read -t 20 -u 3 || true"
    hosts.succeed(f"for n in $(seq 50); do setsid bash -c {shlex.quote(half)} < /dev/null > /dev/null 2>&1 & done")
    relay.wait_until_succeeds("[ $(ss -Htn state established '( sport = :2470 )' | wc -l) -ge 50 ]")
    hosts.succeed(f"curl --silent --fail --max-time 5 {RELAY}/xrpc/_health")
