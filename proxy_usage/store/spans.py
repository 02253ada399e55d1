"""What lies beside the ledger: the times of its parts, and what merged events stand for.

The ledger is written in the order in which events are settled, which is nearly that of their windows. So the
first and last window of each 256 entries (a trigger keeps them) find a time as well as an index would, at
less than a tenth of a byte a row.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

SPAN_BITS = 8
"""As the trigger has it: entries of one span differ in so many of their last bits."""


def forget_spans(db: sqlite3.Connection, last: int) -> None:
    """Entries up to ``last`` are gone."""
    empty = db.execute("SELECT 1 FROM ledger LIMIT 1").fetchone() is None  # then its numbers begin anew
    db.execute("DELETE FROM spans WHERE span<?", (1 << 62 if empty else (last + 1) >> SPAN_BITS,))


def note_merge(
    db: sqlite3.Connection,
    parts: Sequence[str],
    made: Iterable[str],
    first_ms: int,
    outputs: int,
) -> None:
    """Events took the place of others: what they stand for.

    Args:
        parts: the ids that are gone; of those that were merged before, what they stood for is taken over.
        first_ms: the earliest window of the parts.
        outputs: how many wait for the new ones.
    """
    events = 0
    for part in parts:
        row = db.execute("DELETE FROM merges WHERE id=? RETURNING first_ms, events", (part,)).fetchone()
        first_ms = first_ms if row is None else min(first_ms, row[0])
        events += 1 if row is None else row[1]
    db.executemany(
        "INSERT INTO merges VALUES(?,?,?,?)", [(event_id, first_ms, events, outputs) for event_id in made]
    )


def forget_merges(db: sqlite3.Connection, ids: Sequence[str]) -> None:
    """An output's ledger rows of these events are gone: after the last one there is nothing to explain."""
    if db.execute("SELECT 1 FROM merges LIMIT 1").fetchone() is None:
        return
    named = [(event_id,) for event_id in ids if event_id]
    db.executemany("UPDATE merges SET outputs=outputs-1 WHERE id=?", named)
    db.executemany("DELETE FROM merges WHERE id=? AND outputs<=0", named)
