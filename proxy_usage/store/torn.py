"""The log of open windows with records missing: which of them were certainly open.

A record says what changed and what was closed, and closing a window makes its events. So a window that was
open before a missing record may have been closed and billed in it. It is certainly open only if it changed
after that.

    born ── changed ── ✗ ── changed      certain: it changed since
    born ── changed ── ✗                 uncertain: perhaps closed in the missing record
            ✗ (born in it) ── changed    nameless: nobody knows whose it was
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from proxy_usage.model import Cell, Key
from proxy_usage.store.records import LogFold


class Left(NamedTuple):
    """What was open when the file was last written."""

    cells: tuple[Cell, ...]
    """Certainly open."""
    uncertain: tuple[Cell, ...]
    """Open before a record that cannot be read, and not heard of since: they may be closed and billed."""
    nameless: int
    """Windows whose key was in a record that cannot be read."""


class TornLog:
    """Records of the log, added in their order, with word of those that cannot be read."""

    def __init__(self) -> None:
        self._fold = LogFold()
        self._uncertain: dict[int, Cell] = {}
        self._nameless: set[int] = set()

    def doubt(self) -> None:
        """A record is missing here: whatever is open may have been closed in it."""
        self._uncertain.update((cell.id, cell) for cell in _cells(self._fold))
        self._nameless |= {*self._fold.states} - {*self._fold.births}
        self._fold = LogFold()

    def add(self, packed: object) -> bool:
        """Adds a record; False for what is none."""
        try:
            record = self._fold.add(packed if isinstance(packed, bytes) else b"")
        except msgspec.MsgspecError:
            return False
        # What is born or closed here is no longer what was open before: a number may be given anew.
        for number in [*(birth[0] for birth in record.born), *record.closed]:
            self._uncertain.pop(number, None)
            self._nameless.discard(number)
        for number, *_ in record.changed:  # it changed, so it is open
            cell = self._uncertain.pop(number, None)
            if cell is not None:
                tenant, dimensions = cell.key
                self._fold.births[number] = (number, cell.window_ms, tenant, dimensions, 0)
            self._nameless.discard(number)
        return True

    def left(self) -> Left:
        """What was open at the end."""
        nameless = self._nameless | ({*self._fold.states} - {*self._fold.births})
        return Left(tuple(_cells(self._fold)), tuple(self._uncertain.values()), len(nameless))


def _cells(fold: LogFold) -> Iterator[Cell]:
    for number, birth in fold.births.items():
        state = fold.states.get(number)
        if state is not None:
            yield Cell(number, birth[1], Key(birth[2], tuple(birth[3])), state[1], tuple(state[2:]))
