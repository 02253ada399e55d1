"""Hourly sums: what is left of ledger rows once they are old.

A sum says how many events of a key and meter met a fate at an output, and their value, by the UTC hour of
their windows. Sums are removed at last, and then only counted: so that what a store still shows, and what it
has forgotten, always adds up to what it once made.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

from proxy_usage.store.database import add_counters, counters

HOUR_MS = 3_600_000

Place = tuple[int, int, str, int, str]
"""``(hour_ms, output, fate, key, meter)``."""


def add_sums(db: sqlite3.Connection, sums: Mapping[Place, tuple[int, int]]) -> None:
    """Adds ``(events, value)`` to hourly sums. Values are kept as text: they may pass 64 bits."""
    fresh = 0
    for place, (events, value) in sorted(sums.items()):
        row = db.execute(
            "SELECT events, value FROM sums WHERE hour_ms=? AND output=? AND fate=? AND key=? AND meter=?",
            place,
        ).fetchone()
        fresh += row is None
        have_events, have_value = (row[0], int(row[1])) if row else (0, 0)
        db.execute(
            "INSERT INTO sums VALUES(?,?,?,?,?,?,?) ON CONFLICT(hour_ms, output, fate, key, meter)"
            " DO UPDATE SET events=excluded.events, value=excluded.value",
            (*place, have_events + events, str(have_value + value)),
        )
    add_counters(db, "sums", [("kept", fresh)])


def remove_sums(db: sqlite3.Connection, before_ms: int, limit: int) -> int:
    """Removes the oldest sums, of hours before a moment, and counts them. Returns how many."""
    rows = db.execute(
        "SELECT hour_ms, output, fate, key, meter, events, value FROM sums WHERE hour_ms<?"
        " ORDER BY hour_ms, output, fate, key, meter LIMIT ?",
        (before_ms, limit),
    ).fetchall()
    forgotten: dict[str, tuple[int, int]] = {}
    for _, output, fate, _, meter, events, value in rows:
        label = f"{output}/{fate}/{meter}"
        have = forgotten.get(label, (0, 0))
        forgotten[label] = (have[0] + events, have[1] + int(value))
    db.executemany(
        "DELETE FROM sums WHERE hour_ms=? AND output=? AND fate=? AND key=? AND meter=?",
        [row[:5] for row in rows],
    )
    add_counters(db, "forgotten_events", [(label, have[0]) for label, have in forgotten.items()])
    add_counters(db, "forgotten_value", [(label, have[1]) for label, have in forgotten.items()])
    add_counters(db, "sums", [("kept", -len(rows))])
    return len(rows)


def kept(db: sqlite3.Connection) -> int:
    """How many hourly sums there are, without counting them."""
    return counters(db, "sums").get("kept", 0)


def history(db: sqlite3.Connection) -> dict[tuple[int, str, str], tuple[int, int]]:
    """``(output, fate, meter) → (events, value)`` of all sums, and of those that were removed."""
    found: dict[tuple[int, str, str], tuple[int, int]] = {}
    for output, fate, meter, events, value in db.execute(
        "SELECT output, fate, meter, events, value FROM sums"
    ):
        have = found.get((output, fate, meter), (0, 0))
        found[output, fate, meter] = (have[0] + events, have[1] + int(value))
    values = counters(db, "forgotten_value")
    for label, events in counters(db, "forgotten_events").items():
        output, fate, meter = label.split("/", 2)
        have = found.get((int(output), fate, meter), (0, 0))
        found[int(output), fate, meter] = (have[0] + events, have[1] + values.get(label, 0))
    return found
