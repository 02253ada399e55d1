"""The fold whose inner loop is compiled, and the protobuf fold behind it for what needs state or looks odd.

               ┌─ plain, finished ─▶ its own table ─┐
    Split ─ Walker                                   ├─▶ drains
               └─ the rest, by place ─▶ ProtobufFold ┘

The walker handles a row only if it is certain to come to the same as ``ProtobufFold``. It knows the plan as
numbers; what is text to decide about (patterns, map files) it asks here, and remembers the answers.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from proxy_usage.als.v1 import als_pb2 as als
from proxy_usage.decode.contract import Fold
from proxy_usage.decode.fold import MAX_HELD_BYTES, ProtobufFold
from proxy_usage.decode.framing import OpenRows, Split, open_row
from proxy_usage.decode.rows import (
    DRAIN_ROWS,
    FLAGS,
    METHODS,
    Drained,
    EnvoySettings,
    Fate,
    Handling,
    RowFate,
    SkipTest,
    full_match,
    handlings,
)
from proxy_usage.decode.sums import SUMS
from proxy_usage.decode.timing import finished_below_ns
from proxy_usage.decode.values import constant
from proxy_usage.model import Field, FieldKind, FoldPlan, Identity, Origin

# As native/walker.h and native/row.h have them.
_MAX_FIELDS = 32
_MAX_PATH = 8
_MAX_PART = 1_000
_MAX_TESTS = 64
_MAX_TYPES = 64
_MAX_SOURCES = 60_000
_MAX_NOW_MS = 1 << 42
_CAREFUL, _HTTP_END, _TCP_END, _HTTP_END_UNTYPED, _TCP_END_UNTYPED, _FIRST_SKIP = range(6)
_FIRST_FATES: tuple[Fate, ...] = ((RowFate.COUNTED, ""), (RowFate.SKIPPED, "internal_redirect"))
_NOTES = ("no_start_time", "future", "past_horizon")
_FROM_SOURCE = 6
_ROW_BYTES = 152
"""Of a row with some 100 bytes of texts, as the shipped configuration has."""
_KINDS = {
    FieldKind.CUSTOM_TAG: 0,
    FieldKind.REQUEST_HEADER: 1,
    FieldKind.DYNAMIC_METADATA: 2,
    FieldKind.ROUTE_NAME: 3,
    FieldKind.AUTHORITY: 4,
    FieldKind.SNI: 5,
    FieldKind.NODE: _FROM_SOURCE,
    FieldKind.LITERAL: _FROM_SOURCE,
}
_KEYED = {FieldKind.CUSTOM_TAG, FieldKind.REQUEST_HEADER, FieldKind.DYNAMIC_METADATA}

Accepts = Callable[[int, str], bool]


class _Questions:
    """What the walker asks: does a rule take a text, does it match a skip test's pattern?

    Apart from the fold, which owns the walker that owns this: nothing refers in a circle.
    """

    def __init__(self, accepts: Accepts, rules: int) -> None:
        self._accepts = accepts
        self._rules = rules
        self.patterns: list[Any] = []

    def add(self, pattern: Any) -> int:
        """The number of the question whether a text matches; -1 without a pattern."""
        if pattern is None:
            return -1
        self.patterns.append(pattern)
        return self._rules + len(self.patterns) - 1

    def __call__(self, question: int, text: bytes) -> bool:
        if question < self._rules:
            return self._accepts(question, text.decode("utf-8", "surrogateescape"))
        return full_match(self.patterns[question - self._rules], text)


class CompiledFold(Fold):
    """The compiled fold. Not thread-safe."""

    def __init__(
        self,
        native: ModuleType,
        plan: FoldPlan,
        *,
        accepts: Accepts,
        envoy: EnvoySettings,
        skip: Sequence[SkipTest] = (),
        identity_limit: int,
        plain: Collection[int] = (),
    ) -> None:
        """As ``new_fold``."""
        self._careful = ProtobufFold(
            plan, accepts=accepts, envoy=envoy, skip=skip, identity_limit=identity_limit
        )
        self._plan = plan
        self._envoy = envoy
        self._skip = tuple(skip)
        self._limit = identity_limit
        self._limit_bytes = max(MAX_HELD_BYTES, identity_limit * _ROW_BYTES)
        self._fields = tuple(dict.fromkeys((*plan.rules, *plan.dimensions)))
        self._fates: list[Fate] = list(_FIRST_FATES)
        self._sources: dict[Origin, int] = {}
        self._walker: Any = None
        if fits(plan, envoy, skip):
            self._walker = self._build(native, accepts, plain)

    def _build(self, native: ModuleType, accepts: Accepts, plain: Collection[int]) -> Any:
        plan = self._plan
        questions = _Questions(accepts, len(plan.rules))
        number = {field: index for index, field in enumerate(self._fields)}
        return native.Walker(
            tuple((_KINDS[field.kind], _keys(field)) for field in self._fields),
            bytes(number[field] for field in plan.rules),
            bytes(number[field] for field in plan.dimensions),
            bytes(SUMS.index(quantity) for quantity in plan.quantities),
            sum(1 << rule for rule in plain),
            questions,
            tuple(self._test(test, questions) for test in self._skip),
            plan.window_ms,
            plan.max_skew_ms,
            plan.late_horizon_ms,
            finished_below_ns(self._envoy),
            secrets.token_bytes(48),
        )

    def _fate(self, fate: Fate) -> int:
        if fate not in self._fates:
            self._fates.append(fate)
        return self._fates.index(fate)

    def _test(self, test: SkipTest, questions: _Questions) -> tuple[Any, ...]:
        flags = sum(
            1 << als.ResponseFlags.DESCRIPTOR.fields_by_name[name].number
            for name, short in FLAGS.items()
            if full_match(test.flag, short)
        )
        methods = sum(1 << code for code in range(10) if full_match(test.method, METHODS.get(code, "")))
        return (
            self._fate((RowFate.SKIPPED, test.reason)),
            test.status,
            test.flag is not None,
            flags,
            methods,
            questions.add(test.details),
            questions.add(test.route),
        )

    @property
    def full(self) -> bool:
        """Whether so much is held that the caller must drain before it folds on."""
        walker = self._walker
        return self._careful.full or (
            walker is not None
            and (
                walker.rows >= self._limit
                or walker.held_bytes >= self._limit_bytes
                or len(self._sources) >= _MAX_SOURCES
            )
        )

    @property
    def rows(self) -> int:
        """Sums in the walker's table."""
        return 0 if self._walker is None else int(self._walker.rows)

    @property
    def answers(self) -> int:
        """Answers about texts that the walker remembers."""
        return 0 if self._walker is None else int(self._walker.answers)

    @property
    def allocated_bytes(self) -> int:
        """What the walker's table takes of the system."""
        return 0 if self._walker is None else int(self._walker.allocated_bytes)

    def entries(self, origin: Origin, split: Split, now_ms: int) -> int:
        """Folds a part of a message and returns how many rows it had. Never raises on its bytes."""
        # The walker knows its own sequence and lists.
        entries = list(split.entries) if isinstance(split.entries, OpenRows) else split.entries
        if self._walker is None or not 0 <= now_ms <= _MAX_NOW_MS:
            return self._careful.entries(origin, split, now_ms)
        source = self._sources.get(origin)
        if source is None:
            source = self._sources[origin] = self._source(origin)
        odd = self._walker.fold(source, entries, split.http, now_ms)
        if odd is not None or split.damaged:
            http = split.http
            rows = ((number, open_row(entries[number], http=number < http)) for number in odd or ())
            self._careful.some(origin, split, rows, now_ms)
        return len(entries)

    def _source(self, origin: Origin) -> int:
        paths = self._plan.node_paths
        number: int = self._walker.source(
            self._handlings(origin, http=True),
            self._handlings(origin, http=False),
            tuple(constant(field, origin, paths) for field in self._fields),
            sum(1 << index for index, test in enumerate(self._skip) if test.meets_origin(origin)),
        )
        return number

    def _handlings(self, origin: Origin, *, http: bool) -> bytes:
        table: Mapping[int, Handling] = handlings(self._envoy, origin.log_name, http=http)
        return bytes(self._handling(table.get(number)) for number in range(_MAX_TYPES))

    def _handling(self, handling: Handling | None) -> int:
        if handling is None or handling.periodic or handling.connection:
            return _CAREFUL
        if handling.skip:
            return _FIRST_SKIP + self._fate(handling.skip) - len(_FIRST_FATES)
        if handling.untyped:
            return _TCP_END_UNTYPED if handling.tcp else _HTTP_END_UNTYPED
        return _TCP_END if handling.tcp else _HTTP_END

    def drains(self, limit: int = DRAIN_ROWS) -> Iterator[Drained]:
        """Hands over what was folded, see ``Fold.drains``."""
        careful = self._careful.drains(limit)
        if self._walker is None:
            return careful
        origins = [origin._replace(host="") for origin in self._sources]
        self._sources = {}
        rows, fates, notes, ended = self._walker.take()
        first = next(careful)
        for origin, count in zip(origins, ended, strict=True):
            first.end(origin.node_id, count)
        for fate, count in zip(self._fates, fates, strict=False):
            if count:
                first.fates[fate] = first.fates.get(fate, 0) + count
        for note, count in zip(_NOTES, notes, strict=True):
            if count:
                first.notes[note] = first.notes.get(note, 0) + count
        first.rows_read += sum(fates)
        return _pieces(first, careful, rows, origins, limit)


def _pieces(
    first: Drained, careful: Iterator[Drained], rows: Any, origins: list[Origin], limit: int
) -> Iterator[Drained]:
    yield first
    yield from careful
    while len(rows):
        piece = Drained()
        for source, window_ms, rule, value, dimensions, routed, totals in rows.take(limit):
            piece.add(Identity(origins[source], rule, value, dimensions, routed), window_ms, totals)
        yield piece


def fits(plan: FoldPlan, envoy: EnvoySettings, skip: Sequence[SkipTest]) -> bool:
    """Whether the walker can follow a plan: not where connections are metered, each row being a sighting."""
    fields = {*plan.rules, *plan.dimensions}
    return (
        not envoy.connections
        and max(len(fields), len(plan.rules), len(plan.dimensions)) <= _MAX_FIELDS
        and len(plan.quantities) <= len(SUMS)
        and len(skip) <= _MAX_TESTS
        and all(field.kind not in _KEYED or 1 <= len(field.path) <= _MAX_PATH for field in fields)
        and all(0 < len(part) < _MAX_PART for field in fields for part in field.path)
        and max(plan.window_ms, plan.max_skew_ms, plan.late_horizon_ms) <= _MAX_NOW_MS
    )


def _keys(field: Field) -> tuple[bytes, ...]:
    """A map's entries begin with these."""
    if field.kind not in _KEYED:
        return ()
    return tuple(als.Entry(key=part.encode()).SerializeToString() for part in field.path)
