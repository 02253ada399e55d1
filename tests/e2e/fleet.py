"""Three sinks behind one Envoy, and streams of every kind through it, each with a tenant of its own.

    short rows ──▶ a, b                  long streams' rows ──▶ owner (listen.streams)
    every periodic row once more, by mistake ──▶ owner (listen.grpc)

One tenant per stream makes sums per tenant sums per stream, so that every stream is compared by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from program import Sink, eventually

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.bootstrap import EnvoyOptions, TcpProxy, bootstrap
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.echo import GrpcEcho, TcpEcho
from proxy_usage.demo.envoy import EnvoyProcess
from proxy_usage.demo.listener import lease_port
from proxy_usage.demo.loggers import BY_CHAIN
from proxy_usage.demo.longlived import Connect, EventStream, Grpc, LongStream, Tcp, WebSocket, client_hello
from proxy_usage.demo.truth import Tenant
from proxy_usage.demo.upstream import Upstream
from proxy_usage.model import NS_PER_SECOND
from proxy_usage.store.reader import Reader

HTTP_KINDS = ("websocket", "connect", "grpc", "events")
TCP_KINDS = ("tcp", "chain", "sni")
"""Whose a TCP connection is, says: its listener, the filter chain of its server name, the name itself."""
KINDS = HTTP_KINDS + TCP_KINDS
FLUSH_MS = 1_000
SIZES = (0, 1, 200, 1_000, 3_000)
_LOCAL = "127.0.0.1"
_SNI = r"^(?P<tenant>[^.]+)\.sni\.example\.com$"


class Bill(NamedTuple):
    """What the billing endpoint was told about a stream, or what it should have been."""

    requests: int
    ingress: int
    egress: int


class Driven:
    """A stream that goes on, step after step, until it is told to rest or to end."""

    def __init__(self, tenant: str, kind: str, stream: LongStream) -> None:
        self.tenant, self.kind, self.stream = tenant, kind, stream
        self.opened_ns = time.monotonic_ns()
        self.over_ns = 0
        self._resting = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Self:
        await self.stream.__aenter__()
        self.go()
        return self

    def go(self) -> None:
        self._resting.clear()
        self._task = asyncio.create_task(self._steps())

    async def rest(self) -> None:
        """Returns when nothing is under way any more."""
        self._resting.set()
        if self._task is not None:
            task, self._task = self._task, None
            await task

    async def end(self) -> None:
        await self.rest()
        await self.stream.end()
        self.over_ns = time.monotonic_ns()

    async def broken(self) -> None:
        """It was broken off while it rested."""
        await self.stream.close()
        self.over_ns = time.monotonic_ns()

    async def _steps(self) -> None:
        number = 0
        while not self._resting.is_set():
            await self.stream.step(SIZES[number % len(SIZES)])
            number += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._resting.wait(), 0.1)

    @property
    def age_ms(self) -> int:
        return (time.monotonic_ns() - self.opened_ns) // 1_000_000

    @property
    def truth(self) -> Bill:
        """What its client counted."""
        return Bill(int(self.kind in HTTP_KINDS), self.stream.written, self.stream.read)


class Fleet:
    """All of it, in ``directory``; ``phases`` are the names of the groups of streams that ``open`` opens."""

    def __init__(self, directory: Path, phases: Sequence[str]) -> None:
        self.directory = directory
        self.billing = BillingStandIn()
        self.streams: list[Driven] = []
        self.a: Sink
        self.b: Sink
        self.owner: Sink
        self.envoy: EnvoyProcess
        self._tenants = {(phase, kind): f"{phase}-{kind}" for phase in phases for kind in KINDS}
        self._upstream = Upstream()
        self._parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as parts:
            await parts.enter_async_context(self.billing)
            await parts.enter_async_context(self._upstream)
            tcp = await parts.enter_async_context(TcpEcho())
            grpc = await parts.enter_async_context(GrpcEcho())
            streams_port, inner_port = lease_port(), lease_port()
            rules = [
                {"custom_tag": "project_name"},
                {"custom_tag": "vhost_project"},
                {"sni": True, "pattern": _SNI},
            ]
            common = {
                "tenant": {"rules": rules},
                "skip": [{"if": {"log_name": "inner(-open)?"}, "reason": "inner_hop"}],
            }
            owner = {
                **common,
                "listen": {"streams": f"{_LOCAL}:{streams_port}"},
                "envoy": {"flush_interval": f"{FLUSH_MS}ms"},
                "windows": {"checkpoint": "1s"},  # so that a crash finds something to take
            }
            self.a, self.b, self.owner = (
                Sink(self.directory / name, url=self.billing.url, settings=settings)
                for name, settings in (("a", common), ("b", common), ("owner", owner))
            )
            await asyncio.gather(*(parts.enter_async_context(sink) for sink in self.sinks))
            options = EnvoyOptions(
                tenants=[
                    Tenant(tenant, f"{tenant}.example.com")
                    for (_, kind), tenant in self._tenants.items()
                    if kind in HTTP_KINDS
                ],
                upstream=(_LOCAL, self._upstream.port),
                als=[(_LOCAL, self.a.grpc_port), (_LOCAL, self.b.grpc_port)],
                streams_als=(_LOCAL, streams_port),
                astray_als=(_LOCAL, self.owner.grpc_port),
                flush_interval_ms=FLUSH_MS,
                access_log=self.directory / "access.jsonl",
                # CONNECT ends at a listener of the same Envoy, which logs the same bytes a second time.
                tcp=[*self._proxies(), TcpProxy("inner", "inner", log="inner", listen=(_LOCAL, inner_port))],
                tcp_upstream=(_LOCAL, tcp.port),
                tunnel=(_LOCAL, inner_port),
                grpc_upstream=(_LOCAL, grpc.port),
            )
            self.envoy = EnvoyProcess(bootstrap(options), self.directory, concurrency=2)
            await parts.enter_async_context(self.envoy)
            self._parts = parts.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        for driven in self.streams:
            with contextlib.suppress(Exception):  # after a failure, which is what is to be seen
                await driven.rest()
            await driven.stream.close()
        await self._parts.aclose()

    def _proxies(self) -> Iterator[TcpProxy]:
        for (_, kind), tenant in self._tenants.items():
            if kind == "tcp":
                yield TcpProxy(tenant, tenant)
            elif kind == "chain":
                yield TcpProxy(tenant, sni=f"{tenant}.chain.example.com", project=BY_CHAIN)
        yield TcpProxy("by-name", sni="*.sni.example.com", project="")

    @property
    def sinks(self) -> tuple[Sink, Sink, Sink]:
        return self.a, self.b, self.owner

    # --- streams ----------------------------------------------------------------------------------------

    async def open(self, phase: str) -> list[Driven]:
        """Opens a stream of each kind."""
        opened = [Driven(self._tenants[phase, kind], kind, self._stream(phase, kind)) for kind in KINDS]
        self.streams += opened
        await asyncio.gather(*(driven.start() for driven in opened))
        return opened

    def _stream(self, phase: str, kind: str) -> LongStream:
        tenant = self._tenants[phase, kind]
        http, host = (_LOCAL, self.envoy.port), f"{tenant}.example.com"
        if kind == "events":
            return EventStream(http, host, publisher=(_LOCAL, self._upstream.port))
        if kind == "tcp":
            return Tcp((_LOCAL, self.envoy.ports[tenant]))
        if kind in TCP_KINDS:
            hello = client_hello(f"{tenant}.{kind}.example.com")
            return Tcp((_LOCAL, self.envoy.ports["tls"]), hello=hello)
        if kind == "grpc":
            return Grpc(http, host)
        return WebSocket(http, host) if kind == "websocket" else Connect(http, host)

    async def pass_by(self, phase: str) -> list[Driven]:
        """Opens a stream of each kind and ends it at once, long before a periodic row."""
        opened = await self.open(phase)
        await end(opened)
        return opened

    # --- what was said about them -----------------------------------------------------------------------

    def bill(self, tenant: str) -> Bill:
        """All sinks' events about a tenant."""
        sums = self.billing.sums()
        return Bill(*(sums.get((tenant, meter), 0) for meter in METERS[:3]))

    def seconds(self, tenant: str) -> int:
        return self.billing.sums().get((tenant, METERS[3]), 0)

    def open_ns(self, tenant: str) -> int:
        """Billed seconds and the fraction that the stores carry on; needs all windows to be closed."""
        left = sum(keys.get(tenant, 0) for keys in map(remainders_ns, self.sinks))
        return self.seconds(tenant) * NS_PER_SECOND + left

    async def billed(self, streams: Iterable[Driven]) -> None:
        """Waits until the endpoint was told exactly what the streams' clients counted."""
        listed = tuple(streams)
        await eventually(
            lambda: not self.wrong(listed), "streams are billed to the byte", why=lambda: self.wrong(listed)
        )

    def wrong(self, streams: Iterable[Driven]) -> list[str]:
        """Streams whose bill is not the truth, in words."""
        return [
            f"{driven.tenant}: {bill}, client {driven.truth}"
            for driven in streams
            if (bill := self.bill(driven.tenant)) != driven.truth
        ]

    def logged_ms(self) -> dict[str, int]:
        """Duration of each stream that ended, in floored milliseconds, by Envoy's own file."""
        rows = [json.loads(line) for line in (self.directory / "access.jsonl").read_text().splitlines()]
        return {row["project"] or str(row["sni"]).partition(".")[0]: row["duration_ms"] for row in rows}


async def end(streams: Iterable[Driven]) -> None:
    await asyncio.gather(*(driven.end() for driven in streams))


def remainders_ns(sink: Sink) -> dict[str, int]:
    """What a store carries on of each tenant's open time, in nanoseconds."""
    with contextlib.closing(sqlite3.connect(f"file:{sink.store}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT tenant, remainders FROM keys").fetchall()
    left: dict[str, int] = {}
    for tenant, text in rows:
        left[tenant] = left.get(tenant, 0) + json.loads(text).get("connection_seconds", 0)
    return left


def rows(sink: Sink) -> Mapping[str, Mapping[str, int]]:
    """Rows of a sink's whole life by fate and reason."""
    with Reader(sink.store) as reader:
        status = reader.status()
    return status.rows


def unlike(sinks: Iterable[Sink]) -> list[Any]:
    """What does not add up in the sinks' stores."""
    found: list[Any] = []
    for sink in sinks:
        with Reader(sink.store) as reader:
            found += reader.conservation(deep=True).differences
    return found
