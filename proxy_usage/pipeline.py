"""The pure core in one piece: rows in, turns out. No socket, no file, no clock of its own.

    take ─▶ fold ─drain─▶ attribute ─┬───────────▶ windows ─┐
                                     ├─▶ streams ────▶ ┤    │
                                     ├─▶ connections ▶ ┘    │
                                     └─ held ───────────────┴─ begin ─▶ Turn ─▶ store ─▶ commit | rollback

Every row that ``take`` is given has, after the next drain, one fate: counted, skipped or invalid. All amounts
of counted rows are in ``counted``, and in exactly one of: an open window, an event, a remainder, held.
"""

from __future__ import annotations

import operator
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from proxy_usage.attribution import Attributor, Reason, Unattributed
from proxy_usage.cells import Closing
from proxy_usage.connections import Connections, ConnectionTurn, Share
from proxy_usage.decode import ConnectionRow, Drained, Fold, RowFate, Split, StreamRow
from proxy_usage.holding import OVERFLOW, Holding, Sums, packed
from proxy_usage.intake import OTHERS, PLACES, Source, label
from proxy_usage.model import Identity, Key, Origin, Quantity
from proxy_usage.origins import NO_RULE, Origins, RowOrigin
from proxy_usage.quota import Quota
from proxy_usage.streams import Streams, StreamTurn
from proxy_usage.turn import Held, Observed, Pending, Turn
from proxy_usage.windows import Windows

BOOK, BOOK_ROWS = 24, 12
"""Totals, and rows of long streams, that are booked without a pause: one step, a third of a millisecond.
Of keys never seen before it is half as many totals."""
STEPS_A_PART = 5
"""Steps of what is set aside, after each part of a message: they book more rows than a part may bring."""
MAX_ASIDE = 64
"""So many folds set aside, and a part does what they need, however long it takes: memory is bounded."""
_STEP, _NOTHING = 1, 0  # whether a pause follows work, or hardly any


class Port(StrEnum):
    """What may come in where."""

    ALL = "all"  # the only port of a single sink
    SHORT = "short"  # beside a port for long streams: rows that can be added up anywhere
    STREAMS = "streams"  # rows of long streams, which must meet at one owner


_TOO_MANY = Unattributed(Reason.IDENTITY_LIMIT)


@dataclass(slots=True)
class _Cut:
    """What a turn in the making took at its cut."""

    closing: Closing = field(default_factory=list)
    streams: StreamTurn | None = None
    connections: ConnectionTurn | None = None
    origins: tuple[RowOrigin, ...] = ()
    held: Sums = field(default_factory=dict)
    pending: Pending | None = None
    """Set at the cut, and not before."""


def next_step(steps: Generator[None, None, Turn]) -> Turn | None:
    """Takes a step of ``Pipeline.beginning``. The turn, when that was the last."""
    try:
        next(steps)
    except StopIteration as done:
        turn: Turn = done.value
        return turn
    return None


class Pipeline:
    """From rows to turns.

    Args:
        counts: rows read, absolute: they go into each turn.
        last_turn: number of the last turn that took effect.
        ended: see the attribute.
        max_held: bound on identities of unattributed usage between two turns.
        streams: the owner of long streams; None where Envoy sends no periodic rows.
        connections: who used which connection; None where listener rows are not metered.
        max_identities: bound on identities of one node within an hour.
        stepped: called after each step of booking what was folded.
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
        stepped: Callable[[], object] = lambda: None,
    ) -> None:
        self.windows = windows
        self.streams = streams
        self.connections = connections
        self.observed = Observed()
        self.origins = Origins()
        self.ended = Counter(ended or {})
        """End rows of HTTP streams per node, of any fate, over the life of the store."""
        self._folds = dict(folds)
        self._attributor = attributor
        self._quantities = tuple(quantities)
        self._meters = len(self._quantities)
        self._counts = counts
        self.holding = Holding(max_held, self._meters)
        self._quota = Quota(max_identities)
        self._stepped = stepped
        self._last_turn = last_turn
        self._pending = Pending([0] * self._meters)
        self._aside: deque[Iterator[int]] = deque()

    def take(self, port: Port, origin: Origin, part: Split, now_ms: int) -> None:
        """Folds a part of a message that came in on a port. The caller has counted its rows before.

        What a full fold held is booked along with the parts that follow, more of it at a time than they
        bring: no part waits for all of it, and it never grows.
        """
        fold = self._folds[port]
        fold.entries(origin, part, now_ms)
        if fold.full:
            self._set_aside(now_ms)
        steps = STEPS_A_PART
        while self._aside and (steps > 0 or len(self._aside) > MAX_ASIDE):
            steps -= self._step()

    def replace(self, folds: Mapping[Port, Fold], attributor: Attributor, now_ms: int) -> None:
        """Goes on with other rules; what was folded under the old ones is attributed by them."""
        self.drain(now_ms)
        self._folds, self._attributor = dict(folds), attributor
        self.holding.forget_rules()

    def drain(self, now_ms: int) -> None:
        """Attributes what was folded and adds it to windows, or holds it."""
        for _ in self.draining(now_ms):
            pass

    def draining(self, now_ms: int) -> Iterator[None]:
        """The same in steps; rows may be taken in between."""
        self._set_aside(now_ms)
        while self._aside:
            self._step()
            yield

    def _set_aside(self, now_ms: int) -> None:
        """Whatever is folded is to be booked; the folds begin anew."""
        for fold in self._folds.values():
            self._aside.append(self._book(fold.drains(BOOK), now_ms))

    def _step(self) -> int:
        """One step of what is set aside, in its order. Returns 0 where it was hardly any work."""
        worked = next(self._aside[0], None)
        if worked is None:
            self._aside.popleft()
        self._stepped()
        return worked or _NOTHING

    def _book(self, pieces: Iterator[Drained], now_ms: int) -> Iterator[int]:
        fates: Counter[tuple[str, str]] = Counter()
        ended: Counter[str] = Counter()
        for piece in pieces:
            fates.update(piece.fates)
            ended.update(piece.ended)
            yield from self._book_rows(piece, fates, now_ms)
            opened = len(self.windows)
            for number, ((identity, window_ms), (rows, *amounts)) in enumerate(piece.totals.items(), start=1):
                self._book_total(identity, window_ms, rows, amounts, fates, now_ms)
                if number == BOOK // 2 and len(self.windows) - opened > BOOK // 4:
                    yield _STEP
            self.observed.notes.update(piece.notes)
            self.observed.complaints.extend(piece.complaints)
            yield _STEP if piece.totals else _NOTHING
        # At once, or a look in between would see rows twice that are moved from one fate to another.
        self._end(ended)
        self._pending.fates.update(fates)
        self.observed.rows.update(fates)

    def _book_total(
        self,
        identity: Identity,
        window_ms: int,
        rows: int,
        amounts: list[int],
        fates: Counter[tuple[str, str]],
        now_ms: int,
    ) -> None:
        outcome = self._attribute(identity, now_ms)
        if isinstance(outcome, Key):
            if self.windows.add(outcome, window_ms, rows, amounts, now_ms):
                self._count(amounts)
                self._trace(outcome, window_ms, identity, rows, now_ms)
                return
            outcome = Unattributed(Reason.TENANT_LIMIT)
        if outcome.skip:
            fates[RowFate.COUNTED, ""] -= rows
            fates[RowFate.SKIPPED, str(outcome.reason)] += rows
            return
        self._count(amounts)
        self._hold(window_ms, str(outcome.reason), identity, rows, amounts)

    def _book_rows(self, piece: Drained, fates: Counter[tuple[str, str]], now_ms: int) -> Iterator[int]:
        """What is booked row by row: streams, and who used which connection."""
        fates.pop((RowFate.STREAM, ""), None)
        for number, row in enumerate(piece.long_rows, start=1):
            fates[self._advance(row, now_ms)] += 1
            if number % BOOK_ROWS == 0:
                yield _STEP
        if self.connections is None:
            return
        for number, (sighting, start_ns) in enumerate(piece.sightings.items(), start=1):
            user = self._attribute(sighting.identity, now_ms)
            if isinstance(user, Key):
                self.connections.saw(sighting, user, start_ns)
            if number % BOOK == 0:
                yield _STEP
        for number, listener_row in enumerate(piece.connection_rows, start=1):
            self._close_connection(self.connections, listener_row, now_ms)
            if number % BOOK_ROWS == 0:
                yield _STEP

    def _end(self, ended: Mapping[str, int]) -> None:
        for node, rows in ended.items():
            name = label(node)
            if name not in self.ended and len(self.ended) >= PLACES:
                name = OTHERS
            self.ended[name] += rows
            self._pending.ended[name] += rows

    def _attribute(self, identity: Identity, now_ms: int) -> Key | Unattributed:
        """Whom the identity's usage is billed to, unless its node brings too many of them."""
        digest = hash(identity)
        outcome = self._attributor.attribute(identity, digest)
        if isinstance(outcome, Unattributed) and outcome.skip:
            return outcome
        return outcome if self._quota.admits(identity, digest, now_ms) else _TOO_MANY

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
            self._trace(key, row.window_ms, row.identity, 1, now_ms)
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
        elif self.windows.add(share.key, share.window_ms, rows, amounts, now_ms):
            self._trace(share.key, share.window_ms, share.identity, rows, now_ms)
        else:
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
        steps = self.beginning(now_ms, limit=limit, everything=everything)
        while (turn := next_step(steps)) is None:
            continue
        return turn

    def beginning(
        self, now_ms: int, *, limit: int = 1_000, everything: bool = False
    ) -> Generator[None, None, Turn]:
        """``begin`` in steps, each of a millisecond or two; rows may be taken in between.

        The turn holds the rows taken before its first step, and none that were taken after it: those wait in
        the folds, or set aside behind it. ::

            first step   folds set aside, rows read per node noted
            then         all that is set aside is booked ─▶ due windows taken out ─▶ the cut
            then         what changed before the cut is packed; later rows are booked beside
        """
        intake = dict(self._counts())
        self._set_aside(now_ms)
        cut = _Cut()
        self._aside.append(self._cut(cut, now_ms, limit=limit, everything=everything))
        yield
        while cut.pending is None:
            self._step()
            yield
        for _ in self.windows.pack():
            yield
        held: list[Held] = []
        for number, one in enumerate(packed(cut.held), start=1):
            held.append(one)
            if number % BOOK == 0:
                yield
        self._last_turn += 1
        return Turn(
            number=self._last_turn,
            windows=self.windows.turn(cut.closing),
            counted=tuple(cut.pending.counted),
            fates={fate: rows for fate, rows in cut.pending.fates.items() if rows},
            held=tuple(held),
            intake=intake,
            ended=cut.pending.ended,
            streams=cut.streams,
            connections=cut.connections,
            origins=cut.origins,
        )

    def _cut(self, cut: _Cut, now_ms: int, *, limit: int, everything: bool) -> Iterator[int]:
        """The end of what a turn holds, set aside behind its rows: nothing else is booked meanwhile."""
        self._settle(now_ms)
        yield _STEP
        cut.origins = self.origins.begin(now_ms)
        yield _STEP
        for _ in self.windows.close_due(cut.closing, now_ms, limit=limit, everything=everything):
            yield _STEP
        self.windows.cut()
        cut.streams = None if self.streams is None else self.streams.begin()
        cut.connections = None if self.connections is None else self.connections.begin()
        cut.held = self.holding.take()
        cut.pending, self._pending = self._pending, Pending([0] * self._meters)

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
        self.origins.rollback(turn.origins)
        self._pending.fates.update(turn.fates)
        self._pending.ended.update(turn.ended)
        self._count(turn.counted)
        self.holding.give_back(turn.held)

    def observe(self) -> Observed:
        """What happened since the last call."""
        observed, self.observed = self.observed, Observed()
        return observed

    def _count(self, amounts: Sequence[int]) -> None:
        pending = self._pending
        pending.counted = [*map(operator.add, pending.counted, amounts)]

    def _trace(self, key: Key, window_ms: int, identity: Identity, rows: int, now_ms: int) -> None:
        """Notes for whom, by which rule and on which node rows were counted."""
        names = self._attributor.rule_names
        rule = names[identity.rule] if 0 <= identity.rule < len(names) else NO_RULE
        self.origins.note(key, window_ms, rule, identity.origin.node_id, rows, now_ms)

    def _hold(
        self, window_ms: int, reason: str, identity: Identity, rows: int, amounts: Sequence[int]
    ) -> None:
        self.observed.unattributed[reason] += rows
        if not self.holding.hold(self._attributor, window_ms, reason, identity, rows, amounts):
            self.observed.notes["trimmed_identity"] += rows
