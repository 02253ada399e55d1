"""What one store brings over from another, as one transaction's work: see ``adopt``."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import msgspec

from proxy_usage.errors import StoreError
from proxy_usage.intake import OTHERS, Source, by_node
from proxy_usage.store.audits import adopt_sink
from proxy_usage.store.connections import load_connections, merge_connections
from proxy_usage.store.database import Database, Sums, add_counters, add_tallies
from proxy_usage.store.history import Place, add_sums
from proxy_usage.store.letters import absent, mark_absent
from proxy_usage.store.origins import OriginBook
from proxy_usage.store.records import Record, fold_log
from proxy_usage.store.schema import dumps, translated
from proxy_usage.store.streams import load_streams, merge_streams, record_size
from proxy_usage.turn import Layout

TABLES_TAKEN = (
    "batches counters dead deliveries events held intake keys ledger log merges origins outputs sources"
    " stream_keys stream_log stream_shards sums tallies ties waiting"
)
"""Tables whose content is taken over; of ``meta`` it is the stores that were set aside, and sinks' names."""
TABLES_LEFT = {
    "audits": "a worker that can be left behind never audited",
    "audit_hours": "likewise",
    "spans": "a trigger makes them of the ledger's rows",
}
"""Tables whose content is not, and why."""
_BY_NODE = ("crash_lost", "crash_lost_http", "crash_unknown", "ended")
"""Counters by node."""
_MADE_HERE = ("origins", "sums")
"""Counters of how many rows a table has: whoever adds rows counts them."""
_STEP = 5_000

_encode = msgspec.msgpack.Encoder().encode


class Bringing:
    """One transaction's work."""

    def __init__(self, db: sqlite3.Connection, orphan: Database, layout: Layout, now_ms: int) -> None:
        self.windows = 0
        self._db = db
        self._orphan = orphan
        self._layout = layout
        self._now_ms = now_ms
        self._record = Record([], [], [])
        self._cell = max(fold_log(db), default=0)
        self._outputs = self._match_outputs()
        self._keys = self._match_keys()

    def _rows(self, sql: str) -> Iterator[Any]:
        """Rows of the other store; what goes wrong with it is said of it."""
        with translated(self._orphan.path):
            yield from self._orphan.db.execute(sql)

    # --- what rows refer to -----------------------------------------------------------------------------

    def _match_outputs(self) -> dict[int, int]:
        """Numbers here by numbers there. What one of the stores lacked for a while has gaps from now on."""
        db = self._db
        theirs = list(self._rows("SELECT output, name, added_ms FROM outputs ORDER BY output"))
        mine: dict[str, int] = dict(db.execute("SELECT name, output FROM outputs"))
        gaps = {mine[name] for name in mine.keys() - {name for _, name, _ in theirs}}
        with translated(self._orphan.path):
            lacking = absent(self._orphan.db)
        first_ms = min((added_ms for _, _, added_ms in theirs), default=0)
        matched = {0: 0}
        for number, name, added_ms in theirs:
            if name not in mine:
                db.execute(
                    "INSERT INTO outputs(name, added_ms)"
                    " SELECT ?, max(?, coalesce(max(added_ms), 0) + 1) FROM outputs",
                    (name, self._now_ms),
                )
                mine[name] = db.execute("SELECT output FROM outputs WHERE name=?", (name,)).fetchone()[0]
                gaps.add(mine[name])
            if added_ms > first_ms or number in lacking:
                gaps.add(mine[name])
            matched[number] = mine[name]
        mark_absent(db, gaps, self._now_ms)
        return matched

    def _match_keys(self) -> dict[int, int]:
        """Numbers here by numbers there; remainders are added."""
        db = self._db
        matched: dict[int, int] = {}
        for key, digest, tenant, dimensions, text, used_ms in self._rows(
            "SELECT key, digest, tenant, dimensions, remainders, used_ms FROM keys"
        ):
            db.execute(
                "INSERT INTO keys(digest,tenant,dimensions,remainders,used_ms) VALUES(?,?,?,'{}',?)"
                " ON CONFLICT(digest) DO UPDATE SET used_ms=max(used_ms, excluded.used_ms)",
                (digest, tenant, dimensions, used_ms),
            )
            number, have = db.execute("SELECT key, remainders FROM keys WHERE digest=?", (digest,)).fetchone()
            matched[key] = number
            if text != "{}":
                total = Counter(json.loads(have))
                total.update(json.loads(text))
                self._open_whole(tenant, json.loads(dimensions), total)
                rest = {meter: amount for meter, amount in total.items() if amount}
                db.execute("UPDATE keys SET remainders=? WHERE key=?", (dumps(rest), number))
        return matched

    def _open_whole(self, tenant: str, dimensions: Mapping[str, str], total: Counter[str]) -> None:
        """Whole units of remainders go into the present window: nobody may have to wait for them for ever."""
        if dimensions.keys() != set(self._layout.dimensions):
            return  # of a former layout: it waits to be written off, as it did there
        whole = []
        for name, _, _, _, divisor in self._layout.meters:
            units = total[name] // divisor * divisor
            total[name] -= units
            whole.append(units)
        if any(whole):
            window_ms = self._now_ms - self._now_ms % self._layout.window_ms
            names = tuple(dimensions[name] for name in self._layout.dimensions)
            self._open(window_ms, tenant, names, self._now_ms, (0, *whole))

    def _open(
        self, window_ms: int, tenant: str, dimensions: tuple[str, ...], due_ms: int, state: tuple[int, ...]
    ) -> None:
        self._cell += 1
        self._record.born.append((self._cell, window_ms, tenant, dimensions, due_ms))
        self._record.changed.append((self._cell, *state))

    # --- what is brought --------------------------------------------------------------------------------

    def events(self) -> int:
        """Events, and how far each output is with them. Returns how many."""
        db, outputs, keys = self._db, self._outputs, self._keys
        past = self._last("events")
        count = 0

        def entered() -> Iterator[tuple[Any, ...]]:
            nonlocal count
            for seq, event_id, key, *rest in self._rows(
                "SELECT seq,id,key,meter,window_ms,value,minted_ms,outputs,given,body FROM events"
            ):
                if db.execute("SELECT 1 FROM events WHERE id=?", (event_id,)).fetchone() is not None:
                    raise StoreError(
                        f"store {self._orphan.path} holds event {event_id}, and so does the store beside it",
                        hint="one of them is a copy of the other: move the copy away",
                    )
                count += 1
                yield (past + seq, event_id, keys[key], *rest)

        db.executemany(
            "INSERT INTO events(seq,id,key,meter,window_ms,value,minted_ms,outputs,given,body)"
            " VALUES(?,?,?,?,?,?,?,?,?,?)",
            entered(),
        )
        before = self._last("batches")
        db.executemany(
            "INSERT INTO batches(batch,output,attempts,not_before_ms,confirm,clean,answer)"
            " VALUES(?,?,?,?,?,?,?)",
            (
                (before + batch, outputs[output], *rest)
                for batch, output, *rest in self._rows(
                    "SELECT batch,output,attempts,not_before_ms,confirm,clean,answer FROM batches"
                )
            ),
        )
        db.executemany(
            "INSERT INTO deliveries(output,seq,batch,first_attempt_ms) VALUES(?,?,?,?)",
            (
                (outputs[output], past + seq, None if batch is None else before + batch, first_attempt_ms)
                for output, seq, batch, first_attempt_ms in self._rows(
                    "SELECT output,seq,batch,first_attempt_ms FROM deliveries"
                )
            ),
        )
        db.executemany(
            "INSERT INTO dead(output,seq,reason,answer,at_ms,first_attempt_ms) VALUES(?,?,?,?,?,?)",
            (
                (outputs[output], past + seq, *rest)
                for output, seq, *rest in self._rows(
                    "SELECT output,seq,reason,answer,at_ms,first_attempt_ms FROM dead"
                )
            ),
        )
        return count

    def history(self) -> None:
        """Ledger, hourly sums, and the sums that are kept of everything."""
        db, outputs, keys = self._db, self._outputs, self._keys
        # In one row with those that are here: how far apart the first and the last are is what they take.
        (last,) = db.execute("SELECT coalesce(max(entry), 0) FROM ledger").fetchone()
        db.executemany(
            "INSERT INTO ledger(entry,output,fate,key,meter,window_ms,value,at_ms,answer,id)"
            " VALUES(?,?,?,?,?,?,?,?,?,?)",
            (
                (last + number, outputs[output], fate, keys[key], *rest)
                for number, (output, fate, key, *rest) in enumerate(
                    self._rows(
                        "SELECT output,fate,key,meter,window_ms,value,at_ms,answer,id FROM ledger"
                        " ORDER BY entry"
                    ),
                    1,
                )
            ),
        )
        hours = self._rows("SELECT hour_ms,output,fate,key,meter,events,value FROM sums")
        while part := list(islice(hours, _STEP)):
            sums: dict[Place, tuple[int, int]] = {}
            for hour_ms, output, fate, key, meter, events, value in part:
                sums[hour_ms, outputs[output], fate, keys[key], meter] = (events, int(value))
            add_sums(db, sums)
        tallies: Sums = {
            (outputs[output], fate, meter): (events, int(value))
            for output, fate, meter, events, value in self._rows(
                "SELECT output,fate,meter,events,value FROM tallies"
            )
        }
        add_tallies(db, tallies)
        for name, label, value in self._rows("SELECT name,label,value FROM counters"):
            if name not in (*_MADE_HERE, *_BY_NODE):
                add_counters(db, name, [(self._label(name, label), int(value))])
        db.executemany(
            "INSERT OR IGNORE INTO merges VALUES(?,?,?,?)",
            self._rows("SELECT id, first_ms, events, outputs FROM merges"),
        )
        OriginBook().merge(
            db,
            self._rows("SELECT source, rule, node, used_ms FROM sources"),
            self._rows("SELECT hour_ms, key, source, rows FROM origins"),
            keys,
        )
        db.executemany(
            "INSERT OR IGNORE INTO meta VALUES(?,?)",
            self._rows("SELECT name, value FROM meta WHERE name BETWEEN 'aside/' AND 'aside/~'"),
        )

    def usage(self) -> None:
        """What is no event yet: open windows, held usage, long streams, connections."""
        db = self._db
        with translated(self._orphan.path):
            source = self._orphan.db
            cells, streams, size = fold_log(source), load_streams(source), record_size(source)
            connections = load_connections(source)
        self.windows = len(cells)
        for (_, window_ms, tenant, dimensions, due_ms), (_, *state) in cells.values():
            self._open(window_ms, tenant, tuple(dimensions), due_ms, tuple(state))
        if self._record.born:
            db.execute("INSERT INTO log(record) VALUES(?)", (_encode(self._record),))
        merge_streams(db, streams, size)
        merge_connections(db, connections)
        for hour_ms, digest, *rest, text, first_ms, last_ms in self._rows(
            "SELECT hour_ms,digest,reason,identity,rows,amounts,first_ms,last_ms FROM held"
        ):
            have = db.execute(
                "SELECT amounts FROM held WHERE hour_ms=? AND digest=?", (hour_ms, digest)
            ).fetchone()
            amounts = Counter(json.loads(have[0]) if have else {})
            amounts.update(json.loads(text))
            db.execute(
                "INSERT INTO held VALUES(?,?,?,?,?,?,?,?) ON CONFLICT(hour_ms, digest) DO UPDATE SET"
                " rows=rows+excluded.rows, amounts=excluded.amounts,"
                " first_ms=min(first_ms, excluded.first_ms), last_ms=max(last_ms, excluded.last_ms)",
                (hour_ms, digest, *rest, dumps(amounts), first_ms, last_ms),
            )

    def rows(self, known_as: Callable[[Source], Source]) -> Mapping[str, int]:
        """Rows read, and what is known by node besides. Returns the rows of each node."""
        db = self._db
        rows: Counter[Source] = Counter()
        nodes: dict[str, set[str]] = {}
        for node, log, kind, count in self._rows("SELECT node, log, kind, rows FROM intake"):
            known = known_as(Source(node, log, kind))
            rows[known] += count
            nodes.setdefault(node, set()).add(known.node)
        db.executemany(
            "INSERT INTO intake VALUES(?,?,?,?) ON CONFLICT(node, log, kind)"
            " DO UPDATE SET rows=rows+excluded.rows",
            [(*source, count) for source, count in rows.items()],
        )
        for name, node, value in self._rows("SELECT name, label, value FROM counters"):
            if name in _BY_NODE:
                (here,) = names if len(names := nodes.get(node, {node})) == 1 else (OTHERS,)
                add_counters(db, name, [(here, int(value))])
        # An audit must not take for a loss what is counted with other nodes from now on.
        moved = [node for node, names in nodes.items() if names != {node}]
        add_counters(db, "crash_unknown", [(node, 1) for node in moved])
        with translated(self._orphan.path):
            adopt_sink(db, self._orphan.db)
        return by_node(rows)

    def _last(self, table: str) -> int:
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name=?", (table,)).fetchone()
        return row[0] if row else 0

    def _label(self, name: str, label: str) -> str:
        """A counter's label here; some name an output by its number."""
        if name == "unanswered":
            return str(self._outputs[int(label)])
        if name in ("forgotten_events", "forgotten_value"):
            output, _, rest = label.partition("/")
            return f"{self._outputs[int(output)]}/{rest}"
        return label
