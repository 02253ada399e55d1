"""What Envoy's signals can and cannot tell of usage, measured side by side: docs/signals.md says it in words.

One Envoy writes the same requests to a gRPC access log, an OpenTelemetry access log and a file, and tells its
counters by the admin port and by the metrics service.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import pytest
from harness import Recorder
from program import eventually

from proxy_usage.cli.capture import wire_fields
from proxy_usage.demo.bootstrap import EnvoyOptions, bootstrap
from proxy_usage.demo.envoy import EnvoyProcess
from proxy_usage.demo.longlived import WebSocket
from proxy_usage.demo.traffic import mixed
from proxy_usage.demo.truth import Truth, tenants
from proxy_usage.demo.upstream import Upstream

pytestmark = pytest.mark.e2e

TYPE = "type.googleapis.com/envoy."
TENANTS = tenants(3)
LOGS, METRICS = "opentelemetry.proto.collector.logs.v1.LogsService", "envoy.service.metrics.v3.MetricsService"
END, PERIODIC = 6, 5
ATTRIBUTES = {
    "project": "%METADATA(ROUTE:datum-gateway:project_name)%",
    "type": "%ACCESS_LOG_TYPE%",
    "wire_in": "%DOWNSTREAM_WIRE_BYTES_RECEIVED%",
    "duration": "%DURATION%",
}


class Collector:
    """A receiver of OpenTelemetry logs and of Envoy's metrics service that keeps every message."""

    def __init__(self) -> None:
        self.logs: list[bytes] = []
        self.metrics: list[bytes] = []
        self.away = False
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        export: Any = grpc.unary_unary_rpc_method_handler(self._export)
        stream: Any = grpc.stream_unary_rpc_method_handler(self._stream)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(LOGS, {"Export": export}),
                grpc.method_handlers_generic_handler(METRICS, {"StreamMetrics": stream}),
            )
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            await self._server.stop(None)

    async def _export(self, raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        if self.away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        self.logs.append(raw)
        return b""

    async def _stream(self, requests: AsyncIterator[bytes], _: object) -> bytes:
        async for raw in requests:
            self.metrics.append(raw)
        return b""

    def rows(self) -> int:
        """Log records: ExportLogsServiceRequest.resource_logs (1) .scope_logs (2) .log_records (2)."""
        scopes = [scope for raw in self.logs for resource in inside(raw, 1) for scope in inside(resource, 2)]
        return sum(len(inside(scope, 2)) for scope in scopes)


def inside(raw: bytes, field: int) -> list[bytes]:
    return [value for number, _, value in wire_fields(raw) if number == field]


class Signals:
    """The Envoy and all who listen to it."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "access.jsonl"
        self.als = Recorder()
        self.collector = Collector()
        self.envoy: EnvoyProcess
        self._directory = directory
        self._parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        upstream = await self._parts.enter_async_context(Upstream())
        await self._parts.enter_async_context(self.als)
        await self._parts.enter_async_context(self.collector)
        document = bootstrap(
            EnvoyOptions(
                TENANTS,
                ("127.0.0.1", upstream.port),
                als=[("127.0.0.1", self.als.port)],
                flush_interval_ms=1_000,
                access_log=self.file,
                health_check=False,
            )
        )
        self._add(document)
        self.envoy = EnvoyProcess(document, self._directory, buffer_flush_ms=200)
        await self._parts.enter_async_context(self.envoy)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._parts.aclose()

    def _add(self, document: dict[str, Any]) -> None:
        static = document["static_resources"]
        cluster = copy.deepcopy(next(one for one in static["clusters"] if one["name"] == "usage"))
        cluster["name"] = cluster["load_assignment"]["cluster_name"] = "collector"
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoint["endpoint"]["address"]["socket_address"]["port_value"] = self.collector.port
        static["clusters"].append(cluster)
        service = {"envoy_grpc": {"cluster_name": "collector"}}
        manager = static["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        config = f"{TYPE}extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig"
        values = [{"key": key, "value": {"string_value": text}} for key, text in ATTRIBUTES.items()]
        manager["access_log"].append(
            {
                "name": "otel",
                "filter": {"log_type_filter": {"types": ["DownstreamEnd"]}},
                "typed_config": {
                    "@type": config,
                    "common_config": {
                        "log_name": "otel",
                        "transport_api_version": "V3",
                        "grpc_service": service,
                        "buffer_flush_interval": "0.2s",
                        "buffer_size_bytes": 16 << 20,
                    },
                    "attributes": {"values": values},
                },
            }
        )
        metrics = {"@type": f"{TYPE}config.metrics.v3.MetricsServiceConfig", "transport_api_version": "V3"}
        document["stats_sinks"] = [{"name": "metrics", "typed_config": {**metrics, "grpc_service": service}}]
        document["stats_flush_interval"] = "1s"

    async def send(self, requests: int, seed: int = 1) -> Truth:
        truth = Truth()
        await mixed("127.0.0.1", self.envoy.port, TENANTS, requests=requests, seed=seed, truth=truth)
        return truth

    def als_rows(self, kind: int) -> list[Any]:
        common = (row.entry.common_properties for row in self.als.rows())
        return [one for one in common if one.access_log_type == kind]

    def lines(self) -> int:
        return len(self.file.read_text().splitlines()) if self.file.exists() else 0


@pytest.fixture
async def signals(tmp_path: Path) -> AsyncIterator[Signals]:
    async with Signals(tmp_path) as running:
        yield running


async def test_logs_have_every_request_and_whose_it_is_and_counters_do_not(signals: Signals) -> None:
    truth = await signals.send(300)
    await eventually(lambda: len(signals.als_rows(END)) == 300, "the gRPC log has them all")
    await eventually(lambda: signals.collector.rows() == 300, "OpenTelemetry has them all")
    await eventually(lambda: signals.lines() == 300, "the file has them all")
    await eventually(lambda: signals.collector.metrics, "the metrics service tells its counters")
    text = await signals.envoy.admin("GET", "/stats/prometheus")
    pushed = b"".join(signals.collector.metrics)
    for tenant in TENANTS:
        assert tenant.name not in text
        assert tenant.name.encode() not in pushed
    # Counters have the bytes of all tenants together, and a little more: HTTP/2's own frames.
    counters = await signals.envoy.stats("http.ingress.downstream_cx_rx_bytes_total")
    (received,) = counters.values()
    sent = sum(count.wire_in for count in truth.tenants().values())
    assert sent <= received <= sent + 1_000


async def test_a_stream_that_is_open_is_in_periodic_rows_and_in_counters_alone(signals: Signals) -> None:
    before = signals.lines()
    async with WebSocket(("127.0.0.1", signals.envoy.port), TENANTS[0].host) as stream:
        await stream.step(1_000)

        def told() -> bool:
            return any(
                row.downstream_wire_bytes_received == stream.written for row in signals.als_rows(PERIODIC)
            )

        await eventually(told, "a periodic row has its running total")
        counters = await signals.envoy.stats("http.ingress.downstream_cx_rx_bytes_total")
        assert sum(counters.values()) >= stream.written
        assert (signals.lines(), signals.collector.rows()) == (before, 0)  # filtered by type, they have ends
        # An Envoy that dies says nothing more of it, anywhere; the running total is known.
        signals.envoy.kill()
        await asyncio.sleep(0.5)
        assert (signals.lines(), signals.collector.rows()) == (before, 0)
        assert told()


async def test_opentelemetry_rows_of_a_receiver_that_is_away_are_lost_and_counted(
    signals: Signals,
) -> None:
    await signals.send(20)
    await eventually(lambda: signals.collector.rows() == 20, "OpenTelemetry works")
    signals.collector.away = True
    await signals.send(100, seed=2)

    async def dropped() -> int:
        counters = await signals.envoy.stats("open_telemetry_access_log.logs_dropped")
        return sum(counters.values())

    await eventually(dropped, "Envoy counts what it dropped")
    signals.collector.away = False
    await signals.send(20, seed=3)

    async def settled() -> bool:
        return signals.collector.rows() + await dropped() == 140

    await eventually(settled, "received and dropped are all there was")
    assert await dropped() > 0  # a refused batch is not kept, whatever room the buffer has
