# What the scenarios say in common; it stands before each testScript.

import json
import shlex

RELAY = "http://relay:2470"
METRICS = "http://127.0.0.1:2471"
CONSUMER = "http://127.0.0.1:2590"
POST = "app.bsky.feed.post"


def ask(machine, url, body=None, token=None):
    """A request from a machine; the answer's JSON, or its text."""
    command = "curl --silent --show-error --fail-with-body --max-time 30"
    if body is not None:
        command += f" --header 'content-type: application/json' --data {shlex.quote(json.dumps(body))}"
    if token is not None:
        command += f" --header 'authorization: Bearer {token}'"
    answer = machine.succeed(f"{command} {shlex.quote(url)}")
    return json.loads(answer) if answer[:1] in ("{", "[") else answer


def metrics(machine):
    """The relay's metrics, by name and labels as written."""
    lines = machine.succeed(f"curl --silent --fail {METRICS}/metrics").splitlines()
    samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in samples}


def drops(machine):
    """Events dropped, by rule."""
    start = 'relay_events_dropped_total{rule="'
    counted = {name: count for name, count in metrics(machine).items() if name.startswith(start) and count > 0}
    return {name[len(start) : -2]: count for name, count in counted.items()}


def wait_for_hosts(machine, count, timeout=60):
    """Waits until the relay is connected to so many hosts."""
    connected = f"grep -qx 'relay_hosts{{state=\"connected\"}} {count}'"
    machine.wait_until_succeeds(f"curl --silent --fail {METRICS}/metrics | {connected}", timeout=timeout)


def wait_for_report(machine, condition, timeout=60):
    """Waits until a consumer's report fulfils a condition of jq."""
    machine.wait_until_succeeds(
        f"curl --silent --fail {CONSUMER}/report | jq --exit-status '{condition}'", timeout=timeout
    )


def report(machine):
    """What a consumer says of its connection."""
    return ask(machine, f"{CONSUMER}/report")


def intact(said, connections=1):
    """A consumer's report without a gap, a double or an unproven event."""
    wrong = {key: said[key] for key in ("gaps", "doubles", "bad") if said[key] != 0}
    assert not wrong, said
    assert said["connections"] == connections, said


def write(machine, rate, accounts=0):
    """Lets a PDS write so many records a second into its accounts, of which there are so many at least."""
    ask(machine, "http://127.0.0.1:2583/devnet/traffic", {"accounts": accounts, "rate": rate})


def compare(machine, pdses, accounts, within=60):
    """Waits until a consumer has what the PDSes have."""
    of = " ".join(f"--pds http://{pds.name}:2583" for pds in pdses)
    machine.succeed(
        f"atproto-devnet compare --consumer {CONSUMER} {of} --accounts {accounts} --within {within}",
        timeout=within + 60,
    )


def wait_for_accounts(relay, pdses):
    """Waits until the relay's database has the last revision of every account."""
    for pds in pdses:
        for held in ask(pds, f"http://{pds.name}:2583/devnet/repositories"):
            latest = f"{RELAY}/xrpc/com.atproto.sync.getLatestCommit?did={held['did']}"
            known = f"jq --exit-status '.rev == \"{held['rev']}\"'"
            relay.wait_until_succeeds(f"curl --silent --fail '{latest}' | {known}", timeout=60)


def wait_for_network(relay, consumer, pdses):
    """Waits until the relay is ready, connected to every PDS, and followed by the consumer."""
    relay.wait_for_unit("atproto-relay.service")
    for pds in pdses:
        pds.wait_for_unit("devnet.service")
        pds.wait_for_open_port(2583)
    wait_for_hosts(relay, len(pdses))
    consumer.wait_for_unit("devnet.service")
    wait_for_report(consumer, ".connected")
