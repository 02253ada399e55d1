"""The pure core in one piece: rows in, turns out. No socket, no file, no clock of its own.

    take ─▶ fold ─drain─▶ attribute ─┬───────────▶ windows ─┐
                                     ├─▶ streams ────▶ ┤    │
                                     ├─▶ connections ▶ ┘    │
                                     └─ held ───────────────┴─ begin ─▶ Turn ─▶ store ─▶ commit | rollback

Every row that ``take`` is given has, after the next drain, one fate: counted, skipped or invalid. All amounts
of counted rows are in ``counted``, and in exactly one of: an open window, an event, a remainder, held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from proxy_usage.attribution import Attributor, Reason, Unattributed
from proxy_usage.connections import Connections, Share
from proxy_usage.decode import ConnectionRow, Drained, Fold, RowFate, Split, StreamRow
from proxy_usage.intake import OTHERS, PLACES, Source, label
from proxy_usage.model import Identity, Key, Origin, Quantity
from proxy_usage.quota import Quota, overflow, trimmed
from proxy_usage.reattribution import Fact, facts
from proxy_usage.streams import Streams
from proxy_usage.turn import Held, Turn
from proxy_usage.windows import Windows

HOUR_MS = 3_600_000


class Port(StrEnum):
    """What may come in where."""

    ALL = "all"  # the only port of a single sink
    SHORT = "short"  # beside a port for long streams: rows that can be added up anywhere
    STREAMS = "streams"  # rows of long streams, which must meet at one owner


OVERFLOW = Identity(Origin("", "", ""), -1, b"", (), routed=False)
"""Stands for the identities of unattributed usage past their bound."""

_TOO_MANY = Unattributed(Reason.IDENTITY_LIMIT)

_HeldKey = tuple[int, str, Identity, tuple[Fact, ...]]  # hour, reason, identity, what it says


@dataclass(slots=True)
class Observed:
    """What happened since the last look, for metrics and the log. Differences."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows by ``(fate, reason)``."""
    notes: Counter[str] = field(default_factory=Counter)
    unattributed: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Pending:
    """What no committed turn holds yet."""

    counted: list[int]
    fates: Counter[tuple[str, str]] = field(default_factory=Counter)
    held: dict[_HeldKey, list[int]] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)


class Pipeline:
    """From rows to turns.

    Args:
        counts: rows read, absolute: they go into each turn.
        last_turn: number of the last turn that took effect.
        ended: see the attribute.
        max_held: see the attribute.
        streams: the owner of long streams; None where Envoy sends no periodic rows.
        connections: who used which connection; None where listener rows are not metered.
        max_identities: bound on identities of one node within an hour.
    """

    def __init__(
        self,
        folds: Mapping[Port, Fold],
        attributor: Attributor,
        windows: Windows,
        *,
        quantities: Sequence[Quantity],
        counts: Callable[[], Mapping[Source, int]],
        max_held: int,
        last_turn: int = 0,
        ended: Mapping[str, int] | None = None,
        streams: Streams | None = None,
        connections: Connections | None = None,
        max_identities: int = 100_000,
    ) -> None:
        self.windows = windows
        self.streams = streams
        self.connections = connections
        self.observed = Observed()
        self.ended = Counter(ended or {})
        """End rows of HTTP streams per node, of any fate, over the life of the store."""
        self._folds = dict(folds)
        self._attributor = attributor
        self._quantities = tuple(quantities)
        self._meters = len(self._quantities)
        self._counts = counts
        self.max_held = max_held
        """Bound on identities of unattributed usage between two turns."""
        self._quota = Quota(max_identities)
        self._last_turn = last_turn
        self._known: dict[Identity, tuple[Fact, ...]] = {}  # of identities held, by the present rules
        self._pending = _Pending([0] * self._meters)

    def take(self, port: Port, origin: Origin, part: Split, now_ms: int) -> None:
        """Folds a part of a message that came in on a port. The caller has counted its rows before."""
        fold = self._folds[port]
        fold.entries(origin, part, now_ms)
        if fold.full:
            self.drain(now_ms)

    def replace(self, folds: Mapping[Port, Fold], attributor: Attributor, now_ms: int) -> None:
        """Goes on with other rules; what was folded under the old ones is attributed by them."""
        self.drain(now_ms)
        self._folds, self._attributor = dict(folds), attributor
        self._known.clear()

    def drain(self, now_ms: int) -> None:
        """Attributes what was folded and adds it to windows, or holds it."""
        for fold in self._folds.values():
            self._book(fold.drain(), now_ms)

    def _book(self, drained: Drained, now_ms: int) -> None:
        fates = Counter(drained.fates)
        for (identity, window_ms), (rows, *amounts) in drained.totals.items():
            outcome = self._attribute(identity, now_ms)
            if isinstance(outcome, Key):
                if self.windows.add(outcome, window_ms, rows, amounts, now_ms):
                    self._count(amounts)
                    continue
                outcome = Unattributed(Reason.TENANT_LIMIT)
            if outcome.skip:
                fates[RowFate.COUNTED, ""] -= rows
                fates[RowFate.SKIPPED, str(outcome.reason)] += rows
                continue
            self._count(amounts)
            self._hold(window_ms, str(outcome.reason), identity, rows, amounts)
        if drained.long_rows:
            del fates[RowFate.STREAM, ""]
            for row in drained.long_rows:
                fates[self._advance(row, now_ms)] += 1
        if self.connections is not None:
            for sighting, start_ns in drained.sightings.items():
                user = self._attribute(sighting.identity, now_ms)
                if isinstance(user, Key):
                    self.connections.saw(sighting, user, start_ns)
            for listener_row in drained.connection_rows:
                self._close_connection(self.connections, listener_row, now_ms)
        self._end(drained.ended)
        self._pending.fates.update(fates)
        self.observed.rows.update(fates)
        self.observed.notes.update(drained.notes)
        self.observed.complaints.extend(drained.complaints)

    def _end(self, ended: Mapping[str, int]) -> None:
        for node, rows in ended.items():
            name = label(node)
            if name not in self.ended and len(self.ended) >= PLACES:
                name = OTHERS
            self.ended[name] += rows
            self._pending.ended[name] += rows

    def _attribute(self, identity: Identity, now_ms: int) -> Key | Unattributed:
        """Whom the identity's usage is billed to, unless its node brings too many of them."""
        outcome = self._attributor.attribute(identity)
        if isinstance(outcome, Unattributed) and outcome.skip:
            return outcome
        return outcome if self._quota.admits(identity, now_ms) else _TOO_MANY

    def _advance(self, row: StreamRow, now_ms: int) -> tuple[str, str]:
        """Books what a row of running totals adds. Returns the row's fate."""
        assert self.streams is not None, "decode hands out such rows only where a flush interval is set"
        outcome = self._attribute(row.identity, now_ms)
        key = outcome if isinstance(outcome, Key) else None
        fate, amounts = self.streams.advance(row, key)
        if amounts is None:
            return fate
        if key is not None and self.windows.add(key, row.window_ms, 1, amounts, now_ms):
            self._count(amounts)
            return fate
        if isinstance(outcome, Unattributed) and outcome.skip:
            return RowFate.SKIPPED, str(outcome.reason)
        reason = Reason.TENANT_LIMIT if isinstance(outcome, Key) else outcome.reason
        self._count(amounts)
        self._hold(row.window_ms, str(reason), row.identity, 1, amounts)
        return fate

    def _close_connection(self, connections: Connections, row: ConnectionRow, now_ms: int) -> None:
        """Books the time of a connection whose own row says for whom; else it waits for who used it."""
        owner = self._attribute(row.identity, now_ms)
        share = connections.closed(row, owner if isinstance(owner, Key) else None)
        if share is not None:
            self._add_connection(share, now_ms)

    def _add_connection(self, share: Share, now_ms: int) -> None:
        amounts = [share.open_ns if q is Quantity.CONNECTION_NS else 0 for q in self._quantities]
        rows = int(share.last)
        self._count(amounts)
        if share.key is None:
            self._hold(share.window_ms, str(Reason.NO_OWNER), share.identity, rows, amounts)
        elif not self.windows.add(share.key, share.window_ms, rows, amounts, now_ms):
            self._hold(share.window_ms, str(Reason.TENANT_LIMIT), share.identity, rows, amounts)

    def _settle(self, now_ms: int) -> None:
        """Books what time alone decides: connections that waited, requests of streams that fell silent."""
        if self.connections is not None:
            for share in self.connections.due(now_ms):
                self._add_connection(share, now_ms)
        if self.streams is None:
            return
        for delta in self.streams.expire(now_ms):
            window_ms = delta.at_ms - delta.at_ms % self.windows.length_ms
            self._count(delta.amounts)
            if not self.windows.add(delta.key, window_ms, 0, delta.amounts, now_ms):
                self._hold(window_ms, str(Reason.TENANT_LIMIT), OVERFLOW, 0, delta.amounts)

    def begin(self, now_ms: int, *, limit: int = 1_000, everything: bool = False) -> Turn:
        """All that changed since the last turn. ``commit`` or ``rollback`` must follow."""
        self.drain(now_ms)
        self._settle(now_ms)
        pending, self._pending = self._pending, _Pending([0] * self._meters)
        self._last_turn += 1
        return Turn(
            number=self._last_turn,
            windows=self.windows.begin(now_ms, limit=limit, everything=everything),
            counted=tuple(pending.counted),
            fates={fate: rows for fate, rows in pending.fates.items() if rows},
            held=tuple(
                Held(hour_ms, reason, identity, rows, tuple(amounts), known)
                for (hour_ms, reason, identity, known), (rows, *amounts) in pending.held.items()
            ),
            intake=self._counts(),
            ended=pending.ended,
            streams=None if self.streams is None else self.streams.begin(),
            connections=None if self.connections is None else self.connections.begin(),
        )

    def commit(self, turn: Turn) -> None:
        """The turn is durable."""
        self.windows.commit(turn.windows)

    def rollback(self, turn: Turn) -> None:
        """The store refused the turn: the next one holds it all again."""
        self.windows.rollback(turn.windows)
        if self.streams is not None and turn.streams is not None:
            self.streams.rollback(turn.streams)
        if self.connections is not None and turn.connections is not None:
            self.connections.rollback(turn.connections)
        self._pending.fates.update(turn.fates)
        self._pending.ended.update(turn.ended)
        self._count(turn.counted)
        for held in turn.held:
            self._add_held((held.hour_ms, held.reason, held.identity, held.facts), held.rows, held.amounts)

    def observe(self) -> Observed:
        """What happened since the last call."""
        observed, self.observed = self.observed, Observed()
        return observed

    def _count(self, amounts: Sequence[int]) -> None:
        counted = self._pending.counted
        for index, amount in enumerate(amounts):
            counted[index] += amount

    def _hold(
        self, window_ms: int, reason: str, identity: Identity, rows: int, amounts: Sequence[int]
    ) -> None:
        self.observed.unattributed[reason] += rows
        whole = identity
        identity = overflow(identity) if reason == Reason.IDENTITY_LIMIT else trimmed(identity)
        if identity != whole and reason != Reason.IDENTITY_LIMIT:
            self.observed.notes["trimmed_identity"] += rows
        known = self._known.get(identity)
        if known is None:
            if len(self._known) >= self.max_held:
                self._known.clear()
            known = self._known[identity] = facts(self._attributor, identity)
        self._add_held((window_ms - window_ms % HOUR_MS, reason, identity, known), rows, amounts)

    def _add_held(self, key: _HeldKey, rows: int, amounts: Sequence[int]) -> None:
        held = self._pending.held
        if key not in held and len(held) >= self.max_held:
            key = (key[0], key[1], OVERFLOW, ())
        have = held.setdefault(key, [0] * (self._meters + 1))
        for index, amount in enumerate((rows, *amounts)):
            have[index] += amount
