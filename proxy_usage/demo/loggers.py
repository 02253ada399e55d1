"""The access loggers of the demo's Envoys: which rows go where, and with what.

With an owner of long streams, each gRPC logger is two: finished short rows to any of the sinks, all else
that counts to the owner, told apart by filters alone (``deploy/envoy/envoy-two-sinks.yaml`` explains them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TYPE = "type.googleapis.com/envoy."
Kind = Literal["http", "tcp"]
_END = {"http": "DownstreamEnd", "tcp": "TcpConnectionEnd"}
_PERIODIC = {"http": "DownstreamPeriodic", "tcp": "TcpPeriodic"}

BY_LISTENER = "%METADATA(LISTENER:datum-gateway:project_name)%"
BY_CHAIN = "%FILTER_CHAIN_NAME%"
"""A TCP connection has no route: its listener says whose it is, or the filter chain that its SNI chose."""


@dataclass(frozen=True, slots=True)
class Logging:
    """What all loggers of one Envoy have in common."""

    sinks: bool
    """Whether there are gRPC loggers at all."""
    split_at_ms: int | None
    """0.9 of the flush interval; None: nothing is split."""
    flush_ms: int
    buffer_bytes: int
    gateway: str
    extra_tags: Sequence[dict[str, Any]]
    file: Path | None
    astray: bool
    """Whether periodic rows go to the cluster ``usage_astray`` as well."""

    def listener(self, project: str = "") -> list[dict[str, Any]]:
        """Of a listener: a row per connection, at its close. ``project`` as in ``connections``."""
        return [self._grpc("tcp", "conn", "usage", [*_TIMES[:2], *_project(project)])] if self.sinks else []

    def requests(self) -> list[dict[str, Any]]:
        """Of a connection manager: ``http``, and ``open`` where rows are split."""
        route_metadata: dict[str, Any] = {
            "kind": {"route": {}},
            "metadata_key": {"key": "datum-gateway", "path": [{"key": "project_name"}]},
        }
        tags: list[dict[str, Any]] = [
            {"tag": "project_name", "metadata": route_metadata},
            {"tag": "vhost_project", "value": "%METADATA(VIRTUAL_HOST:datum-gateway:project_name)%"},
        ]
        return self._loggers("http", "http", "open", tags)

    def connections(self, log: str, project: str) -> list[dict[str, Any]]:
        """Of a TCP proxy: ``<log>``, and ``<log>-open`` where rows are split.

        ``project``: what says whose a connection is, e.g. ``BY_LISTENER``; ``""``: no tag does.
        """
        return self._loggers("tcp", log, f"{log}-open", _project(project))

    def _loggers(
        self, kind: Kind, short: str, long: str, project: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        gateway = [
            {"tag": "gateway", "literal": {"value": self.gateway}},
            {"tag": "gateway_namespace", "literal": {"value": "gateways"}},
            {"tag": "gateway_class", "literal": {"value": "demo"}},
        ]
        tags = [*_TIMES, *project, *gateway, *self.extra_tags]
        loggers: list[dict[str, Any]] = []
        periodic = {"log_type_filter": {"types": [_PERIODIC[kind]]}}
        if self.sinks and self.split_at_ms is None:
            loggers.append(self._grpc(kind, short, "usage", tags))
        elif self.sinks and self.split_at_ms is not None:
            ended = {"log_type_filter": {"types": [_END[kind]]}}
            early = {
                "and_filter": {"filters": [ended, _duration("LE", self.split_at_ms - 1, "usage.short_ms")]}
            }
            late = {"and_filter": {"filters": [ended, _duration("GE", self.split_at_ms, "usage.long_ms")]}}
            still_open = {"or_filter": {"filters": [periodic, late]}}
            loggers.append({**self._grpc(kind, short, "usage", tags), "filter": early})
            loggers.append({**self._grpc(kind, long, "usage_streams", tags), "filter": still_open})
        if self.astray:
            loggers.append({**self._grpc(kind, short, "usage_astray", tags), "filter": periodic})
        if self.file is not None:
            loggers.append(_file(kind, self.file))
        return loggers

    def _grpc(
        self, kind: Kind, log_name: str, cluster: str, tags: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        common = {
            "log_name": log_name,
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": cluster}},
            "buffer_flush_interval": duration(self.flush_ms),
            "buffer_size_bytes": self.buffer_bytes,
            "custom_tags": list(tags),
        }
        message = "TcpGrpcAccessLogConfig" if kind == "tcp" else "HttpGrpcAccessLogConfig"
        return {
            "name": f"envoy.access_loggers.{kind}_grpc",
            "typed_config": {
                "@type": f"{TYPE}extensions.access_loggers.grpc.v3.{message}",
                "common_config": common,
            },
        }


_TIMES = (
    {"tag": "conn_id", "value": "%CONNECTION_ID%"},
    {"tag": "emit_us", "value": "%EMIT_TIME(%s%6f)%"},
    {"tag": "dur_ms", "value": "%DURATION%"},
)


def _project(value: str) -> list[dict[str, Any]]:
    return [{"tag": "project_name", "value": value}] if value else []


def duration(milliseconds: int) -> str:
    """As Envoy reads it."""
    return f"{milliseconds // 1000}.{milliseconds % 1000:03d}s"


def _duration(op: str, milliseconds: int, runtime_key: str) -> dict[str, Any]:
    value = {"default_value": milliseconds, "runtime_key": runtime_key}
    return {"duration_filter": {"comparison": {"op": op, "value": value}}}


def _file(kind: Kind, path: Path) -> dict[str, Any]:
    fields = {
        "route": "%ROUTE_NAME%",
        "project": "%METADATA(ROUTE:datum-gateway:project_name)%" if kind == "http" else BY_LISTENER,
        "sni": "%REQUESTED_SERVER_NAME%",
        "status": "%RESPONSE_CODE%",
        "wire_in": "%DOWNSTREAM_WIRE_BYTES_RECEIVED%",
        "wire_out": "%DOWNSTREAM_WIRE_BYTES_SENT%",
        "body_in": "%BYTES_RECEIVED%",
        "body_out": "%BYTES_SENT%",
        "duration_ms": "%DURATION%",
    }
    return {
        "name": "envoy.access_loggers.file",
        "filter": {"log_type_filter": {"types": [_END[kind]]}},
        "typed_config": {
            "@type": f"{TYPE}extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(path),
            "log_format": {"json_format": fields},
        },
    }
