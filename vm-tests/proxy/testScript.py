# A thousand consumers through each proxy, in the module's configuration. The relay counts them by their own address, not by
# the proxy's.

HANDSHAKE = (
    "curl --silent --include --max-time 5 --header 'Connection: Upgrade' --header 'Upgrade: websocket'"
    " --header 'Sec-WebSocket-Version: 13' --header 'Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=='"
    " http://{}/xrpc/com.atproto.sync.subscribeRepos 2> /dev/null | head --lines=1 || true"
)
# Each consumer is a connection of the load generator.
LOAD = (
    "systemd-run --quiet --unit=crowd-{name} --property=LimitNOFILE=16384 --property=StandardOutput=file:/tmp/{name}"
    " $(command -v atproto-devnet) load --relay http://$(getent ahostsv4 {name} | head -n1 | cut -d ' ' -f 1):80"
    " --listen 0.0.0.0:{port} --name load --hosts 1 --accounts 10 --events 60 --rate 6 --records 10"
    " --consumers 1000 --json"
)

start_all()

for proxy, port in [(caddy, 3000), (nginx, 4000)]:
    with subtest(f"{proxy.name} passes a thousand consumers, and one that checks the events"):
        proxy.wait_for_unit("atproto-relay.service")
        proxy.wait_for_unit(f"{proxy.name}.service")
        load.wait_for_open_port(80, addr=proxy.name)
        load.succeed(LOAD.format(name=proxy.name, port=port))
        proxy.wait_until_succeeds(f"curl --silent {METRICS}/metrics | grep --line-regexp 'relay_consumers 1001'")

    with subtest(f"behind {proxy.name} the next consumer from that address is refused, and one from another address is not"):
        assert " 429 " in load.succeed(HANDSHAKE.format(proxy.name)), "the 1002nd from one address"
        assert " 101 " in proxy.succeed(HANDSHAKE.format("$(hostname)")), "the first from another"

    with subtest(f"the events through {proxy.name} are complete"):
        load.wait_until_fails(f"systemctl --quiet is-active crowd-{proxy.name}")
        found = json.loads(load.succeed(f"cat /tmp/{proxy.name}").strip().splitlines()[-1])
        assert found["clean"], found["report"]

    with subtest(f"{proxy.name} passes the firehose and the XRPC methods, but not the private paths"):
        load.succeed(f"curl --silent --fail http://{proxy.name}/xrpc/_health")
        for path in ["metrics", "admin/pds/list", "_health"]:
            load.fail(f"curl --silent --fail http://{proxy.name}/{path}")
