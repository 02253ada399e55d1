"""A store file that may be damaged, read as far as it can be read, row by row, and never changed.

SQLite gives an error for a row on a page that it cannot read and for every row behind it in the same query.
So each table is walked by its row numbers: after an error the walk asks for the row after the next number,
the one after that, and so on, until a page can be read again.

      1 … 500  501 ✗ 502 ✗ 503 ✗  504 … 2 000 ✗ … ✗        numbers near by are tried one by one (a page of the
      └─ read ─┘ └──── gap ─────┘ └── read ──┘ └─ gap ─▶   tree holds some thousand), then in growing steps

What is read proves itself: an event's bytes must say the same id and value as its row, since SQLite has no
checksum over what a page holds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import msgspec

from proxy_usage.model import MAX_EVENT_VALUE
from proxy_usage.store.schema import APPLICATION_ID
from proxy_usage.store.torn import Left, TornLog
from proxy_usage.turn import Layout

AT_ONCE = 256
NEAR = 4_096
"""Row numbers tried one by one behind an unreadable row."""
MAX_ROW = 1 << 62
SUBJECT = "projects/"

_Row = tuple[Any, ...]


class State(NamedTuple):
    """What became of an event at an output, as far as the file says."""

    name: str
    """``pending``, ``attempted``, ``dead``, ``settled`` or ``unreadable``."""
    words: str = ""
    first_attempt_ms: int | None = None

    @property
    def open(self) -> bool:
        """Whether the output may still want it."""
        return self.name != "settled"


class Found(NamedTuple):
    """An event that could be read."""

    seq: int
    id: str
    tenant: str
    dimensions: Mapping[str, str]
    meter: str
    window_ms: int
    value: int
    minted_ms: int
    body: bytes
    states: Mapping[str, State] | None
    """By output's name; None when the file cannot say which outputs there were."""


class _Data(msgspec.Struct):
    value: str
    dimensions: dict[str, str]


class _Body(msgspec.Struct):
    id: str
    subject: str
    data: _Data


_decode_body = msgspec.json.Decoder(_Body).decode


class Wreck:
    """A file, opened for reading. Use it as a context manager. It may be used by one thread after another.

    Args:
        frozen: nobody else has the file open: it lies aside.
    """

    def __init__(self, path: Path, *, frozen: bool = True) -> None:
        self.path = path
        self.gaps = 0
        """Places where rows could not be read, so far."""
        self.senseless = 0
        """Rows that could be read and are not what they claim to be."""
        self._db = _connect(path, frozen=frozen)
        self._outputs: dict[int, str] | None = None
        self._asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Closing twice is harmless."""
        self._db.close()

    def hold(self) -> None:
        """From now on everything is read as it is at one moment, whoever writes meanwhile."""
        self._db.execute("BEGIN")

    # --- what it is -------------------------------------------------------------------------------------

    def trouble(self) -> str | None:
        """Why nothing at all can be read, in a line; None when something may be."""
        try:
            application: int = self._db.execute("PRAGMA application_id").fetchone()[0]
            self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            return str(error)
        return None if application == APPLICATION_ID else "it is a database of another program"

    def version(self) -> int:
        """The schema version. Raises sqlite3.DatabaseError where there is ``trouble``."""
        version: int = self._db.execute("PRAGMA user_version").fetchone()[0]
        return version

    def layout(self) -> Layout | None:
        """Meters and dimensions as of its last start; None when that cannot be read."""
        row = self._one("SELECT value FROM meta WHERE name='layout'")
        try:
            return msgspec.json.decode(_text(row[0]), type=Layout) if row else None
        except msgspec.MsgspecError:
            return None

    def outputs(self) -> dict[int, str] | None:
        """Names by number; None when not all of them can be read."""
        if not self._asked:
            self._asked = True
            try:
                found = self._db.execute("SELECT output, name FROM outputs").fetchall()
            except sqlite3.DatabaseError:
                found = [(None, None)]
            if all(isinstance(number, int) and isinstance(name, str) for number, name in found):
                self._outputs = dict(found)
            else:
                self.gaps += 1
        return self._outputs

    def expected(self) -> dict[tuple[int, str], tuple[int, int]] | None:
        """Events and values by output and meter that wait or are dead letters, by the sums the file keeps;
        None when these cannot all be read."""
        sums: dict[tuple[int, str], tuple[int, int]] = {}
        try:
            for output, meter, events, value in self._db.execute(
                "SELECT output, meter, events, value FROM tallies WHERE fate IN ('pending', 'dead')"
            ):
                if not (isinstance(events, int) and isinstance(output, int)):
                    return None
                have = sums.get((output, str(meter)), (0, 0))
                sums[output, str(meter)] = (have[0] + events, have[1] + int(_text(value)))
        except (sqlite3.DatabaseError, ValueError):
            return None
        return sums

    def amounts(self, table: str) -> dict[str, int] | None:
        """Base units by meter in ``held`` or as remainders in ``keys``; None when not all can be read."""
        column = {"held": "amounts", "keys": "remainders"}[table]
        sums: dict[str, int] = {}
        try:
            for (text,) in self._db.execute(f"SELECT {column} FROM {table}"):  # noqa: S608 (two literals)
                for name, amount in msgspec.json.decode(_text(text), type=dict[str, int]).items():
                    sums[name] = sums.get(name, 0) + amount
        except (sqlite3.DatabaseError, msgspec.MsgspecError):
            return None
        return sums

    def count(self, table: str) -> int | None:
        """Rows of a table; None when they cannot be counted."""
        row = self._one(f'SELECT count(*) FROM "{table}"')  # noqa: S608 (a name out of the schema)
        return row[0] if row else None

    def tables(self) -> list[str]:
        """The tables it has. Raises sqlite3.DatabaseError where there is ``trouble``."""
        return [
            name
            for (name,) in self._db.execute(
                "SELECT name FROM sqlite_master WHERE type='table' AND name NOT LIKE 'sqlite_%' ORDER BY name"
            )
        ]

    def verdict(self, lines: int = 20) -> tuple[str, ...]:
        """What SQLite finds wrong in the whole file, so many lines at most; nothing when it is sound."""
        try:
            found = self._db.execute(f"PRAGMA quick_check({lines})").fetchall()
        except sqlite3.DatabaseError as error:
            return (str(error),)
        return tuple(line for (text,) in found for line in text.splitlines() if line != "ok")

    # --- what it holds ----------------------------------------------------------------------------------

    def events(self, after: int = 0) -> Iterator[Found]:
        """The events behind a row number that some output may still want, in their order."""
        for row in self._walk(
            "SELECT seq, id, meter, window_ms, value, minted_ms, body FROM events WHERE seq > ? ORDER BY seq",
            after,
        ):
            body = _proven(row)
            if body is None:
                self.senseless += 1
                continue
            seq, event_id, meter, window_ms, value, minted_ms, raw = row
            yield Found(
                seq,
                event_id,
                body.subject.removeprefix(SUBJECT),
                body.data.dimensions,
                meter,
                window_ms,
                value,
                minted_ms,
                raw,
                self._states(seq),
            )

    def left(self) -> Left:
        """The windows that were open."""
        log = TornLog()
        last: int | None = None
        gaps = self.gaps
        for seq, packed in self._walk("SELECT seq, record FROM log WHERE seq > ? ORDER BY seq", 0):
            if self.gaps > gaps or (last is not None and seq != last + 1):
                log.doubt()
            last, gaps = seq, self.gaps
            if not log.add(packed):
                self.senseless += 1
                log.doubt()
        if self.gaps > gaps:
            log.doubt()
        return log.left()

    def _states(self, seq: int) -> Mapping[str, State] | None:
        outputs = self.outputs()
        if outputs is None:
            return None
        states = {name: self._state(number, seq) for number, name in outputs.items()}
        if not any(state.open for state in states.values()):
            # The event is there because an output wants it: what is said of it cannot be right.
            return {name: State("unreadable") for name in states}
        return states

    def _state(self, output: int, seq: int) -> State:
        try:
            row = self._db.execute(
                "SELECT batch, first_attempt_ms FROM deliveries WHERE output=? AND seq=?", (output, seq)
            ).fetchone()
            dead = self._db.execute(
                "SELECT reason, answer, first_attempt_ms FROM dead WHERE output=? AND seq=?", (output, seq)
            ).fetchone()
        except sqlite3.DatabaseError:
            return State("unreadable", "what became of it cannot be read")
        if dead is not None:
            return State("dead", f"was a dead letter: {dead[0]}: {dead[1]}", _moment(dead[2]))
        if row is None:
            return State("settled")
        if row[0] is None:
            return State("pending", "was waiting", _moment(row[1]))
        batch = self._one("SELECT attempts, answer FROM batches WHERE batch=?", row[0])
        words = f"was sent, attempts that failed: {batch[0]}: {batch[1]}" if batch else "was sent"
        return State("attempted", words, _moment(row[1]))

    def _one(self, sql: str, *arguments: object) -> _Row | None:
        try:
            row: _Row | None = self._db.execute(sql, arguments).fetchone()
        except sqlite3.DatabaseError:
            self.gaps += 1
            return None
        return row

    # --- the walk ---------------------------------------------------------------------------------------

    def _walk(self, sql: str, after: int) -> Iterator[_Row]:
        """Rows of a query that gives the row number first and takes it as its one argument."""
        at = after
        while True:
            rows, whole = 0, True
            try:
                for row in self._db.execute(f"{sql} LIMIT {AT_ONCE}", (at,)):
                    if row[0] <= at:  # a page that is in the wrong place of the tree
                        whole = False
                        break
                    at, rows = row[0], rows + 1
                    yield row
            except sqlite3.DatabaseError:
                whole = False
            if whole and rows < AT_ONCE:
                return
            if not whole:
                self.gaps += 1
                found = self._beyond(sql, at)
                if found is None:
                    return
                at = found

    def _beyond(self, sql: str, at: int) -> int | None:
        """The first number past ``at`` behind which a row can be read, or nothing is left; None: there is no
        such number."""
        failed, step = at, 1
        while at + step < MAX_ROW and not self._readable(sql, at + step):
            failed = at + step
            step = step + 1 if step < NEAR else 2 * step
        if at + step >= MAX_ROW:
            return None
        found = at + step
        while found - failed > 1:
            middle = (found + failed) // 2
            if self._readable(sql, middle):
                found = middle
            else:
                failed = middle
        return found

    def _readable(self, sql: str, at: int) -> bool:
        try:
            row = self._db.execute(f"{sql} LIMIT 1", (at,)).fetchone()
        except sqlite3.DatabaseError:
            return False
        return row is None or row[0] > at


def _connect(path: Path, *, frozen: bool) -> sqlite3.Connection:
    """A connection that takes a damaged schema as far as it goes and believes no page blindly."""
    log = path.with_name(path.name + "-wal")
    # Without a log nothing but the file itself is needed: no other file is made beside it.
    still = "&immutable=1" if frozen and not (log.exists() and log.stat().st_size) else ""
    db = _open(path, still)
    try:
        db.execute("PRAGMA schema_version")
    except sqlite3.DatabaseError as error:
        # Where nobody may write, SQLite has no place for the index of the log. Nobody changes the file, then.
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            db.close()
            db = _open(path, "&immutable=1")
    db.execute("PRAGMA writable_schema=ON")
    db.execute("PRAGMA cell_size_check=ON")
    return db


def _open(path: Path, more: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro{more}",
        uri=True,
        isolation_level=None,
        timeout=5,
        check_same_thread=False,
    )


def _text(value: object) -> str:
    """A column that should be text; what is not makes no sense to whoever reads it on."""
    return value if isinstance(value, str) else ""


def _moment(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _proven(row: _Row) -> _Body | None:
    _, event_id, meter, window_ms, value, minted_ms, raw = row
    if not (isinstance(raw, bytes) and isinstance(meter, str)):
        return None
    if not all(isinstance(number, int) for number in (window_ms, value, minted_ms)):
        return None
    try:
        body = _decode_body(raw)
    except msgspec.MsgspecError:
        return None
    same = body.id == event_id and body.data.value == str(value) and 0 < value <= MAX_EVENT_VALUE
    return body if same and body.subject.startswith(SUBJECT) else None
