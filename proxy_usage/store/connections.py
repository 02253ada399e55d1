"""Connections in the store: who used them, and the listener rows that wait for that."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from proxy_usage.connections import ConnectionTurn, SavedConnections, Tie, Waiting
from proxy_usage.model import Identity, Key
from proxy_usage.store.schema import dumps
from proxy_usage.store.streams import relaid

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Identity).decode


def save_connections(db: sqlite3.Connection, turn: ConnectionTurn) -> None:
    """Saves a turn, inside the caller's transaction."""
    # In this order: a connection's number may have been given anew in the same turn.
    db.executemany("DELETE FROM ties WHERE connection=?", [(connection,) for connection in turn.untied])
    _save_ties(db, turn.tied)
    db.executemany("DELETE FROM waiting WHERE number=?", [(number,) for number in turn.settled])
    _save_waiting(db, turn.waiting)


def load_connections(db: sqlite3.Connection) -> SavedConnections:
    """The connections as of the last committed turn."""
    return SavedConnections(
        tuple(
            Tie(connection, Key(tenant, tuple(json.loads(dimensions))), first_ns, last_ns)
            for connection, tenant, dimensions, first_ns, last_ns in db.execute("SELECT * FROM ties")
        ),
        tuple(
            Waiting(*row)._replace(identity=_decode(row[3]))
            for row in db.execute("SELECT * FROM waiting ORDER BY number")
        ),
    )


def relay_connections(db: sqlite3.Connection, dimensions: Sequence[int | None]) -> None:
    """Writes the ties anew for other dimensions, inside the caller's transaction.

    Args:
        dimensions: where each dimension stood in the former layout; None for a new one.
    """
    ties: dict[tuple[bytes, Key], tuple[int, int]] = {}
    for tie in load_connections(db).ties:
        place = tie.connection, relaid(tie.key, dimensions)
        first_ns, last_ns = ties.get(place, (tie.first_ns, tie.last_ns))
        ties[place] = min(first_ns, tie.first_ns), max(last_ns, tie.last_ns)
    db.execute("DELETE FROM ties")
    _save_ties(db, (Tie(connection, key, *span) for (connection, key), span in ties.items()))


def _save_waiting(db: sqlite3.Connection, rows: Iterable[Waiting]) -> None:
    db.executemany(
        "INSERT INTO waiting VALUES(?,?,?,?,?,?,?)",
        [row._replace(identity=_encode(row.identity)) for row in rows],  # type: ignore[arg-type]
    )


def _save_ties(db: sqlite3.Connection, ties: Iterable[Tie]) -> None:
    db.executemany(
        "INSERT OR REPLACE INTO ties VALUES(?,?,?,?,?)",
        [
            (tie.connection, tie.key.tenant, dumps(list(tie.key.dimensions)), tie.first_ns, tie.last_ns)
            for tie in ties
        ],
    )


def merge_connections(db: sqlite3.Connection, other: SavedConnections) -> None:
    """Adds the connections of another store of the same layout, inside the caller's transaction."""
    ties = {(tie.connection, tie.key): (tie.first_ns, tie.last_ns) for tie in load_connections(db).ties}
    merged = []
    for tie in other.ties:
        first_ns, last_ns = ties.get((tie.connection, tie.key), (tie.first_ns, tie.last_ns))
        merged.append(Tie(tie.connection, tie.key, min(first_ns, tie.first_ns), max(last_ns, tie.last_ns)))
    _save_ties(db, merged)
    (last,) = db.execute("SELECT coalesce(max(number), 0) FROM waiting").fetchone()
    _save_waiting(db, (row._replace(number=last + row.number) for row in other.waiting))
