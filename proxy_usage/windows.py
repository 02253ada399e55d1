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

from proxy_usage.bulk import Columns, Numbered, Pages, Shards
from proxy_usage.cells import UNKNOWN, Birth, Closing, Cut, OpenCell, Sums
from proxy_usage.model import Amounts, Cell, Key

CELL_LIMIT = 1 << 61
PACK, CLOSE = 200, 25
"""Cells packed, and cells taken out, at a time: a tenth and a quarter of a millisecond, or twice that where
there are many."""
HOUR_MS = 3_600_000
TENANT_IDLE_MS = 86_400_000
"""A tenant unseen for a day no longer counts against ``max_tenants``."""
SWEEP_MS, SWEEP = 60_000, 250
"""How often those are looked for at most, and how many tenants are looked at for a new one."""


@dataclass(frozen=True, slots=True)
class WindowTurn:
    """What one turn moves from memory to the store, in one transaction."""

    closing: tuple[Cell, ...] = ()
    born: Pages[Birth] = field(default_factory=Pages)
    changed: Columns = field(default_factory=Columns)
    """``(id, rows, *amounts)`` of open cells, absolute, so that applying one twice changes nothing."""
    since: int = UNKNOWN
    """The first of the turns that it holds: those before it that were rolled back are in it."""
    taken: Closing = field(repr=False, default_factory=list)
    """The live cells behind ``closing``: for ``rollback`` alone."""

    def release(self) -> Iterator[None]:
        """Lets go of what a turn held, a page at a time: to free a million at once takes long."""
        while self.changed.pages or self.born.pages:
            for held in (self.changed.pages, self.born.pages):
                del held[-1:]
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
        self._cells: Numbered[OpenCell] = Numbered()
        self._open: dict[int, Shards[Key, OpenCell]] = {}  # those that take rows, by window
        self._sums = Sums()
        self._queue: list[tuple[int, int]] = []  # (due, id) of each cell
        self._turn = self._since = 1  # the one that is noted for, and the first that is not in the store
        self._noted = [Columns()]  # ids of what changed, some more than once
        self._cut: Cut | None = None  # while a turn is packed
        self._tenants: Shards[str, int] = Shards()
        self._swept_ms = self._sweep_at = 0
        self.late_rows = 0
        self.overflow_rows = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __repr__(self) -> str:
        return f"<Windows open={len(self._queue)} turn={self._turn} tenants={len(self._tenants)}>"

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
        if self._added(key, window_ms, rows, amounts):
            return
        if len(self._queue) >= self._max_keys:
            self.overflow_rows += rows
            key = Key(key.tenant, self.defaults)
            if len(self._queue) >= 2 * self._max_keys:
                # Nothing was closed for long: from here on a window a tenant and hour, its first, takes all.
                window_ms = now_ms - now_ms % HOUR_MS
            if self._added(key, window_ms, rows, amounts):
                return
        end_ms = window_ms + self.length_ms + self._grace_ms
        late = now_ms >= end_ms
        due_ms = now_ms + self._reopen_ms if late else end_ms + self._share(key)
        cell = self._sums.open(self._next_id, window_ms, key, due_ms, 0, (0,) * len(amounts), late=late)
        self._next_id += 1
        self._enqueue(cell)
        self._open_at(window_ms).put(key, cell)
        self._added(key, window_ms, rows, amounts)

    def _added(self, key: Key, window_ms: int, rows: int, amounts: Sequence[int]) -> bool:
        """Adds to the open cell, if there is one that takes so much; one that would pass the limit is
        retired."""
        opened = self._open.get(window_ms)
        cell = None if opened is None else opened.parts[hash(key) & opened.mask].get(key)
        if opened is None or cell is None:
            return False
        cut = self._cut
        if cut is not None and cut.since <= cell.noted <= cut.number:
            cut.pack(cell)  # as it was at the cut
        # Where they are: what replaces an object is young, and the collector walks all that is, however much
        # it has become since it last looked.
        sums, place, most = cell.sums, cell.start + 2, 0
        for amount in amounts:
            sums[place] = total = sums[place] + amount
            place += 1
            if total > most:
                most = total
        if most > CELL_LIMIT:
            for place, amount in enumerate(amounts, start=cell.start + 2):
                sums[place] -= amount
            opened.pop(key)  # it closes when due, a successor takes over
            return False
        sums[cell.start + 1] += rows
        if cell.noted != self._turn:
            self._note(cell)
        if cell.late:
            self.late_rows += rows
        return True

    def _note(self, cell: OpenCell) -> None:
        cell.noted = self._turn
        self._noted[-1].add((cell.id,))

    def _open_at(self, window_ms: int) -> Shards[Key, OpenCell]:
        opened = self._open.get(window_ms)
        if opened is None:
            opened = self._open[window_ms] = Shards()
        return opened

    def _enqueue(self, cell: OpenCell) -> None:
        self._cells[cell.id] = cell
        heapq.heappush(self._queue, (cell.due_ms, cell.id))

    def _share(self, key: Key) -> int:
        """A key's part of the spread, in milliseconds: the same at each window, another in each process."""
        return zlib.crc32("\0".join((key.tenant, *key.dimensions)).encode(), self._salt) % self._spread_ms

    def _admit(self, tenant: str, now_ms: int) -> bool:
        seen = self._tenants.parts[hash(tenant) & self._tenants.mask]
        if tenant in seen:
            seen[tenant] = now_ms
            return True
        if len(self._tenants) >= self.max_tenants:
            self._sweep(now_ms)
        if len(self._tenants) >= self.max_tenants:
            return False
        self._tenants.put(tenant, now_ms)
        return True

    def _sweep(self, now_ms: int) -> None:
        """Looks for tenants unseen for a day where the last look ended, until one is found or many were
        looked at."""
        if self._sweep_at == 0:
            if 0 <= now_ms - self._swept_ms < SWEEP_MS:  # below 0: the clock was moved back
                return
            self._swept_ms = now_ms
        horizon, looked = self._swept_ms - TENANT_IDLE_MS, 0
        idle: list[str] = []
        while looked < SWEEP and not idle:
            part = self._tenants.parts[self._sweep_at]
            looked += len(part)
            idle = [name for name, seen_ms in part.items() if seen_ms <= horizon]
            self._sweep_at = (self._sweep_at + 1) % len(self._tenants.parts)
            if self._sweep_at == 0:
                break
        for name in idle:
            self._tenants.pop(name)

    @property
    def tenants(self) -> int:
        """Tenants seen within a day, and some whose day is over."""
        return len(self._tenants)

    def next_due_ms(self) -> int | None:
        """When the next cell is due, or None when nothing is open."""
        return self._queue[0][0] if self._queue else None

    def begin(self, now_ms: int, *, limit: int = 1_000, everything: bool = False) -> WindowTurn:
        """Takes up to ``limit`` due cells out, and a snapshot of what changed since the last turn.

        ``everything`` takes cells that are not due as well (the configuration's meters changed).
        Exactly one of ``commit`` and ``rollback`` must follow before the next ``begin``.
        """
        closing: Closing = []
        for _ in self.close_due(closing, now_ms, limit=limit, everything=everything):
            pass
        self.cut()
        for _ in self.pack():
            pass
        return self.turn(closing)

    def close_due(
        self, closing: Closing, now_ms: int, *, limit: int, everything: bool = False
    ) -> Iterator[None]:
        """The first step of ``begin``: takes due cells out, ``CLOSE`` at a time. Nothing may be added."""
        while self._queue and len(closing) < limit and (everything or self._queue[0][0] <= now_ms):
            cell = self._cells.pop(heapq.heappop(self._queue)[1])
            assert cell is not None, "what is queued is open"
            closing.append((cell, Cell(cell.id, cell.window_ms, cell.key, cell.rows, tuple(cell.amounts))))
            opened = self._open.get(cell.window_ms)
            if opened is not None and opened.get(cell.key) is cell:
                opened.pop(cell.key)
                if not opened:
                    del self._open[cell.window_ms]
            if len(closing) % CLOSE == 0:
                yield

    def cut(self) -> None:
        """The second step: what is added from here on belongs to the next turn."""
        assert self._cut is None, "a turn is being packed"
        self._cut = Cut(self._turn, self._since, self._noted)
        self._turn += 1
        self._since, self._noted = self._turn, [Columns()]  # or this turn is rolled back

    def pack(self) -> Iterator[None]:
        """The third step: packs what changed before the cut, ``PACK`` cells at a time."""
        cut = self._cut
        assert cut is not None, "cut comes first"
        ids = (number for noted in cut.noted for number in noted.take_first())
        for count, number in enumerate(ids, start=1):
            cell = self._cells.get(number)
            if cell is not None:  # it is not closing
                cut.pack(cell)
            if count % PACK == 0:
                yield

    def turn(self, closing: Closing) -> WindowTurn:
        """The last step: the turn, when all is packed."""
        cut, self._cut = self._cut, None
        assert cut is not None
        assert not any(noted.pages for noted in cut.noted), "pack it whole"
        return WindowTurn(tuple(cell for _, cell in closing), cut.born, cut.changed, cut.since, closing)

    def commit(self, turn: WindowTurn) -> None:
        """The store has it: the closed cells are gone, the changed ones are saved, as they say already."""

    def rollback(self, turn: WindowTurn) -> None:
        """The store refused it: everything is as if the turn had not been taken."""
        # A disk may be full for hours: this costs what was to be closed, not all that waits to be saved.
        self._since = min(self._since, turn.since)
        self._noted.insert(0, turn.changed.handed_over())
        for cell, _ in turn.taken:
            # A successor may have been opened meanwhile; then both close, each once.
            opened = self._open_at(cell.window_ms)
            if opened.get(cell.key) is None:
                opened.put(cell.key, cell)
            self._enqueue(cell)
            self._note(cell)

    def restore(self, cells: Iterable[tuple[Cell, int]]) -> None:
        """Takes over ``(cell, due_ms)`` that a former process checkpointed. Ids go on after theirs."""
        for cell, due_ms in cells:
            opened = self._sums.open(
                cell.id, cell.window_ms, cell.key, due_ms, cell.rows, cell.amounts, late=False
            )
            opened.saved = 0
            self._open_at(cell.window_ms).put(cell.key, opened)
            self._enqueue(opened)
            self._next_id = max(self._next_id, cell.id + 1)

    def open_amounts(self) -> Amounts:
        """The sum of all open cells per meter: a term of the conservation sum."""
        sums: Amounts = ()
        for cell in self._cells.values():
            sums = tuple(map(operator.add, sums or (0,) * len(cell.amounts), cell.amounts))
        return sums


def _parts(amounts: Sequence[int]) -> Iterable[Sequence[int]]:
    """Splits amounts so that none passes ``CELL_LIMIT``."""
    rest = list(amounts)
    while max(rest) > CELL_LIMIT:
        yield [min(value, CELL_LIMIT) for value in rest]
        rest = [max(0, value - CELL_LIMIT) for value in rest]
    yield rest
