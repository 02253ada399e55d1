"""A store that lies aside, a fresh one in its place, and what its salvage brought."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from made_store import DIMENSIONS, METERS, SOURCE, START, MadeStore

from proxy_usage.events import Mint
from proxy_usage.model import Meter, Quantity
from proxy_usage.store import Layout
from proxy_usage.store.aside import notes, set_aside
from proxy_usage.store.reader import Reader
from proxy_usage.store.report import adopt, asides
from proxy_usage.store.salvage import Salvage
from proxy_usage.store.views import DeadLetter

BOTH = ("billing", "mirror")
LATER = START + 3_600_000
LAYOUT = Layout.of(METERS, DIMENSIONS)


def mint_of(layout: Layout) -> Mint:
    meters = tuple(
        Meter(name, kind, unit, Quantity(q), divisor) for name, kind, unit, q, divisor in layout.meters
    )
    return Mint(meters, layout.dimensions, SOURCE, layout.window_ms)


def replaced(path: Path, outputs: Sequence[str] = ("billing",)) -> MadeStore:
    """A fresh store in the place of one, which lies aside."""
    set_aside(path, "a test", LATER)
    return MadeStore(path, outputs)


def salvage_of(store: MadeStore) -> Salvage:
    """The salvage of what lies aside, as the next start builds it."""
    for note in notes(store.database.path):
        adopt(store.database, note)
    (aside,) = asides(store.database.db)
    return Salvage(store.database, aside, store.slots, LAYOUT, mint_of)


def letters(store: MadeStore) -> list[DeadLetter]:
    with Reader(store.database.path) as reader:
        return list(reader.dead_letters(limit=100_000))


def check_sums(store: MadeStore) -> None:
    """Everything adds up, table by table."""
    with Reader(store.database.path) as reader:
        sums = reader.conservation(deep=True)
        assert sums.balanced, sums
        assert [terms.difference for terms in sums.meters] == [0] * len(sums.meters)


def bodies(path: Path) -> dict[str, bytes]:
    db = sqlite3.connect(path)
    found = dict(db.execute("SELECT id, body FROM events"))
    db.close()
    return found


def many(path: Path, tenants: int = 400, outputs: Sequence[str] = ("billing",)) -> dict[str, bytes]:
    """A closed store with an event waiting for each of so many tenants: bytes by id."""
    with MadeStore(path, outputs) as store:
        for number in range(tenants):
            store.use(f"tenant-{number}", 1 + number, 0)
        while store.close_windows():  # so many at once
            pass
    return bodies(path)
