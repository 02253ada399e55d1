"""Rows of running totals, an owner of long streams, and the tables that it is saved in."""

import sqlite3
from typing import Any

from proxy_usage.decode import StreamRow
from proxy_usage.model import Identity, Key, Origin, Quantity
from proxy_usage.store.schema import TABLES
from proxy_usage.store.streams import load_streams, save_streams
from proxy_usage.streams import Streams, StreamTurn, stream_digest

QUANTITIES = (Quantity.REQUESTS, Quantity.WIRE_IN, Quantity.WIRE_OUT, Quantity.OPEN_NS)
ORIGIN = Origin("", "envoy-1", "http")
KEY = Key("alpha", ("eu",))
OTHER = Key("beta", ("eu",))
START_MS = 1_795_300_000_000
INTERVAL_MS = 60_000
SILENT_MS = 3 * INTERVAL_MS + 1
DAY_MS = 86_400_000


def owner(limit: int = 100_000, **changes: Any) -> Streams:
    settings = {"interval_ms": INTERVAL_MS, "limit": limit, "expire": 3, "remember_ms": 30 * DAY_MS}
    return Streams(QUANTITIES, **settings | changes)


def row(
    number: int = 0, total: int = 1, *, end: bool = False, http: bool = True, **changes: Any
) -> StreamRow:
    whole = StreamRow(
        origin=ORIGIN,
        conn_id=b"1",
        start_ns=START_MS * 1_000_000,
        stream_id=b"%d" % number,
        identity=Identity(ORIGIN, 0, b"", (), routed=True),
        window_ms=START_MS,
        amounts=(int(end and http), 10 * total, 20 * total, 30 * total),
        end=end,
        http=http,
        emit_ms=START_MS,
        now_ms=START_MS,
    )
    return whole._replace(**changes)


def booked(streams: Streams, *args: Any, key: Key | None = KEY, **changes: Any) -> tuple[int, ...] | None:
    return streams.advance(row(*args, **changes), key).amounts


def same_shard(streams: int) -> list[int]:
    """Numbers of rows whose streams lie in one shard."""
    shard = stream_digest(row(0))[0]
    numbers = (number for number in range(1_000_000) if stream_digest(row(number))[0] == shard)
    return [next(numbers) for _ in range(streams)]


class Store:
    """The tables of streams, and nothing else."""

    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.executescript(TABLES)

    def save(self, turn: StreamTurn) -> None:
        self.db.execute("BEGIN")
        save_streams(self.db, turn)
        self.db.execute("COMMIT")

    def read(self) -> Streams:
        streams = owner()
        streams.restore(load_streams(self.db))
        return streams

    def count(self, table: str) -> int:
        (rows,) = self.db.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(rows)
