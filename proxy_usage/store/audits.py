"""What audits found: where each comparison stands, and the figures of each node and hour."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
import structlog
from ulid import ULID

from proxy_usage.completeness import Track
from proxy_usage.figures import Figures
from proxy_usage.store.database import Database, counters
from proxy_usage.store.history import HOUR_MS

log = structlog.get_logger()

MAX_HOURS = 200_000
"""Figures kept, one per node and hour with traffic or an audit; beyond it the oldest go. About 60 MB."""

_track = msgspec.json.Decoder(Track).decode
_figures = msgspec.json.Decoder(Figures).decode


class Hour(NamedTuple):
    """What is known of a node and an hour. Its figures may reach back before the hour: ``from_ms``."""

    hour_ms: int
    node: str
    figures: Figures


class Sink(msgspec.Struct, frozen=True):
    """The store by name, so that audits count each sink once."""

    id: str
    born_ms: int


MAX_ADOPTED = 64
"""Sinks remembered that were taken over: an audit must have seen each once since."""


class Audits:
    """The audit's side of the store.

    Args:
        keep_ms: age at which figures are removed.
    """

    def __init__(self, database: Database, *, keep_ms: int) -> None:
        self._database = database
        self._keep_ms = keep_ms

    def sink(self, now_ms: int) -> Sink:
        """The store's name; made at the first call."""
        with self._database.transaction() as db:
            row = db.execute("SELECT value FROM meta WHERE name='sink'").fetchone()
            if row is not None:
                return msgspec.json.decode(row[0], type=Sink)
            sink = Sink(str(ULID()), now_ms)
            written = msgspec.json.encode(sink).decode()
            db.execute("INSERT INTO meta VALUES('sink', ?)", (written,))
        self._database.known = self._database.known._replace(sink=written)
        return sink

    def adopted(self) -> dict[str, int]:
        """Sinks whose stores were taken over, and when those were made."""
        with self._database.reading() as db:
            return adopted_sinks(db)

    def losses(self) -> dict[str, dict[str, int]]:
        """Rows that crashes lost, and how often nobody can say, by node."""
        with self._database.reading() as db:
            return {name: counters(db, name) for name in ("crash_lost", "crash_lost_http", "crash_unknown")}

    def tracks(self) -> dict[str, Track]:
        """Where each comparison stands, by Envoy. One that cannot be read begins anew."""
        found: dict[str, Track] = {}
        with self._database.reading() as db:
            rows = db.execute("SELECT envoy, state FROM audits").fetchall()
        for envoy, state in rows:
            try:
                found[envoy] = _track(state)
            except msgspec.MsgspecError as error:
                log.warning("audit begins anew", envoy=envoy, error=str(error))
        return found

    def hours(self, from_ms: int) -> tuple[Hour, ...]:
        """Figures of hours that begin at a moment or later."""
        with self._database.reading() as db:
            return hours(db, from_ms, 1 << 62)

    def save(
        self, tracks: Mapping[str, Track | None], found: Sequence[tuple[str, Figures]], now_ms: int
    ) -> None:
        """Keeps what a round came to: comparisons (None: ended), and figures to be added to their hour."""
        with self._database.transaction() as db:
            for envoy, track in tracks.items():
                if track is None:
                    db.execute("DELETE FROM audits WHERE envoy=?", (envoy,))
                else:
                    state = msgspec.json.encode(track).decode()
                    db.execute("INSERT OR REPLACE INTO audits VALUES(?,?)", (envoy, state))
            for node, figures in found:
                _add(db, node, figures)
            db.execute("DELETE FROM audit_hours WHERE hour_ms<?", (now_ms - self._keep_ms,))

    def bound(self, limit: int = MAX_HOURS) -> int:
        """Removes the oldest figures beyond a bound, whole hours of them. Returns how many."""
        with self._database.transaction() as db:
            count: int = db.execute("SELECT count(*) FROM audit_hours").fetchone()[0]
            if count <= limit:
                return 0
            last = db.execute(
                "SELECT hour_ms FROM audit_hours ORDER BY hour_ms LIMIT 1 OFFSET ?", (count - limit - 1,)
            ).fetchone()[0]
            return db.execute("DELETE FROM audit_hours WHERE hour_ms<=?", (last,)).rowcount


def adopted_sinks(db: sqlite3.Connection) -> dict[str, int]:
    """Sinks whose stores were taken over, the latest last, and when those were made."""
    row = db.execute("SELECT value FROM meta WHERE name='adopted_sinks'").fetchone()
    return {} if row is None else msgspec.json.decode(row[0], type=dict[str, int])


def adopt_sink(db: sqlite3.Connection, orphan: sqlite3.Connection) -> None:
    """Remembers a sink that is taken over, and those that it took over: part of the caller's transaction."""
    row = orphan.execute("SELECT value FROM meta WHERE name='sink'").fetchone()
    # One without a name was asked by nobody: that its rows come must be noticed all the same.
    sink = Sink(str(ULID()), 0) if row is None else msgspec.json.decode(row[0], type=Sink)
    known = adopted_sinks(db) | adopted_sinks(orphan) | {sink.id: sink.born_ms}
    kept = dict(list(known.items())[-MAX_ADOPTED:])
    db.execute(
        "INSERT OR REPLACE INTO meta VALUES('adopted_sinks', ?)", (msgspec.json.encode(kept).decode(),)
    )


def hours(db: sqlite3.Connection, from_ms: int, to_ms: int) -> tuple[Hour, ...]:
    """Figures of hours that begin in ``[from_ms, to_ms)``, by hour and node."""
    rows = db.execute(
        "SELECT hour_ms, node, figures FROM audit_hours WHERE hour_ms>=? AND hour_ms<?"
        " ORDER BY hour_ms, node",
        (from_ms, to_ms),
    )
    return tuple(Hour(hour_ms, node, _figures(text)) for hour_ms, node, text in rows)


def audited(db: sqlite3.Connection) -> dict[str, str]:
    """The node that each audited Envoy was last known as. Comparisons that cannot be read are left out."""
    found: dict[str, str] = {}
    for envoy, text in db.execute("SELECT envoy, state FROM audits ORDER BY envoy"):
        with suppress(msgspec.MsgspecError):
            found[envoy] = _track(text).node
    return found


def _add(db: sqlite3.Connection, node: str, figures: Figures) -> None:
    hour_ms = figures.to_ms - figures.to_ms % HOUR_MS
    place = (hour_ms, node)
    row = db.execute("SELECT figures FROM audit_hours WHERE hour_ms=? AND node=?", place).fetchone()
    total = _figures(row[0]) if row else Figures()
    total.add(figures)
    text = msgspec.json.encode(total).decode()
    db.execute("INSERT OR REPLACE INTO audit_hours VALUES(?,?,?)", (*place, text))
