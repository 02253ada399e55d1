"""Rows added up per identity and window, with protobuf: the reference, and what is careful with odd rows.

Every row takes the same steps: its type, internal redirects, the operator's skip tests; then its sizes, its
time, its identity; then it goes into a sum or, where its stream may have more rows, out as a ``StreamRow``.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError as ProtobufError

from proxy_usage.decode.contract import Fold
from proxy_usage.decode.framing import Split, open_rows
from proxy_usage.decode.identities import Identities
from proxy_usage.decode.rows import (
    COUNTED,
    DRAIN_ROWS,
    END,
    REDIRECT,
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
    upgraded,
)
from proxy_usage.decode.straight import Straight
from proxy_usage.decode.sums import SUMS, Source, Sums
from proxy_usage.decode.timing import Invalid, Timing
from proxy_usage.decode.values import NO_REQUEST, NO_RESPONSE, lookup, reader
from proxy_usage.model import MAX_BYTES, FoldPlan, Identity, Origin

_MAX_COMPLAINTS = 20
_MAX_TYPES_NAMED = 20
_MAX_LONG_ROWS = 64
"""Each is booked by itself, and so many, and a piece of a message, may hold up the event loop at once."""
MAX_HELD_BYTES = 32 * 1024 * 1024
"""Clients choose values of up to a header's size, so what is held is limited in bytes too."""

_STREAM: Fate = (RowFate.STREAM, "")
_INTERNAL_REDIRECT: Fate = (RowFate.SKIPPED, "internal_redirect")
_MISROUTED: Fate = (RowFate.SKIPPED, "misrouted")
_EARLY: Fate = (RowFate.SKIPPED, "early_periodic")
_UNKNOWN_TYPE = Handling(skip=(RowFate.SKIPPED, "unknown_type"))

_Sizes = tuple[int, int, int, int]  # wire in and out, body in and out

_TCP_PERIODIC, _PERIODIC = 2, 5  # AccessLogType


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
        self._envoy = envoy
        self._limit = identity_limit
        self._skip = tuple(skip)
        self._identities = Identities(plan, accepts)
        self._straight = Straight(plan, envoy, self._identities)
        self._sighting = envoy.connections
        self._window_ms = plan.window_ms
        self._columns = tuple(1 + SUMS.index(quantity) for quantity in plan.quantities)
        self._connection_id = lookup(envoy.connection_id.encode())
        self._types_named: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._timing = Timing(self._plan, self._envoy)
        self._sums = Sums()
        self._rows_read = self._now_ms = 0
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
            self._sums.held >= self._limit
            or self._sums.held_bytes >= MAX_HELD_BYTES
            or len(self._long_rows) >= _MAX_LONG_ROWS
        )

    def entries(self, origin: Origin, split: Split, now_ms: int) -> int:
        """Folds a part of a message and returns how many rows it had. Never raises on its bytes."""
        rows = open_rows(split)
        odd: Iterable[int] = range(len(rows))
        if not self._sighting:  # else each row is one, besides its sums
            source = self._sums.sources.get(origin) or self._source(origin)
            self._timing.present(now_ms)
            odd = self._straight.fold(
                source, rows, split.http, self._sums, self._fates, self._timing.credible
            )
            self._rows_read += len(rows) - len(odd)
        if odd or split.damaged:
            self.some(origin, split, ((number, rows[number]) for number in odd), now_ms)
        return len(rows)

    def some(self, origin: Origin, split: Split, rows: Iterable[tuple[int, Any]], now_ms: int) -> None:
        """Folds these rows of a part, opened (None: malformed), each with its place in it, and notes the
        part's damage."""
        source = self._sums.sources.get(origin) or self._source(origin)
        self._now_ms = now_ms
        self._timing.present(now_ms)
        fates = self._fates
        for number, row in rows:
            try:
                fate = self._fate(source, row, http=number < split.http)
            except Invalid as error:
                fate = self._invalid(origin, str(error), number, split)
            except ProtobufError:
                fate = self._invalid(origin, "malformed", number, split)
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
            fates={fate: rows for fate, rows in self._fates.items() if rows},
            notes=notes,
            complaints=self._complaints,
        )
        sources = list(self._sums.sources.values())
        for source in sources:
            first.end(source.origin.node_id, source.ended)
        self._begin()
        return self._pieces(first, sources, limit)

    def _pieces(self, piece: Drained, sources: list[Source], limit: int) -> Iterator[Drained]:
        # Taken out one by one, in the order of their first rows: to let go of all of them at once takes long.
        for source in sources:
            places = deque(source.cells)
            while places:
                place = places.popleft()
                cell = source.cells.pop(place)
                window_ms, whose = place
                for found in source.seen.values():
                    if found:
                        found.popitem()
                if len(piece.totals) >= limit:
                    yield piece
                    piece = Drained()
                piece.add(
                    Identity(source.plain, *whose),
                    window_ms,
                    [cell[0], *[cell[column] for column in self._columns]],
                )
        yield piece

    def _source(self, origin: Origin) -> Source:
        paths = self._plan.node_paths
        source = self._sums.sources[origin] = Source(
            origin,
            origin._replace(host=""),
            http=handlings(self._envoy, origin.log_name, http=True),
            tcp=handlings(self._envoy, origin.log_name, http=False),
            skip=tuple(test for test in self._skip if test.meets_origin(origin)),
            fields=self._identities.fields(lambda field: reader(field, origin, paths)),
            straight=self._straight.fields(origin),
        )
        return source

    def _fate(self, source: Source, row: Any, *, http: bool) -> Fate:
        if row is None:
            raise Invalid("malformed")
        return self._http(source, row) if http else self._tcp(source, row)

    def _http(self, source: Source, row: Any) -> Fate:
        common, request, response = row.common_properties, row.request, row.response
        source.ended += common.access_log_type == END
        handling = source.http.get(common.access_log_type) or self._unknown(source, common)
        if handling.untyped and common.intermediate_log_entry:
            handling = source.http[_PERIODIC]
        if handling.skip:
            return handling.skip
        if response.response_code_details == REDIRECT:
            return _INTERNAL_REDIRECT  # the row of the final answer brings the same request again
        if source.skip and (reason := source.skipped(common, request, response)):
            return RowFate.SKIPPED, reason
        sizes = (
            common.downstream_wire_bytes_received,
            common.downstream_wire_bytes_sent,
            request.request_body_bytes,
            response.response_body_bytes,
        )
        return self._book(source, handling, common, request, sizes, upgraded=upgraded(request, response))

    def _tcp(self, source: Source, row: Any) -> Fate:
        common, connection = row.common_properties, row.connection_properties
        handling = source.tcp.get(common.access_log_type) or self._unknown(source, common)
        if handling.untyped and common.intermediate_log_entry:
            handling = source.tcp[_TCP_PERIODIC]
        if handling.skip:
            return handling.skip
        if source.skip and (reason := source.skipped(common, NO_REQUEST, NO_RESPONSE)):
            return RowFate.SKIPPED, reason
        wire = body = connection.received_bytes, connection.sent_bytes
        if not handling.tcp:  # an HTTP stream logged through tcp_grpc: those were its bodies
            wire = common.downstream_wire_bytes_received, common.downstream_wire_bytes_sent
        return self._book(source, handling, common, NO_REQUEST, (*wire, *body), upgraded=handling.tcp)

    def _book(
        self,
        source: Source,
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
        # Only a route (or a TCP proxy) chooses a cluster: rows of routes without a name have one too.
        routed = bool(common.route_name or common.upstream_cluster)
        whose = self._identities.of(source.fields, (common, request), routed=routed)
        identity = Identity(source.plain, *whose)
        if self._sighting and (handling.connection or start_ns):
            conn_id = self._connection_id(common.custom_tags)
            if handling.connection:
                self._connection_rows.append(
                    ConnectionRow(
                        source.origin, conn_id, start_ns, identity, window_ms, open_ns, self._now_ms
                    )
                )
                self._sums.hold(conn_id, identity.value, *identity.dimensions)
                return COUNTED
            self._sight(Sighting(source.origin, conn_id, identity), start_ns)
        if finished:
            cell = self._sums.cell(source, window_ms, whose)
            cell[0] += 1
            cell[1] += handling.requests
            cell[2] += wire_in
            cell[3] += wire_out
            cell[4] += body_in
            cell[5] += body_out
            cell[6] += open_ns
            if upgraded:
                cell[7] += open_ns
            return COUNTED
        sums = (handling.requests, *sizes, open_ns, open_ns if upgraded else 0, 0)
        row = StreamRow(
            origin=source.origin,
            conn_id=self._connection_id(common.custom_tags),
            start_ns=start_ns,
            stream_id=common.stream_id,
            identity=identity,
            window_ms=window_ms,
            amounts=tuple([sums[column - 1] for column in self._columns]),
            end=not handling.periodic,
            http=not handling.tcp,
            emit_ms=at_ms,
            now_ms=self._now_ms,
        )
        self._long_rows.append(row)
        self._sums.hold(row.conn_id, row.stream_id, identity.value, *identity.dimensions)
        return _STREAM

    def _sight(self, sighting: Sighting, start_ns: int) -> None:
        latest = self._sightings.get(sighting)
        if latest is None:
            self._sums.hold(sighting.conn_id, *sighting.identity.dimensions)
        self._sightings[sighting] = max(start_ns, latest or 0)

    def _unknown(self, source: Source, common: Any) -> Handling:
        number = common.access_log_type
        if number not in self._types_named and len(self._types_named) < _MAX_TYPES_NAMED:
            self._types_named.add(number)
            self._complain(source.origin, f"rows of access log type {number}, which is unknown, are skipped")
        return _UNKNOWN_TYPE

    def _invalid(self, origin: Origin, reason: str, number: int, split: Split) -> Fate:
        if len(self._complaints) < _MAX_COMPLAINTS:
            size = len(split.entries[number])
            self._complain(origin, f"invalid row ({reason}): row {number} of its part, {size} bytes")
        return RowFate.INVALID, reason

    def _complain(self, origin: Origin, what: str) -> None:
        if len(self._complaints) < _MAX_COMPLAINTS:
            node, log = origin.node_id[:100], origin.log_name[:100]
            self._complaints.append(f"{what}; from node {node!r}, log {log!r}")
