"""The open store: its one connection, its transactions, and the sums that every part of it keeps."""

from __future__ import annotations

import ctypes
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from proxy_usage.errors import (
    StoreBusy,
    StoreForeign,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
    StoreVersion,
)
from proxy_usage.places import Place, place
from proxy_usage.store import aside
from proxy_usage.store.doubt import AT_ONCE_BYTES, Doubt
from proxy_usage.store.migrate import HISTORY, History, migrate
from proxy_usage.store.schema import Lock, connect, connect_readonly, translated
from proxy_usage.store.space import Space


class Mark(NamedTuple):
    """What tells one store from another, and from an older copy of itself."""

    sink: str | None
    """Its name, as it is written there; None before it has one."""
    turn: int
    """The last turn known to have taken effect."""


def mark(db: sqlite3.Connection) -> Mark:
    """What tells this store from others."""
    rows: dict[str, str] = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('sink', 'turn')"))
    turn = rows.get("turn", "")
    return Mark(rows.get("sink"), int(turn) if turn.isdecimal() else 0)


class Database:
    """Exclusive owner of one store file. Used by one thread at a time.

    Args:
        aside_ms: the present. When it is given, the whole file is checked, and one that is damaged or not
            ours is set aside and a fresh store opened in its place; ``aside.notes`` tells. A large file that
            nobody doubts is only to be checked: ``unchecked`` says so, ``check_beside`` does it.
        at_once_bytes: what counts as large.
        make: False: where there is no file, none is made.

    Raises:
        StoreLocked: another process owns the store.
        StoreVersion: it is of a version that this program does not work with.
        StoreForeign, StoreFull, StoreUnavailable: it cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 8 << 30,
        aside_ms: int | None = None,
        history: History = HISTORY,
        at_once_bytes: int = AT_ONCE_BYTES,
        make: bool = True,
    ) -> None:
        self.path = path.resolve()  # a store has one lock, by whatever name it is reached
        # A store that was set aside is no reason: the process may have ended before it had a successor.
        if not make and place(self.path) is None and not any(path.parent.glob(f"{path.name}.aside-*")):
            raise self._gone()
        self._max_bytes = max_bytes
        self._history = history
        self._lock = Lock(self.path)
        self.space = Space(self.path, max_bytes)
        self.unchecked = False
        """Whether the file was opened without having been read whole."""
        self._cause = ""  # why it is broken
        self.broken = False
        """Whether the connection met an error of the disk: only ``reopen`` can help it."""
        self.known = Mark(None, 0)
        """What the store that is opened anew must have; kept up by whoever writes these."""
        self._file: Place | None = None  # what is open
        self._doubt = Doubt(self.path, at_once_bytes)
        self._beside: sqlite3.Connection | None = None
        self._checks = True  # False once nothing is to be read beside any more
        try:
            if aside_ms is None:
                self.db = self._connect()
            else:
                aside.take_back(path)
                self.db = self._connect_anyway(aside_ms)
        except BaseException:
            self._lock.release()
            raise

    def _connect(self, *, check: bool = False) -> sqlite3.Connection:
        db = connect(self.path, self._max_bytes, self._history.newest)
        try:
            if check:
                aside.check(db, self.path)
            migrate(db, self.path, self._history)
            with translated(self.path):
                self.known = mark(db)
                self.space.attach(db)
            self._file = place(self.path)
        except BaseException:
            db.close()
            raise
        return db

    def _connect_anyway(self, now_ms: int) -> sqlite3.Connection:
        waits = self._doubt.can_wait()
        try:
            db = self._connect(check=not waits)
        except StoreVersion:
            raise
        except StoreForeign as error:
            aside.set_aside(self.path, error.message, now_ms)
            self._doubt.settle()
            return self._connect()
        self.unchecked = waits
        (self._doubt.begin if waits else self._doubt.settle)()
        return db

    def check_beside(self) -> None:
        """Reads the whole file on a connection of its own, on any thread, beside the one in use.

        Raises:
            StoreForeign: it is damaged; the next start reads it before it uses it.
            StoreUnavailable: the disk cannot be read. StoreError: it was stopped.
        """
        self._look()
        self._beside = connect_readonly(self.path)
        try:
            with translated(self.path):
                if not self._checks:  # SQLite forgets an interruption of a connection that does nothing yet
                    raise sqlite3.OperationalError("interrupted")
            aside.check(self._beside, self.path)
        finally:
            self._beside.close()
        self.unchecked = False
        self._doubt.settle()

    def stop_checking(self) -> None:
        """Cuts ``check_beside`` short, from another thread; what was not read stays doubted.

        None begins any more. One that is just beginning may have to be stopped once more.
        """
        self._checks = False
        if self._beside is not None:
            with suppress(sqlite3.ProgrammingError):  # it is closed
                self._beside.interrupt()

    def replace(self, reason: str, now_ms: int) -> None:
        """Sets the open file aside, since what it holds cannot be read, and opens a fresh one.

        Raises:
            StoreFull, StoreUnavailable: the directory does not take it.
        """
        self.db.close()
        aside.set_aside(self.path, reason, now_ms)
        self._doubt.settle()
        self.unchecked = False
        self.db = self._connect()

    def close(self) -> None:
        """Closes the file and gives up the lock. Closing twice is harmless."""
        self._let_go()
        self._lock.release()

    def reopen(self) -> None:
        """Opens the file anew and checks it: a connection that met an I/O error never recovers.

        Only the store that was open is opened: while its disk is away there may be no file in its place, or
        another, and to go on with that would be to forget what waits, or to send it again.

        What can be read after a failed sync may be in the system's memory alone. So before anything of it is
        believed, all of the log is written to the database once more, and synced.

        Raises:
            StoreUnavailable: it still cannot be used, it is not there, or has another owner by now.
            StoreForeign: it was damaged.
        """
        self._let_go()
        file = place(self.path)
        if file is None:  # nothing is to be made where its disk will be mounted
            raise self._gone()
        try:
            self._lock.renew()
        except StoreLocked as error:  # perhaps for a moment; what waits in memory is not to end with that
            raise StoreUnavailable(error.message, hint=error.hint) from error
        try:
            self.db = self._verified()
        except StoreForeign as error:
            if file == self._file:
                raise
            raise self._other(f" ({error.message})") from error
        self._file = file
        self.unchecked = self.broken = False
        self._doubt.settle()

    def _verified(self) -> sqlite3.Connection:
        """What lies at the path, when it is the store that was open, and durable."""
        db = connect(self.path, self._max_bytes, self._history.newest, make=False)
        try:
            with translated(self.path):
                self._compare(db)
            aside.check(db, self.path)
            with translated(self.path):
                self._write_out(db)
                self.space.attach(db)
        except BaseException:
            db.close()
            raise
        return db

    def _let_go(self) -> None:
        """Closes the connection, unless another file lies in the place of its own by now.

        SQLite would remove that one's write-ahead log where both have the same inode number, as first files
        of two disks do: it goes by name and number. Then the connection is left open for good.
        """
        if self._file is None or place(self.path) in (self._file, None):
            self.db.close()
            return
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.db))
        self.db, self._file = sqlite3.connect(":memory:", check_same_thread=False), None
        self.db.close()

    def is_there(self) -> bool:
        """Whether the path leads to the open file, and that works."""
        return not self.broken and place(self.path) == self._file is not None

    def _look(self) -> None:
        """Raises StoreUnavailable when the connection failed before, since what it reads may be anything; and
        when the path leads to another file than the open one, or to none: what is written would be found by
        no later start."""
        if self.broken:
            raise StoreUnavailable(
                f"{self._cause}; it waits to be opened anew", hint="check the disk and the mount"
            )
        file = place(self.path)
        if file is None:
            raise self._gone()
        if file != self._file:
            raise self._other()

    def _write_out(self, db: sqlite3.Connection) -> None:
        (busy, *_) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreUnavailable(
                f"store {self.path} cannot be made durable: somebody is reading it",
                hint="it is tried again; end programs that have the file open for long",
            )

    def _gone(self) -> StoreUnavailable:
        why = "is not there any more"
        try:
            self.path.stat()
        except FileNotFoundError:
            pass
        except OSError as error:
            why = f"cannot be reached: {error.strerror}"
        return StoreUnavailable(
            f"store {self.path} {why}",
            hint="mount its disk again, or put the file back: the service goes on with it by itself."
            " Only a restart would begin an empty one",
        )

    def _other(self, why: str = "") -> StoreUnavailable:
        return StoreUnavailable(
            f"another store lies at {self.path} than the one that was open{why}",
            hint="mount the right disk, or restart the service if it is to work with this one",
        )

    def _compare(self, db: sqlite3.Connection) -> None:
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            raise self._gone()
        found = mark(db)
        if found.sink != self.known.sink:
            raise self._other()
        if found.turn < self.known.turn:
            raise StoreUnavailable(
                f"store {self.path} is an older copy: it ends with turn {found.turn}, and turn"
                f" {self.known.turn} was saved",
                hint="mount the disk that was in use, or restart the service with --restored to work with"
                " a backup",
            )

    @contextmanager
    def transaction(self, *, usage: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is durable when the block ends, or none of it.

        Args:
            usage: it brings new usage, which has less room than what moves or removes what is there.

        Raises:
            StoreFull, StoreUnavailable, StoreForeign: nothing was changed.
        """
        try:
            with self._noted(), self._transaction(usage=usage) as db:
                yield db
        except StoreFull:
            self.space.failed(usage=usage)
            raise

    @contextmanager
    def _transaction(self, *, usage: bool) -> Iterator[sqlite3.Connection]:
        with translated(self.path):
            self.space.admit(self.db, usage=usage)
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                # SQLite ends a transaction by itself on some errors (a full disk among them).
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection for a few quick reads, with SQLite's errors in our words."""
        with self._noted(), translated(self.path):
            yield self.db

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Remembers what an error says of the connection, and of the file."""
        try:
            self._look()
            yield
        except StoreBusy:  # the connection is sound
            raise
        except StoreUnavailable as error:
            if not self.broken:
                self.broken, self._cause = True, error.message
            raise
        except StoreForeign:
            self._doubt.begin()
            raise


Sums = dict[tuple[int, str, str], tuple[int, int]]
"""``(output, fate, meter) → (events, value)``: what one transaction adds to the tallies; may be negative."""


def tally(sums: Sums, output: int, fate: str, meter: str, value: int, events: int = 1) -> None:
    """Notes that an output's events changed their fate."""
    have_events, have_value = sums.get((output, fate, meter), (0, 0))
    sums[output, fate, meter] = (have_events + events, have_value + value)


def add_tallies(db: sqlite3.Connection, sums: Sums) -> None:
    """Adds to the tallies. Sums are kept as text: over the years they may pass 64 bits."""
    for (output, fate, meter), (events, value) in sums.items():
        row = db.execute(
            "SELECT events, value FROM tallies WHERE output=? AND fate=? AND meter=?", (output, fate, meter)
        ).fetchone()
        have_events, have_value = (row[0], int(row[1])) if row else (0, 0)
        db.execute(
            "INSERT INTO tallies VALUES(?,?,?,?,?) ON CONFLICT(output, fate, meter)"
            " DO UPDATE SET events=excluded.events, value=excluded.value",
            (output, fate, meter, have_events + events, str(have_value + value)),
        )


def add_counters(db: sqlite3.Connection, name: str, values: Iterable[tuple[str, int]]) -> None:
    """Adds to sums over the life of the store, one per label."""
    for label, value in values:
        if value == 0:
            continue
        row = db.execute("SELECT value FROM counters WHERE name=? AND label=?", (name, label)).fetchone()
        total = value + (int(row[0]) if row else 0)
        db.execute(
            "INSERT INTO counters VALUES(?,?,?) ON CONFLICT(name, label) DO UPDATE SET value=excluded.value",
            (name, label, str(total)),
        )


def counters(db: sqlite3.Connection, name: str) -> dict[str, int]:
    """Sums of one name by label."""
    return {
        label: int(value)
        for label, value in db.execute("SELECT label, value FROM counters WHERE name=?", (name,))
    }
