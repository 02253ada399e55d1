"""The room a store may take, and the file that keeps some of it free for getting out of a full disk.

    ◀──────────────────────────────────── max_bytes ────────────────────────────────────▶
    ┌──────────────────────────────────────────────┬──────────┬─────────────┬─────────────┐
    │ usage.db: pages in use, free pages           │ headroom │ usage.db-wal│ .reserve    │
    └──────────────────────────────────────────────┴──────────┴─────────────┴─────────────┘
    ◀── turns: new usage ─────────────────────────▶           ◀─── a share each: an eighth, at most 64 MiB
    ◀── settling, merging, rolling up: while the reserve is there ▶
    ◀── … and once it was given up ───────────────────────────────┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄▶

SQLite can neither delete nor checkpoint on a full disk, so what makes room needs some. New usage never gets
the headroom nor the reserve's place, also not on a disk that others fill: what it may add is bounded by the
disk's free bytes as if the reserve were still to be made. The reserve is made again when half as much as its
size would still be free beside it.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import structlog

from proxy_usage.errors import StoreFull

log = structlog.get_logger()

MAX_SHARE = 64 << 20
PARTS = 8
"""The reserve and the write-ahead log may take so many parts of all each, up to ``MAX_SHARE``."""
MIN_LIMIT = 1 << 20
"""A smaller ``max_bytes`` is exceeded up to here: below, a store holds little more than its empty tables."""
SHORT = 16
"""A disk with less free than this part of the reserve is short: the reserve is given up."""
SLACK = 8 << 20
"""So much of the database, or a quarter of it, may be free: it is soon used again."""
BLOCK = 1 << 20


class Reserve:
    """A file that holds disk space: ``<store>.reserve``, really allocated."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Bytes it holds; 0 while it was given up."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def make(self, size: int) -> bool:
        """Allocates the space. Returns False, and holds nothing, when the disk does not give it."""
        try:
            with self.path.open("wb", buffering=0) as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError:
                    _write(file.fileno(), size)
                os.fsync(file.fileno())
        except OSError as error:
            log.warning("no reserve", path=str(self.path), error=error.strerror)
            self.give_up()
            return False
        return True

    def give_up(self) -> bool:
        """Frees the space. Returns whether there was any."""
        try:
            self.path.unlink()
        except OSError:
            return False
        return True


def _write(file: int, size: int) -> None:
    """For file systems that cannot allocate: bytes that none of them can leave out or pack."""
    os.ftruncate(file, 0)
    while size > 0:
        size -= os.write(file, os.urandom(min(BLOCK, size)))


@dataclass(frozen=True, slots=True)
class Measure:
    """What a store occupies at one moment, in bytes, and what it may."""

    file: int
    """The database's file, and its pages that are only in the log by now."""
    pages: int
    """The database, free pages included, wherever they are."""
    free: int
    """Pages of it that hold nothing and are used before it grows."""
    wal: int
    reserve: int
    limit: int
    """``store.max_bytes``."""
    room: int
    """The size to which the database may grow by new usage, by the limit and by the disk."""

    @property
    def occupied(self) -> int:
        """All that counts against the limit."""
        return self.file + self.wal + self.reserve

    @property
    def wasteful(self) -> bool:
        """Whether so much of the database is free that it should shrink; or it is in the reserve's place."""
        share = min(MAX_SHARE, self.limit // PARTS)
        in_the_way = not self.reserve and self.file + 2 * share > self.limit
        return self.free > max(SLACK, self.pages // 4) or (in_the_way and self.free > 0)

    @property
    def used(self) -> int:
        """What the database holds."""
        return self.pages - self.free


class Space:
    """The accounting of one store.

    Args:
        path: the store.
        limit: ``store.max_bytes``.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.limit = max(limit, MIN_LIMIT)
        self.reserve = Reserve(path.with_name(path.name + ".reserve"))
        self._path = path
        self._wal = path.with_name(path.name + "-wal")
        self._page = 4096
        self._allowed = 0
        self.share = min(MAX_SHARE, min(self.limit, _disk(path.parent)[0]) // PARTS)
        """Size of the reserve, and what the write-ahead log is held to."""

    def attach(self, db: sqlite3.Connection) -> None:
        """Fits a new connection to the accounting: how large its write-ahead log gets and stays."""
        self._page = db.execute("PRAGMA page_size").fetchone()[0]
        self._allowed = 0
        db.execute(f"PRAGMA journal_size_limit={self.share}")
        db.execute(f"PRAGMA wal_autocheckpoint={max(8, min(1_000, self.share // 4 // self._page))}")

    def admit(self, db: sqlite3.Connection, *, usage: bool) -> None:
        """Sets how far the file may grow in the transaction that is about to begin.

        Args:
            usage: it brings new usage, rather than moving or removing what is there.

        Raises:
            StoreFull: a reader keeps the write-ahead log from shrinking, and there is no more room for it.
        """
        pages: int = db.execute("PRAGMA page_count").fetchone()[0]
        wal, held = _size(self._wal), self.reserve.size
        file = pages * self._page
        beside = file + held + (self.share // 2 if usage else 0)
        if wal > self.share and beside + wal > self.limit:
            self._shrink_log(db)
            wal = _size(self._wal)
            if wal > self.share and beside + wal > self.limit:
                raise StoreFull(
                    f"store {self._path} is full: its write-ahead log has {wal} bytes and does not shrink",
                    hint="a program that reads the store for long keeps it; end it, or raise store.max_bytes",
                )
        room = self._room(file, held) if usage else self.limit - self.share - held
        allowed = room // self._page
        if allowed != self._allowed:
            db.execute(f"PRAGMA max_page_count={max(allowed, pages)}")
            # A limit below what is there would be raised by SQLite, so it must be set again at the next look.
            self._allowed = allowed if allowed >= pages else 0

    def failed(self, *, usage: bool) -> None:
        """A transaction met the end of the disk or of the limit: gives the reserve up if it helps.

        New usage that meets its own limit leaves the reserve to what makes room.
        """
        if usage and _disk(self._path.parent)[1] >= self.share:
            return
        self._give_up("the store is full")

    def keep(self, db: sqlite3.Connection) -> Measure:
        """Looks at disk and file, gives the reserve up or makes it again, and tells what it saw."""
        pages: int = db.execute("PRAGMA page_count").fetchone()[0]
        free: int = db.execute("PRAGMA freelist_count").fetchone()[0]
        # The file shrinks, and grows, when the log is copied into it.
        file = max(pages * self._page, _size(self._path))
        wal, held = _size(self._wal), self.reserve.size
        disk = _disk(self._path.parent)[1]
        if held and disk < self.share // SHORT:
            self._give_up("the disk is short")
        elif held != self.share and disk + held >= self.share + self.share // 2:
            fits = file + self.share + max(wal, self.share) <= self.limit
            if fits and self.reserve.make(self.share):
                log.info("reserve made", bytes=self.share)
        held = self.reserve.size
        room = max(0, self._room(pages * self._page, held))
        return Measure(file, pages * self._page, free * self._page, wal, held, self.limit, room)

    def _room(self, file: int, held: int) -> int:
        own = self.limit - 2 * self.share - self.share // 2
        disk = _disk(self._path.parent)[1] + held - self.share
        return min(own, file + max(0, disk))

    def _give_up(self, reason: str) -> None:
        if self.reserve.give_up():
            log.warning("reserve given up", reason=reason)

    def _shrink_log(self, db: sqlite3.Connection) -> None:
        """Empties the write-ahead log if nobody reads and the disk takes it; does not wait for either."""
        db.execute("PRAGMA busy_timeout=0")
        try:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.OperationalError:
            return
        finally:
            db.execute("PRAGMA busy_timeout=5000")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _disk(directory: Path) -> tuple[int, int]:
    """Bytes of the file system, and those of them that are free for us."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return 1 << 62, 1 << 62
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
