"""Rows as most are: a stream has ended, and all it says is in order. What a call costs is saved here.

    Split ─ Straight ─┬─ straight ─▶ the sums
                      └─ the rest, by place ─▶ ProtobufFold, row by row

A row is booked here only if that is certain to come to the same as there: what the walker is to the compiled
fold. Anything odd (no duration, an incredible time, an absurd size, a tag that cannot be opened) is left to
``ProtobufFold``, which knows what becomes of it.

Whose a row is depends on a few texts of it. So its sum is found again by these, and the rules are asked once
for each combination. What is remembered is bounded; what is not remembered is worked out again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from google.protobuf.message import DecodeError as ProtobufError

from proxy_usage.als.v1 import als_pb2 as als
from proxy_usage.decode.identities import MAX_TEXT_BYTES, Fields, Identities
from proxy_usage.decode.rows import COUNTED, END, REDIRECT, TCP_END, EnvoySettings, Fate, Handling, upgraded
from proxy_usage.decode.sums import Cell, Source, Sums, Texts
from proxy_usage.decode.timing import MAX_START_SECONDS, finished_below_ns
from proxy_usage.decode.values import (
    NO_REQUEST,
    NO_RESPONSE,
    Reader,
    constant,
    filter_metadata,
    key_begins,
    reader,
)
from proxy_usage.model import (
    MAX_BYTES,
    MAX_DURATION_NS,
    NS_PER_MS,
    NS_PER_SECOND,
    Field,
    FieldKind,
    FoldPlan,
    Origin,
    Quantity,
)

_MAX_TAGS = 16_384
_MAX_SEEN = 16_384
_MAX_SEEN_BYTES = 1_024
"""Of the texts of one."""
_ROUTE = Field(FieldKind.ROUTE_NAME)
_NO_OTHERS = {FieldKind.CUSTOM_TAG, FieldKind.ROUTE_NAME, FieldKind.NODE, FieldKind.LITERAL}


class _Odd(Exception):
    """Leaves a row to ``ProtobufFold``."""


class Straight:
    """Books straight rows. Not thread-safe."""

    def __init__(self, plan: FoldPlan, envoy: EnvoySettings, identities: Identities) -> None:
        """``identities`` are of the same plan."""
        self._plan = plan
        self._identities = identities
        self._below_ns = min(finished_below_ns(envoy), MAX_DURATION_NS + 1)
        self._bodies = not {Quantity.BODY_IN, Quantity.BODY_OUT}.isdisjoint(plan.quantities)
        self._upgrades = Quantity.UPGRADED_NS in plan.quantities
        fields = dict.fromkeys((*plan.rules, *plan.dimensions))
        tags = [field for field in fields if field.kind is FieldKind.CUSTOM_TAG]
        others = [field for field in fields if field.kind not in _NO_OTHERS]
        # The texts of a row: its cluster if it has no route, its route, the plan's tags, and what else the
        # plan's fields are read from.
        self._places = {field: place for place, field in enumerate((_ROUTE, *tags, *others), start=1)}
        self._tags: dict[bytes, tuple[int, tuple[bytes, ...]]] = {}
        for field in tags:
            tag = field.path[0].encode()
            self._tags[tag] = self._places[field], key_begins(tag)
        self._begins = tuple({start for _, begins in self._tags.values() for start in begins})
        self._others = tuple(_raw(field) for field in others)
        self._opened: dict[bytes, tuple[int, bytes]] = {}

    def fields(self, origin: Origin) -> Fields:
        """The plan's fields as read from the texts of a row."""

        def read(field: Field) -> Reader:
            place = self._places.get(field)
            if place is None:
                value = constant(field, origin, self._plan.node_paths)
                return lambda _texts: value
            if field.kind is FieldKind.DYNAMIC_METADATA:
                return lambda texts: filter_metadata(texts[place], field.path)
            return itemgetter(place)

        return self._identities.fields(read)

    def fold(
        self,
        source: Source,
        rows: Sequence[Any],
        http: int,
        sums: Sums,
        fates: defaultdict[Fate, int],
        credible: tuple[int, int],
    ) -> list[int]:
        """Books the straight rows of a part. Returns the places of the others, of which it has done nothing.

        ``rows`` are opened, the first ``http`` of them HTTP rows; malformed ones are None. ``credible`` are
        the earliest and the latest moment in ns that rows may be of.
        """
        odd: list[int] = []
        opened, begins, others = self._opened.get, self._begins, self._others
        no_texts = [b""] * (2 + len(self._tags))
        below_ns, more = self._below_ns, self._bodies or self._upgrades
        from_ns = until_ns = window_ms = 0  # the window of the row before
        seen: dict[Texts, Cell] = {}
        counted = ended = 0
        for number, row in enumerate(rows):
            if row is None:
                odd.append(number)
                continue
            try:
                if number < http:
                    common, request, response = row.common_properties, row.request, row.response
                    wire_in, wire_out = (
                        common.downstream_wire_bytes_received,
                        common.downstream_wire_bytes_sent,
                    )
                    body_in, body_out = request.request_body_bytes, response.response_body_bytes
                    type_, requests = END, 1
                else:
                    common, request, response = row.common_properties, NO_REQUEST, NO_RESPONSE
                    connection = row.connection_properties
                    wire_in, wire_out = body_in, body_out = connection.received_bytes, connection.sent_bytes
                    type_, requests = TCP_END, 0
                start, duration = common.start_time, common.duration
                seconds, nanos, open_nanos = start.seconds, start.nanos, duration.nanos
                open_ns = duration.seconds * NS_PER_SECOND + open_nanos
                if not (
                    common.access_log_type == type_
                    and (wire_in | wire_out | body_in | body_out) < MAX_BYTES
                    and 0 < seconds <= MAX_START_SECONDS
                    and 0 <= nanos < NS_PER_SECOND
                    and 0 <= open_nanos < NS_PER_SECOND
                    and 0 < open_ns < below_ns
                    and response.response_code_details != REDIRECT
                    and not (source.skip and source.skipped(common, request, response))
                ):
                    fates[_skipped(source.http if requests else source.tcp, common)] += 1
                    continue
                at_ns = seconds * NS_PER_SECOND + nanos + open_ns
                if not from_ns <= at_ns < until_ns:
                    window_ms, from_ns, until_ns = self._window(at_ns, *credible)
                    seen = source.seen.get(window_ms) or {}
                texts = no_texts[:]
                texts[1] = common.route_name
                texts[0] = b"" if texts[1] else common.upstream_cluster
                for tag in common.custom_tags[:]:
                    found = opened(tag)
                    if found is not None:
                        at, texts[at] = found
                    elif tag.startswith(begins):
                        self._open(tag, texts)
                key = tuple([*texts, *[read((common, request)) for read in others]] if others else texts)
                cell = seen.get(key)
                if cell is None:
                    cell = self._meet(source, sums, window_ms, key)
                    seen = source.seen.get(window_ms, seen)
            except (_Odd, ProtobufError):
                odd.append(number)
                continue
            cell[0] += 1
            cell[1] += requests
            cell[2] += wire_in
            cell[3] += wire_out
            cell[6] += open_ns
            if more:
                cell[4] += body_in
                cell[5] += body_out
                cell[7] += open_ns if not requests or upgraded(request, response) else 0
            counted += 1
            ended += requests
        source.ended += ended
        fates[COUNTED] += counted
        return odd

    def _window(self, at_ns: int, earliest_ns: int, latest_ns: int) -> tuple[int, int, int]:
        """The start of a moment's window in ms, and from when until when in ns rows are of it, too."""
        if not earliest_ns <= at_ns <= latest_ns:
            raise _Odd
        window_ms = at_ns // NS_PER_MS
        window_ms -= window_ms % self._plan.window_ms
        until_ns = (window_ms + self._plan.window_ms) * NS_PER_MS
        return window_ms, max(window_ms * NS_PER_MS, earliest_ns), min(until_ns, latest_ns + 1)

    def _open(self, tag: bytes, texts: list[bytes]) -> None:
        """Reads a tag that begins like one of the plan's, by the rules of ``lookup``."""
        if len(tag) > MAX_TEXT_BYTES:
            raise _Odd
        entry = als.Entry.FromString(tag)
        place, begins = self._tags.get(entry.key, (0, ()))
        if tag.startswith(begins):
            texts[place] = value = entry.value
            if len(self._opened) >= _MAX_TAGS:
                self._opened.clear()
            self._opened[tag] = place, value

    def _meet(self, source: Source, sums: Sums, window_ms: int, texts: Texts) -> Cell:
        """The sums of a row that is the first of its kind since the last drain."""
        routed = bool(texts[0] or texts[1])
        cell = sums.cell(source, window_ms, self._identities.of(source.straight, texts, routed=routed))
        if sums.seen < _MAX_SEEN and len(b"".join(texts)) <= _MAX_SEEN_BYTES:
            sums.seen += 1
            source.seen.setdefault(window_ms, {})[texts] = cell
        return cell


def _skipped(handlings: Mapping[int, Handling], common: Any) -> Fate:
    """The fate of a row whose type is never counted."""
    handling = handlings.get(common.access_log_type)
    if handling is None or handling.skip is None:
        raise _Odd
    return handling.skip


def _raw(field: Field) -> Reader:
    """Reads what a field's value follows from, which of metadata is all of it: few rows ask for it."""
    if field.kind is FieldKind.DYNAMIC_METADATA:
        return lambda row: row[0].metadata
    return reader(field, Origin("", "", ""), ())
