"""Which disk a directory is on, so that an empty mount point is not taken for it."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path


class NotMounted(OSError):
    """The directory is missing, or what is there now is what its disk was mounted over."""

    def __init__(self, text: str, place: Path) -> None:
        super().__init__(errno.ENODEV, text, str(place))


@dataclass(frozen=True, slots=True)
class Disk:
    """Where a directory was, once it had been found."""

    device: int
    """Of the directory itself: on layered file systems a file in it may show another one."""
    mount: Path
    """The place where its file system is mounted; the root's is ``/``."""

    @classmethod
    def of(cls, directory: Path) -> Disk:
        """Raises OSError: there is no such directory."""
        place = directory.resolve(strict=True)
        device = place.stat().st_dev
        while place != place.parent and place.parent.stat().st_dev == device:
            place = place.parent
        return cls(device, place)

    def check(self, directory: Path) -> None:
        """Whether the directory may still be believed.

        Another file system in the same place, or mounted further down, is somebody's decision, and so is the
        same one under another number. One that is mounted further up shows through where a disk is gone.

        Raises:
            NotMounted: the directory is missing, or its disk is away.
            OSError: it cannot be looked at.
        """
        try:
            if directory.stat().st_dev == self.device:
                return
            now = Disk.of(directory)
        except FileNotFoundError:
            raise NotMounted("it was there before: mount its disk, or make it", directory) from None
        if now.mount in self.mount.parents:
            raise NotMounted("the archive's disk is not mounted", self.mount)
