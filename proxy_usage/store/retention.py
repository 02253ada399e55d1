"""What a store no longer needs, removed step by step: each method is one short transaction.

    ledger row ──keep_delivered──▶ hourly sum ──keep_sums──▶ a term of the sums over the store's life
    held usage ──unattributed.keep──▶ expired            key nobody refers to ──▶ gone

Rows of the ledger are rolled up in the order they were written, so that their table empties page by page.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy_usage.store.database import Database, add_counters
from proxy_usage.store.history import HOUR_MS, Place, add_sums, kept, remove_sums
from proxy_usage.store.origins import oldest_origins, origins_kept, remove_origins, remove_sources
from proxy_usage.store.spans import forget_merges, forget_spans

DAY_MS = 86_400_000
SLICE = 2_000
"""Rows moved or removed in one step."""
LOOK = 5_000
"""Rows looked at in one step that changes nothing."""
ROW_BYTES = 100
"""What a ledger row takes at most, and what an hourly sum takes."""
ORIGIN_BYTES = 50
"""What an origin takes at most."""
KEYS = 10_000
"""Keys looked at in one search for unused ones."""
PAGES = 256
"""Free pages given back in one step."""


_SUMS = (
    "SELECT hour_ms, output, fate, key, meter, key FROM sums"
    " WHERE (hour_ms, output, fate, key, meter) > (?,?,?,?,?)"
    " ORDER BY hour_ms, output, fate, key, meter LIMIT ?"
)
_ORIGINS = (
    "SELECT hour_ms, key, source, key FROM origins WHERE (hour_ms, key, source) > (?,?,?)"
    " ORDER BY hour_ms, key, source LIMIT ?"
)
# What may refer to a key, in the direction in which references move: events are settled into the ledger, its
# rows are rolled up. So one that moves while the search goes on is met where it arrives, if not before.
_TABLES: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "events": ("SELECT seq, key FROM events WHERE seq>? ORDER BY seq LIMIT ?", (0,)),
    "ledger": ("SELECT entry, key FROM ledger WHERE entry>? ORDER BY entry LIMIT ?", (0,)),
    "sums": (_SUMS, (-(1 << 62), 0, "", 0, "")),
    "origins": (_ORIGINS, (-(1 << 62), 0, 0)),
}


@dataclass(slots=True)
class _Sweep:
    """A search for keys that nothing refers to."""

    unused_since_ms: int
    candidates: set[int] = field(default_factory=set)
    tables: list[str] = field(default_factory=lambda: list(_TABLES))
    cursor: tuple[object, ...] = ()


class Retention:
    """The upkeep of one store.

    Args:
        ledger_max_bytes: bound on ledger and hourly sums together.
        keep_delivered_ms, keep_sums_ms: age at which ledger rows are rolled up, and sums are removed.
        keep_held_ms: age at which unattributed usage is given up.
    """

    def __init__(
        self,
        database: Database,
        *,
        ledger_max_bytes: int,
        keep_delivered_ms: int,
        keep_sums_ms: int,
        keep_held_ms: int,
    ) -> None:
        self._database = database
        self._ledger_max_bytes = ledger_max_bytes
        self._keep_delivered_ms = keep_delivered_ms
        self._keep_sums_ms = keep_sums_ms
        self._keep_held_ms = keep_held_ms
        self._sweep: _Sweep | None = None
        self._swept = 0

    def roll(self, now_ms: int, *, short: bool = False) -> int:
        """Rolls the oldest ledger rows up into hourly sums. Returns how many rows.

        Those older than ``keep_delivered``; younger ones while the ledger is beyond its bound, or ``short``.
        """
        until_ms = now_ms - self._keep_delivered_ms
        with self._database.transaction() as db:
            everything = short or self._ledger_bytes(db) > self._ledger_max_bytes
            rows = db.execute(
                "SELECT entry, output, fate, key, meter, window_ms, value, at_ms, id FROM ledger"
                " ORDER BY entry LIMIT ?",
                (SLICE,),
            ).fetchall()
            sums: dict[Place, tuple[int, int]] = {}
            last = 0
            rolled = 0
            for entry, output, fate, key, meter, window_ms, value, at_ms, _ in rows:
                # Written while the clock was ahead: its age is not known, and it must not be in the way.
                if not everything and until_ms <= at_ms <= now_ms + DAY_MS:
                    break
                place = (window_ms - window_ms % HOUR_MS, output, fate, key, meter)
                events, total = sums.get(place, (0, 0))
                sums[place] = (events + 1, total + value)
                last, rolled = entry, rolled + 1
            if rolled:
                add_sums(db, sums)
                db.execute("DELETE FROM ledger WHERE entry<=?", (last,))
                forget_spans(db, last)
                forget_merges(db, [row[-1] for row in rows[:rolled]])
        return rolled

    def forget(self, now_ms: int) -> int:
        """Removes hourly sums older than ``keep_sums``, or the oldest beyond the ledger's bound.

        Origins go with the sums of their hour. Returns how many of both.
        """
        before_ms = now_ms - self._keep_sums_ms
        before_ms -= before_ms % HOUR_MS
        with self._database.transaction() as db:
            beyond = self._ledger_bytes(db) - self._ledger_max_bytes
            gone = remove_sums(db, before_ms, SLICE) + remove_origins(db, before_ms, SLICE)
            if not gone and beyond > 0:
                (oldest_ms,) = db.execute("SELECT min(hour_ms) FROM sums").fetchone()
                if oldest_origins(db, 1 << 62 if oldest_ms is None else oldest_ms):
                    gone = remove_origins(db, 1 << 62, min(SLICE, -(-beyond // ORIGIN_BYTES)))
                else:
                    gone = remove_sums(db, 1 << 62, min(SLICE, -(-beyond // ROW_BYTES)))
            if not gone:
                remove_sources(db)
        return gone

    def expire_held(self, now_ms: int) -> int:
        """Gives up unattributed usage that nobody claimed in time. Returns how many rows of it.

        The caller tells ``Checkpoints.forget_held``.
        """
        before_ms = now_ms - self._keep_held_ms
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT hour_ms, digest, amounts FROM held WHERE hour_ms<? AND last_ms<?"
                " ORDER BY hour_ms LIMIT ?",
                (before_ms - HOUR_MS, before_ms, SLICE),
            ).fetchall()
            amounts: Counter[str] = Counter()
            for _, _, text in rows:
                for meter, amount in json.loads(text).items():
                    amounts[meter] += amount
            db.executemany("DELETE FROM held WHERE hour_ms=? AND digest=?", [row[:2] for row in rows])
            add_counters(db, "expired", amounts.items())
        return len(rows)

    def sweep_keys(self, now_ms: int) -> tuple[int, bool]:
        """Removes keys that nothing refers to. Returns how many, and whether this search is over.

        It takes many steps: some unused keys are taken note of, those that a table refers to are dropped
        from the notes, and what is left at last is removed.
        """
        with self._database.transaction() as db:
            sweep, self._sweep = self._sweep, None  # an error ends the search
            gone = 0
            if sweep is None:
                sweep = _Sweep(now_ms - self._keep_delivered_ms - DAY_MS)
                done = self._note(db, sweep)
            elif sweep.tables:
                self._look(db, sweep)
                done = not sweep.candidates
            else:
                gone = _remove_keys(db, sweep)
                done = not sweep.candidates
        if not done:
            self._sweep = sweep
        return gone, done

    def vacuum(self) -> int:
        """Gives free pages back to the disk. Returns how many."""
        with self._database.reading() as db:
            before: int = db.execute("PRAGMA freelist_count").fetchone()[0]
            # Through execute() it would free one page: SQLite frees one at each step of the statement.
            db.executescript(f"PRAGMA incremental_vacuum({PAGES})")
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")  # only now the file shrinks
            after: int = db.execute("PRAGMA freelist_count").fetchone()[0]
        return before - after

    def _ledger_bytes(self, db: sqlite3.Connection) -> int:
        """What ledger and sums take, about: never less than they do."""
        # Apart: SQLite finds one end of a table at once, but not both in one query.
        first: int = db.execute("SELECT coalesce(min(entry), 1) FROM ledger").fetchone()[0]
        last: int = db.execute("SELECT coalesce(max(entry), 0) FROM ledger").fetchone()[0]
        return (last - first + 1 + kept(db)) * ROW_BYTES + origins_kept(db) * ORIGIN_BYTES

    def _note(self, db: sqlite3.Connection, sweep: _Sweep) -> bool:
        """Takes note of unused keys, from where the last search ended. Returns whether there is none."""
        rows = db.execute(
            "SELECT key, used_ms<? AND remainders='{}' FROM keys WHERE key>? ORDER BY key LIMIT ?",
            (sweep.unused_since_ms, self._swept, KEYS),
        ).fetchall()
        sweep.candidates.update(key for key, unused in rows if unused)
        self._swept = rows[-1][0] if len(rows) == KEYS else 0
        return not sweep.candidates and not self._swept

    @staticmethod
    def _look(db: sqlite3.Connection, sweep: _Sweep) -> None:
        """Drops the keys from the notes that the next rows refer to."""
        statement, start = _TABLES[sweep.tables[0]]
        rows = db.execute(statement, (*(sweep.cursor or start), LOOK)).fetchall()
        sweep.candidates.difference_update(row[-1] for row in rows)
        if len(rows) == LOOK:
            sweep.cursor = rows[-1][:-1]
        else:
            sweep.tables.pop(0)
            sweep.cursor = ()


def _remove_keys(db: sqlite3.Connection, sweep: _Sweep) -> int:
    keys = [sweep.candidates.pop() for _ in range(min(SLICE, len(sweep.candidates)))]
    return sum(
        # It may have been used since.
        db.execute(
            "DELETE FROM keys WHERE key=? AND used_ms<? AND remainders='{}'", (key, sweep.unused_since_ms)
        ).rowcount
        for key in keys
    )
