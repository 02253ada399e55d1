"""Long streams in the store: what a turn changed, and what a start reads back.

A turn appends the records it changed to ``stream_log`` and saves one shard whole; a log row is obsolete once
every shard it touched was saved after it. So a turn writes about twice what changed, however many there are,
and the log never holds more turns than there are shards.
"""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from proxy_usage.model import Key
from proxy_usage.store.schema import dumps
from proxy_usage.streams import DIGEST, ENDED, HEAD, TCP, SavedStreams, StreamTurn, rearranged


def save_streams(db: sqlite3.Connection, turn: StreamTurn) -> None:
    """Saves a turn, inside the caller's transaction."""
    if turn.is_empty:
        return
    _save_keys(db, turn.keys)
    db.executemany("DELETE FROM stream_keys WHERE number=?", [(number,) for number in turn.dropped])
    db.execute(
        "INSERT INTO stream_log VALUES(?,?,?)",
        (turn.number, _packed(turn.changed), b"".join(turn.forgotten)),
    )
    if turn.shard is not None:
        _save_shard(db, turn.shard, turn.number, _packed(turn.whole))
    db.execute("DELETE FROM stream_log WHERE turn < ?", (turn.keep_from,))
    _save_size(db, turn.record_size)


def load_streams(db: sqlite3.Connection) -> SavedStreams:
    """The streams as of the last committed turn."""
    row = db.execute("SELECT value FROM meta WHERE name='stream_record'").fetchone()
    if row is None:
        return SavedStreams()
    size = int(row[0])
    shards: dict[int, dict[bytes, bytes]] = {}
    saved: dict[int, int] = {}
    dirty: dict[int, int] = {}
    last = 0
    for shard, turn, packed in db.execute("SELECT shard, turn, records FROM stream_shards"):
        shards[shard] = {record[:DIGEST]: record for record in _split(packed, size)}
        saved[shard] = turn
        last = max(last, turn)
    for turn, packed, forgotten in db.execute(
        "SELECT turn, records, forgotten FROM stream_log ORDER BY turn"
    ):
        last = max(last, turn)
        for record in _split(packed, size):
            if saved.get(record[0], 0) < turn:
                shards.setdefault(record[0], {})[record[:DIGEST]] = record
                dirty.setdefault(record[0], turn)
        for digest in _split(forgotten, DIGEST):
            if saved.get(digest[0], 0) < turn:
                shards.get(digest[0], {}).pop(digest, None)
                dirty.setdefault(digest[0], turn)
    keys = tuple(
        (number, Key(tenant, tuple(json.loads(dimensions))))
        for number, tenant, dimensions in db.execute("SELECT number, tenant, dimensions FROM stream_keys")
    )
    records = tuple(record for shard in shards.values() for record in shard.values())
    return SavedStreams(last, keys, records, tuple(dirty.items()))


def relay_streams(
    db: sqlite3.Connection, columns: Sequence[int | None], dimensions: Sequence[int | None]
) -> None:
    """Writes all streams anew for other meters and dimensions, inside the caller's transaction.

    Args:
        columns: where each meter stood in the former layout; None for a new one.
        dimensions: likewise.
    """
    saved = load_streams(db)
    if not saved.turn:
        return
    numbers: dict[int, int] = {}
    merged: dict[Key, int] = {}  # keys that differed in a dimension that is gone
    for number, key in saved.keys:
        numbers[number] = merged.setdefault(relaid(key, dimensions), number)
    shards: dict[int, list[bytes]] = {}
    for record in saved.records:
        shards.setdefault(record[0], []).append(rearranged(record, columns, numbers))
    for table in ("stream_keys", "stream_log", "stream_shards"):
        db.execute(f"DELETE FROM {table}")  # noqa: S608 (one of three literals)
    _save_keys(db, ((number, key.tenant, key.dimensions) for key, number in merged.items()))
    for shard in shards or {0: []}:  # an empty one keeps the number of the last turn
        _save_shard(db, shard, saved.turn, b"".join(shards.get(shard, ())))
    if saved.records:
        _save_size(db, len(rearranged(saved.records[0], columns, numbers)))


def relaid(key: Key, dimensions: Sequence[int | None]) -> Key:
    """A key in another layout; dimensions it lacks are empty until a row says them."""
    return key._replace(
        dimensions=tuple("" if place is None else key.dimensions[place] for place in dimensions)
    )


def _save_keys(db: sqlite3.Connection, keys: Iterable[tuple[int, str, tuple[str, ...]]]) -> None:
    db.executemany(
        "INSERT OR REPLACE INTO stream_keys VALUES(?,?,?)",
        [(number, tenant, dumps(list(dimensions))) for number, tenant, dimensions in keys],
    )


def _save_shard(db: sqlite3.Connection, shard: int, turn: int, packed: bytes) -> None:
    db.execute("INSERT OR REPLACE INTO stream_shards VALUES(?,?,?)", (shard, turn, packed))


def _save_size(db: sqlite3.Connection, size: int) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES('stream_record', ?)", (str(size),))


def _packed(records: Mapping[bytes, bytes]) -> bytes:
    return b"".join([digest + record for digest, record in records.items()])


def _split(packed: bytes, size: int) -> Iterator[bytes]:
    return (packed[at : at + size] for at in range(0, len(packed), size))


def merge_streams(db: sqlite3.Connection, other: SavedStreams, size: int) -> None:
    """Adds the streams of another store of the same layout, inside the caller's transaction.

    Of a stream that both know the highest totals count, so that nothing of it is booked again.

    Args:
        size: bytes of one of its records.
    """
    if not other.turn:
        return
    saved = load_streams(db)
    numbers = {key: number for number, key in saved.keys}
    last = max(numbers.values(), default=0)
    theirs = {0: 0}
    for number, key in other.keys:
        if key not in numbers:
            last += 1
            numbers[key] = last
        theirs[number] = numbers[key]
    records = {record[:DIGEST]: record for record in saved.records}
    for record in other.records:
        last_ms, number, state = HEAD.unpack_from(record, DIGEST)
        head = HEAD.pack(last_ms, theirs[number], state)
        renumbered = record[:DIGEST] + head + record[DIGEST + HEAD.size :]
        mine = records.get(record[:DIGEST])
        records[record[:DIGEST]] = renumbered if mine is None else _highest(mine, renumbered)
    used = {HEAD.unpack_from(record, DIGEST)[1] for record in records.values()}
    shards: dict[int, list[bytes]] = {}
    for record in records.values():
        shards.setdefault(record[0], []).append(record)
    for table in ("stream_keys", "stream_log", "stream_shards"):
        db.execute(f"DELETE FROM {table}")  # noqa: S608 (one of three literals)
    _save_keys(
        db, ((number, key.tenant, key.dimensions) for key, number in numbers.items() if number in used)
    )
    turn = max(saved.turn, other.turn)
    for shard in shards or {0: []}:
        _save_shard(db, shard, turn, b"".join(shards.get(shard, ())))
    _save_size(db, size)


def record_size(db: sqlite3.Connection) -> int:
    """Bytes of one saved record; 0 where no stream was ever saved."""
    row = db.execute("SELECT value FROM meta WHERE name='stream_record'").fetchone()
    return int(row[0]) if row else 0


def _highest(one: bytes, other: bytes) -> bytes:
    """Two records of a stream as one. It has ended if either says so, and is whose it was last."""
    at = DIGEST + HEAD.size
    totals = struct.Struct(f"<{(len(one) - at) // 8}Q")
    heads = (HEAD.unpack_from(each, DIGEST) for each in (one, other))
    earlier, later = sorted(heads, key=lambda head: head[0])
    ended = next((head[2] for head in (later, earlier) if head[2] & ~TCP == ENDED), later[2])
    highest = map(max, totals.unpack_from(one, at), totals.unpack_from(other, at))
    return one[:DIGEST] + HEAD.pack(later[0], later[1] or earlier[1], ended) + totals.pack(*highest)
