"""What lies at a path: whether it is still the file that was opened there."""

from __future__ import annotations

from pathlib import Path

Place = tuple[int, int]
"""Device and inode. The number of an inode alone does not tell apart the first files of two disks."""


def place(path: Path) -> Place | None:
    """What lies at a path; None where there is nothing, or where nobody can say, as on a disk that failed."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
