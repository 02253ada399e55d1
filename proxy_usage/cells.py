"""Open cells, and what a turn takes of them.

A turn, its cut, and a turn that was refused: nobody visits all cells for any of these. A cell says for which
turn it changed last, for which it was packed and which one told the store of it; what counts is which turns
are in the store::

    turn            7           8              9 (being packed)      10 (noted for)
                committed   rolled back        holds 8 and 9

    changed for      ── no ──┼───────── yes: in the cut ───────────┼── in the next one
    told of          ── no ──┼───────── again ─────────────────────
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from proxy_usage.bulk import Columns, Pages
from proxy_usage.model import Amounts, Cell, Key

TOGETHER = 256
"""Cells whose sums stand together in memory, which is freed when all of them are closed."""
UNKNOWN = 1 << 62
"""In the place of the turn that told the store of a cell, where none did."""

Birth = tuple[int, int, str, tuple[str, ...], int]
"""A cell the store does not know yet: its id, window, tenant, dimensions, and when it is due."""


@dataclass(slots=True)
class OpenCell:
    """A key's usage in a window that is open. ``saved``, ``noted`` and ``packed`` are numbers of turns."""

    id: int
    window_ms: int
    key: Key
    due_ms: int
    sums: array[int]
    """Its sums and others', as the store is given them: id, rows, amounts."""
    start: int
    end: int
    late: bool
    saved: int = UNKNOWN
    """The turn that told the store of the cell, or tells it; 0: a former process did."""
    noted: int = 0
    """The last turn that it changed for."""
    packed: int = 0
    """The last turn that it was packed for."""

    @property
    def rows(self) -> int:
        """Rows that were added."""
        return self.sums[self.start + 1]

    @property
    def amounts(self) -> Sequence[int]:
        """Base units per meter; a copy."""
        return self.sums[self.start + 2 : self.end]


@dataclass(slots=True)
class Cut:
    """What changed up to a cut, and what of it is packed."""

    number: int
    since: int
    """The first turn that is not in the store: this one, or the first that was rolled back. What was noted
    from it up to this one is in the cut."""
    noted: list[Columns]
    """Ids of what changed first in each row, some more than once."""
    changed: Columns = field(default_factory=Columns)
    born: Pages[Birth] = field(default_factory=Pages)

    def pack(self, cell: OpenCell) -> None:
        """Packs it as it is now, unless it is packed."""
        if cell.packed == self.number:
            return
        cell.packed = self.number
        self.changed.add(cell.sums[cell.start : cell.end])
        if cell.saved >= self.since:
            cell.saved = self.number
            tenant, dimensions = cell.key
            self.born.add((cell.id, cell.window_ms, tenant, dimensions, cell.due_ms))


Closing = list[tuple[OpenCell, Cell]]
"""Cells that were taken out, and as the store is given them."""


class Sums:
    """Makes cells, with their sums next to those of the cells that were made before."""

    __slots__ = ("_page",)

    def __init__(self) -> None:
        self._page = array("q")

    def open(
        self, number: int, window_ms: int, key: Key, due_ms: int, rows: int, amounts: Amounts, *, late: bool
    ) -> OpenCell:
        """A new cell."""
        if len(self._page) >= (2 + len(amounts)) * TOGETHER:
            self._page = array("q")
        start = len(self._page)
        self._page.extend((number, rows, *amounts))
        return OpenCell(number, window_ms, key, due_ms, self._page, start, len(self._page), late)
