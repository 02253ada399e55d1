"""A store that cannot be used is set aside as a whole, and a fresh one takes its place.

    usage.db         ─▶  usage.db.aside-20261122T052452Z
    usage.db-wal     ─▶  usage.db.aside-20261122T052452Z-wal      where SQLite looks for it
    usage.db.intake  ─▶  usage.db.aside-20261122T052452Z.intake
                         usage.db.aside-20261122T052452Z.note     why; gone once the fresh store knows

The note is written first and the database renamed last. So after a crash in between, the damaged store still
has its name, and the next start takes back what was begun; after the last step, the next start finds the
note, and the fresh store learns what lies aside. Nothing is ever overwritten. The caller holds the lock.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from proxy_usage.errors import StoreForeign, StoreUnavailable
from proxy_usage.store.schema import translated

MOVED = ("-wal", "-shm", ".intake", "")
"""What belongs to a store, the database last: once it has its new name, all of it lies aside."""
NOTE = ".note"
_ASIDE = re.compile(r"\.aside-\d{8}T\d{6}Z(\.\d+)?")


class Note(NamedTuple):
    """A store that lies aside and that the one in its place does not know of yet."""

    path: Path
    """Where the database is now."""
    reason: str
    at_ms: int


class _Written(msgspec.Struct):
    reason: str
    at_ms: int


def check(db: sqlite3.Connection, path: Path) -> None:
    """Reads the whole file once.

    Raises:
        StoreForeign: SQLite finds it damaged. StoreUnavailable: the disk cannot be read.
    """
    with translated(path):
        verdict: str = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        # The verdict may have lines, the first a heading.
        raise StoreForeign(
            f"store {path} is damaged: {' '.join(verdict.split())}",
            hint="start the service again: it sets the file aside and keeps what can be read of it",
        )


def set_aside(store: Path, reason: str, now_ms: int) -> Path:
    """Renames a store and all that belongs to it. Returns the database's new path.

    Raises:
        StoreUnavailable: the directory cannot be written. Then the store keeps its name.
    """
    with _explained(store):
        aside = _free_name(store, now_ms)
        note = _beside(aside, NOTE)
        with note.open("xb") as file:
            file.write(msgspec.json.encode(_Written(reason, now_ms)))
            file.flush()
            os.fsync(file.fileno())
        _move(store, aside)
        sync(store.parent)
    return aside


def take_back(store: Path) -> None:
    """Undoes what a crash left half done: gives a store that still has its name its parts back.

    Raises:
        StoreUnavailable: the directory cannot be written.
    """
    with _explained(store):
        for note in _notes(store):
            aside = note.with_name(note.name.removesuffix(NOTE))
            if not aside.exists():
                _move(aside, store)
                note.unlink()


def notes(store: Path) -> list[Note]:
    """What lies aside and is not known to the store in its place, oldest first.

    Raises:
        StoreUnavailable: a note cannot be read.
    """
    found = []
    with _explained(store):
        for note in _notes(store):
            try:
                written = msgspec.json.decode(note.read_bytes(), type=_Written)
            except msgspec.MsgspecError:  # a crash of the machine itself: the moment is in the name anyway
                written = _Written("set aside; the reason was lost", note.stat().st_mtime_ns // 1_000_000)
            found.append(Note(note.with_name(note.name.removesuffix(NOTE)), written.reason, written.at_ms))
    return sorted(found, key=lambda note: note.at_ms)


def forget(note: Note) -> None:
    """The fresh store knows."""
    with _explained(note.path):
        _beside(note.path, NOTE).unlink(missing_ok=True)


def files(store: Path) -> int:
    """How many stores lie aside: until somebody takes their files away.

    Raises:
        StoreUnavailable: the directory cannot be read.
    """
    with _explained(store):
        names = [path.name.removeprefix(store.name) for path in store.parent.iterdir()]
    return sum(_ASIDE.fullmatch(name) is not None for name in names)


def _move(source: Path, target: Path) -> None:
    for suffix in MOVED:
        part, place = _beside(source, suffix), _beside(target, suffix)
        if part.exists() and not place.exists():
            part.rename(place)


def _free_name(store: Path, now_ms: int) -> Path:
    stamp = f"{datetime.fromtimestamp(now_ms // 1_000, UTC):%Y%m%dT%H%M%SZ}"
    base = aside = store.with_name(f"{store.name}.aside-{stamp}")
    number = 1
    while any(_beside(aside, suffix).exists() for suffix in (*MOVED, NOTE)):
        number += 1
        aside = _beside(base, f".{number}")
    return aside


def _notes(store: Path) -> list[Path]:
    start = f"{store.name}.aside-"
    return [
        path for path in store.parent.iterdir() if path.name.startswith(start) and path.name.endswith(NOTE)
    ]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def sync(directory: Path) -> None:
    """The new names outlive a crash of the machine."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def _explained(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"cannot set {store} aside: {error.strerror}",
            hint="its directory must be writable and have room; or move the store away by hand",
        ) from None
