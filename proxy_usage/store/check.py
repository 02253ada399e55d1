"""What is in a store file, sound or not: a report that changes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proxy_usage.errors import StoreError, StoreUnavailable
from proxy_usage.store.reader import Reader
from proxy_usage.store.schema import VERSION
from proxy_usage.store.views import Conservation
from proxy_usage.store.wreck import Wreck


@dataclass(frozen=True, slots=True)
class Salvageable:
    """What could be brought over if the file were set aside."""

    events: int
    values: Mapping[str, int]
    """Values by meter."""
    open_windows: int
    uncertain_windows: int
    """Perhaps closed and billed: they would be left out."""
    gaps: int
    """Places that cannot be read."""
    senseless: int
    """Rows that can be read and are not what they should be."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A file, as it was found."""

    path: str
    bytes: int
    log_bytes: int
    """Of its write-ahead log."""
    ours: bool
    version: int | None
    """Schema version; None where it cannot be read."""
    damage: tuple[str, ...]
    """What is wrong with it, a line each; nothing when it is sound."""
    tables: Mapping[str, int | None]
    """Rows by table; None: they cannot be counted."""
    conservation: Conservation | None
    """Whether everything adds up, table by table; None where it cannot be added up."""
    salvageable: Salvageable | None
    """None for a file of which nothing can be read."""

    @property
    def sound(self) -> bool:
        """Whether this program can work with it, as far as anybody can see."""
        return self.ours and not self.damage and self.version is not None and self.version <= VERSION


def check_file(path: Path) -> Checked:
    """Reads a file from its first page to its last, beside a running service or without.

    Raises:
        StoreUnavailable: there is no such file, or it cannot be opened.
    """
    if not path.is_file():
        raise StoreUnavailable(
            f"there is no store at {path}", hint="name the file, or check store.path in the configuration"
        )
    size, log_size = path.stat().st_size, _size(path.with_name(path.name + "-wal"))
    try:
        wreck = Wreck(path, frozen=False)
    except sqlite3.DatabaseError as error:
        raise StoreUnavailable(
            f"store {path} cannot be opened: {error}", hint="it must be readable by this user"
        ) from error
    with wreck:
        trouble = wreck.trouble()
        if trouble is not None:
            return Checked(str(path), size, log_size, False, None, (trouble,), {}, None, None)
        wreck.hold()
        version, damage = wreck.version(), wreck.verdict()
        tables = {name: wreck.count(name) for name in wreck.tables()}
        salvageable = _salvageable(wreck)
    if version == VERSION and (salvageable.gaps or salvageable.senseless) and not damage:
        damage = ("rows cannot be read, or are not what they should be",)
    conservation = None
    if version == VERSION:
        conservation, odd = _conservation(path)
        damage += odd
    return Checked(str(path), size, log_size, True, version, damage, tables, conservation, salvageable)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _salvageable(wreck: Wreck) -> Salvageable:
    wreck.gaps = wreck.senseless = 0
    events = 0
    values: dict[str, int] = {}
    for event in wreck.events():
        events += 1
        values[event.meter] = values.get(event.meter, 0) + event.value
    left = wreck.left()
    return Salvageable(
        events,
        values,
        len(left.cells),
        len(left.uncertain) + left.nameless,
        wreck.gaps,
        wreck.senseless,
    )


def _conservation(path: Path) -> tuple[Conservation | None, tuple[str, ...]]:
    """Whether it adds up, and what is wrong with what should."""
    try:
        with Reader(path) as reader:
            sums = reader.conservation(deep=True)
    except StoreUnavailable:  # where nobody may write, only what is certainly not in use can be read
        return None, ()
    except (StoreError, ValueError) as error:
        return None, (str(error).splitlines()[0],)
    return sums, () if sums.balanced else ("the sums it keeps are not what its tables come to",)
