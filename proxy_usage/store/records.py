"""The log of open cells: packed records of what changed, and what they come to in their order."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import msgspec

RECORD_CELLS = 2_000
"""Cells in a record at most: to pack or to open so many holds up the event loop's thread for half a ms."""

Birth = tuple[int, int, str, tuple[str, ...], int]  # id, window, tenant, dimensions, due


class Record(msgspec.Struct, array_like=True):
    """A record of the log: what one turn, or a fold, says of open cells."""

    born: list[Birth]
    changed: list[tuple[int, ...]]  # id, rows, *amounts
    closed: list[int]


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def records_of(
    births: Iterable[Birth], states: Sequence[tuple[int, ...]], closed: Sequence[int]
) -> Iterator[bytes]:
    """Packed records of at most ``RECORD_CELLS`` each; none where there is nothing to say."""
    births = iter(births)
    for first in range(0, max(len(states), len(closed)), RECORD_CELLS):
        part = slice(first, first + RECORD_CELLS)
        yield encode(Record(list(islice(births, RECORD_CELLS)), list(states[part]), list(closed[part])))


def fold_log(db: sqlite3.Connection) -> dict[int, tuple[Birth, tuple[int, ...]]]:
    """Reads the log from its first record to its last: the open cells by id."""
    fold = LogFold()
    for (packed,) in db.execute("SELECT record FROM log ORDER BY seq"):
        fold.add(packed)
    return {number: (birth, fold.states[number]) for number, birth in fold.births.items()}


class LogFold:
    """What records of the log come to, added in their order."""

    def __init__(self) -> None:
        self.births: dict[int, Birth] = {}
        self.states: dict[int, tuple[int, ...]] = {}

    def add(self, packed: bytes) -> Record:
        """Adds a record. Raises msgspec.MsgspecError for what is none."""
        record = _decode(packed)
        for birth in record.born:
            self.births[birth[0]] = birth
        for state in record.changed:
            self.states[state[0]] = state
        for closed in record.closed:
            self.births.pop(closed, None)
            self.states.pop(closed, None)
        return record
