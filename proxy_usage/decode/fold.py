"""Rows added up per identity and window, with protobuf: the reference, and what is careful with odd rows.

Every row takes the same steps: its type, internal redirects, the operator's skip tests; then its sizes, its
time, its identity; then it goes into a sum or, where its stream may have more rows, out as a ``StreamRow``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError as ProtobufError

from proxy_usage.als.v1 import als_pb2 as als
from proxy_usage.decode.contract import Fold
from proxy_usage.decode.framing import Split
from proxy_usage.decode.rows import (
    DRAIN_ROWS,
    ConnectionRow,
    Drained,
    EnvoySettings,
    Fate,
    Handling,
    RowFate,
    Sighting,
    SkipTest,
    StreamRow,
    handlings,
)
from proxy_usage.decode.timing import Invalid, Timing
from proxy_usage.decode.values import Reader, lookup, reader
from proxy_usage.model import MAX_BYTES, FoldPlan, Identity, Origin, Quantity

_MAX_COMPLAINTS = 20
_MAX_TYPES_NAMED = 20
_MAX_LONG_ROWS = 64
"""Each is booked by itself, and so many, and a piece of a message, may hold up the event loop at once."""
MAX_HELD_BYTES = 32 * 1024 * 1024
"""Clients choose values of up to a header's size, so what is held is limited in bytes too."""
_MAX_VERDICTS = 65_536
_MAX_VERDICT_BYTES = 256

_COUNTED: Fate = (RowFate.COUNTED, "")
_STREAM: Fate = (RowFate.STREAM, "")
_INTERNAL_REDIRECT: Fate = (RowFate.SKIPPED, "internal_redirect")
_MISROUTED: Fate = (RowFate.SKIPPED, "misrouted")
_EARLY: Fate = (RowFate.SKIPPED, "early_periodic")
_UNKNOWN_TYPE = Handling(skip=(RowFate.SKIPPED, "unknown_type"))

SUMS = (
    Quantity.REQUESTS,
    Quantity.WIRE_IN,
    Quantity.WIRE_OUT,
    Quantity.BODY_IN,
    Quantity.BODY_OUT,
    Quantity.OPEN_NS,
    Quantity.UPGRADED_NS,
    Quantity.CONNECTION_NS,
)
"""What every row is read into, whatever the meters are; a further source of a meter is read in ``_book``."""

_CellKey = tuple[int, int, bytes, tuple[bytes, ...], bool]  # window, then an Identity without its origin
_Sizes = tuple[int, int, int, int]  # wire in and out, body in and out

NO_VALUE = b"-"
"""What Envoy's formatters write where there is nothing."""
_SWITCHED = 101
_TCP_PERIODIC, _PERIODIC, _END = 2, 5, 6  # AccessLogType
_CONNECT = 6  # RequestMethod
_NO_REQUEST = als.Request()
_NO_RESPONSE = als.Response()


@dataclass(slots=True)
class _Source:
    """What all rows of one origin have in common, worked out once, and their sums."""

    origin: Origin
    plain: Origin
    """Without the host, which tells connections apart and not whom usage belongs to."""
    http: Mapping[int, Handling]
    tcp: Mapping[int, Handling]
    skip: tuple[SkipTest, ...]
    rules: tuple[tuple[int, Reader], ...]
    dimensions: tuple[Reader, ...]
    ended: int = 0
    """End rows of HTTP streams, of any fate."""
    cells: dict[_CellKey, list[int]] = field(default_factory=dict)
    """Rows, then ``SUMS``."""


class ProtobufFold(Fold):
    """The fold that opens each row with protobuf. Not thread-safe."""

    def __init__(
        self,
        plan: FoldPlan,
        *,
        accepts: Callable[[int, str], bool],
        envoy: EnvoySettings,
        skip: Sequence[SkipTest] = (),
        identity_limit: int = 50_000,
    ) -> None:
        """``accepts(rule, text)`` says whether a rule's pattern and map take a value. It must depend on its
        arguments alone, for its answers are remembered; bytes that are not UTF-8 are surrogates in ``text``.

        ``identity_limit`` is how many sums and long rows may be held before ``full``.
        """
        self._plan = plan
        self._accepts = accepts
        self._envoy = envoy
        self._skip = tuple(skip)
        self._limit = identity_limit
        self._sighting = envoy.connections
        self._window_ms = plan.window_ms
        self._columns = tuple(SUMS.index(quantity) for quantity in plan.quantities)
        self._connection_id = lookup(envoy.connection_id.encode())
        self._verdicts: dict[tuple[int, bytes], bool] = {}
        self._types_named: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._timing = Timing(self._plan, self._envoy)
        self._sources: dict[Origin, _Source] = {}
        self._held = self._held_bytes = self._rows_read = self._now_ms = 0
        self._fates: defaultdict[Fate, int] = defaultdict(int)
        self._malformed_messages = 0
        self._long_rows: list[StreamRow] = []
        self._connection_rows: list[ConnectionRow] = []
        self._sightings: dict[Sighting, int] = {}
        self._complaints: list[str] = []

    @property
    def full(self) -> bool:
        """Whether so much is held that the caller must drain before it folds on."""
        return (
            self._held >= self._limit
            or self._held_bytes >= MAX_HELD_BYTES
            or len(self._long_rows) >= _MAX_LONG_ROWS
        )

    def entries(self, origin: Origin, split: Split, now_ms: int) -> int:
        """Folds a part of a message and returns how many rows it had. Never raises on its bytes."""
        self.some(origin, split, enumerate(split.entries), now_ms)
        return len(split.entries)

    def some(self, origin: Origin, split: Split, rows: Iterable[tuple[int, bytes]], now_ms: int) -> None:
        """Folds these rows of a part, each with its place in it, and notes the part's damage."""
        source = self._sources.get(origin) or self._source(origin)
        self._now_ms = now_ms
        self._timing.present(now_ms)
        fates = self._fates
        for number, raw in rows:
            try:
                fate = self._http(source, raw) if number < split.http else self._tcp(source, raw)
            except Invalid as error:
                fate = self._invalid(origin, str(error), number, raw)
            except ProtobufError:
                fate = self._invalid(origin, "malformed", number, raw)
            fates[fate] += 1
            self._rows_read += 1
        if split.damaged:
            self._malformed_messages += 1
            self._complain(origin, f"damaged message, rows behind the damage are lost: {split.damaged}")

    def drains(self, limit: int = DRAIN_ROWS) -> Iterator[Drained]:
        """Hands over what was folded, see ``Fold.drains``."""
        notes = dict(self._timing.notes)
        if self._malformed_messages:
            notes["malformed_message"] = self._malformed_messages
        first = Drained(
            rows_read=self._rows_read,
            long_rows=self._long_rows,
            connection_rows=self._connection_rows,
            sightings=self._sightings,
            fates=dict(self._fates),
            notes=notes,
            complaints=self._complaints,
        )
        sources = list(self._sources.values())
        for source in sources:
            first.end(source.origin.node_id, source.ended)
        self._begin()
        return self._pieces(first, sources, limit)

    def _pieces(self, piece: Drained, sources: list[_Source], limit: int) -> Iterator[Drained]:
        for source in sources:
            for (window_ms, rule, value, dimensions, routed), (rows, *sums) in source.cells.items():
                if len(piece.totals) >= limit:
                    yield piece
                    piece = Drained()
                identity = Identity(source.plain, rule, value, dimensions, routed)
                piece.add(identity, window_ms, [rows, *(sums[column] for column in self._columns)])
        yield piece

    def _source(self, origin: Origin) -> _Source:
        paths = self._plan.node_paths
        source = self._sources[origin] = _Source(
            origin,
            origin._replace(host=""),
            http=handlings(self._envoy, origin.log_name, http=True),
            tcp=handlings(self._envoy, origin.log_name, http=False),
            skip=tuple(test for test in self._skip if test.meets_origin(origin)),
            rules=tuple(enumerate(reader(rule, origin, paths) for rule in self._plan.rules)),
            dimensions=tuple(reader(dimension, origin, paths) for dimension in self._plan.dimensions),
        )
        return source

    def _http(self, source: _Source, raw: bytes) -> Fate:
        row = als.HttpRow.FromString(raw)
        common, request, response = row.common_properties, row.request, row.response
        source.ended += common.access_log_type == _END
        handling = source.http.get(common.access_log_type) or self._unknown(source, common)
        if handling.untyped and common.intermediate_log_entry:
            handling = source.http[_PERIODIC]
        if handling.skip:
            return handling.skip
        if response.response_code_details == b"internal_redirect":
            return _INTERNAL_REDIRECT  # the row of the final answer brings the same request again
        if source.skip and (reason := _skipped(source, common, request, response)):
            return RowFate.SKIPPED, reason
        sizes = (
            common.downstream_wire_bytes_received,
            common.downstream_wire_bytes_sent,
            request.request_body_bytes,
            response.response_body_bytes,
        )
        code = response.response_code.value
        upgraded = code == _SWITCHED or (request.request_method == _CONNECT and 200 <= code < 300)
        return self._book(source, handling, common, request, sizes, upgraded=upgraded)

    def _tcp(self, source: _Source, raw: bytes) -> Fate:
        row = als.TcpRow.FromString(raw)
        common, connection = row.common_properties, row.connection_properties
        handling = source.tcp.get(common.access_log_type) or self._unknown(source, common)
        if handling.untyped and common.intermediate_log_entry:
            handling = source.tcp[_TCP_PERIODIC]
        if handling.skip:
            return handling.skip
        if source.skip and (reason := _skipped(source, common, _NO_REQUEST, _NO_RESPONSE)):
            return RowFate.SKIPPED, reason
        wire = body = connection.received_bytes, connection.sent_bytes
        if not handling.tcp:  # an HTTP stream logged through tcp_grpc: those were its bodies
            wire = common.downstream_wire_bytes_received, common.downstream_wire_bytes_sent
        return self._book(source, handling, common, _NO_REQUEST, (*wire, *body), upgraded=handling.tcp)

    def _book(
        self,
        source: _Source,
        handling: Handling,
        common: Any,
        request: Any,
        sizes: _Sizes,
        *,
        upgraded: bool,
    ) -> Fate:
        wire_in, wire_out, body_in, body_out = sizes
        # None is negative (the fields are uint64) and the limit is a power of two: one test for all four.
        if (wire_in | wire_out | body_in | body_out) >= MAX_BYTES:
            raise Invalid("bytes")
        timing = self._timing
        start_ns, open_ns, at_ms, finished = (
            timing.of_periodic(common) if handling.periodic else timing.of_end(common)
        )
        if not finished and self._envoy.short_only:
            return _MISROUTED
        if handling.periodic and timing.is_early(open_ns):
            return _EARLY
        window_ms = at_ms - at_ms % self._window_ms
        rule, value = self._tenant_value(source, common, request)
        values = [read(common, request) for read in source.dimensions]
        dimensions = tuple([b"" if value == NO_VALUE else value for value in values])
        # Only a route (or a TCP proxy) chooses a cluster: rows of routes without a name have one too.
        routed = bool(common.route_name or common.upstream_cluster)
        if self._sighting and (handling.connection or start_ns):
            conn_id = self._connection_id(common.custom_tags)
            identity = Identity(source.plain, rule, value, dimensions, routed)
            if handling.connection:
                self._connection_rows.append(
                    ConnectionRow(
                        source.origin, conn_id, start_ns, identity, window_ms, open_ns, self._now_ms
                    )
                )
                self._hold(conn_id, value, *dimensions)
                return _COUNTED
            self._sight(Sighting(source.origin, conn_id, identity), start_ns)
        if finished:
            cell = source.cells.get((window_ms, rule, value, dimensions, routed))
            if cell is None:
                cell = source.cells[window_ms, rule, value, dimensions, routed] = [0] * (1 + len(SUMS))
                self._hold(value, *dimensions)
            cell[0] += 1
            cell[1] += handling.requests
            cell[2] += wire_in
            cell[3] += wire_out
            cell[4] += body_in
            cell[5] += body_out
            cell[6] += open_ns
            if upgraded:
                cell[7] += open_ns
            return _COUNTED
        sums = (handling.requests, *sizes, open_ns, open_ns if upgraded else 0, 0)
        row = StreamRow(
            origin=source.origin,
            conn_id=self._connection_id(common.custom_tags),
            start_ns=start_ns,
            stream_id=common.stream_id,
            identity=Identity(source.plain, rule, value, dimensions, routed),
            window_ms=window_ms,
            amounts=tuple([sums[column] for column in self._columns]),
            end=not handling.periodic,
            http=not handling.tcp,
            emit_ms=at_ms,
            now_ms=self._now_ms,
        )
        self._long_rows.append(row)
        self._hold(row.conn_id, row.stream_id, value, *dimensions)
        return _STREAM

    def _sight(self, sighting: Sighting, start_ns: int) -> None:
        latest = self._sightings.get(sighting)
        if latest is None:
            self._hold(sighting.conn_id, *sighting.identity.dimensions)
        self._sightings[sighting] = max(start_ns, latest or 0)

    def _tenant_value(self, source: _Source, common: Any, request: Any) -> tuple[int, bytes]:
        """The first rule that takes its field's value, and that; else the first value and its ``~rule``."""
        refused, first = -1, b""
        for rule, read in source.rules:
            value = read(common, request)
            if value and value != NO_VALUE:
                verdict = self._verdicts.get((rule, value))
                if self._judge(rule, value) if verdict is None else verdict:
                    return rule, value
                if not first:
                    refused, first = ~rule, value
        return refused, first

    def _judge(self, rule: int, value: bytes) -> bool:
        verdict = self._accepts(rule, value.decode("utf-8", "surrogateescape"))
        if len(value) <= _MAX_VERDICT_BYTES:
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            self._verdicts[rule, value] = verdict
        return verdict

    def _hold(self, *texts: bytes) -> None:
        self._held += 1
        self._held_bytes += sum(map(len, texts))

    def _unknown(self, source: _Source, common: Any) -> Handling:
        number = common.access_log_type
        if number not in self._types_named and len(self._types_named) < _MAX_TYPES_NAMED:
            self._types_named.add(number)
            self._complain(source.origin, f"rows of access log type {number}, which is unknown, are skipped")
        return _UNKNOWN_TYPE

    def _invalid(self, origin: Origin, reason: str, number: int, raw: bytes) -> Fate:
        self._complain(origin, f"invalid row ({reason}): row {number} of its part, {len(raw)} bytes")
        return RowFate.INVALID, reason

    def _complain(self, origin: Origin, what: str) -> None:
        if len(self._complaints) < _MAX_COMPLAINTS:
            node, log = origin.node_id[:100], origin.log_name[:100]
            self._complaints.append(f"{what}; from node {node!r}, log {log!r}")


def _skipped(source: _Source, common: Any, request: Any, response: Any) -> str:
    """The reason of the first skip test that the row meets; ``""`` if it meets none."""
    for test in source.skip:
        if test.meets_row(common, request, response):
            return test.reason
    return ""
