# Prometheus scrapes the relay, the machine and the database; an alert fires and clears; Grafana serves the dashboard.

PROMETHEUS = "http://127.0.0.1:9090"
GRAFANA = "http://127.0.0.1:3000"


def query(expression):
    """The samples of a query: their labels and values."""
    asked = f"curl --silent --fail --get --data-urlencode 'query={expression}' {PROMETHEUS}/api/v1/query"
    return json.loads(relay.succeed(asked))["data"]["result"]


def wait_for_sample(expression, timeout=90):
    relay.wait_until_succeeds(
        f"curl --silent --fail --get --data-urlencode 'query={expression}' {PROMETHEUS}/api/v1/query"
        " | jq --exit-status '.data.result | length > 0'",
        timeout=timeout,
    )


def wait_for_alert(name, state, timeout):
    relay.wait_until_succeeds(
        f"curl --silent --fail {PROMETHEUS}/api/v1/alerts"
        f' | jq --exit-status \'[.data.alerts[] | select(.labels.alertname == "{name}" and .state == "{state}")] | length > 0\'',
        timeout=timeout,
    )


start_all()

with subtest("Prometheus scrapes the relay, the machine's exporter and the database's"):
    relay.wait_for_unit("atproto-relay.service")
    relay.wait_for_unit("prometheus.service")
    for job in ["atproto-relay", "atproto-relay-node", "atproto-relay-postgres"]:
        wait_for_sample(f'up{{job="{job}"}} == 1')

with subtest("it has loaded the alert rules, and can evaluate each of them"):
    groups = ask(relay, f"{PROMETHEUS}/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"] if group["name"].startswith("atproto-relay")]
    assert len(rules) >= 10, rules
    relay.wait_until_succeeds(
        f"curl --silent --fail {PROMETHEUS}/api/v1/rules | jq --exit-status '[.data.groups[].rules[].health] | all(. == \"ok\")'"
    )

with subtest("Prometheus has metrics of events"):
    pds1.wait_for_unit("devnet.service")
    wait_for_hosts(relay, 1)
    write(pds1, rate=10, accounts=3)
    wait_for_sample("sum(relay_events_forwarded_total) > 20")
    wait_for_sample("pg_up == 1")

with subtest("every query of the dashboard is answered, and all but those for faults have data"):
    for job in ["atproto-relay-node", "atproto-relay-postgres"]:
        wait_for_sample(f'count_over_time(up{{job="{job}"}}[1m]) > 1')
    wait_for_sample('rate(relay_events_forwarded_total{kind="commit"}[1m]) > 0')
    panels = json.loads(relay.succeed("cat /etc/dashboard.json"))["panels"]
    silent = set()
    for panel in panels:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$instance", "relay")
            if not query(expression):
                silent.add(panel["title"])
    assert silent <= {"Firing alerts", "Drops by rule"}, silent

with subtest("none of it is open to the network"):
    for port in [2471, 9090, 9100, 9187, 3000]:
        pds1.fail(f"nc -z -w 2 relay {port}")

with subtest("the relay is stopped: the alert is pending, then fires"):
    relay.succeed("systemctl stop atproto-relay.service atproto-relay-metrics.socket")
    wait_for_alert("RelayDown", "pending", timeout=60)
    wait_for_alert("RelayDown", "firing", timeout=200)

with subtest("the relay is started: the alert clears"):
    relay.succeed("systemctl start atproto-relay-metrics.socket atproto-relay.service")
    relay.wait_for_unit("atproto-relay.service")
    relay.wait_until_succeeds(
        f"curl --silent --fail {PROMETHEUS}/api/v1/alerts"
        " | jq --exit-status '[.data.alerts[] | select(.labels.alertname == \"RelayDown\")] | length == 0'",
        timeout=120,
    )

if relay.execute("systemctl cat grafana.service")[0] == 0:
    with subtest("Grafana serves the dashboard, with its data source"):
        relay.wait_for_unit("grafana.service")
        relay.wait_for_open_port(3000)
        dashboards = ask(relay, f"{GRAFANA}/api/search?type=dash-db")
        assert dashboards, "no dashboard"
        dashboard = ask(relay, f"{GRAFANA}/api/dashboards/uid/{dashboards[0]['uid']}")
        assert dashboard["dashboard"]["panels"], dashboard
else:
    relay.log("skipped: Grafana serves the dashboard: Debian has no package of Grafana")
