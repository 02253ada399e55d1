"""Rows read per node, in a small file that a crash of the process cannot take back.

The count of a row is raised before the row is folded; each checkpoint stores the same counts in its own
transaction. What the file says more than the store, at the next start, is exactly what the crash lost:

    file    node-a 120 480   ──┐
    store   node-a 120 102   ──┴─▶ 378 rows of node-a were read and not saved

The kernel keeps the pages of a killed process; only a crash of the machine itself can take them, and then the
answer is "unknown", not zero. So it is when file and store do not belong together: one of them is new, or
both come from a backup.

It is written, not mapped: touching a mapped page whose file system has failed can end the process with a
signal (mmap(2), SIGBUS; not seen in the one try made here), and a write is an error like any other. (2.4 µs a
message on ext4, against 0.1 µs mapped.)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

from proxy_usage.errors import StoreUnavailable

MAGIC = b"proxy-usage rows read 1\n".ljust(64, b"\0")
SLOT = 256
NAME = SLOT - 8
NODES = 4_096
"""Nodes counted apart; past it they share the last slot."""
OTHERS = "(other nodes)"
SIZE = len(MAGIC) + SLOT * NODES
_COUNT = struct.Struct("<Q")


class Loss(NamedTuple):
    """What the process before this one read and did not save."""

    rows: Mapping[str, int]
    """By node; exact."""
    unknown: tuple[str, ...]
    """Nodes of which nobody can say: the file knows less than the store, or does not belong to it."""
    unexplained: Mapping[str, int] = {}
    """By node: what the file says more than a store it does not belong to. No loss, only where counting goes
    on from."""


def together(one: Loss, other: Loss) -> Loss:
    """What two processes lost."""
    rows = {node: one.rows.get(node, 0) + other.rows.get(node, 0) for node in {**one.rows, **other.rows}}
    return one._replace(rows=rows, unknown=tuple(dict.fromkeys((*one.unknown, *other.unknown))))


class Intake:
    """The open file. One process at a time: whoever holds the store's lock.

    Raises:
        StoreUnavailable: the file cannot be made or opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._open()
        self._found: dict[str, int] = {}  # node ids as Envoy writes them, looked up before
        known = list(_slots(os.pread(self._file.fileno(), SIZE, 0)))
        self._slots = {name: number for number, (name, _) in enumerate(known)}
        self._counts = [rows for _, rows in known]

    def _open(self) -> BinaryIO:
        path = self.path
        try:
            if not path.exists() or path.stat().st_size != SIZE or path.read_bytes()[:64] != MAGIC:
                # Written out, not made by truncation: a full disk is noticed here, not at a row.
                path.write_bytes(MAGIC + bytes(SIZE - len(MAGIC)))
            return path.open("r+b", buffering=0)
        except OSError as error:
            raise StoreUnavailable(
                f"cannot keep row counts in {path}: {error.strerror}",
                hint="the store's directory must be writable and have 2 MiB of room",
            ) from None

    def renew(self) -> None:
        """Opens the file anew and brings it up to date, after its disk failed or gave way to another.

        Raises:
            StoreUnavailable: as the constructor; then the former file is kept.
        """
        self._file, former = self._open(), self._file
        former.close()
        for name, slot in self._slots.items():
            self._write(slot, name)

    def add(self, node: str, rows: int) -> None:
        """Counts rows of a node as read. Call it before they are folded."""
        slot = self._found.get(node)
        if slot is None:
            slot = self._slot(node)
        self._counts[slot] += rows
        self._write(slot)

    def known_as(self, node: str) -> str:
        """How a node's rows are counted: by its name, or with those of the others past the bound."""
        self._slot(node)
        name = label(node)
        return name if name in self._slots else OTHERS

    def raise_to(self, stored: Mapping[str, int]) -> None:
        """Lets no count be below the stored one: rows of another store that was taken over."""
        counts = self.counts()
        for name, rows in stored.items():
            if rows > counts.get(name, 0):
                self.add(name, rows - counts.get(name, 0))

    def _write(self, slot: int, name: str | None = None) -> None:
        """Writes a count, and the name of its node where it is given.

        A disk that fails is the store's to notice and to tell; the counts are absolute, so that the next
        one that can be written makes up for those that could not.
        """
        count = _COUNT.pack(self._counts[slot])
        content = count if name is None else count + name.encode().ljust(NAME, b"\0")
        with suppress(OSError):
            os.pwrite(self._file.fileno(), content, len(MAGIC) + slot * SLOT)

    def counts(self) -> dict[str, int]:
        """Rows read per node over the life of the store: what a checkpoint saves."""
        return {name: self._counts[slot] for name, slot in self._slots.items()}

    def compare(self, stored: Mapping[str, int], *, related: bool = True) -> Loss:
        """What the process before this one lost, given what its last checkpoint stored.

        Counts that the file lost are raised to the stored ones, so that they go on from there.

        Args:
            related: False when the store is not the one that this file was kept for, or not of the same
                moment: then no difference is a loss, and every node's is unknown.
        """
        counts = self.counts()
        ahead = {name: rows - stored.get(name, 0) for name, rows in counts.items()}
        ahead = {name: rows for name, rows in ahead.items() if rows > 0}
        behind = [name for name, rows in stored.items() if counts.get(name, 0) < rows]
        for name in behind:
            self.add(name, stored[name] - counts.get(name, 0))
        if related:
            return Loss(ahead, tuple(behind))
        return Loss({}, tuple(sorted(counts.keys() | stored.keys())), ahead)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _slot(self, node: str) -> int:
        name = label(node)
        if name not in self._slots:
            name = name if len(self._counts) < NODES - 1 else OTHERS
        slot = self._slots.get(name)
        if slot is None:
            slot = self._create(name)
        if len(self._found) >= 2 * NODES:
            self._found.clear()
        self._found[node] = slot
        return slot

    def _create(self, name: str) -> int:
        slot = self._slots[name] = len(self._counts)
        self._counts.append(0)
        self._write(slot, name)
        return slot


def read_counts(path: Path) -> dict[str, int]:
    """Rows per node that a file counted, beside its owner; empty where there is none, or none of ours."""
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    whole = len(content) == SIZE and content.startswith(MAGIC)
    return dict(_slots(content)) if whole else {}


def _slots(content: bytes) -> Iterator[tuple[str, int]]:
    for start in range(len(MAGIC), SIZE, SLOT):
        name = content[start + 8 : start + SLOT].rstrip(b"\0").decode("utf-8", "replace")
        if not name:
            return
        yield name, _COUNT.unpack_from(content, start)[0]


def label(node: str) -> str:
    """A node's name as the file and the store know it: at most 200 bytes, long ones ended by a digest."""
    text = node or "(unnamed node)"
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= 200 and "\0" not in text:
        return encoded.decode()
    digest = blake2b(encoded, digest_size=8).hexdigest()
    shown = encoded.replace(b"\0", b" ")[:180].decode("utf-8", "ignore")
    return f"{shown}…{digest}"
