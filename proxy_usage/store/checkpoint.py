"""Turns: what the pipeline added since the last one becomes durable, and due windows become events.

A turn is one transaction. It appends packed records to ``log`` (open cells that changed, absolute; ids of
cells that closed; some thousand cells each, for who packs holds Python's lock), mints the events of the cells
that close, and adds up the counters; so that after a crash at any point the store holds either all of a turn
or none of it. Records are folded together when they outgrow what they describe.
"""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from types import MappingProxyType

import msgspec

from proxy_usage.errors import StoreForeign
from proxy_usage.events import Mint
from proxy_usage.intake import HTTP, Source, by_node
from proxy_usage.model import Amounts, Cell, Event, Key
from proxy_usage.store.connections import load_connections, relay_connections, save_connections
from proxy_usage.store.database import Database, add_counters, counters
from proxy_usage.store.held import Attribute, Released, WantedHeld, let_go, look, pack
from proxy_usage.store.mintage import Mintage
from proxy_usage.store.origins import NumberOf, OriginBook
from proxy_usage.store.records import Record, encode, fold_log, records_of
from proxy_usage.store.schema import dumps
from proxy_usage.store.streams import load_streams, relay_streams, save_streams
from proxy_usage.store.week import Hours, add_hours
from proxy_usage.turn import Held, Layout, OutputSlot, Recovered, Turn

FOLD_BYTES = 256 << 10
"""Records are folded when those since the last fold outgrow this and three times the folded one."""
REMAINDER_IDLE_MS = 35 * 86_400_000
"""A remainder unused for so long is written off (design: promise 3)."""


class Checkpoints:
    """The pipeline's side of the store."""

    def __init__(self, database: Database, *, max_held: int) -> None:
        self._database = database
        self._origins = OriginBook()
        self.max_held = max_held
        """Bound on rows of unattributed usage."""
        with database.reading() as db:
            self._held = db.execute("SELECT count(*) FROM held").fetchone()[0]
            last = db.execute("SELECT value FROM meta WHERE name='log_base'").fetchone()
            base = int(last[0]) if last else db.execute("SELECT coalesce(min(seq), 0) FROM log").fetchone()[0]
            sizes = "SELECT coalesce(sum(length(record)), 0) FROM log WHERE seq"
            self._base: int = db.execute(f"{sizes} <= ?", (base,)).fetchone()[0]
            self._grown: int = db.execute(f"{sizes} > ?", (base,)).fetchone()[0]
        self.outputs: tuple[OutputSlot, ...] = ()

    # --- starting ---------------------------------------------------------------------------------------

    def recover(self) -> Recovered:
        """Reads what a former process left: open cells, the rows it had read, the layout it used.

        Raises:
            StoreForeign: what is there makes no sense, though SQLite can read it.
        """
        try:
            return self._recover()
        except (msgspec.MsgspecError, ValueError, KeyError, OverflowError) as error:
            raise StoreForeign(
                f"store {self._database.path} is damaged: it holds what nobody wrote: {error}",
                hint="start the service again: it sets the file aside and keeps what can be read of it",
            ) from error

    def _recover(self) -> Recovered:
        with self._database.reading() as db:
            cells = fold_log(db)
            row = db.execute("SELECT value FROM meta WHERE name='layout'").fetchone()
            layout = msgspec.json.decode(row[0], type=Layout) if row else None
            intake = stored_intake(db)
            ended = counters(db, "ended")
            streams = load_streams(db)
            connections = load_connections(db)
        return Recovered(
            turn=self.last_turn(),
            layout=layout,
            cells=tuple(
                (
                    Cell(birth[0], birth[1], Key(birth[2], tuple(birth[3])), state[1], _amounts(state)),
                    birth[4],
                )
                for birth, state in cells.values()
            ),
            intake=intake,
            ended=ended,
            streams=streams,
            connections=connections,
        )

    def begin(
        self,
        layout: Layout,
        outputs: Sequence[OutputSlot],
        lost: Mapping[Source, int],
        *,
        unknown: Iterable[str] = (),
        unexplained: Mapping[Source, int] = MappingProxyType({}),
    ) -> None:
        """Makes the store fit this start: its layout, its outputs, and what the crash before it lost.

        Under another layout what ``recover`` gave of streams and connections is out of date: it must be
        read again.

        Args:
            lost: rows that the former process had read and not saved. They are added both to ``crash_lost``
                and to ``intake``, so that no later start reports them again.
            unknown: nodes of which nobody can say what was lost; counted in ``crash_unknown``.
            unexplained: rows that ``intake`` is raised by without a word.
        """
        with self._database.transaction() as db:
            row = db.execute("SELECT value FROM meta WHERE name='layout'").fetchone()
            if row is not None:
                _relay(db, msgspec.json.decode(row[0], type=Layout), layout)
            db.execute(
                "INSERT INTO meta VALUES('layout', ?) ON CONFLICT(name) DO UPDATE SET value=excluded.value",
                (msgspec.json.encode(layout).decode(),),
            )
            add_counters(db, "crash_lost", by_node(lost).items())
            lost_http = {source: rows for source, rows in lost.items() if source.kind == HTTP}
            add_counters(db, "crash_lost_http", by_node(lost_http).items())
            add_counters(db, "crash_unknown", ((node, 1) for node in unknown))
            for source, rows in (*lost.items(), *unexplained.items()):
                db.execute(
                    "INSERT INTO intake VALUES(?,?,?,?) ON CONFLICT(node, log, kind)"
                    " DO UPDATE SET rows=rows+excluded.rows",
                    (*source, rows),
                )
        self.outputs = tuple(outputs)

    # --- turns ------------------------------------------------------------------------------------------

    def commit(self, turn: Turn, mint: Mint, now_ms: int) -> tuple[Event, ...]:
        """Makes one turn durable and mints the events of the cells it closes.

        Returns the new events. Raises StoreFull or StoreUnavailable, and then nothing has changed: the
        caller rolls its turn back and tries again with the next one.
        """
        windows = turn.windows
        closed = (cell.id for cell in windows.closing)
        records = list(records_of(windows.born, windows.changed, closed))
        held_before = self._held
        try:
            with self._database.transaction(usage=True) as db:
                events = self._close(db, turn.windows.closing, mint, now_ms)
                for packed in records:
                    db.execute("INSERT INTO log(record) VALUES(?)", (packed,))
                names = [meter.name for meter in mint.meters]
                for held in turn.held:
                    self._hold(db, held, names, now_ms)
                add_counters(db, "counted", zip(names, turn.counted, strict=True))
                add_counters(db, "rows", ((f"{f}/{reason}", n) for (f, reason), n in turn.fates.items()))
                db.executemany(
                    "INSERT INTO intake VALUES(?,?,?,?) ON CONFLICT(node, log, kind)"
                    " DO UPDATE SET rows=excluded.rows",
                    [(*source, rows) for source, rows in turn.intake.items()],
                )
                add_counters(db, "ended", turn.ended.items())
                if turn.streams is not None:
                    save_streams(db, turn.streams)
                if turn.connections is not None:
                    save_connections(db, turn.connections)
                self._origins.add(db, turn.origins, self._numbers(db, mint, now_ms), now_ms)
                db.execute("INSERT OR REPLACE INTO meta VALUES('turn', ?)", (str(turn.number),))
        except BaseException:
            self._held = held_before
            self._origins.forget()
            raise
        self._database.known = self._database.known._replace(turn=turn.number)
        self._grown += sum(map(len, records))
        return events

    def last_turn(self) -> int:
        """The number of the last turn that took effect.

        A commit that broke off (an I/O error while it was synced) may have taken effect all the same: only
        the store can say, once it can be read again.
        """
        with self._database.reading() as db:
            row = db.execute("SELECT value FROM meta WHERE name='turn'").fetchone()
        return int(row[0]) if row else 0

    @property
    def wants_fold(self) -> bool:
        """Whether the log has outgrown what it describes."""
        return self._grown > max(FOLD_BYTES, 3 * self._base)

    def fold(self) -> None:
        """Folds the log into as few records as there may be. What it says does not change.

        A transaction of its own: a turn that was committed stays committed when this fails.
        """
        with self._database.transaction() as db:
            cells = fold_log(db)
            births, states = (birth for birth, _ in cells.values()), (state for _, state in cells.values())
            last = db.execute("SELECT coalesce(max(seq), 0) FROM log").fetchone()[0]
            db.execute("DELETE FROM log")
            base = 0
            for packed in records_of(births, states, []) if cells else (encode(Record([], [], [])),):
                last += 1
                db.execute("INSERT INTO log(seq, record) VALUES(?,?)", (last, packed))
                base += len(packed)
            db.execute("INSERT OR REPLACE INTO meta VALUES('log_base', ?)", (str(last),))
        self._base, self._grown = base, 0

    def write_off(self, now_ms: int, limit: int = 500) -> int:
        """Writes off remainders unused for 35 days, each as a row of the ledger. Returns how many keys."""
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT key, remainders FROM keys WHERE remainders != '{}' AND used_ms < ? LIMIT ?",
                (now_ms - REMAINDER_IDLE_MS, limit),
            ).fetchall()
            for key, text in rows:
                remainders: dict[str, int] = json.loads(text)
                for meter, amount in remainders.items():
                    db.execute(
                        "INSERT INTO ledger(output,fate,key,meter,window_ms,value,at_ms,answer,id)"
                        " VALUES(0,'written_off',?,?,?,?,?,0,'')",
                        (key, meter, now_ms, amount, now_ms),
                    )
                add_counters(db, "written_off", remainders.items())
                db.execute("UPDATE keys SET remainders='{}' WHERE key=?", (key,))
        return len(rows)

    # --- inside a transaction ----------------------------------------------------------------------------

    def _close(
        self, db: sqlite3.Connection, cells: Iterable[Cell], mint: Mint, now_ms: int
    ) -> tuple[Event, ...]:
        mintage = Mintage(self.outputs, now_ms)
        hours: Hours = {}
        keys: dict[Key, tuple[int, dict[str, int]]] = {}  # two cells of a key may close at once
        names = [meter.name for meter in mint.meters]
        for cell in cells:
            known = keys.get(cell.key)
            if known is None:
                known = keys[cell.key] = key_number(db, cell.key, mint.dimensions, now_ms)
            number, stored = known
            minted = mint.mint(cell, [stored.pop(name, 0) for name in names], now_ms)
            # What is left in `stored` belongs to meters of an earlier layout and waits to be written off.
            stored.update((name, left) for name, left in zip(names, minted.remainders, strict=True) if left)
            for event in minted.events:
                meter = names[event.meter]
                mintage.add(event, number, meter)
                count, value = hours.get((event.window_ms, meter), (0, 0))
                hours[event.window_ms, meter] = (count + 1, value + event.value)
        db.executemany(
            "UPDATE keys SET remainders=?, used_ms=? WHERE key=?",
            [(dumps(stored), now_ms, number) for number, stored in keys.values()],
        )
        mintage.write(db)
        if hours:
            add_hours(db, hours, now_ms)
        return tuple(mintage.events)

    @staticmethod
    def _numbers(db: sqlite3.Connection, mint: Mint, now_ms: int) -> NumberOf:
        return lambda key: key_number(db, key, mint.dimensions, now_ms)[0]

    def _hold(self, db: sqlite3.Connection, held: Held, names: Sequence[str], now_ms: int) -> None:
        """Adds unattributed usage to its row; past the bound, to one row per hour and reason."""
        identity = pack(held)
        digest = blake2b(held.reason.encode() + b"\0" + identity, digest_size=16).digest()
        row = db.execute(
            "SELECT amounts FROM held WHERE hour_ms=? AND digest=?", (held.hour_ms, digest)
        ).fetchone()
        if row is None and self._held >= self.max_held:
            identity = b""
            digest = blake2b(held.reason.encode(), digest_size=16).digest()
            row = db.execute(
                "SELECT amounts FROM held WHERE hour_ms=? AND digest=?", (held.hour_ms, digest)
            ).fetchone()
        amounts: dict[str, int] = json.loads(row[0]) if row else {}
        for name, amount in zip(names, held.amounts, strict=True):
            amounts[name] = amounts.get(name, 0) + amount
        if row is None:
            self._held += 1
        db.execute(
            "INSERT INTO held VALUES(?,?,?,?,?,?,?,?) ON CONFLICT(hour_ms, digest) DO UPDATE SET"
            " rows=rows+excluded.rows, amounts=excluded.amounts, last_ms=excluded.last_ms",
            (held.hour_ms, digest, held.reason, identity, held.rows, dumps(amounts), now_ms, now_ms),
        )

    def release(
        self,
        wanted: WantedHeld,
        attribute: Attribute,
        mint: Mint,
        now_ms: int,
        after: tuple[int, bytes] = (-1, b""),
    ) -> Released:
        """Makes events of held usage that the present rules attribute, a slice of it in one transaction.

        Raises:
            UsageError: nothing is held under an id that is wanted.
        """
        with self._database.transaction() as db:
            seen = look(db, wanted, after, attribute, mint, now_ms)
            events = self._close(db, seen.cells, mint, now_ms)
            self._origins.add(db, seen.origins, self._numbers(db, mint, now_ms), now_ms)
            removed = let_go(db, seen)
        self._held -= removed
        return seen.result._replace(events=len(events))

    def forget_held(self, rows: int) -> None:
        """Rows of unattributed usage are gone: there is room for as many others."""
        self._held -= rows

    def crash_lost(self) -> dict[str, int]:
        """Rows per node that crashes lost over the life of the store."""
        with self._database.reading() as db:
            return counters(db, "crash_lost")


def _amounts(state: Sequence[int]) -> Amounts:
    """The amounts of a state. Raises OverflowError for what no cell comes to."""
    return tuple(array("q", state)[2:])


def _relay(db: sqlite3.Connection, former: Layout, layout: Layout) -> None:
    """Writes what outlives windows anew for another layout: long streams, and who used which connection."""
    meters, former_meters = ([meter[0] for meter in each.meters] for each in (layout, former))
    if meters == former_meters and layout.dimensions == former.dimensions:
        return
    columns = [former_meters.index(name) if name in former_meters else None for name in meters]
    places = [
        former.dimensions.index(name) if name in former.dimensions else None for name in layout.dimensions
    ]
    relay_streams(db, columns, places)
    relay_connections(db, places)


def stored_intake(db: sqlite3.Connection) -> dict[Source, int]:
    """Rows read as of the last checkpoint."""
    rows = db.execute("SELECT node, log, kind, rows FROM intake")
    return {Source(node, log, kind): count for node, log, kind, count in rows}


def key_number(
    db: sqlite3.Connection, key: Key, dimensions: Sequence[str], now_ms: int
) -> tuple[int, dict[str, int]]:
    """The key's number and its remainders by meter name; a new key gets a row."""
    named = dumps(dict(zip(dimensions, key.dimensions, strict=True)))
    digest = blake2b(f"{key.tenant}\0{named}".encode(), digest_size=16).digest()
    row = db.execute("SELECT key, remainders FROM keys WHERE digest=?", (digest,)).fetchone()
    if row is not None:
        return row[0], json.loads(row[1])
    number = db.execute(
        "INSERT INTO keys(digest,tenant,dimensions,remainders,used_ms) VALUES(?,?,?,'{}',?)",
        (digest, key.tenant, named, now_ms),
    ).lastrowid
    assert number is not None
    return number, {}
