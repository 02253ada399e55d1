"""The Envoy configurations in ``deploy/envoy``, run as they are shipped.

Only addresses, certificate files and the flush interval (a second in place of a minute) are changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from fleet import Bill, rows
from program import Sink, eventually

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.echo import TcpEcho
from proxy_usage.demo.envoy import EnvoyProcess
from proxy_usage.demo.listener import lease_port
from proxy_usage.demo.longlived import Address, LongStream, Tcp, WebSocket, client_hello
from proxy_usage.demo.upstream import Upstream

pytestmark = pytest.mark.e2e

DEPLOY = Path(__file__).parents[2] / "deploy" / "envoy"
LOCAL = "127.0.0.1"
ALPHA = "alpha.example.com"
OWNER: Mapping[str, Any] = {"envoy": {"flush_interval": "1s", "connection_logs": ["conn"]}}
"""What the files say of their sinks, with the test's interval."""
OTHER: Mapping[str, Any] = {
    "envoy": {"flush_interval": "1s", "long_streams": "elsewhere", "connection_logs": ["conn"]}
}


def shipped(name: str, ports: Mapping[int, int], tls: Path | None = None) -> dict[str, Any]:
    """A shipped configuration with other ports: each has its new number in ``ports``, 0 any free one."""
    text = (DEPLOY / name).read_text().replace("0.0.0.0", LOCAL)
    text = re.sub(r"port_value: (\d+)", lambda port: f"port_value: {ports[int(port[1])]}", text)
    text = text.replace("access_log_flush_interval: 60s", "access_log_flush_interval: 1s")
    text = text.replace("default_value: 53999", "default_value: 899")
    text = text.replace("default_value: 54000", "default_value: 900")
    if tls is not None:
        text = text.replace("/etc/envoy/tls", str(tls))
    document: dict[str, Any] = yaml.safe_load(text)
    return document


class Edge:
    """The shipped Envoy with peers, and what its clients counted per tenant."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.billing = BillingStandIn()
        self.upstream = Upstream()
        self.database = TcpEcho()
        self.envoy: EnvoyProcess
        self.truth: dict[str, Bill] = {}
        self.parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Edge:
        for part in (self.billing, self.upstream, self.database):
            await self.parts.enter_async_context(part)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.parts.aclose()

    async def sink(self, name: str, settings: Mapping[str, Any]) -> Sink:
        sink = Sink(self.directory / name, url=self.billing.url, settings=settings)
        return await self.parts.enter_async_context(sink)

    async def start(self, name: str, sinks: Mapping[int, int], tls: Path | None = None) -> None:
        """Starts the Envoy of a file. ``sinks``: its sinks' ports there and here."""
        servers = {8081: self.upstream.port, 5432: self.database.port}
        ports = dict.fromkeys((9901, 10080, 10432, 10443), 0) | servers | dict(sinks)
        envoy = EnvoyProcess(shipped(name, ports, tls), self.directory, buffer_flush_ms=1_000)
        self.envoy = await self.parts.enter_async_context(envoy)

    def at(self, listener: str) -> Address:
        return LOCAL, self.envoy.ports[listener]

    async def short_and_long(self, tenant: str, requests: int, make: Callable[[], LongStream]) -> None:
        """One stream that is over at once, and one that is billed while it is open."""
        have = self.truth.get(tenant, Bill(0, 0, 0))
        async with make() as short:
            await short.step(500)
            await short.end()
        async with make() as stream:
            await stream.step(1_000)
            over = have.ingress + short.written
            await eventually(lambda: self.bill(tenant).ingress > over, f"{tenant}: billed while open")
            await stream.step(2_000)
            await stream.end()
        counted = (short.written + stream.written, short.read + stream.read)
        self.truth[tenant] = Bill(
            have.requests + 2 * requests, have.ingress + counted[0], have.egress + counted[1]
        )

    def bill(self, tenant: str) -> Bill:
        sums = self.billing.sums()
        return Bill(*(sums.get((tenant, meter), 0) for meter in METERS[:3]))

    def bills(self) -> dict[str, Bill]:
        return {tenant: self.bill(tenant) for tenant in {tenant for tenant, _ in self.billing.sums()}}

    async def equal(self, *sinks: Sink) -> None:
        """Waits until the bills are right and everything is settled, and looks at them again."""
        await eventually(lambda: self.bills() == self.truth, "bills", why=lambda: (self.bills(), self.truth))
        for sink in sinks:
            await eventually(sink.idle, "everything is settled", why=sink.said)
            fates = rows(sink)
            assert fates.keys() <= {"counted", "skipped"}
            assert fates.get("skipped", {}).keys() <= {"listener"}
        assert self.bills() == self.truth
        # Every dimension that the files' tags are there for.
        for event in self.billing.stored.values():
            dimensions = event["data"]["dimensions"]
            assert dimensions["gateway"] == "edge"
            assert dimensions["region"] == "us-east-1"
            assert dimensions["project_name"] == event["subject"].removeprefix("projects/")
        assert self.billing.arrived.violations == []


async def test_one_sink(tmp_path: Path) -> None:
    async with Edge(tmp_path) as edge:
        sink = await edge.sink("sink", OWNER)
        await edge.start("envoy.yaml", {9001: sink.grpc_port})
        await edge.short_and_long("alpha", 1, lambda: WebSocket(edge.at("http"), ALPHA))
        await edge.short_and_long("alpha", 0, lambda: Tcp(edge.at("tcp")))
        await edge.equal(sink)


async def test_two_sinks(tmp_path: Path) -> None:
    async with Edge(tmp_path) as edge:
        streams = lease_port()
        owner, other = await asyncio.gather(
            edge.sink("owner", {**OWNER, "listen": {"streams": f"{LOCAL}:{streams}"}}),
            edge.sink("other", OTHER),
        )
        ports = {9001: owner.grpc_port, 9002: streams, 9011: other.grpc_port}
        await edge.start("envoy-two-sinks.yaml", ports)
        await edge.short_and_long("alpha", 1, lambda: WebSocket(edge.at("http"), ALPHA))
        await edge.short_and_long("alpha", 0, lambda: Tcp(edge.at("tcp")))
        await edge.equal(owner, other)


async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    for name, host in (("site", ALPHA), ("edge", "edge-1.example.net"), ("sink", "usage.example.net")):
        issued = authority.issue_cert(host)
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        for pem in issued.cert_chain_pems:
            pem.write_to_path(tmp_path / f"{name}.crt", append=True)
    tls = {
        "cert_file": str(tmp_path / "sink.crt"),
        "key_file": str(tmp_path / "sink.key"),
        "client_ca_file": str(tmp_path / "ca.crt"),
        "allow_san": ["dns:edge-1.example.net"],
    }
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with Edge(tmp_path) as edge:
        sink = await edge.sink("sink", {**OWNER, "listen": {"tls": tls}})
        await edge.start("envoy-tls.yaml", {9001: sink.grpc_port}, tmp_path)
        hello = client_hello("database.bravo.example.com")
        await edge.short_and_long("alpha", 1, lambda: WebSocket(edge.at("https"), ALPHA, tls=context))
        await edge.short_and_long("bravo", 0, lambda: Tcp(edge.at("https"), hello=hello))
        await edge.equal(sink)
