"""Strangers and broken clients: garbage, floods, trickles, half messages. The service goes on for the others.

Plaintext and one address: the worst that a configuration allows. What is bounded is bounded here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hostile import Raw
from listening import Client
from program import Sink, eventually
from wire import http_row, message

from proxy_usage.config import load
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.receiver import SERVICE

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SENDERS = 16
ROW = message(http_row(tags={"project_name": "alpha"}), node_id="edge-1")


class Site:
    """A sink, and an honest stream that goes on through everything."""

    def __init__(self, sink: Sink, client: Client) -> None:
        self.sink = sink
        self.client = client
        self.sent = 0
        self._stream = client.stream()

    async def row(self) -> None:
        """The honest stream says something, and is heard."""
        await self._stream.write(ROW)
        self.sent += 1
        await eventually(lambda: self.sink.read() >= self.sent, "the honest row is read", why=self.sink.said)

    async def well(self) -> None:
        """The honest stream is open, gRPC health says SERVING, and the process is ready."""
        await self.row()
        assert not self._stream.done()
        stub = health_pb2_grpc.HealthStub(self.client.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert await self.sink.reasons() == {}

    def rss(self) -> int:
        """Resident bytes of the sink's process."""
        pages = int(Path(f"/proc/{self.sink.pid}/statm").read_text().split()[1])
        return pages * 4096

    async def refused(self, reason: str) -> int:
        name = f'receiver_refused_streams_total{{reason="{reason}"}}'
        return (await self.sink.metrics()).get(name, 0)


@contextlib.asynccontextmanager
async def running(directory: Path, **limits: object) -> AsyncIterator[Site]:
    async with BillingStandIn() as billing:
        sink = Sink(directory, url=billing.url, settings={"listen": {"limits": limits}})
        async with sink, Client(sink.grpc_port) as client:
            site = Site(sink, client)
            await site.row()
            yield site
            await site.well()
            assert sink.read() == site.sent  # nothing of what the others sent was a row


async def hold(raw: Raw, size: int, sent: int, first: bytes = b"") -> bool:
    stream = raw.open()
    if first:
        await raw.write_message(stream, first)
    return await raw.begin_message(stream, size, sent)


async def test_ten_connections_with_60_of_64_mib_each_stay_under_the_bound(tmp_path: Path) -> None:
    """The attack that took a plain server from 32 to 697 MiB."""
    async with running(tmp_path, memory="256MiB", new_streams=2, first_message="3s", connections=32) as site:
        config = load(site.sink.config, {})
        bound = config.worst_case_memory()
        before = site.rss()
        async with contextlib.AsyncExitStack() as stack:
            raws = [await stack.enter_async_context(Raw(site.sink.grpc_port)) for _ in range(10)]
            most = 0
            attack = asyncio.gather(*(hold(raw, 64 * MIB, 60 * MIB) for raw in raws))
            while not attack.done():
                most = max(most, site.rss())
                await asyncio.sleep(0.02)
                await site.row()
            await attack
            await site.well()
            # A new honest sender gets its turn when those in its way have had theirs.
            async with Client(site.sink.grpc_port) as late:
                await late.send(ROW)
                site.sent += 1
            most = max(most, site.rss())
        grown = most - before
        print(f"held {grown // MIB} MiB of at most {bound // MIB} MiB")
        assert grown <= bound
        assert grown <= 2 * 2 * 64 * MIB  # two places, and each message once more while it is let go
        assert await site.refused("first_message") > 0


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_health_checks_without_end_are_ended_and_honest_ones_are_answered(
    tmp_path: Path, method: str
) -> None:
    """They need no token and wait for no place, so they may hold next to nothing."""
    async with running(tmp_path, memory="256MiB", new_streams=2, first_message="30s", connections=32) as site:
        before = most = site.rss()
        async with contextlib.AsyncExitStack() as stack:
            raws = [await stack.enter_async_context(Raw(site.sink.grpc_port)) for _ in range(10)]
            streams = [raw.open(path=f"/grpc.health.v1.Health/{method}") for raw in raws]
            attack = asyncio.gather(
                *(raw.begin_message(one, 64 * MIB, 60 * MIB) for raw, one in zip(raws, streams, strict=True))
            )
            while not attack.done():
                most = max(most, site.rss())
                await asyncio.sleep(0.02)
                await site.well()
            await attack  # whether it was through before the next look or not:
            pairs = list(zip(raws, streams, strict=True))
            await eventually(lambda: all(one in raw.ended for raw, one in pairs), "all are ended")
            assert await site.refused("memory") == len(raws)
        print(f"held {(most - before) // MIB} MiB")
        assert most - before <= load(site.sink.config, {}).worst_case_memory()


async def test_a_health_check_that_asks_nothing_is_ended(tmp_path: Path) -> None:
    async with running(tmp_path, first_message="1s") as site, Raw(site.sink.grpc_port) as raw:
        stream = raw.open(path="/grpc.health.v1.Health/Check")
        await eventually(lambda: stream in raw.ended, "it is ended")
        assert await site.refused("first_message") == 1


async def test_admitted_senders_together_stay_under_the_bound(tmp_path: Path) -> None:
    """Each has sent a whole message before: only what has arrived, as the kernel counts it, tells."""
    async with running(tmp_path, memory="512MiB", new_streams=2, connections=32) as site:
        before, most = site.rss(), 0

        async def enough() -> bool:
            return await site.refused("memory") >= SENDERS - 512 // 60

        async with contextlib.AsyncExitStack() as stack:
            raws = [await stack.enter_async_context(Raw(site.sink.grpc_port)) for _ in range(SENDERS)]
            empty = message(node_id="evil")
            attack = asyncio.gather(*(hold(raw, 64 * MIB, 60 * MIB, empty) for raw in raws))
            while not attack.done():
                most = max(most, site.rss())
                await asyncio.sleep(0.02)
                await site.row()
            went_through = sum(await attack)
            await eventually(lambda: site.refused("memory"), "somebody is sent away", why=site.sink.said)
            most = max(most, site.rss())
        bound = load(site.sink.config, {}).worst_case_memory()
        print(
            f"held {(most - before) // MIB} MiB of at most {bound // MIB} MiB; {went_through} not ended yet"
        )
        assert most - before <= bound
        await eventually(enough, "as many are sent away as must be", why=site.sink.said)


async def test_garbage_on_the_port(tmp_path: Path) -> None:
    dice = random.Random(11)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = struct.pack(">I", 0)[1:] + b"\x04\x00" + bytes(4)
    async with running(tmp_path) as site:
        for number in range(300):
            noise = dice.randbytes(dice.randrange(1, 4096))
            opening = (b"", preface, preface + settings, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00")[
                number % 5
            ]
            if number % 5 == 2:  # a frame of a random kind, sized right
                noise = struct.pack(">I", len(noise))[1:] + dice.randbytes(6) + noise
            reader, writer = await asyncio.open_connection("127.0.0.1", site.sink.grpc_port)
            with contextlib.suppress(OSError):
                writer.write(opening + noise)
                await writer.drain()
                if number % 7 == 0:
                    async with asyncio.timeout(0.2):
                        await reader.read()
            writer.transport.abort()
            if number % 50 == 0:
                await site.row()


async def test_a_tls_hello_on_a_plaintext_port(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        for _ in range(20):
            with contextlib.suppress(ssl.SSLError, OSError):
                await asyncio.open_connection(
                    "127.0.0.1", site.sink.grpc_port, ssl=ssl.create_default_context()
                )


async def test_rapid_resets(tmp_path: Path) -> None:
    """CVE-2023-44487: streams opened and reset as fast as they go."""
    async with running(tmp_path) as site:
        async with Raw(site.sink.grpc_port) as raw:
            for number in range(3_000):
                if raw.closed.is_set() or raw.goaway.is_set():
                    break
                raw.reset(raw.open())
                if number % 100 == 0:
                    await raw.drained()
                    await asyncio.sleep(0)
            await site.well()
        await eventually(lambda: open_streams(site, 1), "no stream is left of it", why=site.sink.said)


async def test_keepalive_is_no_abuse_and_a_flood_of_pings_is(tmp_path: Path) -> None:
    """By default gRPC ends a connection after a few pings within minutes: Envoy's keepalive sends those."""
    async with running(tmp_path) as site, Raw(site.sink.grpc_port) as raw:
        await raw.write_message(raw.open(), message(node_id="edge-2"))
        for _ in range(6):
            raw.ping()
            await asyncio.sleep(1)  # twice the least that is allowed: a busy machine reads them less evenly
        assert not raw.closed.is_set()
        for _ in range(50):
            raw.ping()
        await eventually(raw.closed.is_set, "the flood is ended")


@pytest.mark.parametrize("waits", [True, False])
async def test_huge_headers_are_refused_and_cost_nothing(tmp_path: Path, waits: bool) -> None:
    """Also from a client that sends them before it can have read the server's settings."""
    async with running(tmp_path, first_message="500ms") as site:
        before = site.rss()
        for _ in range(10):
            async with Raw(site.sink.grpc_port) as raw:
                if waits:
                    await raw.settled.wait()
                stream = raw.open(*((f"x-{number}", "v" * 8_000) for number in range(8)))
                await eventually(lambda: raw.ended or raw.closed.is_set(), "it is refused")
                assert raw.ended.get(stream, "reset") in {"8", "reset"}
        assert site.rss() - before < 32 * MIB


async def test_a_trickle_loses_its_place(tmp_path: Path) -> None:
    async with running(tmp_path, first_message="1s", new_streams=2) as site, Raw(site.sink.grpc_port) as raw:
        stream = raw.open()
        await raw.write(stream, struct.pack(">BI", 0, len(ROW)))
        for byte in ROW:
            if stream in raw.ended:
                break
            await raw.write(stream, bytes([byte]))
            await asyncio.sleep(0.1)
        assert raw.ended[stream] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert await site.refused("first_message") == 1


async def test_streams_that_say_nothing_are_ended(tmp_path: Path) -> None:
    async with running(tmp_path, first_message="1s") as site, Raw(site.sink.grpc_port) as raw:
        streams = [raw.open() for _ in range(16)]
        await eventually(lambda: all(one in raw.ended for one in streams), "all are ended")
        assert await site.refused("first_message") == 16
        await eventually(lambda: open_streams(site, 1), "none is left", why=site.sink.said)


async def test_more_connections_than_allowed(tmp_path: Path) -> None:
    async with running(tmp_path, connections=8) as site, contextlib.AsyncExitStack() as stack:
        raws = [await stack.enter_async_context(Raw(site.sink.grpc_port)) for _ in range(20)]
        await eventually(lambda: sum(raw.closed.is_set() for raw in raws) >= 13, "those too many are closed")
        await site.row()


async def test_more_streams_than_allowed_on_a_connection_wait_or_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path, streams_per_connection=4) as site, Raw(site.sink.grpc_port) as raw:
        await raw.settled.wait()
        with contextlib.suppress(Exception):
            for _ in range(40):
                raw.open()
        streams = await open_now(site)
        assert streams <= 1 + 4


async def test_a_message_past_the_limit_ends_its_stream_and_is_counted(tmp_path: Path) -> None:
    async with running(tmp_path, message="1MiB") as site, Raw(site.sink.grpc_port) as raw:
        stream = raw.open()
        await raw.begin_message(stream, 2 * MIB, 1 * MIB)
        await eventually(lambda: raw.ended.get(stream) == "8", "it is refused")
        await eventually(lambda: broken(site), "it is counted", why=site.sink.said)


async def test_a_name_without_end_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as site, Raw(site.sink.grpc_port) as raw:
        stream = raw.open()
        await raw.write_message(stream, message(node_id="n" * 1_000_000))
        await eventually(lambda: stream in raw.ended, "it is refused")
        assert await site.refused("identifier") == 1


async def broken(site: Site) -> int:
    return (await site.sink.metrics())["receiver_broken_streams_total"]


async def open_now(site: Site) -> int:
    return (await site.sink.metrics())["receiver_streams"]


async def open_streams(site: Site, expected: int) -> bool:
    return await open_now(site) == expected
