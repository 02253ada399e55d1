"""Windows: usage per key and UTC-aligned interval, from the first row to the event.

The life of one cell (a key in a window), clock passed in, nothing awaited:

      first row, in time                        end + grace + spread
    ──────────────────────▶  open  ──────────────────────────────────▶  closing ──commit──▶ event
                              ▲  │ rows add up; each turn saves             │
      first row after         │  │ what changed (checkpoint)                │ rollback: as if never taken
      end + grace: late ──────┘  └──── due = now + reopen, when late ◀──────┘

* A cell is due ``grace`` after its window's end, plus a share of ``spread_ms`` that its key decides, so
  that neither the keys of one process nor its siblings on other machines post all at once.
* A late row opens a cell of its own that stays open for ``reopen``: however late an Envoy always is,
  a key makes at most one late event per meter and ``reopen``.
* ``begin`` hands out what is due and what changed; ``commit`` forgets it, ``rollback`` takes it back.
  Between the two, rows go on arriving: a cell that is being closed gets a successor with an id of its own.
* A million cells may change between two turns. So ``begin`` has steps, ``close_due``, ``cut`` and ``pack``,
  and may pause between and within them: the turn is what there was at the cut. A cell that changes before it
  is packed is packed first.
* Amounts never pass ``CELL_LIMIT``: a cell that would is retired and a successor takes over, so that every
  stored integer fits in 64 bits, whatever an Envoy claims.
"""

from __future__ import annotations

import heapq
import operator
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from proxy_usage.model import Amounts, Cell, Key

CELL_LIMIT = 1 << 61
PACK = 500
"""Cells taken out or packed at a time: half a millisecond of work."""
HOUR_MS = 3_600_000
TENANT_IDLE_MS = 86_400_000
"""A tenant unseen for a day no longer counts against ``max_tenants``."""


@dataclass(slots=True)
class _Open:
    id: int
    window_ms: int
    key: Key
    due_ms: int
    rows: int
    amounts: list[int]
    late: bool
    saved: bool = False  # whether a checkpoint knows the cell, or the turn that is under way
    packed: int = 0  # the cut that it was packed for


class Birth(NamedTuple):
    """A cell the store does not know yet."""

    id: int
    window_ms: int
    key: Key
    due_ms: int


@dataclass(slots=True)
class _Cut:
    """What changed up to a cut, and what of it is packed."""

    number: int
    cells: dict[int, _Open]
    changed: list[tuple[int, ...]]
    born: list[_Open]
    births: list[Birth]

    def pack(self, cell: _Open) -> None:
        if cell.packed == self.number:
            return
        cell.packed = self.number
        self.changed.append((cell.id, cell.rows, *cell.amounts))
        if not cell.saved:
            self.born.append(cell)
            cell.saved = True  # or the turn is rolled back


@dataclass(frozen=True, slots=True)
class WindowTurn:
    """What one turn moves from memory to the store, in one transaction."""

    closing: tuple[Cell, ...]
    born: list[Birth]
    changed: list[tuple[int, ...]]
    """``(id, rows, *amounts)`` of open cells, absolute, so that applying one twice changes nothing."""
    taken: tuple[list[_Open], list[_Open], dict[int, _Open]] = field(
        repr=False, default_factory=lambda: ([], [], {})
    )
    """The live cells behind ``closing``, ``born`` and ``changed``: for ``rollback`` alone."""

    def release(self) -> Iterator[None]:
        """Lets go of what a turn held, ``PACK`` cells at a time: to free a million at once takes long."""
        _, born, cells = self.taken
        while cells or self.changed or self.born or born:
            for held in (self.changed, self.born, born):
                del held[-PACK:]
            for _ in range(min(PACK, len(cells))):
                cells.popitem()
            yield


class Windows:
    """All open cells.

    Args:
        length_ms: length of a window.
        grace_ms: how long after its end a window still takes rows as being in time.
        reopen_ms: how long a late row keeps its window open.
        spread_ms: over how much time the closings of one window are spread.
        salt: differs between processes, so that siblings close the same key at other moments.
        max_keys: bound on open cells; past it a tenant's new keys share one cell per window, and past twice
            as many, when nothing could be closed for long, one per hour.
        defaults, max_tenants: see the attributes.
    """

    def __init__(
        self,
        *,
        length_ms: int,
        grace_ms: int,
        reopen_ms: int,
        spread_ms: int,
        salt: bytes,
        defaults: tuple[str, ...],
        max_keys: int,
        max_tenants: int,
        next_id: int = 1,
    ) -> None:
        self.length_ms = length_ms
        self._grace_ms = grace_ms
        self._reopen_ms = reopen_ms
        self._spread_ms = max(1, spread_ms)
        self._salt = zlib.crc32(salt)
        self.defaults = defaults
        """The dimensions of the key that takes over past ``max_keys``."""
        self._max_keys = max_keys
        self.max_tenants = max_tenants
        """Bound on tenants seen within a day; past it usage of new ones is refused."""
        self._next_id = next_id
        self._open: dict[tuple[int, Key], _Open] = {}
        self._queue: list[tuple[int, int, _Open]] = []  # (due, id, cell); also cells no longer in _open
        self._changed: dict[int, _Open] = {}
        self._cut: _Cut | None = None  # while a turn is packed
        self._cuts = 0
        self._spare = _spare()
        self._tenants: dict[str, int] = {}
        self._tenants_swept_ms = 0
        self.late_rows = 0
        self.overflow_rows = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __repr__(self) -> str:
        return f"<Windows open={len(self._queue)} changed={len(self._changed)} tenants={len(self._tenants)}>"

    def add(self, key: Key, window_ms: int, rows: int, amounts: Sequence[int], now_ms: int) -> bool:
        """Adds usage to a key's window.

        Returns False, having added nothing, when the tenant is one too many; the caller holds the usage.
        """
        if not self._admit(key.tenant, now_ms):
            return False
        if max(amounts) <= CELL_LIMIT:
            self._add(key, window_ms, rows, amounts, now_ms)
            return True
        for part in _parts(amounts):
            self._add(key, window_ms, rows, part, now_ms)
            rows = 0
        return True

    def _add(self, key: Key, window_ms: int, rows: int, amounts: Sequence[int], now_ms: int) -> None:
        cell = self._with_room(key, window_ms, amounts)
        if cell is None:
            cell = self._create(key, window_ms, rows, amounts, now_ms)
        cut = self._cut
        if cut is not None and cell.id in cut.cells:
            cut.pack(cell)  # as it was at the cut
        cell.rows += rows
        cell.amounts = [*map(operator.add, cell.amounts, amounts)]
        self._changed[cell.id] = cell
        if cell.late:
            self.late_rows += rows

    def _with_room(self, key: Key, window_ms: int, amounts: Sequence[int]) -> _Open | None:
        """The open cell that takes these amounts; one that would pass the limit is retired."""
        cell = self._open.get((window_ms, key))
        if cell is not None and max(map(operator.add, cell.amounts, amounts)) > CELL_LIMIT:
            del self._open[window_ms, key]  # it closes when due, a successor takes over
            return None
        return cell

    def _create(self, key: Key, window_ms: int, rows: int, amounts: Sequence[int], now_ms: int) -> _Open:
        if len(self._queue) >= self._max_keys:
            self.overflow_rows += rows
            key = Key(key.tenant, self.defaults)
            if len(self._queue) >= 2 * self._max_keys:
                # Nothing was closed for long: from here on a window a tenant and hour, its first, takes all.
                window_ms = now_ms - now_ms % HOUR_MS
            shared = self._with_room(key, window_ms, amounts)
            if shared is not None:
                return shared
        end_ms = window_ms + self.length_ms + self._grace_ms
        late = now_ms >= end_ms
        due_ms = now_ms + self._reopen_ms if late else end_ms + self._share(key)
        cell = _Open(self._next_id, window_ms, key, due_ms, 0, [0] * len(amounts), late)
        self._next_id += 1
        self._open[window_ms, key] = cell
        heapq.heappush(self._queue, (due_ms, cell.id, cell))
        return cell

    def _share(self, key: Key) -> int:
        """A key's part of the spread, in milliseconds: the same at each window, another in each process."""
        return zlib.crc32("\0".join((key.tenant, *key.dimensions)).encode(), self._salt) % self._spread_ms

    def _admit(self, tenant: str, now_ms: int) -> bool:
        if tenant not in self._tenants and len(self._tenants) >= self.max_tenants:
            if 0 <= now_ms - self._tenants_swept_ms < 60_000:  # below 0: the clock was moved back
                return False
            self._tenants_swept_ms = now_ms
            horizon = now_ms - TENANT_IDLE_MS
            self._tenants = {name: seen for name, seen in self._tenants.items() if seen > horizon}
            if len(self._tenants) >= self.max_tenants:
                return False
        self._tenants[tenant] = now_ms
        return True

    @property
    def tenants(self) -> int:
        """Tenants seen within a day."""
        return len(self._tenants)

    def next_due_ms(self) -> int | None:
        """When the next cell is due, or None when nothing is open."""
        return self._queue[0][0] if self._queue else None

    def begin(self, now_ms: int, *, limit: int = 1_000, everything: bool = False) -> WindowTurn:
        """Takes up to ``limit`` due cells out, and a snapshot of what changed since the last turn.

        ``everything`` takes cells that are not due as well (the configuration's meters changed).
        Exactly one of ``commit`` and ``rollback`` must follow before the next ``begin``.
        """
        closing: list[_Open] = []
        for _ in self.close_due(closing, now_ms, limit=limit, everything=everything):
            pass
        self.cut()
        for _ in self.pack():
            pass
        return self.turn(closing)

    def close_due(
        self, closing: list[_Open], now_ms: int, *, limit: int, everything: bool = False
    ) -> Iterator[None]:
        """The first step of ``begin``: takes due cells out, ``PACK`` at a time. Nothing may be added."""
        while self._queue and len(closing) < limit and (everything or self._queue[0][0] <= now_ms):
            cell = heapq.heappop(self._queue)[2]
            closing.append(cell)
            if self._open.get((cell.window_ms, cell.key)) is cell:
                del self._open[cell.window_ms, cell.key]
            self._changed.pop(cell.id, None)
            if len(closing) % PACK == 0:
                yield

    def cut(self) -> None:
        """The second step: what is added from here on belongs to the next turn."""
        assert self._cut is None, "a turn is being packed"
        self._cuts += 1
        # What a turn let go of is filled anew: Python's collector walks large lists while they are young.
        cells, changed, born, births = self._spare
        self._cut = _Cut(
            self._cuts,
            self._changed,
            [] if changed else changed,
            [] if born else born,
            [] if births else births,
        )
        self._changed = {} if cells else cells

    def pack(self) -> Iterator[None]:
        """The third step: packs what changed before the cut, ``PACK`` cells at a time."""
        cut = self._cut
        assert cut is not None, "cut comes first"
        for number, cell in enumerate(cut.cells.values(), start=1):
            cut.pack(cell)
            if number % PACK == 0:
                yield
        births = cut.births
        while len(births) < len(cut.born):
            births.extend(
                Birth(c.id, c.window_ms, c.key, c.due_ms) for c in cut.born[len(births) : len(births) + PACK]
            )
            yield

    def turn(self, closing: list[_Open]) -> WindowTurn:
        """The last step: the turn, when all is packed."""
        cut, self._cut = self._cut, None
        assert cut is not None
        assert len(cut.changed) == len(cut.cells), "pack it whole"
        self._spare = cut.cells, cut.changed, cut.born, cut.births
        return WindowTurn(
            closing=tuple(Cell(c.id, c.window_ms, c.key, c.rows, tuple(c.amounts)) for c in closing),
            born=cut.births,
            changed=cut.changed,
            taken=(closing, cut.born, cut.cells),
        )

    def commit(self, turn: WindowTurn) -> None:
        """The store has it: the closed cells are gone, the changed ones are saved, as they say already."""

    def rollback(self, turn: WindowTurn) -> None:
        """The store refused it: everything is as if the turn had not been taken."""
        closing, born, changed = turn.taken
        self._spare = _spare()
        for cell in born:
            cell.saved = False
        # A disk may be full for hours: this costs what changed since, not all that waits to be saved.
        changed.update(self._changed)
        self._changed = changed
        for cell in closing:
            heapq.heappush(self._queue, (cell.due_ms, cell.id, cell))
            # A successor may have been opened meanwhile; then both close, each once.
            self._open.setdefault((cell.window_ms, cell.key), cell)
            self._changed[cell.id] = cell

    def restore(self, cells: Iterable[tuple[Cell, int]]) -> None:
        """Takes over ``(cell, due_ms)`` that a former process checkpointed. Ids go on after theirs."""
        for cell, due_ms in cells:
            opened = _Open(
                cell.id,
                cell.window_ms,
                cell.key,
                due_ms,
                cell.rows,
                list(cell.amounts),
                late=False,
                saved=True,
            )
            self._open[cell.window_ms, cell.key] = opened
            heapq.heappush(self._queue, (due_ms, cell.id, opened))
            self._next_id = max(self._next_id, cell.id + 1)

    def open_amounts(self) -> Amounts:
        """The sum of all open cells per meter: a term of the conservation sum."""
        columns = zip(*(cell.amounts for _, _, cell in self._queue), strict=True)
        return tuple(sum(column) for column in columns)


def _spare() -> tuple[dict[int, _Open], list[tuple[int, ...]], list[_Open], list[Birth]]:
    return {}, [], [], []


def _parts(amounts: Sequence[int]) -> Iterable[Sequence[int]]:
    """Splits amounts so that none passes ``CELL_LIMIT``."""
    rest = list(amounts)
    while max(rest) > CELL_LIMIT:
        yield [min(value, CELL_LIMIT) for value in rest]
        rest = [max(0, value - CELL_LIMIT) for value in rest]
    yield rest
