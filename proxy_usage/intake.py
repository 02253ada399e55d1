"""Rows read per node, in a small memory-mapped file that a crash of the process cannot take back.

The count of a row is raised before the row is folded; each checkpoint stores the same counts in its own
transaction. What the file says more than the store, at the next start, is exactly what the crash lost:

    file    node-a 120 480   ──┐
    store   node-a 120 102   ──┴─▶ 378 rows of node-a were read and not saved

The kernel keeps the pages of a killed process; only a crash of the machine itself can take them, and then the
answer is "unknown", not zero. So it is when file and store do not belong together: one of them is new, or
both come from a backup.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from proxy_usage.errors import StoreUnavailable

MAGIC = b"proxy-usage rows read 1\n".ljust(64, b"\0")
SLOT = 256
NAME = SLOT - 8
NODES = 4_096
"""Nodes counted apart; past it they share the last slot."""
OTHERS = "(other nodes)"
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


class Intake:
    """The mapped file. One process at a time: whoever holds the store's lock.

    Raises:
        StoreUnavailable: the file cannot be made or mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = len(MAGIC) + SLOT * NODES
        try:
            fresh = not path.exists() or path.stat().st_size != size or path.read_bytes()[:64] != MAGIC
            if fresh:
                # Written out, not made by truncation: a hole in a mapped file on a full disk kills.
                path.write_bytes(MAGIC + bytes(SLOT * NODES))
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise StoreUnavailable(
                f"cannot keep row counts in {path}: {error.strerror}",
                hint="the store's directory must be writable and have 2 MiB of room",
            ) from None
        self._found: dict[str, int] = {}  # node ids as Envoy writes them, looked up before
        known = list(_slots(self._map))
        self._slots = {name: number for number, (name, _) in enumerate(known)}
        self._counts = [rows for _, rows in known]

    def add(self, node: str, rows: int) -> None:
        """Counts rows of a node as read. Call it before they are folded."""
        slot = self._found.get(node)
        if slot is None:
            slot = self._slot(node)
        self._counts[slot] += rows
        _COUNT.pack_into(self._map, len(MAGIC) + slot * SLOT, self._counts[slot])

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
        """Unmaps the file."""
        self._map.close()

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
        slot = len(self._counts)
        start = len(MAGIC) + slot * SLOT
        self._map[start + 8 : start + SLOT] = name.encode().ljust(NAME, b"\0")
        self._slots[name] = slot
        self._counts.append(0)
        return slot


def read_counts(path: Path) -> dict[str, int]:
    """Rows per node that a file counted, without mapping it; empty where there is none, or none of ours."""
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    whole = len(content) == len(MAGIC) + SLOT * NODES and content.startswith(MAGIC)
    return dict(_slots(content)) if whole else {}


def _slots(content: bytes | mmap.mmap) -> Iterator[tuple[str, int]]:
    for start in range(len(MAGIC), len(MAGIC) + SLOT * NODES, SLOT):
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
