"""An Envoy as Envoy Gateway configures it, with the patches of deploy/envoy-gateway.

Only addresses, the certificate, and the flush interval (a second in place of a minute) are changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from envoy_gateway import Xds, readme_blocks, shipped
from fleet import Bill, rows
from pki import Authority
from program import Sink, eventually, merged

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.envoy import EnvoyProcess
from proxy_usage.demo.http1 import Http1Client
from proxy_usage.demo.listener import lease_port
from proxy_usage.demo.longlived import Address, LongStream, WebSocket
from proxy_usage.demo.upstream import Upstream

pytestmark = pytest.mark.e2e

LOCAL = "127.0.0.1"
TENANTS = ("alpha", "bravo")
A_SECOND = {"flush_interval: 60s": "flush_interval: 1s", ": 53999": ": 899", ": 54000": ": 900"}
OWNER, OTHERS, OF_A_VIRTUAL_HOST, MERGED_TAG, MERGED_DIMENSIONS = readme_blocks()


class Gateway:
    """Clients' side of it: Envoy with its peers, and what clients counted per tenant."""

    def __init__(self, directory: Path, *, one_for_many: bool = False) -> None:
        self.directory = directory
        self.one_for_many = one_for_many
        """Whether it does as the README says for mergeGateways."""
        self.billing = BillingStandIn()
        self.truth = dict.fromkeys(TENANTS, Bill(0, 0, 0))
        self.owner: Sink
        self.other: Sink
        self.envoy: EnvoyProcess
        self.tls: ssl.SSLContext
        self._parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Gateway:
        async with self._parts as parts:
            await parts.enter_async_context(self.billing)
            upstream = await parts.enter_async_context(Upstream())
            streams = lease_port()
            here = {"listen": {"streams": f"{LOCAL}:{streams}"}}
            self.owner = self._sink("owner", merged({"envoy": OWNER["envoy"]}, here))
            self.other = self._sink("other", {"envoy": OTHERS["envoy"]})
            await asyncio.gather(*(parts.enter_async_context(sink) for sink in self.sinks))
            ports = {
                9001: self.owner.grpc_port,
                9011: self.other.grpc_port,
                9002: streams,
                8081: upstream.port,
            }
            self.envoy = EnvoyProcess(
                self._xds().static(ports, self._site()), self.directory, concurrency=2, buffer_flush_ms=1_000
            )
            await parts.enter_async_context(self.envoy)
            self._parts = parts.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._parts.aclose()

    def _sink(self, name: str, settings: Mapping[str, Any]) -> Sink:
        settings = merged(settings, {"envoy": {"flush_interval": "1s"}})
        if self.one_for_many:
            settings = merged(settings, MERGED_DIMENSIONS)
        return Sink(self.directory / name, url=self.billing.url, settings=settings)

    def _xds(self) -> Xds:
        xds = Xds()
        xds.apply(shipped("envoypatchpolicy.yaml", A_SECOND)["spec"]["jsonPatches"])
        xds.apply(OF_A_VIRTUAL_HOST)
        if self.one_for_many:
            xds.apply(MERGED_TAG)
        return xds

    def _site(self) -> tuple[Path, Path]:
        authority = Authority(self.directory, "ours")
        pair = authority.issue("site", dns=["alpha.example.com"])
        self.tls = ssl.create_default_context(cafile=str(authority.file))
        return pair.cert, pair.key

    @property
    def sinks(self) -> tuple[Sink, Sink]:
        return self.owner, self.other

    def at(self, listener: str) -> Address:
        return LOCAL, self.envoy.ports[f"gateways/edge/{listener}"]

    # --- what clients do ------------------------------------------------------------------------------------

    def count(self, tenant: str, requests: int, ingress: int, egress: int) -> None:
        have = self.truth[tenant]
        self.truth[tenant] = Bill(have.requests + requests, have.ingress + ingress, have.egress + egress)

    async def short(self, tenant: str, requests: int) -> None:
        """Requests of one client, which names them all alike so that they look like one."""
        async with Http1Client(*self.at("http")) as client:
            for number in range(requests):
                exchange = await client.request(
                    "POST",
                    f"{tenant}.example.com",
                    "/echo",
                    headers=[("x-request-id", "00000000-0000-4000-8000-000000000001")],
                    body=b"x" * number * 10,
                )
                assert exchange.status == 200
                self.count(tenant, 1, exchange.wire_in, exchange.wire_out)

    async def brief(self, tenant: str, stream: LongStream) -> None:
        """A stream that is over at once."""
        async with stream:
            await stream.step(500)
            await stream.end()
        self.count(tenant, 1, stream.written, stream.read)

    async def long(self, tenant: str, stream: LongStream) -> None:
        """A stream that is billed while it is open."""
        async with stream:
            await stream.step(1_000)
            ended = self.truth[tenant].ingress
            await eventually(lambda: self.bill(tenant).ingress > ended, f"{tenant}: billed while open")
            await stream.step(2_000)
            await stream.end()
        self.count(tenant, 1, stream.written, stream.read)

    async def astray(self) -> None:
        async with Http1Client(*self.at("http")) as client:
            assert (await client.request("GET", "nobody.example.com", "/")).status == 404

    # --- what was said of it --------------------------------------------------------------------------------

    def bill(self, tenant: str) -> Bill:
        sums = self.billing.sums()
        return Bill(*(sums.get((tenant, meter), 0) for meter in METERS[:3]))

    def bills(self) -> dict[str, Bill]:
        return {tenant: self.bill(tenant) for tenant in {tenant for tenant, _ in self.billing.sums()}}

    async def equal(self) -> None:
        """Waits until the bills are right and everything is settled, and looks at them again."""
        await eventually(lambda: self.bills() == self.truth, "bills", why=lambda: (self.bills(), self.truth))
        for sink in self.sinks:
            await eventually(sink.idle, "everything is settled", why=sink.said)
        assert self.bills() == self.truth
        assert self.billing.arrived.violations == []

    def skipped(self, reason: str) -> int:
        """Rows that both sinks skipped for a reason; a row has no other fate than that or being counted."""
        fates = [rows(sink) for sink in self.sinks]
        for fate in fates:
            assert fate.keys() <= {"counted", "skipped"}
            assert fate.get("skipped", {}).keys() <= {"listener", "no_route"}
        return sum(fate.get("skipped", {}).get(reason, 0) for fate in fates)

    async def connections(self, count: int) -> None:
        """Waits for a row of each client connection."""
        await eventually(lambda: self.skipped("listener") >= count, f"{count} connection rows")
        assert self.skipped("listener") == count

    async def sees(self, healthy: int) -> None:
        """Waits until Envoy takes so many endpoints of the sinks for healthy."""

        async def agreed() -> bool:
            stats = await self.envoy.stats(r"^cluster\.accesslog_als_0_0\.membership_healthy$")
            return list(stats.values()) == [healthy]

        await eventually(agreed, f"{healthy} sinks are healthy")


async def test_two_tenants_short_and_long_and_no_sink_for_a_while(tmp_path: Path) -> None:
    async with Gateway(tmp_path) as gateway:
        await gateway.sees(2)
        for tenant in TENANTS:
            await gateway.short(tenant, 40)
        await gateway.astray()
        await gateway.equal()
        for tenant in TENANTS:
            await gateway.long(tenant, WebSocket(gateway.at("http"), f"{tenant}.example.com"))
        for drive in (gateway.brief, gateway.long):
            await drive("alpha", WebSocket(gateway.at("https"), "alpha.example.com", tls=gateway.tls))
        await gateway.equal()

        await gateway.connections(7)  # two of short requests, one that went astray, four of streams

        # With no sink there, rows wait in Envoy's buffer: it knows, and no longer hands them to anybody.
        for sink in gateway.sinks:
            assert await sink.stop() == 0
        await gateway.sees(0)
        for tenant in TENANTS:
            await gateway.short(tenant, 40)
        await asyncio.gather(*(sink.start() for sink in gateway.sinks))
        await gateway.equal()

        seconds = {tenant: gateway.billing.sums()[tenant, METERS[3]] for tenant in TENANTS}
        assert all(seconds[tenant] >= 1 for tenant in TENANTS)
        await gateway.connections(9)
        assert gateway.skipped("no_route") == 1
        assert await gateway.envoy.stats("access_logs.grpc_access_log.logs_dropped") == {
            "access_logs.grpc_access_log.logs_dropped": 0
        }
        for event in gateway.billing.stored.values():
            tenant, dimensions = event["subject"].removeprefix("projects/"), event["data"]["dimensions"]
            assert dimensions["region"] == "us-east-1"
            assert dimensions["gateway"] == "edge"
            assert dimensions["gateway_namespace"] == "gateways"
            assert dimensions["gateway_class"] == "datum-downstream-gateway"
            assert dimensions["httproute_name"] == "web"
            assert dimensions["httproute_namespace"] == f"ns-{tenant}"


async def test_merged_gateways_say_which_one_it_was(tmp_path: Path) -> None:
    async with Gateway(tmp_path, one_for_many=True) as gateway:
        for tenant in TENANTS:
            await gateway.short(tenant, 5)
        await gateway.long("bravo", WebSocket(gateway.at("http"), "bravo.example.com"))
        await gateway.equal()
        for event in gateway.billing.stored.values():
            dimensions = event["data"]["dimensions"]
            assert dimensions["gateway"] == "edge"
            assert dimensions["gateway_namespace"] == "gateways"
