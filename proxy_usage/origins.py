"""Where usage came from: rows by hour, key, the node that sent them and the tenant rule that they matched.

It explains figures and makes none. So it is kept by the hour, waits in memory for a while before the store is
told, and has bounds past which only the number of rows is known: a crash costs some seconds of it, never of
usage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from proxy_usage.model import Key

HOUR_MS = 3_600_000
HOLD_MS = 20_000
"""For so long rows are added up before the store is told."""
SLICE = 500
"""Origins told in one turn."""
MAX_WAITING = 100_000
"""Origins that wait; rows of further ones count as of nobody knows where."""
MAX_TEXT = 256
"""Characters of a node's name and of a rule."""

NO_RULE = "listener row: the rules of the requests that used the connection"
"""In the place of a rule, where none was asked."""
REPLAYED = "unattributed replay: the rules in force at that time"


class RowOrigin(NamedTuple):
    """Rows of one origin."""

    hour_ms: int
    """Begin of the UTC hour of their windows."""
    key: Key | None
    """Whom they were counted for; None: of keys past the bound."""
    rule: str
    node: str
    rows: int


class _Waiting:
    __slots__ = ("rows", "since_ms")

    def __init__(self, since_ms: int) -> None:
        self.rows = 0
        self.since_ms = since_ms


class Origins:
    """What the store was not told yet, oldest first."""

    def __init__(self, *, hold_ms: int = HOLD_MS, max_waiting: int = MAX_WAITING) -> None:
        self.ending = False
        """Nothing is held back any more: the process ends."""
        self._hold_ms = hold_ms
        self._max_waiting = max_waiting
        self._waiting: dict[tuple[int, Key | None, str, str], _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def note(self, key: Key | None, window_ms: int, rule: str, node: str, rows: int, now_ms: int) -> None:
        """Rows of a node were counted for a key, by a rule."""
        place = (window_ms // HOUR_MS, key, rule, node)
        waiting = self._waiting.get(place)
        if waiting is None:
            if len(self._waiting) >= self._max_waiting:
                place = (place[0], None, "", "")
            waiting = self._waiting.setdefault(place, _Waiting(now_ms))
        waiting.rows += rows

    def due(self, now_ms: int) -> bool:
        """Whether the oldest has waited long enough."""
        oldest = next(iter(self._waiting.values()), None)
        # Below 0: the clock was moved back.
        return oldest is not None and (self.ending or not 0 <= now_ms - oldest.since_ms < self._hold_ms)

    def begin(self, now_ms: int) -> tuple[RowOrigin, ...]:
        """Takes out what has waited long enough, a slice of it; ``rollback`` if the store refuses it."""
        taken: list[RowOrigin] = []
        while len(taken) < SLICE and self.due(now_ms):
            place = next(iter(self._waiting))
            hour, key, rule, node = place
            rows = self._waiting.pop(place).rows
            taken.append(RowOrigin(hour * HOUR_MS, key, rule[:MAX_TEXT], node[:MAX_TEXT], rows))
        return tuple(taken)

    def rollback(self, taken: Iterable[RowOrigin]) -> None:
        """The store was not told: they are due as soon as it is their turn."""
        for one in taken:
            self.note(one.key, one.hour_ms, one.rule, one.node, one.rows, 0)
