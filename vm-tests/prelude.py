# Functions shared by the scenarios; this file is put before each testScript.

import json
import shlex

RELAY = "http://relay:2470"
METRICS = "http://127.0.0.1:2471"
CONSUMER = "http://127.0.0.1:2590"
POST = "app.bsky.feed.post"


def ask(machine, url, body=None, token=None):
    """Sends a request from a machine, and returns the JSON or the text of the answer."""
    command = "curl --silent --show-error --fail-with-body --max-time 30"
    if body is not None:
        command += f" --header 'content-type: application/json' --data {shlex.quote(json.dumps(body))}"
    if token is not None:
        command += f" --header 'authorization: Bearer {token}'"
    answer = machine.succeed(f"{command} {shlex.quote(url)}")
    return json.loads(answer) if answer[:1] in ("{", "[") else answer


def metrics(machine):
    """The relay's metrics by name and labels as printed."""
    lines = machine.succeed(f"curl --silent --fail {METRICS}/metrics").splitlines()
    samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in samples}


def drops(machine):
    """Events dropped, by rule."""
    start = 'relay_events_dropped_total{rule="'
    counted = {name: count for name, count in metrics(machine).items() if name.startswith(start) and count > 0}
    return {name[len(start) : -2]: count for name, count in counted.items()}


def wait_for_hosts(machine, count, timeout=60):
    """Waits until the relay is connected to `count` hosts."""
    connected = f"grep -qx 'relay_hosts{{state=\"connected\"}} {count}'"
    machine.wait_until_succeeds(f"curl --silent --fail {METRICS}/metrics | {connected}", timeout=timeout)


def wait_for_report(machine, condition, timeout=60):
    """Waits until a consumer's report satisfies a condition of jq."""
    machine.wait_until_succeeds(
        f"curl --silent --fail {CONSUMER}/report | jq --exit-status '{condition}'", timeout=timeout
    )


def report(machine):
    """The report of a consumer on its connection."""
    return ask(machine, f"{CONSUMER}/report")


def intact(said, connections=1):
    """Asserts that a consumer's report has no gap, no duplicate and no unverified event."""
    wrong = {key: said[key] for key in ("gaps", "doubles", "bad") if said[key] != 0}
    assert not wrong, said
    assert said["connections"] == connections, said


def write(machine, rate, accounts=0):
    """Makes a PDS write `rate` records a second into its accounts, after creating accounts up to `accounts`."""
    ask(machine, "http://127.0.0.1:2583/devnet/traffic", {"accounts": accounts, "rate": rate})


def compare(machine, pdses, accounts, within=60):
    """Waits until a consumer has the same records as the PDSes."""
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
    """Waits until the relay is ready and connected to every PDS, and the consumer is connected to the relay."""
    relay.wait_for_unit("atproto-relay.service")
    for pds in pdses:
        pds.wait_for_unit("devnet.service")
        pds.wait_for_open_port(2583)
    wait_for_hosts(relay, len(pdses))
    consumer.wait_for_unit("devnet.service")
    wait_for_report(consumer, ".connected")
