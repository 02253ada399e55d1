"""The database file: its tables, its opening, its lock, and SQLite's errors in our words.

The only SQL of the program is in this package. One process writes, by a lock file that names its pid and
host (SQLite's own EXCLUSIVE mode would shut readers out); any number of processes read.

    log        checkpoints of open windows, absolute, in order; folded together now and then
    keys       tenant and dimensions by number, with the remainders of connection time
    events     billable events until every output has settled them: id, bytes, window, value; `outputs` that
               have not, and those it was `given` to when a window closed (0: it must stay as it is)
    deliveries one row per output and event not settled yet: pending (no batch) or attempted (a batch)
    batches    what was sent together and is resent together: attempts, not before,
               clean (nothing of it can be stored yet)
    dead       dead letters: reason and answer; replay puts the delivery back
    ledger     what became of each event per output, after its bytes are gone: at most 100 bytes, oldest first
    spans      the first and last window of each 256 entries of the ledger: finds a time without an index
    sums       old ledger rows by the hour of their windows; and how many events were merged into others
    merges     what an event stands for that took the place of several
    sources    a node, and the tenant rule that its rows matched; origins: rows by hour, key and source
    held       unattributed usage, per hour and raw identity
    tallies    events and values by output, fate and meter: the conservation sum
    counters   sums over the life of the store: counted amounts (``salvaged``: of these, out of a damaged
               store), rows by fate, crash losses
    intake     rows read per node, log name and kind as of the last checkpoint
    audits     where the audit of each Envoy stands; audit_hours: what it found, by node and hour
    ties       which keys used an open connection; waiting: listener rows whose time is not booked yet
    stream_*   long streams: a log of changed records, whole shards that make older log obsolete, their keys
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import quote

from proxy_usage.errors import (
    StoreBusy,
    StoreError,
    StoreForeign,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
    StoreVersion,
)

APPLICATION_ID = 0x70757367  # "pusg"
VERSION = 3

TABLES = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE log(seq INTEGER PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE keys(
    key INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, tenant TEXT NOT NULL, dimensions TEXT NOT NULL,
    remainders TEXT NOT NULL, used_ms INTEGER NOT NULL);
CREATE INDEX keys_idle ON keys(used_ms) WHERE remainders != '{}';
CREATE TABLE events(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key INTEGER NOT NULL, meter TEXT NOT NULL,
    window_ms INTEGER NOT NULL, value INTEGER NOT NULL, minted_ms INTEGER NOT NULL,
    outputs INTEGER NOT NULL, given INTEGER NOT NULL DEFAULT 0, body BLOB NOT NULL);
CREATE TABLE outputs(
    output INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, added_ms INTEGER NOT NULL,
    paused TEXT, paused_ms INTEGER, detail TEXT);
CREATE TABLE deliveries(
    output INTEGER NOT NULL, seq INTEGER NOT NULL, batch INTEGER, first_attempt_ms INTEGER,
    PRIMARY KEY(output, seq)) WITHOUT ROWID;
CREATE INDEX deliveries_pending ON deliveries(output, seq) WHERE batch IS NULL;
CREATE INDEX deliveries_batch ON deliveries(batch) WHERE batch IS NOT NULL;
CREATE TABLE batches(
    batch INTEGER PRIMARY KEY AUTOINCREMENT, output INTEGER NOT NULL, attempts INTEGER NOT NULL,
    not_before_ms INTEGER NOT NULL, confirm INTEGER NOT NULL, clean INTEGER NOT NULL DEFAULT 0,
    answer TEXT NOT NULL);
CREATE INDEX batches_due ON batches(output, not_before_ms);
CREATE TABLE dead(
    output INTEGER NOT NULL, seq INTEGER NOT NULL, reason TEXT NOT NULL, answer TEXT NOT NULL,
    at_ms INTEGER NOT NULL, first_attempt_ms INTEGER, PRIMARY KEY(output, seq)) WITHOUT ROWID;
CREATE TABLE ledger(
    entry INTEGER PRIMARY KEY, output INTEGER NOT NULL, fate TEXT NOT NULL, key INTEGER NOT NULL,
    meter TEXT NOT NULL, window_ms INTEGER NOT NULL, value INTEGER NOT NULL, at_ms INTEGER NOT NULL,
    answer INTEGER NOT NULL, id TEXT NOT NULL);
CREATE TABLE sums(
    hour_ms INTEGER NOT NULL, output INTEGER NOT NULL, fate TEXT NOT NULL, key INTEGER NOT NULL,
    meter TEXT NOT NULL, events INTEGER NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY(hour_ms, output, fate, key, meter)) WITHOUT ROWID;
CREATE INDEX ledger_ambiguous ON ledger(output, entry) WHERE fate='delivered_ambiguous';
CREATE TABLE held(
    hour_ms INTEGER NOT NULL, digest BLOB NOT NULL, reason TEXT NOT NULL, identity BLOB NOT NULL,
    rows INTEGER NOT NULL, amounts TEXT NOT NULL, first_ms INTEGER NOT NULL, last_ms INTEGER NOT NULL,
    PRIMARY KEY(hour_ms, digest)) WITHOUT ROWID;
CREATE TABLE tallies(
    output INTEGER NOT NULL, fate TEXT NOT NULL, meter TEXT NOT NULL, events INTEGER NOT NULL,
    value TEXT NOT NULL, PRIMARY KEY(output, fate, meter)) WITHOUT ROWID;
CREATE TABLE counters(
    name TEXT NOT NULL, label TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY(name, label)) WITHOUT ROWID;
CREATE TABLE stream_log(turn INTEGER PRIMARY KEY, records BLOB NOT NULL, forgotten BLOB NOT NULL);
CREATE TABLE stream_shards(shard INTEGER PRIMARY KEY, turn INTEGER NOT NULL, records BLOB NOT NULL);
CREATE TABLE stream_keys(number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, dimensions TEXT NOT NULL);
CREATE TABLE ties(
    connection BLOB NOT NULL, tenant TEXT NOT NULL, dimensions TEXT NOT NULL, first_ns INTEGER NOT NULL,
    last_ns INTEGER NOT NULL, PRIMARY KEY(connection, tenant, dimensions)) WITHOUT ROWID;
CREATE TABLE waiting(
    number INTEGER PRIMARY KEY, connection BLOB NOT NULL, start_ns INTEGER NOT NULL, identity BLOB NOT NULL,
    window_ms INTEGER NOT NULL, open_ns INTEGER NOT NULL, since_ms INTEGER NOT NULL);
"""
SPAN_TRIGGER = """CREATE TRIGGER ledger_span AFTER INSERT ON ledger BEGIN
    INSERT INTO spans VALUES(NEW.entry >> 8, NEW.window_ms, NEW.window_ms) ON CONFLICT(span) DO UPDATE
    SET first_ms=min(first_ms, NEW.window_ms), last_ms=max(last_ms, NEW.window_ms)
    WHERE NEW.window_ms NOT BETWEEN first_ms AND last_ms; END"""
MERGES = """CREATE TABLE merges(
    id TEXT PRIMARY KEY, first_ms INTEGER NOT NULL, events INTEGER NOT NULL, outputs INTEGER NOT NULL
    ) WITHOUT ROWID"""
SOURCES = """CREATE TABLE sources(
    source INTEGER PRIMARY KEY, rule TEXT NOT NULL, node TEXT NOT NULL, used_ms INTEGER NOT NULL,
    UNIQUE(rule, node))"""
ORIGINS = """CREATE TABLE origins(
    hour_ms INTEGER NOT NULL, key INTEGER NOT NULL, source INTEGER NOT NULL, rows INTEGER NOT NULL,
    PRIMARY KEY(hour_ms, key, source)) WITHOUT ROWID"""
USAGE_TABLES = (
    "CREATE INDEX events_window ON events(window_ms, key)",
    "CREATE INDEX keys_tenant ON keys(tenant)",
    "CREATE TABLE spans(span INTEGER PRIMARY KEY, first_ms INTEGER NOT NULL, last_ms INTEGER NOT NULL)",
    "CREATE INDEX spans_last ON spans(last_ms, first_ms)",
    SPAN_TRIGGER,
    MERGES,
    SOURCES,
    ORIGINS,
)
"""What version 2 added: what a bill is explained by."""
AUDIT_TABLES = (
    """CREATE TABLE intake(
    node TEXT NOT NULL, log TEXT NOT NULL, kind TEXT NOT NULL, rows INTEGER NOT NULL,
    PRIMARY KEY(node, log, kind)) WITHOUT ROWID""",
    "CREATE TABLE audits(envoy TEXT PRIMARY KEY, state TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE audit_hours(
    hour_ms INTEGER NOT NULL, node TEXT NOT NULL, figures TEXT NOT NULL,
    PRIMARY KEY(hour_ms, node)) WITHOUT ROWID""",
)
"""What version 3 added, and `intake` as it made it."""


class Lock:
    """Ownership of a store by one process: ``<store>.lock``, held by flock and naming pid and host.

    Raises:
        StoreLocked: another process holds it; the message says which.
        StoreUnavailable: the lock file cannot be made.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._path = store.with_name(store.name + ".lock")
        self._file = self._take()

    def _take(self) -> IO[str]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file: IO[str] = self._path.open("a+")
        except OSError as error:
            raise StoreUnavailable(
                f"cannot create {self._path}: {error.strerror}",
                hint="store.path must lie in a directory that this user may write to and that has room",
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "an unknown process"
            file.close()
            raise StoreLocked(
                f"store {self._store} is in use by {owner}",
                hint="one process owns a store; give this one a store.path of its own or stop the other",
            ) from None
        except OSError as error:
            file.close()
            raise StoreUnavailable(
                f"cannot lock {self._path}: {error.strerror}",
                hint="store.path must lie on a file system that knows locks, and that works",
            ) from None
        # A full or failing disk: the lock itself holds all the same. Past the file's buffer, which would try
        # again when it is closed, and fail then.
        with suppress(OSError):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"pid {os.getpid()} on host {socket.gethostname()}\n".encode())
        return file

    def renew(self) -> None:
        """Takes the lock anew where its path leads elsewhere by now: a disk was mounted in place of another.

        Raises: as the constructor; then the former lock is kept.
        """
        with suppress(OSError):  # a file system that failed answers nothing: then it is taken anew
            held = os.fstat(self._file.fileno())
            found = self._path.stat()
            if (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino):
                return
        self._file, former = self._take(), self._file
        with suppress(OSError):
            former.close()

    def release(self) -> None:
        """Gives the store up. The file stays: removing it would race with the next owner."""
        with suppress(OSError):  # closed it is all the same
            self._file.close()


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raises SQLite's errors as ours.

    Raises:
        StoreFull: the disk, or the store's own limit, is reached.
        StoreUnavailable: an I/O error, a read-only file system, a file that cannot be opened.
        StoreForeign: the file is damaged or not a database.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise StoreFull(
                f"store {path} is full: {error}", hint="free disk space or raise store.max_bytes"
            ) from error
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise StoreForeign(
                f"store {path} is damaged or not a database: {error}",
                hint="start the service again: it sets the file aside and keeps what can be read of it",
            ) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreBusy(
                f"store {path} cannot be used: {error}",
                hint="another program holds it for long: end that one",
            ) from error
        if code in (
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PERM,
        ):
            raise StoreUnavailable(
                f"store {path} cannot be used: {error}",
                hint="check the disk, the mount (read-only?) and the owner of the file",
            ) from error
        if isinstance(error, sqlite3.ProgrammingError) and "closed database" in str(error):
            # An attempt to open it anew failed; another follows.
            raise StoreUnavailable(
                f"store {path} is closed after an error of the disk", hint="check the disk and the mount"
            ) from error
        raise StoreError(f"store {path}: {error}") from error


def connect(path: Path, max_bytes: int, newest: int = VERSION, *, make: bool = True) -> sqlite3.Connection:
    """Opens the store for writing, creating it where there is none. The caller holds the lock.

    Args:
        newest: the schema version that the caller brings an older store to.
        make: False: where there is no file, none is made; an empty one stays empty.

    Raises:
        StoreVersion: a store of a newer version of this program.
        StoreForeign: a database of somebody else, or a damaged one.
        StoreFull, StoreUnavailable: as ``translated`` says.
    """
    with translated(path):
        # Autocommit: transactions are begun and ended by hand, so that what one holds can be read off.
        where = f"file:{quote(os.fsencode(path))}?mode={'rwc' if make else 'rw'}"
        db = sqlite3.connect(where, uri=True, isolation_level=None, check_same_thread=False, timeout=5)
        try:
            _prepare(db, path, max_bytes, newest, make=make)
        except BaseException:
            db.close()
            raise
    return db


def _prepare(db: sqlite3.Connection, path: Path, max_bytes: int, newest: int, *, make: bool) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if not empty and application != APPLICATION_ID:
        raise StoreForeign(
            f"{path} is a database of another program", hint="point store.path to a file of its own"
        )
    if version > newest:
        raise StoreVersion(
            f"store {path} has schema version {version}, this program knows up to {newest}",
            hint="start the newer version of proxy-usage again, or restore the backup made before it",
        )
    if empty and not make:
        return
    if empty:
        db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # only takes effect before the first table
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA foreign_keys=OFF")
    page = db.execute("PRAGMA page_size").fetchone()[0]
    db.execute(f"PRAGMA max_page_count={max(64, max_bytes // page)}")
    if empty:
        db.executescript(
            f"BEGIN IMMEDIATE;{TABLES}{';'.join((*USAGE_TABLES, *AUDIT_TABLES))};"
            f"PRAGMA application_id={APPLICATION_ID};PRAGMA user_version={VERSION};COMMIT;"
        )


def connect_readonly(path: Path) -> sqlite3.Connection:
    """Opens the store for reading beside a running service.

    Raises:
        StoreUnavailable: there is no store, or it cannot be read.
        StoreForeign: it is not one of ours.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreUnavailable(
            f"there is no store at {path}", hint="the service makes it at its first start; check store.path"
        ) from None
    except OSError as error:
        raise StoreUnavailable(
            f"store {path} cannot be reached: {error.strerror}", hint="check the disk and the mount"
        ) from None
    with translated(path):
        where = f"file:{quote(os.fsencode(path))}?mode=ro"
        db = sqlite3.connect(where, uri=True, isolation_level=None, timeout=5)
        try:
            application = db.execute("PRAGMA application_id").fetchone()[0]
        except BaseException:
            db.close()
            raise
    if application != APPLICATION_ID:
        db.close()
        raise StoreForeign(f"{path} is not a store of proxy-usage", hint="check store.path")
    return db


_ENCODER = json.JSONEncoder(separators=(",", ":"), sort_keys=True)


def dumps(value: object) -> str:
    """Compact JSON with sorted keys: equal values are equal text."""
    return _ENCODER.encode(value)
