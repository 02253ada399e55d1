"""What one transaction mints: noted event by event, written into the queue together.

minted ──┬─▶ an output that will send it: ``events`` and ``deliveries``
         └─▶ one that will not, for its window is none of that output's: the ledger
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from proxy_usage.model import Event
from proxy_usage.store.database import Sums, add_tallies, tally
from proxy_usage.turn import OutputSlot

_INSERT = (
    "INSERT INTO events(seq,id,key,meter,window_ms,value,minted_ms,outputs,given,body)"
    " VALUES(?,?,?,?,?,?,?,?8,?8,?)"
)


class Mintage:
    """The events that one transaction mints.

    Args:
        outputs: every one of them is given each event, or has it in its ledger.
    """

    def __init__(self, outputs: Sequence[OutputSlot], now_ms: int) -> None:
        self.events: list[Event] = []
        self._outputs = outputs
        self._now_ms = now_ms
        self._sums: Sums = {}
        self._rows: list[tuple[object, ...]] = []
        self._deliveries: list[tuple[int, int]] = []
        self._ledger: list[tuple[object, ...]] = []

    def add(self, event: Event, key: int, meter: str) -> None:
        """An event of a key's number and a meter's name. What nobody will send leaves no bytes."""
        self.events.append(event)
        tally(self._sums, 0, "minted", meter, event.value)
        waiting = 0
        for slot in self._outputs:
            output, fate = slot.output, slot.fate(event.window_ms)
            tally(self._sums, output, fate, meter, event.value)
            if fate == "pending":
                waiting += 1
                self._deliveries.append((output, len(self._rows)))
            else:
                at_ms = self._now_ms
                self._ledger.append((output, fate, key, meter, event.window_ms, event.value, at_ms, event.id))
        if waiting:
            place = (event.id, key, meter, event.window_ms, event.value)
            self._rows.append((*place, self._now_ms, waiting, event.body))

    def write(self, db: sqlite3.Connection) -> None:
        """Writes all of them."""
        # SQLite numbers the first (never as one before), the others follow: one by one they would cost a
        # statement each.
        first: int | None = None
        for row in self._rows[:1]:
            first = db.execute(_INSERT, (None, *row)).lastrowid
        if first is not None:
            db.executemany(_INSERT, [(first + place, *row) for place, row in enumerate(self._rows)][1:])
            db.executemany(
                "INSERT INTO deliveries(output, seq) VALUES(?,?)",
                [(output, first + place) for output, place in self._deliveries],
            )
        db.executemany(
            "INSERT INTO ledger(output,fate,key,meter,window_ms,value,at_ms,answer,id)"
            " VALUES(?,?,?,?,?,?,?,0,?)",
            self._ledger,
        )
        add_tallies(db, self._sums)
