"""Origins in the store: how many rows of a key came from which node by which rule, per UTC hour.

    sources   1  "0 custom_tag: project_name"   envoy-a          origins   12:00  key 7  source 1   1,204 rows
              2  "0 custom_tag: project_name"   envoy-b                    12:00  key 7  source 2     996

A rule is kept as text, so that an old figure is explained by the rule of its time, however the rules have
changed. Past the bounds rows are counted under ``OTHERS``. Origins go with the sums of their hour.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping

from proxy_usage.model import Key
from proxy_usage.origins import RowOrigin
from proxy_usage.store.database import add_counters, counters

HOUR_MS = 3_600_000
OTHERS = 0
"""The number of all keys, or sources, past the bound."""
MAX_ORIGINS = 50_000
"""Origins of one hour."""
MAX_SOURCES = 20_000
REMEMBERED = 1_000
"""Hours whose number of origins is remembered."""


NumberOf = Callable[[Key], int]
"""A key's number; a new key gets one."""


class OriginBook:
    """Writes origins. After a transaction that failed: ``forget``."""

    def __init__(self) -> None:
        self._hours: dict[int, int] = {}

    def forget(self) -> None:
        """What is remembered of the tables may be wrong."""
        self._hours.clear()

    def add(
        self, db: sqlite3.Connection, origins: Iterable[RowOrigin], number_of: NumberOf, now_ms: int
    ) -> None:
        """Adds origins, as part of the caller's transaction."""
        fresh = 0
        numbers: dict[Key | None, int] = {None: OTHERS}
        sources: dict[tuple[str, str, int], int] = {}
        for one in origins:
            key = numbers.get(one.key)
            if key is None:
                assert one.key is not None, "it has a number"
                key = numbers[one.key] = number_of(one.key)
            named = (one.rule, one.node, one.hour_ms)
            source = sources.get(named)
            if source is None:
                source = sources[named] = _source(db, *named)
            kept = self._put(db, one.rows, one.hour_ms, key, source)
            if kept is None:
                continue
            # It is in use: a search for unused keys that is under way must not take it.
            used_ms = now_ms - HOUR_MS
            db.execute("UPDATE keys SET used_ms=? WHERE key=? AND used_ms<?", (now_ms, kept, used_ms))
            fresh += 1
        add_counters(db, "origins", [("kept", fresh)])

    def merge(
        self,
        db: sqlite3.Connection,
        sources: Iterable[tuple[int, str, str, int]],
        origins: Iterable[tuple[int, int, int, int]],
        keys: Mapping[int, int],
    ) -> None:
        """Adds what another store has in its tables, as part of the caller's transaction.

        Args:
            keys: numbers here by numbers there.
        """
        numbers = {OTHERS: OTHERS}
        for number, rule, node, used_ms in sources:
            numbers[number] = _source(db, rule, node, used_ms)
        fresh = 0
        for hour_ms, key, source, rows in origins:
            # A key, or a source, that is gone has a name no more.
            known = keys.get(key, OTHERS), numbers.get(source, OTHERS)
            fresh += self._put(db, rows, hour_ms, *known) is not None
        add_counters(db, "origins", [("kept", fresh)])

    def _put(self, db: sqlite3.Connection, rows: int, hour_ms: int, key: int, source: int) -> int | None:
        """Adds rows to an origin, or to the others past the bound. The key of one that is new, else None."""
        if _added(db, rows, hour_ms, key, source):
            return None
        if self._count(db, hour_ms) >= MAX_ORIGINS:
            key = source = OTHERS
            if _added(db, rows, hour_ms, key, source):
                return None
        db.execute("INSERT INTO origins VALUES(?,?,?,?)", (hour_ms, key, source, rows))
        self._hours[hour_ms] = self._count(db, hour_ms) + 1
        return key

    def _count(self, db: sqlite3.Connection, hour_ms: int) -> int:
        if hour_ms not in self._hours:
            if len(self._hours) >= REMEMBERED:
                self._hours.clear()
            (count,) = db.execute("SELECT count(*) FROM origins WHERE hour_ms=?", (hour_ms,)).fetchone()
            self._hours[hour_ms] = count
        return self._hours[hour_ms]


def _added(db: sqlite3.Connection, rows: int, hour_ms: int, key: int, source: int) -> bool:
    """Whether there was an origin to which they could be added."""
    place = (rows, hour_ms, key, source)
    done = db.execute("UPDATE origins SET rows=rows+? WHERE hour_ms=? AND key=? AND source=?", place)
    return done.rowcount > 0


def _source(db: sqlite3.Connection, rule: str, node: str, hour_ms: int) -> int:
    """A source's number; a new one gets a row."""
    row = db.execute("SELECT source, used_ms FROM sources WHERE rule=? AND node=?", (rule, node)).fetchone()
    if row is not None:
        if row[1] < hour_ms:
            db.execute("UPDATE sources SET used_ms=? WHERE source=?", (hour_ms, row[0]))
        known: int = row[0]
        return known
    (count,) = db.execute("SELECT count(*) FROM sources").fetchone()
    if count >= MAX_SOURCES or not rule:
        return OTHERS
    number = db.execute(
        "INSERT INTO sources(rule, node, used_ms) VALUES(?,?,?)", (rule, node, hour_ms)
    ).lastrowid
    assert number is not None
    return number


def origins_kept(db: sqlite3.Connection) -> int:
    """How many origins there are, without counting them."""
    return counters(db, "origins").get("kept", 0)


def oldest_origins(db: sqlite3.Connection, until_ms: int) -> bool:
    """Whether there are origins of an hour up to this one."""
    (oldest_ms,) = db.execute("SELECT min(hour_ms) FROM origins").fetchone()
    return oldest_ms is not None and oldest_ms <= until_ms


def remove_origins(db: sqlite3.Connection, before_ms: int, limit: int) -> int:
    """Removes the oldest origins, of hours before a moment. Returns how many."""
    rows = db.execute(
        "SELECT hour_ms, key, source FROM origins WHERE hour_ms<? ORDER BY hour_ms, key, source LIMIT ?",
        (before_ms, limit),
    ).fetchall()
    db.executemany("DELETE FROM origins WHERE hour_ms=? AND key=? AND source=?", rows)
    add_counters(db, "origins", [("kept", -len(rows))])
    return len(rows)


def remove_sources(db: sqlite3.Connection) -> int:
    """Removes sources that were last used before the oldest hour of which there are origins."""
    (oldest_ms,) = db.execute("SELECT min(hour_ms) FROM origins").fetchone()
    if oldest_ms is None:
        return 0
    return db.execute("DELETE FROM sources WHERE used_ms<?", (oldest_ms,)).rowcount
