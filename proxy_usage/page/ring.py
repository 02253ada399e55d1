"""The last hour in memory: one point each five seconds, integers, of a bound size.

Points lie on multiples of five seconds of the wall clock, so that those of several processes can be added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STEP_MS = 5_000
POINTS = 720
RATES = ("entries", "minted", "delivered", "undelivered")
"""Given as totals, kept as what came since the point before."""
LEVELS = ("queued", "oldest_ms", "windows")
"""Kept as they are given."""


class Ring:
    """The points. A moment at which nobody looked has none: None in every column."""

    def __init__(self) -> None:
        self._columns: dict[str, list[int | None]] = {name: [] for name in (*RATES, *LEVELS)}
        self._last: int | None = None  # number of the last point
        self._totals: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._columns[LEVELS[0]])

    def add(self, now_ms: int, totals: Mapping[str, int], levels: Mapping[str, int]) -> None:
        """Takes the point of this moment. Of two at the same moment, or after the clock was moved back by
        less than an hour, the first stays."""
        number = now_ms // STEP_MS
        if self._last is not None:
            ahead = number - self._last
            if -POINTS < ahead <= 0:
                return
            if not 0 < ahead < POINTS:
                self._columns = {name: [] for name in self._columns}
            else:
                for _ in range(ahead - 1):
                    self._append({})
        # What the first point would have is of nobody knows how long.
        grown = {name: totals[name] - self._totals.get(name, totals[name]) for name in RATES}
        self._append({**grown, **{name: levels[name] for name in LEVELS}})
        self._last, self._totals = number, {name: totals[name] for name in RATES}

    def _append(self, point: Mapping[str, int]) -> None:
        for name, column in self._columns.items():
            column.append(point.get(name))
            del column[:-POINTS]

    def history(self) -> History:
        """All points, oldest first."""
        end_ms = None if self._last is None else self._last * STEP_MS
        return History(end_ms, {name: tuple(column) for name, column in self._columns.items()})


@dataclass(frozen=True, slots=True)
class History:
    """Points that end at ``end_ms``; columns by name, all of the same length."""

    end_ms: int | None
    columns: Mapping[str, tuple[int | None, ...]]
