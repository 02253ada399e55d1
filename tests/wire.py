"""Rows as Envoy sends them, built with Envoy's complete schema (xds-protos), not with our subset.

    from wire import DOWNSTREAM_PERIODIC, NOW_MS, http_row, message, tcp_row

    first = message(http_row(tags={"project_name": "alpha"}, wire=(80, 1176)), node_id="envoy-1")
    later = message(http_row(type=DOWNSTREAM_PERIODIC, duration_ns=None))  # says no more who sends

Every builder's default is a plausible finished request that ended just before ``NOW_MS``. What a builder does
not offer is set on what it returns, which is Envoy's own message: ``row.common_properties.sample_rate = 1``.

``captured(NAME)`` reads what a real Envoy sent, ``truth(NAME)`` what its clients counted; the names are the
files in data/captures.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from google.protobuf import json_format, struct_pb2

CAPTURES = Path(__file__).parent / "data" / "captures"

NOW_MS = 1_795_300_000_000
"""2026-11-21T22:26:40Z, 40 seconds into its minute: when the rows below were received."""
START_NS = (NOW_MS - 2_000) * 1_000_000
"""When their streams began."""
DURATION_NS = 1_234_567
"""How long they lasted."""

# AccessLogType, as numbers: 14 is newer than the published schema.
NOT_SET = 0
TCP_UPSTREAM_CONNECTED = 1
TCP_PERIODIC = 2
TCP_CONNECTION_END = 3
DOWNSTREAM_START = 4
DOWNSTREAM_PERIODIC = 5
DOWNSTREAM_END = 6
UPSTREAM_POOL_READY = 7
UPSTREAM_PERIODIC = 8
UPSTREAM_END = 9
DOWNSTREAM_TUNNEL = 10
TCP_CONNECTION_START = 14


def http_row(
    *,
    type: int = DOWNSTREAM_END,  # noqa: A002 (the field's own name)
    start_ns: int | None = START_NS,
    duration_ns: int | None = DURATION_NS,
    wire: tuple[int, int] = (0, 0),
    body: tuple[int, int] = (0, 0),
    tags: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    route: str = "",
    cluster: str = "",
    authority: str = "",
    sni: str = "",
    method: str = "GET",
    path: str = "/",
    status: int = 200,
    details: str = "via_upstream",
    flags: Iterable[str] = (),
    stream_id: str = "",
) -> Any:
    """An ``HTTPAccessLogEntry``.

    ``wire`` and ``body`` are (received, sent) bytes, as the client's socket and as bodies. ``metadata`` is
    ``{filter: {key: value}}``; values are what JSON allows. ``flags`` are fields of ``ResponseFlags``, such
    as ``no_route_found``. None leaves a time out.
    """
    row = accesslog_pb2.HTTPAccessLogEntry()
    _common(row.common_properties, type, start_ns, duration_ns, wire, tags, metadata)
    common = row.common_properties
    common.route_name, common.upstream_cluster, common.stream_id = route, cluster, stream_id
    if sni:
        common.tls_properties.tls_sni_hostname = sni
    for flag in flags:
        if flag == "unauthorized_details":
            common.response_flags.unauthorized_details.SetInParent()
        else:
            setattr(common.response_flags, flag, True)
    row.protocol_version = accesslog_pb2.HTTPAccessLogEntry.HTTP11
    row.request.request_method = base_pb2.RequestMethod.Value(method) if method else 0
    row.request.scheme, row.request.authority, row.request.path = "http", authority, path
    row.request.request_headers.update(headers or {})
    row.response.response_code_details = details
    row.response.response_code.value = status
    row.request.request_body_bytes, row.response.response_body_bytes = body
    return row


def tcp_row(
    *,
    type: int = TCP_CONNECTION_END,  # noqa: A002 (the field's own name)
    start_ns: int | None = START_NS,
    duration_ns: int | None = DURATION_NS,
    sizes: tuple[int, int] = (0, 0),
    wire: tuple[int, int] | None = None,
    tags: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    cluster: str = "",
    sni: str = "",
    stream_id: str = "",
) -> Any:
    """A ``TCPAccessLogEntry``. ``sizes`` are the connection's (received, sent) bytes; ``wire``, what stands
    in common_properties, is the same unless given (listener rows have 0 there)."""
    row = accesslog_pb2.TCPAccessLogEntry()
    _common(
        row.common_properties, type, start_ns, duration_ns, sizes if wire is None else wire, tags, metadata
    )
    common = row.common_properties
    common.upstream_cluster, common.stream_id = cluster, stream_id
    if sni:
        common.tls_properties.tls_sni_hostname = sni
    row.connection_properties.received_bytes, row.connection_properties.sent_bytes = sizes
    return row


def identifier(
    node_id: str = "envoy-1",
    log_name: str = "http",
    *,
    cluster: str = "gateway",
    region: str = "",
    zone: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """What a stream's first message says of its sender."""
    named = als_pb2.StreamAccessLogsMessage.Identifier(log_name=log_name)
    named.node.id, named.node.cluster = node_id, cluster
    named.node.locality.region, named.node.locality.zone = region, zone
    if metadata is not None:
        named.node.metadata.CopyFrom(struct(metadata))
    return named


def message(*rows: Any, node_id: str | None = None, log_name: str = "http", **node: Any) -> bytes:
    """A ``StreamAccessLogsMessage`` of HTTP rows or of TCP rows, as bytes.

    With ``node_id`` it is the first of its stream: it says who sends, see ``identifier`` for more of that.
    """
    whole = als_pb2.StreamAccessLogsMessage()
    if node_id is not None:
        whole.identifier.CopyFrom(identifier(node_id, log_name, **node))
    if rows and isinstance(rows[0], accesslog_pb2.TCPAccessLogEntry):
        whole.tcp_logs.log_entry.extend(rows)
    else:
        whole.http_logs.log_entry.extend(rows)
    return bytes(whole.SerializeToString())


def struct(values: Mapping[str, Any]) -> struct_pb2.Struct:
    """A ``google.protobuf.Struct`` of what JSON allows."""
    return json_format.ParseDict(dict(values), struct_pb2.Struct())


def varint(number: int) -> bytes:
    """A number as protobuf writes sizes and tags: for messages that no encoder would make."""
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + varint(number >> 7)


def captured(name: str, folder: Path = CAPTURES) -> list[tuple[int, bytes]]:
    """``(number of the gRPC stream, message)`` in the order of their arrival at a sink."""
    packed = folder / f"{name}.binpb.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / f"{name}.binpb").read_bytes()
    messages = []
    pos = 0
    while pos < len(raw):
        size = shift = 0
        while True:
            byte = raw[pos]
            pos += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        messages.append(raw[pos : pos + size])
        pos += size
    streams = folder / f"{name}.streams.json"
    numbers = json.loads(streams.read_text()) if streams.exists() else [1] * len(messages)
    return list(zip(numbers, messages, strict=True))


def truth(name: str, folder: Path = CAPTURES) -> Any:
    """What was driven: ``tx`` is client to Envoy, ``rx`` Envoy to client, counted at the client's socket."""
    return json.loads((folder / f"{name}.truth.json").read_text())


def _common(
    common: Any,
    type_: int,
    start_ns: int | None,
    duration_ns: int | None,
    wire: tuple[int, int],
    tags: Mapping[str, str] | None,
    metadata: Mapping[str, Any] | None,
) -> None:
    common.access_log_type = type_
    common.intermediate_log_entry = type_ not in (NOT_SET, TCP_CONNECTION_END, DOWNSTREAM_END, UPSTREAM_END)
    if start_ns is not None:
        common.start_time.seconds, common.start_time.nanos = divmod(start_ns, 1_000_000_000)
    if duration_ns is not None:
        common.duration.seconds, common.duration.nanos = divmod(duration_ns, 1_000_000_000)
        common.duration.SetInParent()
    common.downstream_wire_bytes_received, common.downstream_wire_bytes_sent = wire
    common.custom_tags.update(tags or {})
    for filter_name, values in (metadata or {}).items():
        common.metadata.filter_metadata[filter_name].CopyFrom(struct(values))
