"""The whole of it for end-to-end tests: billing stand-in, upstream, a real Envoy, and the sink.

    async with World(tmp_path, tenants=3) as world:
        await world.send(500)            # a mixed load through Envoy, counted at the client's socket
        await world.equal()              # until what was delivered equals what was sent
        assert await world.sink.stop() == 0

``World`` puts the demo's parts together, and can record what Envoy logs (``Recorder``); the program itself is
``program.Sink``; ``AlsClient`` is an Envoy whose every byte is chosen.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
import grpc.aio
from envoy.service.accesslog.v3 import als_pb2
from program import DEADLINE_S, Sink, eventually

from proxy_usage.config.models import METER_TYPES
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.bootstrap import EnvoyOptions, bootstrap
from proxy_usage.demo.compare import AccessLog, differences
from proxy_usage.demo.envoy import EnvoyProcess
from proxy_usage.demo.traffic import mixed
from proxy_usage.demo.truth import Tenant, Truth, tenants
from proxy_usage.demo.upstream import Upstream
from proxy_usage.store.reader import Reader
from proxy_usage.store.usage_sums import UsageSums

STREAM_ACCESS_LOGS = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"


class AlsClient:
    """One connection to a sink, over which messages go as the bytes they are."""

    def __init__(self, port: int) -> None:
        self.channel: grpc.aio.Channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def send(self, *messages: bytes) -> None:
        """Sends messages on a stream of their own; when this returns, the sink has read them all.

        Raises grpc.aio.AioRpcError when the sink ended the stream otherwise than with OK.
        """
        call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = self.channel.stream_unary(STREAM_ACCESS_LOGS)
        stream = call()
        async with asyncio.timeout(DEADLINE_S):
            for message in messages:
                await stream.write(message)
            await stream.done_writing()
            assert await stream == b""


class Row(NamedTuple):
    """A row as Envoy sent it: the log's name, and an HTTPAccessLogEntry or TCPAccessLogEntry."""

    log_name: str
    entry: Any


class Recorder:
    """A second consumer of the rows that keeps every message: what the sink was told, read independently."""

    def __init__(self) -> None:
        self.port = 0
        self._streams: list[list[bytes]] = []
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(self._keep)
        service, _, method = STREAM_ACCESS_LOGS[1:].partition("/")
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            await self._server.stop(None)

    async def _keep(self, requests: AsyncIterator[bytes], _: object) -> bytes:
        kept: list[bytes] = []
        self._streams.append(kept)
        async for raw in requests:
            kept.append(raw)  # noqa: PERF401 - to be seen at once, not when the stream ends
        return b""

    def rows(self) -> Iterator[Row]:
        """All rows, read with Envoy's complete schema."""
        for kept in self._streams:
            log_name = ""
            for raw in kept:
                message = als_pb2.StreamAccessLogsMessage.FromString(raw)
                log_name = message.identifier.log_name or log_name
                for entry in (*message.http_logs.log_entry, *message.tcp_logs.log_entry):
                    yield Row(log_name, entry)

    def attach(self, document: dict[str, Any]) -> None:
        """Changes an Envoy configuration so that each of its gRPC loggers has a twin here."""
        static = document["static_resources"]
        cluster = copy.deepcopy(next(one for one in static["clusters"] if one["name"] == "usage"))
        cluster["name"] = cluster["load_assignment"]["cluster_name"] = "recorder"
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoint["endpoint"]["address"]["socket_address"]["port_value"] = self.port
        static["clusters"].append(cluster)
        (listener,) = static["listeners"]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        for loggers in (listener["access_log"], manager["access_log"]):
            loggers += [_twin(logger) for logger in loggers if "grpc" in logger["name"]]


def _twin(logger: dict[str, Any]) -> dict[str, Any]:
    twin = copy.deepcopy(logger)
    twin["typed_config"]["common_config"]["grpc_service"]["envoy_grpc"]["cluster_name"] = "recorder"
    return twin


class World:
    """Everything from the client's socket to the billing endpoint, in ``directory``.

    ``tenants`` is a number or the tenants themselves; ``record`` adds a ``Recorder``; ``token`` is what the
    stand-in demands; ``settings`` and ``output`` are the sink's, ``envoy`` goes to EnvoyOptions, whose
    configuration ``amend`` may change.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tenants: int | tuple[Tenant, ...] = 3,
        record: bool = False,
        concurrency: int = 1,
        token: str | None = None,
        settings: Mapping[str, Any] | None = None,
        output: Mapping[str, Any] | None = None,
        envoy: Mapping[str, Any] | None = None,
        amend: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.directory = directory
        self.tenants = _tenants(tenants)
        self.truth = Truth()
        self.log = AccessLog(directory / "access.jsonl", self.truth)
        self.billing = BillingStandIn(token=token)
        self.upstream = Upstream()
        self.recorder = Recorder() if record else None
        self.sink: Sink
        self.envoy: EnvoyProcess
        self._concurrency = concurrency
        self._settings, self._output, self._envoy = settings, output, envoy or {}
        self._amend = amend
        self._seed = 0
        self._parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as parts:
            await parts.enter_async_context(self.billing)
            await parts.enter_async_context(self.upstream)
            self.sink = Sink(
                self.directory, url=self.billing.url, settings=self._settings, output=self._output
            )
            await parts.enter_async_context(self.sink)
            options = EnvoyOptions(
                tenants=self.tenants,
                upstream=("127.0.0.1", self.upstream.port),
                als=[("127.0.0.1", self.sink.grpc_port)],
                access_log=self.directory / "access.jsonl",
                **self._envoy,
            )
            document = bootstrap(options)
            if self._amend is not None:
                self._amend(document)
            if self.recorder is not None:
                await parts.enter_async_context(self.recorder)
                self.recorder.attach(document)
            self.envoy = EnvoyProcess(
                document,
                self.directory,
                concurrency=self._concurrency,
                buffer_flush_ms=options.buffer_flush_ms,
            )
            await parts.enter_async_context(self.envoy)
            self._parts = parts.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._parts.aclose()

    async def send(
        self,
        requests: int,
        *,
        strays: int = 0,
        stop: Callable[[], bool] = lambda: False,
        seed: int | None = None,
    ) -> None:
        """Sends a mixed load and counts it in ``truth``: another at each call unless ``seed`` is given."""
        self._seed += 1
        await mixed(
            "127.0.0.1",
            self.envoy.port,
            self.tenants,
            requests=requests,
            seed=self._seed if seed is None else seed,
            strays=strays,
            truth=self.truth,
            stop=stop,
        )

    @contextlib.asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Sends without a pause while the block runs; at its end every request has its answer."""
        ended = asyncio.Event()

        async def send() -> None:
            while not ended.is_set():
                await self.send(500, stop=ended.is_set)

        task = asyncio.create_task(send())
        try:
            yield
        finally:
            ended.set()
            await task

    async def stop_envoy(self) -> None:
        """Ends Envoy so that no row stays behind in it."""
        await self.envoy.drain()
        await self.envoy.stop()

    def differences(self) -> list[str]:
        """Every way in which the bill is not what was sent, in words."""
        self.log.follow()
        return differences(self.truth, self.billing.arrived, self.log.spent)

    async def equal(self) -> None:
        """Waits until everything that was sent is delivered, to the unit, and nothing is on its way."""
        await eventually(lambda: not self.differences(), "the bill is right", why=self.differences)
        await eventually(self.sink.idle, "everything is settled", why=self.sink.said)


def used(reader: Reader, tenant: str) -> UsageSums:
    """What ``proxy-usage usage`` shows of a tenant over all time."""
    sums = UsageSums()
    for hour in reader.usage(tenant, 0, 1 << 45):
        sums.add(hour)
    return sums


def delivered(reader: Reader, tenants: Iterable[str]) -> dict[tuple[str, str], int]:
    """What ``proxy-usage usage`` shows as delivered: by tenant and event type, as the stand-in has it."""
    return {
        (tenant, METER_TYPES[one.meter]): one.delivered
        for tenant in tenants
        for one in used(reader, tenant).sums()
        if one.delivered
    }


def _tenants(given: int | tuple[Tenant, ...]) -> tuple[Tenant, ...]:
    return tenants(given) if isinstance(given, int) else given
