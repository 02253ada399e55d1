"""Damage to a store file: which pages hold what, and writing garbage over them.

path = tmp_path / "usage.db"                       # closed, so that all of it is in the file
overwrite(path, leaves(path, "events")[3:5])
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

INTERIOR = (2, 5)
"""Kinds of pages that lead to others: of an index (or a table without row numbers), of a table."""
GARBAGE = 0x5A


def page_size(path: Path) -> int:
    """Bytes of a page, as the file's header says."""
    (size,) = struct.unpack_from(">H", path.read_bytes()[:18], 16)
    return 65_536 if size == 1 else size


def tree(path: Path, table: str) -> list[tuple[int, int]]:
    """``(page, kind)`` of the pages of a table's tree, in the order of its rows, without overflow pages."""
    db = sqlite3.connect(path)
    (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name=?", (table,)).fetchone()
    db.close()
    return list(_walk(path.read_bytes(), page_size(path), root))


def _walk(content: bytes, size: int, page: int) -> Iterator[tuple[int, int]]:
    start = (page - 1) * size
    head = start + (100 if page == 1 else 0)
    kind = content[head]
    yield page, kind
    if kind not in INTERIOR:
        return
    (cells,) = struct.unpack_from(">H", content, head + 3)
    for number in range(cells):
        (offset,) = struct.unpack_from(">H", content, head + 12 + 2 * number)
        (child,) = struct.unpack_from(">I", content, start + offset)
        yield from _walk(content, size, child)
    (last,) = struct.unpack_from(">I", content, head + 8)
    yield from _walk(content, size, last)


def leaves(path: Path, table: str) -> list[int]:
    """The pages that hold a table's rows, in the order of the rows."""
    return [page for page, kind in tree(path, table) if kind not in INTERIOR]


def overwrite(path: Path, pages: Iterable[int], filler: int = GARBAGE) -> None:
    """Writes garbage over pages, in place, as a disk does that lost them."""
    size = page_size(path)
    with path.open("r+b") as file:
        for page in pages:
            file.seek((page - 1) * size)
            file.write(bytes([filler]) * size)
