"""The log of open cells: packed records of what changed, and what they come to in their order."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec

from proxy_usage.bulk import Numbered
from proxy_usage.cells import Birth

RECORD_CELLS = 2_000
"""Cells in a record at most: to pack or to open so many holds up the event loop's thread for half a ms."""


class Record(msgspec.Struct, array_like=True):
    """A record of the log: what one turn, or a fold, says of open cells."""

    born: list[Birth]
    changed: list[tuple[int, ...]]  # id, rows, *amounts
    closed: list[int]


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def records_of(
    births: Iterable[Birth], states: Iterable[tuple[int, ...]], closed: Iterable[int]
) -> Iterator[bytes]:
    """Packed records of at most ``RECORD_CELLS`` each; none where there is nothing to say.

    A cell's birth is in no later record than its state, if it is among the births as early as there.
    """
    births, states, closed = iter(births), iter(states), iter(closed)
    while True:
        record = Record(
            list(islice(births, RECORD_CELLS)),
            list(islice(states, RECORD_CELLS)),
            list(islice(closed, RECORD_CELLS)),
        )
        if not (record.born or record.changed or record.closed):
            return
        yield encode(record)


def fold_log(db: sqlite3.Connection) -> Numbered[tuple[Birth, tuple[int, ...]]]:
    """Reads the log from its first record to its last: the open cells by id."""
    fold = LogFold()
    for (packed,) in db.execute("SELECT record FROM log ORDER BY seq"):
        fold.add(packed)
    cells: Numbered[tuple[Birth, tuple[int, ...]]] = Numbered()
    for number, birth in fold.births.items():
        cells[number] = birth, fold.states[number]
    return cells


class LogFold:
    """What records of the log come to, added in their order."""

    def __init__(self) -> None:
        self.births: Numbered[Birth] = Numbered()
        self.states: Numbered[tuple[int, ...]] = Numbered()

    def add(self, packed: bytes) -> Record:
        """Adds a record. Raises msgspec.MsgspecError for what is none."""
        record = _decode(packed)
        for birth in record.born:
            self.births[birth[0]] = birth
        for state in record.changed:
            self.states[state[0]] = state
        for closed in record.closed:
            self.births.pop(closed)
            self.states.pop(closed)
        return record
