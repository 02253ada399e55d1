"""Whether a store's file has to be read from its first page to its last before it is used.

A small file always is. A large one takes longer than a start may (a second for each 300 MiB or so), and is
read beside the service once it serves, unless somebody had a reason to doubt it:

    start, large file ─▶ doubted ─▶ serving, read beside ─▶ sound: trusted
                            ▲                └─▶ damaged, or the process ended before ─▶ stays doubted
    damage met while running┘                                                             └─▶ next start
                                                                                     reads it before it serves

The doubt is a file beside the store, so that a damaged one does not end every start alike.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

AT_ONCE_BYTES = 256 << 20
"""Up to this size, write-ahead log included, a file is read at the start."""
SUFFIX = ".unchecked"


class Doubt:
    """The doubt about one store. Where the directory cannot be written, it is not remembered."""

    def __init__(self, store: Path, at_once_bytes: int = AT_ONCE_BYTES) -> None:
        self._mark = store.with_name(store.name + SUFFIX)
        self._parts = (store, store.with_name(store.name + "-wal"))
        self._at_once_bytes = at_once_bytes

    def can_wait(self) -> bool:
        """Whether the file may be used before it was read."""
        return not self._mark.exists() and sum(map(_size, self._parts)) > self._at_once_bytes

    def begin(self) -> None:
        """From here on it is doubted."""
        with contextlib.suppress(OSError):
            self._mark.touch()

    def settle(self) -> None:
        """It was read and is sound, or another file is in its place."""
        with contextlib.suppress(OSError):
            self._mark.unlink()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
