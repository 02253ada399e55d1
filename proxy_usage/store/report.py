"""What the store knows of those that were set aside before it: why, and what came of their content."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from proxy_usage.intake import by_node, read_counts
from proxy_usage.store.aside import Note
from proxy_usage.store.database import Database, add_counters

_PREFIX = "aside/"


@dataclass(frozen=True, slots=True)
class Report:
    """How far a salvage is, and what it found."""

    state: str = "events"
    """``events``, then ``windows`` while it brings these over; ``done``; ``unreadable``: nothing can be read;
    ``gone``: the file is no longer there."""
    place: int = 0
    """Row number of the last event, or number of the last window, that was looked at."""
    events: int = 0
    """Brought over; those made of open windows among them."""
    windows: int = 0
    """Open windows brought over."""
    known: int = 0
    """Events that were here already."""
    gaps: int = 0
    """Places of the file that cannot be read."""
    senseless: int = 0
    """Rows that can be read and are not what they should be."""
    unclear: int = 0
    """Events of which it cannot be read what became of them; dead letters like the others."""
    brought: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Events and their values by ``output/meter``; those made of open windows are not among them."""
    missing: Mapping[str, tuple[int, int]] | None = None
    """By ``output/meter``: events and value that the file's own sums say it held, and that were not found.
    None: not known, or not yet."""
    uncertain: Mapping[str, int] = field(default_factory=dict)
    """Base units by meter in windows that may have been closed and billed: not brought over."""
    nameless: int = 0
    """Open windows of which it cannot be read whose they were."""
    rests: Mapping[str, int] = field(default_factory=dict)
    """Base units by meter below a whole value that open windows left: not brought over."""
    remainders: Mapping[str, int] | None = None
    """Base units by meter that keys carried: not brought over. None: not known, or not yet."""
    held: Mapping[str, int] | None = None
    """Base units by meter of unattributed usage: not brought over. None: not known, or not yet."""
    trouble: str = ""
    """Why nothing can be read."""

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state not in ("events", "windows")


@dataclass(frozen=True, slots=True)
class Aside:
    """A store that was set aside before this one."""

    file: str
    """Its name, in the directory of the store."""
    reason: str
    at_ms: int
    nodes: tuple[str, ...] = ()
    """Nodes that had sent rows: what was lost of them is not known."""
    report: Report = field(default_factory=Report)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Aside).decode


def asides(db: sqlite3.Connection) -> tuple[Aside, ...]:
    """The stores that were set aside before this one, oldest first."""
    rows = db.execute("SELECT value FROM meta WHERE name BETWEEN ? AND ?", (_PREFIX, _PREFIX + "~"))
    return tuple(sorted((_decode(text) for (text,) in rows), key=lambda aside: aside.at_ms))


def save(db: sqlite3.Connection, aside: Aside) -> None:
    """Keeps what is known of one, inside the caller's transaction."""
    db.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (_PREFIX + aside.file, _encode(aside).decode()))


def adopt(database: Database, note: Note) -> Aside:
    """Lets the store know of one that was set aside. What was lost of its nodes counts as unknown, once."""
    counts = read_counts(note.path.with_name(note.path.name + ".intake"))
    nodes = tuple(sorted(by_node(counts)))
    aside = Aside(note.path.name, note.reason, note.at_ms, nodes)
    with database.transaction() as db:
        if db.execute("SELECT 1 FROM meta WHERE name=?", (_PREFIX + aside.file,)).fetchone() is None:
            save(db, aside)
            add_counters(db, "crash_unknown", ((node, 1) for node in nodes))
    return aside
