"""The long streams' clients count what Envoy counts, kind by kind, on a real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy_usage.demo.bootstrap import EnvoyOptions, TcpProxy, bootstrap
from proxy_usage.demo.echo import GrpcEcho, TcpEcho
from proxy_usage.demo.envoy import EnvoyProcess, validate
from proxy_usage.demo.http1 import TrafficError
from proxy_usage.demo.loggers import BY_CHAIN
from proxy_usage.demo.longlived import (
    Address,
    Connect,
    EventStream,
    Grpc,
    LongStream,
    Tcp,
    WebSocket,
    client_hello,
)
from proxy_usage.demo.truth import tenants
from proxy_usage.demo.upstream import Upstream

pytestmark = pytest.mark.e2e
DEPLOY = Path(__file__).parents[2] / "deploy" / "envoy"
TENANTS = tenants(1)
HOST = TENANTS[0].host
KINDS = ("websocket", "connect", "grpc", "events", "tcp", "tls")
PROXIES = (TcpProxy("tcp", "bravo"), TcpProxy("charlie", sni="charlie.example.com", project=BY_CHAIN))


class Edge:
    """An Envoy with an upstream of each kind."""

    def __init__(self, envoy: EnvoyProcess, publisher: Address, log: Path) -> None:
        self.envoy, self._publisher, self._log = envoy, publisher, log

    def stream(self, kind: str) -> LongStream:
        http = ("127.0.0.1", self.envoy.port)
        if kind == "tcp":
            return Tcp(("127.0.0.1", self.envoy.ports["tcp"]))
        if kind == "tls":
            return Tcp(("127.0.0.1", self.envoy.ports["tls"]), hello=client_hello("charlie.example.com"))
        if kind == "events":
            return EventStream(http, HOST, publisher=self._publisher)
        if kind == "websocket":
            return WebSocket(http, HOST)
        return Connect(http, HOST) if kind == "connect" else Grpc(http, HOST)

    async def rows(self) -> list[dict[str, Any]]:
        """Envoy's own, once there is one."""
        await self.envoy.drain()
        async with asyncio.timeout(60):
            while b"\n" not in self._log.read_bytes():
                await asyncio.sleep(0.05)
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    async with contextlib.AsyncExitStack() as parts:
        upstream = await parts.enter_async_context(Upstream())
        tcp = await parts.enter_async_context(TcpEcho())
        grpc = await parts.enter_async_context(GrpcEcho())
        options = EnvoyOptions(
            TENANTS,
            ("127.0.0.1", upstream.port),
            access_log=tmp_path / "access.jsonl",
            tcp=PROXIES,
            tcp_upstream=(tcp.host, tcp.port),
            tunnel=(tcp.host, tcp.port),
            grpc_upstream=(grpc.host, grpc.port),
        )
        envoy = await parts.enter_async_context(EnvoyProcess(bootstrap(options), tmp_path))
        yield Edge(envoy, ("127.0.0.1", upstream.port), tmp_path / "access.jsonl")


@pytest.mark.parametrize("kind", KINDS)
async def test_counts_equal_envoys(edge: Edge, kind: str) -> None:
    async with edge.stream(kind) as stream:
        for size in (0, 1, 125, 126, 5_000, 60_000):
            before = stream.read
            await stream.step(size)
            assert stream.read >= before + size
        await stream.end()
    (row,) = await edge.rows()
    assert (row["wire_in"], row["wire_out"]) == (stream.written, stream.read)
    assert stream.read >= 65_252
    status = {"websocket": 101, "tcp": 0, "tls": 0}.get(kind, 200)
    assert row["status"] == status


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_that_breaks_says_so(edge: Edge, kind: str) -> None:
    async with edge.stream(kind) as stream:
        await stream.step(10)
        edge.envoy.kill()
        await edge.envoy.stop()
        with pytest.raises(TrafficError, match="broke"):
            await stream.step(1)
    with pytest.raises(TrafficError, match="open: the stream broke"):
        async with edge.stream(kind):
            pass
    with pytest.raises(TrafficError, match="closed"):
        await stream.step(1)


async def test_what_is_not_there_is_named(edge: Edge) -> None:
    http = ("127.0.0.1", edge.envoy.port)
    for stream in (WebSocket(http, "nobody.example.com"), Connect(http, "nobody.example.com")):
        with pytest.raises(TrafficError, match="404"):
            async with stream:
                pass
    async with edge.stream("events"):
        with pytest.raises(TrafficError, match="409"):
            async with edge.stream("events"):
                pass


async def test_split_loggers_of_tcp_are_valid(tmp_path: Path) -> None:
    sinks = [("127.0.0.1", 9001), ("127.0.0.1", 9011)]
    options = EnvoyOptions(
        TENANTS,
        ("127.0.0.1", 9),
        als=sinks,
        streams_als=("127.0.0.1", 9002),
        astray_als=sinks[0],
        flush_interval_ms=1000,
        tcp=PROXIES,
        tcp_upstream=("127.0.0.1", 10),
        tunnel=("127.0.0.1", 10),
        grpc_upstream=("127.0.0.1", 11),
    )
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(bootstrap(options)))
    assert "OK" in await validate(path)


def tcp_loggers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The common configurations of all TCP proxies' gRPC loggers."""
    return [
        log["typed_config"]["common_config"]
        for listener in document["static_resources"]["listeners"]
        for chain in listener["filter_chains"]
        for filter_ in chain["filters"]
        if filter_["name"] == "envoy.filters.network.tcp_proxy"
        for log in filter_["typed_config"]["access_log"]
    ]


@pytest.mark.parametrize(
    ("name", "logs"),
    [
        ("envoy.yaml", ["tcp"]),
        ("envoy-tls.yaml", ["tcp"]),
        ("envoy-two-sinks.yaml", ["tcp", "tcp-open"]),
    ],
)
def test_demo_and_deployed_tcp_loggers_send_the_same_tags(name: str, logs: list[str]) -> None:
    demo = bootstrap(EnvoyOptions(TENANTS, ("127.0.0.1", 9), als=[("127.0.0.1", 9001)], tcp=PROXIES))
    wanted = {tag["tag"] for tag in tcp_loggers(demo)[0]["custom_tags"]}
    assert wanted >= {"project_name", "conn_id", "emit_us", "dur_ms"}
    deployed = tcp_loggers(yaml.safe_load((DEPLOY / name).read_text()))
    assert [logger["log_name"] for logger in deployed] == logs
    assert all({tag["tag"] for tag in logger["custom_tags"]} == wanted for logger in deployed)
