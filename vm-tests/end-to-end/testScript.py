# Three PDSes, a directory, a relay and a consumer, each on its own machine: what the consumer builds from the firehose equals
# what the PDSes have.

pdses = [pds1, pds2, pds3]
people: dict[str, dict] = {}


def create_account(pds, name):
    handle = f"{name}.{pds.name}.test"
    url = f"http://{pds.name}:2583/xrpc/com.atproto.server.createAccount"
    people[handle] = ask(pds, url, {"handle": handle, "password": "secret"})


def post(pds, person, text):
    record = {"$type": POST, "text": text, "createdAt": "2026-01-01T00:00:00Z"}
    body = {"repo": person["did"], "collection": POST, "record": record}
    return ask(pds, f"http://{pds.name}:2583/xrpc/com.atproto.repo.createRecord", body, person["accessJwt"])


start_all()

with subtest("the relay and its database are ready"):
    relay.wait_for_unit("atproto-relay.service")
    relay.wait_for_unit("postgresql.service")
    assert relay.get_unit_property("atproto-relay.service", "Type") == "notify-reload"
    tables = relay.succeed("runuser -u postgres -- psql --tuples-only --command='\\dt' atproto-relay")
    assert "account" in tables, tables

with subtest("it subscribes to the two configured hosts"):
    for pds in [pds1, pds2]:
        pds.wait_for_unit("devnet.service")
    wait_for_hosts(relay, 2)

with subtest("a third PDS announces itself with requestCrawl"):
    pds3.wait_for_open_port(2583)
    ask(pds3, "http://pds3:2583/devnet/requestCrawl", {"relay": RELAY})
    wait_for_hosts(relay, 3)

with subtest("a consumer is connected"):
    wait_for_report(consumer, ".connected")

with subtest("accounts and posts of every PDS reach the consumer"):
    for pds in pdses:
        for name in ["ada", "bela"]:
            create_account(pds, name)
    for handle, person in people.items():
        home = pdses[int(handle.split(".")[1][-1]) - 1]
        for text in ["one", "two", "three"]:
            post(home, person, text)
    compare(consumer, pdses, accounts=6)

with subtest("an account moves from one PDS to another, and writes there"):
    moved = ask(
        pds1,
        "http://pds1:2583/devnet/migrateAccount",
        {"did": people["ada.pds1.test"]["did"], "pds": "http://pds2:2583"},
    )
    post(pds2, moved, "moved")
    compare(consumer, pdses, accounts=6)

with subtest("a deleted account, a deactivated one and a deleted record disappear at the consumer"):
    gone = {"did": people["bela.pds2.test"]["did"], "password": "secret", "token": ""}
    ask(pds2, "http://pds2:2583/xrpc/com.atproto.server.deleteAccount", gone)
    asleep = people["bela.pds3.test"]["accessJwt"]
    ask(pds3, "http://pds3:2583/xrpc/com.atproto.server.deactivateAccount", {}, asleep)
    writer = people["ada.pds3.test"]
    rkey = post(pds3, writer, "a slip")["uri"].rsplit("/", 1)[1]
    deletion = {"repo": writer["did"], "collection": POST, "rkey": rkey}
    ask(pds3, "http://pds3:2583/xrpc/com.atproto.repo.deleteRecord", deletion, writer["accessJwt"])
    compare(consumer, pdses, accounts=4)

with subtest("all PDSes create, update and delete records at once"):
    for pds in pdses:
        write(pds, rate=30, accounts=10)
    wait_for_report(consumer, ".events > 600", timeout=120)
    for pds in pdses:
        write(pds, rate=0)
    compare(consumer, pdses, accounts=30)

with subtest("no event was lost, duplicated or unverified, on one connection"):
    intact(report(consumer))
    # The old PDS of the moved account reports that it is deactivated there, without authority.
    assert set(drops(relay)) <= {"wrong_host"}, drops(relay)

with subtest("every signature is valid, read again from the beginning of the log"):
    last = report(consumer)["lastSeq"]
    consumer.succeed(
        f"(atproto-relay firehose {RELAY} --cursor 0 --verify --json --plc-host http://plc:2582 --allow-private-hosts"
        " > /tmp/verified 2>&1 &)"
    )
    consumer.wait_until_succeeds(f"tail --lines=1 /tmp/verified | jq --exit-status '.seq >= {last}'", timeout=60)
    # The directory has the account's current key: commits from before the move are excluded.
    mover = people["ada.pds1.test"]["did"]
    count = f"grep --invert-match {mover} /tmp/verified | grep --count '\"valid\":%s' || true"
    valid, invalid = (int(consumer.succeed(count % word)) for word in ("true", "false"))
    assert valid > 500 and invalid == 0, (valid, invalid)
