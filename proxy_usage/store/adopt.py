"""A sound store that nobody will open again is taken over whole by another, and is gone.

    left behind (usage.worker-2.db)                 this store (usage.db)
    ─────────────────────────────────────────────   ──────────────────────────────────────────────────────────
    open windows                                ─▶  open windows, due when they were
    events: waiting, attempted, dead letters    ─▶  same ids and bytes, batches, marks, reasons, answers
    ledger, hourly sums, sums of all fates      ─▶  added
    remainders of a key                         ─▶  added; whole units that come of it become an open window
    held usage, long streams, connections       ─▶  added; of a stream that both know the highest totals count
    rows read and lost per node                 ─▶  added; audits are told whose they were
    what merged events stand for, rows' origins ─▶  added
    stores that were set aside before it        ─▶  set aside before this one; a salvage goes on here

Crash-safe at every step, each of which is durable before the next:

    1 ``mark``     the store left behind gets a number of its own          meta adoption     = 7f3a…
    2 ``bring``    all of it, and that number, in one transaction here     meta adopting/F   = 7f3a…
    3 ``discard``  its files are removed, the database first
    4 ``forget``   the number is forgotten here

A start that finds 2 done (``begun``; ``same`` says that the file is still that one) goes on with 3. One that
does not, begins anew: nothing was brought over. The caller holds both locks. A key's window that was open in
both stores stays two, which close each once: sums are exact, and there is one event more.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from proxy_usage.errors import StoreUnavailable
from proxy_usage.intake import Source
from proxy_usage.store.aside import MOVED, sync
from proxy_usage.store.bringing import Bringing
from proxy_usage.store.database import Database
from proxy_usage.store.doubt import SUFFIX
from proxy_usage.turn import Layout

_BEGUN = "adopting/"
_FILES = ("", *(suffix for suffix in MOVED if suffix), SUFFIX, ".reserve", ".sock")
"""What belongs to a store, the database first: once it is gone, nobody can take it for a store. The lock file
stays, since removing it would race with the next owner."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """What was taken over."""

    file: str
    events: int
    """On their way, and dead letters."""
    windows: int
    """That were open."""
    rows: Mapping[str, int]
    """Rows read per node over its life."""


def mark(orphan: Database) -> str:
    """Gives a store that is left behind a number of its own. Returns it."""
    with orphan.transaction() as db:
        number = _meta(db, "adoption")
        if number is None:
            number = secrets.token_hex(16)
            db.execute("INSERT INTO meta VALUES('adoption', ?)", (number,))
    return number


def same(orphan: Database, number: str) -> bool:
    """Whether it is the store that was given this number."""
    with orphan.reading() as db:
        return _meta(db, "adoption") == number


def begun(database: Database) -> dict[str, str]:
    """The files that were brought over and may still be there: their numbers by name."""
    with database.reading() as db:
        rows = db.execute("SELECT name, value FROM meta WHERE name BETWEEN ? AND ?", (_BEGUN, _BEGUN + "~"))
        return {name.removeprefix(_BEGUN): number for name, number in rows}


def forget(database: Database, file: str) -> None:
    """The file is gone: another of its name is another store."""
    with database.transaction() as db:
        db.execute("DELETE FROM meta WHERE name=?", (_BEGUN + file,))


def discard(path: Path) -> None:
    """Removes a store's files.

    Raises:
        StoreUnavailable: the directory cannot be written; what is left is removed at the next start.
    """
    try:
        for suffix in _FILES:
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:
        raise StoreUnavailable(
            f"cannot remove {path}, which was taken over: {error.strerror}",
            hint="its directory must be writable",
        ) from None


def bring(
    database: Database,
    orphan: Database,
    layout: Layout,
    now_ms: int,
    known_as: Callable[[Source], Source] = lambda source: source,
) -> Adopted:
    """Takes everything over, in one transaction. Both stores are of this layout.

    Args:
        known_as: what a source's rows are counted as here.

    Raises:
        StoreError: the two hold an event in common. StoreFull, StoreUnavailable, StoreForeign: one of them
            cannot be used. Nothing was changed.
    """
    number = mark(orphan)
    with database.transaction() as db:
        adoption = Bringing(db, orphan, layout, now_ms)
        events = adoption.events()
        adoption.history()
        adoption.usage()
        rows = adoption.rows(known_as)
        db.execute("INSERT INTO meta VALUES(?,?)", (_BEGUN + orphan.path.name, number))
    return Adopted(orphan.path.name, events, adoption.windows, rows)


def _meta(db: sqlite3.Connection, name: str) -> str | None:
    row = db.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
    return row[0] if row else None
