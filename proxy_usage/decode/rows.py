"""What a row of the access log means, and what leaves decode: the table of row types, fates, skip tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from proxy_usage.model import Amounts, Identity, Origin

DRAIN_ROWS = 200
"""Totals in a piece of what is drained: to attribute and book one costs some 5 µs."""


class RowFate(StrEnum):
    """What became of a row. Every row read has exactly one fate."""

    COUNTED = "counted"
    SKIPPED = "skipped"
    INVALID = "invalid"
    STREAM = "stream"  # handed to streams, which says what became of it


Fate = tuple[str, str]
"""A fate and its reason, ``""`` where the fate says it all."""

COUNTED: Fate = (RowFate.COUNTED, "")
TCP_END, END = 3, 6  # AccessLogType
REDIRECT = b"internal_redirect"
"""``response_code_details`` of a row whose request another row brings again, with the final answer."""
_SWITCHED = 101
_CONNECT = 6  # RequestMethod


@dataclass(frozen=True, slots=True)
class EnvoySettings:
    """What must be known of the Envoys' configuration to read their rows."""

    flush_interval_ms: int | None = None
    """Envoy's access_log_flush_interval; None: no periodic rows."""
    connection_logs: frozenset[str] = frozenset({"conn"})
    """Log names of listener logs, whose rows are connections."""
    untyped: Literal["skip", "end"] = "skip"
    """What a row without a type is, outside listener logs: old Envoys send no other."""
    connection_id: str = "conn_id"
    """Custom tag that holds ``%CONNECTION_ID%``."""
    duration_ms: str = "dur_ms"
    """Custom tag that holds ``%DURATION%``: periodic rows have no duration of their own."""
    emit_us: str = "emit_us"
    """Custom tag that holds ``%EMIT_TIME(%s%6f)%``, when a periodic row was written."""
    short_only: bool = False
    """Rows of long streams go to another port or process, by a filter of Envoy's that follows the same rule
    as ours: one that comes here nonetheless, periodic or end, is misrouted."""
    connections: bool = False
    """Whether listener rows are metered: the time a client held its connection open."""


class StreamRow(NamedTuple):
    """A row of a stream that had or may have had periodic rows: running totals, which need state."""

    origin: Origin
    conn_id: bytes
    start_ns: int
    """0 where Envoy did not say."""
    stream_id: bytes
    identity: Identity
    window_ms: int
    """Start of the window in which a difference is to be booked."""
    amounts: Amounts
    """Running totals since the stream began, in the plan's order; requests are 0 until the end."""
    end: bool
    http: bool
    """Whether the stream is a request; a TCP connection is none."""
    emit_ms: int
    """When the row was written; ``now_ms`` where that is unknown or not credible."""
    now_ms: int
    """When it was read."""


class ConnectionRow(NamedTuple):
    """A listener row: one connection, at its close."""

    origin: Origin
    conn_id: bytes
    start_ns: int
    identity: Identity
    window_ms: int
    open_ns: int
    now_ms: int


class Sighting(NamedTuple):
    """Rows of an identity came over a connection: whom its time may belong to."""

    origin: Origin
    conn_id: bytes
    identity: Identity


@dataclass(slots=True)
class Drained:
    """All that was folded since the last drain. ``rows_read`` is the sum of ``fates``."""

    rows_read: int = 0
    totals: dict[tuple[Identity, int], list[int]] = field(default_factory=dict)
    """``(identity, start of the window in ms) -> [rows, *amounts]`` of finished rows, in the plan's order."""
    long_rows: list[StreamRow] = field(default_factory=list)
    """In the order of their arrival."""
    connection_rows: list[ConnectionRow] = field(default_factory=list)
    """Where listener rows are metered; their fate is ``counted``."""
    sightings: dict[Sighting, int] = field(default_factory=dict)
    """Likewise: the latest start in ns of a stream of that identity over that connection."""
    fates: dict[Fate, int] = field(default_factory=dict)
    """``(fate, reason) -> rows``."""
    notes: dict[str, int] = field(default_factory=dict)
    """Oddities that cost no row: ``future`` and ``past_horizon`` (booked in the present window instead),
    ``no_start_time`` (likewise), ``no_duration`` and ``no_emit_time`` (booked as 0); and
    ``malformed_message``, damage behind which an unknown number of rows was lost, in no other count."""
    complaints: list[str] = field(default_factory=list)
    """The first of the invalid rows and damaged messages, a line each: what is wrong, and where."""
    ended: dict[str, int] = field(default_factory=dict)
    """End rows of HTTP streams by node id, of any fate but unreadable: what Envoy's counters of requests are
    compared with."""

    def end(self, node: str, rows: int) -> None:
        """Adds end rows of a node: it may have several origins."""
        if rows:
            self.ended[node] = self.ended.get(node, 0) + rows

    def add(self, identity: Identity, window_ms: int, totals: list[int]) -> None:
        """Adds ``[rows, *amounts]``: identities of several hosts may be the same."""
        known = self.totals.setdefault((identity, window_ms), totals)
        if known is not totals:
            known[:] = [a + b for a, b in zip(known, totals, strict=True)]


class Handling(NamedTuple):
    """What to do with a row of some type."""

    skip: Fate | None = None
    """Its fate, if such rows are never counted."""
    periodic: bool = False
    requests: int = 0
    tcp: bool = False
    """Whether Envoy's TCP proxy wrote it: there are no bodies apart from the wire."""
    connection: bool = False
    """Whether it is a listener row: nothing counts but how long the connection was open."""
    untyped: bool = False
    """Whether an old Envoy wrote it, which says by ``intermediate_log_entry`` that it is periodic."""


_HTTP_END = Handling(requests=1)
_TCP_END = Handling(tcp=True)


def _skip(reason: str) -> Handling:
    return Handling(skip=(RowFate.SKIPPED, reason))


_TYPES: Mapping[int, Handling] = {
    1: _skip("connected"),  # TcpUpstreamConnected
    2: Handling(periodic=True, tcp=True),  # TcpPeriodic
    3: _TCP_END,  # TcpConnectionEnd
    4: _skip("start"),  # DownstreamStart
    5: Handling(periodic=True),  # DownstreamPeriodic
    6: _HTTP_END,  # DownstreamEnd
    7: _skip("upstream"),  # UpstreamPoolReady: its bytes are copies of the downstream's, bodies swapped
    8: _skip("upstream"),  # UpstreamPeriodic
    9: _skip("upstream"),  # UpstreamEnd
    10: _skip("tunnel"),  # DownstreamTunnelSuccessfullyEstablished
    14: _skip("start"),  # TcpConnectionStart
}
"""AccessLogType to meaning; 0 depends on the log, and what is not here on a person."""


def handlings(envoy: EnvoySettings, log_name: str, *, http: bool) -> Mapping[int, Handling]:
    """What each type means in a log of this name, in http_logs or tcp_logs. Unknown types are absent."""
    table = dict(_TYPES)
    if envoy.short_only:
        table[2] = table[5] = _skip("misrouted")
    elif envoy.flush_interval_ms is None:  # then the end row books it all
        table[2] = table[5] = _skip("periodic")
    if log_name in envoy.connection_logs:
        table[0] = Handling(connection=True) if envoy.connections else _skip("listener")
    elif envoy.untyped == "skip":
        table[0] = _skip("untyped")
    else:
        table[0] = (_HTTP_END if http else _TCP_END)._replace(untyped=True)
    return table


def upgraded(request: Any, response: Any) -> bool:
    """Whether an HTTP stream became a tunnel."""
    code: int = response.response_code.value
    return code == _SWITCHED or (request.request_method == _CONNECT and 200 <= code < 300)


@dataclass(frozen=True, slots=True)
class SkipTest:
    """One entry of the configuration's ``skip``: a row that meets all given conditions is skipped.

    Regular expressions must match the whole text. A condition that is None is not given.
    """

    reason: str
    flag: re.Pattern[str] | None = None
    """Any of the row's response flags, by its short name: ``NR``, ``DC|DPE``."""
    details: re.Pattern[str] | None = None
    """``response_code_details``."""
    status: frozenset[int] | None = None
    """Response codes; 0 is a row without one."""
    route: re.Pattern[str] | None = None
    method: re.Pattern[str] | None = None
    """``GET``, ``POST``…; ``""`` where Envoy knew none."""
    log_name: re.Pattern[str] | None = None
    node: re.Pattern[str] | None = None
    """The node's id."""

    def meets_origin(self, origin: Origin) -> bool:
        """Whether rows of this origin can be skipped by this test."""
        return full_match(self.log_name, origin.log_name) and full_match(self.node, origin.node_id)

    def meets_row(self, common: Any, request: Any, response: Any) -> bool:
        """Whether the row's own conditions are met. ``request`` and ``response`` are empty on TCP rows."""
        return (
            (self.status is None or response.response_code.value in self.status)
            and (self.flag is None or any(full_match(self.flag, flag) for flag in flags(common)))
            and full_match(self.details, response.response_code_details)
            and full_match(self.route, common.route_name)
            and (self.method is None or full_match(self.method, METHODS.get(request.request_method, "")))
        )


def full_match(pattern: re.Pattern[str] | None, text: str | bytes) -> bool:
    """Whether the whole text matches; no pattern matches any."""
    if pattern is None:
        return True
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    return pattern.fullmatch(text) is not None


def flags(common: Any) -> list[str]:
    """The short names of a row's response flags, as in Envoy's ``%RESPONSEFLAGS%``."""
    return [FLAGS[flag.name] for flag, _ in common.response_flags.ListFields()]


METHODS = dict(
    enumerate(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"), start=1)
)

FLAGS = {
    "failed_local_healthcheck": "LH",
    "no_healthy_upstream": "UH",
    "upstream_request_timeout": "UT",
    "local_reset": "LR",
    "upstream_remote_reset": "UR",
    "upstream_connection_failure": "UF",
    "upstream_connection_termination": "UC",
    "upstream_overflow": "UO",
    "no_route_found": "NR",
    "delay_injected": "DI",
    "fault_injected": "FI",
    "rate_limited": "RL",
    "unauthorized_details": "UAEX",
    "rate_limit_service_error": "RLSE",
    "downstream_connection_termination": "DC",
    "upstream_retry_limit_exceeded": "URX",
    "stream_idle_timeout": "SI",
    "invalid_envoy_request_headers": "IH",
    "downstream_protocol_error": "DPE",
    "upstream_max_stream_duration_reached": "UMSDR",
    "response_from_cache_filter": "RFCF",
    "no_filter_config_found": "NFCF",
    "duration_timeout": "DT",
    "upstream_protocol_error": "UPE",
    "no_cluster_found": "NC",
    "overload_manager": "OM",
    "dns_resolution_failure": "DF",
    "downstream_remote_reset": "DR",
}
