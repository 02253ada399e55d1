"""A store that comes back from a backup: what it takes for unsent may have been sent since it was copied.

So nothing of it is sent by itself. Every event that waits becomes a dead letter ``restored``, for people to
decide on: replayed with its id, which an endpoint that remembers it knows, or left.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

import msgspec

from proxy_usage.store.database import Database, Sums, add_tallies, tally

RESTORED = "restored"
ANSWER_CHARS = 500
STEP = 5_000
"""Events in one transaction."""


@dataclass(frozen=True, slots=True)
class Restored:
    """The last time the store came back from a backup."""

    at_ms: int
    events: int
    """Dead letters it made so far."""
    done: bool


def restored(db: sqlite3.Connection) -> Restored | None:
    """The last time the store came back from a backup; None: never."""
    row = db.execute("SELECT value FROM meta WHERE name='restored'").fetchone()
    return msgspec.json.decode(row[0], type=Restored) if row else None


def restore(database: Database, now_ms: int, *, wanted: bool) -> Restored | None:
    """Makes dead letters of all that waits, before anything is sent. Returns what came of it.

    ``finish`` must follow once the start took account of the rest. Until then each start goes on with it,
    whether told to or not: a start that was cut short must not end in sending what was to be decided on.

    Args:
        wanted: the store comes from a backup. False: nothing is done but to go on with what was begun; then
            None, unless there was something.

    Raises:
        StoreFull, StoreUnavailable: some events still wait; the next start goes on.
    """
    with database.transaction() as db:
        begun = restored(db)
        if begun is None or begun.done:
            if not wanted:
                return None
            begun = Restored(now_ms, 0, done=False)
            _save(db, begun)
    moved = STEP
    while moved == STEP:
        with database.transaction() as db:
            moved = _step(db, now_ms)
            begun = Restored(begun.at_ms, begun.events + moved, done=False)
            _save(db, begun)
    return begun


def finish(database: Database, begun: Restored) -> Restored:
    """The start that brought the store back knows all it has to. Returns what it came to."""
    ended = Restored(begun.at_ms, begun.events, done=True)
    with database.transaction() as db:
        _save(db, ended)
    return ended


def _save(db: sqlite3.Connection, state: Restored) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES('restored', ?)", (msgspec.json.encode(state).decode(),))


def _step(db: sqlite3.Connection, now_ms: int) -> int:
    sums: Sums = {}
    rows = db.execute(
        "SELECT d.output, d.seq, d.batch, d.first_attempt_ms, e.meter, e.value, b.attempts, b.answer"
        " FROM deliveries d CROSS JOIN events e ON e.seq=d.seq LEFT JOIN batches b ON b.batch=d.batch"
        " ORDER BY d.output, d.seq LIMIT ?",
        (STEP,),
    ).fetchall()
    for output, seq, batch, first_attempt_ms, meter, value, attempts, answer in rows:
        words = "was waiting" if batch is None else f"was sent, attempts that failed: {attempts}: {answer}"
        db.execute("DELETE FROM deliveries WHERE output=? AND seq=?", (output, seq))
        db.execute(
            "INSERT INTO dead(output,seq,reason,answer,at_ms,first_attempt_ms) VALUES(?,?,?,?,?,?)",
            (output, seq, RESTORED, words[:ANSWER_CHARS], now_ms, first_attempt_ms),
        )
        tally(sums, output, "pending", meter, -value, -1)
        tally(sums, output, "dead", meter, value)
    if len(rows) < STEP:
        db.execute("DELETE FROM batches")
    add_tallies(db, sums)
    return len(rows)
