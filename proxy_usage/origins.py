"""Where usage came from: rows by hour, key, the node that sent them and the tenant rule that they matched.

It explains figures and makes none. So it is kept by the hour, waits in memory for a while before the store is
told, and has bounds past which only the number of rows is known: a crash costs some seconds of it, never of
usage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from proxy_usage.bulk import Shards
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


Place = tuple[int, Key | None, str, str]
"""The hour, counted from the epoch, the key, the rule and the node."""


class Origins:
    """What the store was not told yet, oldest first."""

    def __init__(self, *, hold_ms: int = HOLD_MS, max_waiting: int = MAX_WAITING) -> None:
        self.ending = False
        """Nothing is held back any more: the process ends."""
        self._hold_ms = hold_ms
        self._max_waiting = max_waiting
        self._rows: Shards[Place, int] = Shards()
        self._waiting: deque[tuple[int, Place]] = deque()  # since when, oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    def note(self, key: Key | None, window_ms: int, rule: str, node: str, rows: int, now_ms: int) -> None:
        """Rows of a node were counted for a key, by a rule."""
        place: Place = (window_ms // HOUR_MS, key, rule, node)
        known = self._rows
        part = known.parts[hash(place) & known.mask]
        before = part.get(place)
        if before is None and len(self._waiting) >= self._max_waiting:
            place = (place[0], None, "", "")
            part = known.parts[hash(place) & known.mask]
            before = part.get(place)
        if before is None:
            self._waiting.append((now_ms, place))
            known.put(place, rows)
        else:
            part[place] = before + rows

    def due(self, now_ms: int) -> bool:
        """Whether the oldest has waited long enough."""
        if not self._waiting:
            return False
        # Below 0: the clock was moved back.
        return self.ending or not 0 <= now_ms - self._waiting[0][0] < self._hold_ms

    def begin(self, now_ms: int) -> tuple[RowOrigin, ...]:
        """Takes out what has waited long enough, a slice of it; ``rollback`` if the store refuses it."""
        taken: list[RowOrigin] = []
        while len(taken) < SLICE and self.due(now_ms):
            _, place = self._waiting.popleft()
            hour, key, rule, node = place
            rows = self._rows.pop(place) or 0
            taken.append(RowOrigin(hour * HOUR_MS, key, rule[:MAX_TEXT], node[:MAX_TEXT], rows))
        return tuple(taken)

    def rollback(self, taken: Iterable[RowOrigin]) -> None:
        """The store was not told: they are due as soon as it is their turn."""
        for one in taken:
            self.note(one.key, one.hour_ms, one.rule, one.node, one.rows, 0)
