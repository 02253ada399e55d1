"""What the tests of the money path share: meters, keys, windows, a store, and the books of a store recounted.

store = Store(tmp_path)                        # a real file
store.close_window(cell(amounts=(1, 2, 3, 4))) # one turn that closes one window
assert store.recount() == store.tallies()
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from proxy_usage.events import Mint
from proxy_usage.intake import Source
from proxy_usage.model import NS_PER_SECOND, Amounts, Cell, Event, Key, Meter, Quantity
from proxy_usage.store import Batch, Checkpoints, Database, Held, Layout, OutputSlot, Queue, Turn
from proxy_usage.windows import Windows, WindowTurn

SOURCE = "//networking.datumapis.com/gateway"
TYPE = "networking.datumapis.com/gateway/"
METERS = (
    Meter("requests", TYPE + "requests", "{request}", Quantity.REQUESTS),
    Meter("ingress_bytes", TYPE + "ingress-bytes", "By", Quantity.WIRE_IN),
    Meter("egress_bytes", TYPE + "egress-bytes", "By", Quantity.WIRE_OUT),
    Meter("connection_seconds", TYPE + "connection-seconds", "s", Quantity.OPEN_NS, NS_PER_SECOND),
)
NAMES = tuple(meter.name for meter in METERS)
DIMENSIONS = ("region", "httproute_name")
DEFAULTS = ("", "any")
LAYOUT = Layout.of(METERS, DIMENSIONS)
MINUTE_MS = 60_000
HOUR_MS = 3_600_000
DAY_MS = 86_400_000
GRACE_MS = 5_000
T0 = 1_795_305_600_000
"""2026-11-22T00:00:00Z: a midnight."""


def key(tenant: str = "alpha", region: str = "eu", route: str = "web") -> Key:
    return Key(tenant, (region, route))


def cell(
    amounts: Amounts = (1, 100, 200, NS_PER_SECOND),
    *,
    key: Key = key(),  # noqa: B008 (immutable)
    id: int = 1,  # noqa: A002 (the field's own name)
    window_ms: int = T0,
    rows: int = 1,
) -> Cell:
    return Cell(id, window_ms, key, rows, amounts)


def windows(**changes: Any) -> Windows:
    """Minutes with 5 s of grace, reopened for a minute, closed without spread."""
    settings: dict[str, Any] = {
        "length_ms": MINUTE_MS,
        "grace_ms": GRACE_MS,
        "reopen_ms": MINUTE_MS,
        "spread_ms": 1,
        "salt": b"",
        "defaults": DEFAULTS,
        "max_keys": 1_000,
        "max_tenants": 1_000,
    }
    return Windows(**settings | changes)


def mint(meters: Sequence[Meter] = METERS, dimensions: Sequence[str] = DIMENSIONS) -> Mint:
    return Mint(meters, dimensions, SOURCE, MINUTE_MS)


def turn(
    *closing: Cell,
    counted: Amounts = (0, 0, 0, 0),
    held: Sequence[Held] = (),
    fates: Mapping[tuple[str, str], int] | None = None,
    intake: Mapping[Source, int] | None = None,
    windows: WindowTurn | None = None,
) -> Turn:
    """A turn that closes cells the store has never heard of, as they come when they are short-lived."""
    return Turn(
        windows=windows or WindowTurn(closing),
        counted=counted,
        held=tuple(held),
        fates=fates or {},
        intake=intake or {},
    )


def leave_room(database: Database, pages: int | None = None) -> None:
    """Leaves new usage room for so many pages more, as a store near its limit does; None: all there is."""
    space = database.space
    (count,) = database.db.execute("PRAGMA page_count").fetchone()
    kept_free = 2 * space.share + space.share // 2  # write-ahead log, reserve, headroom
    space.limit = 8 << 30 if pages is None else (count + pages) * 4_096 + kept_free


class Store:
    """An opened store with its outputs registered, as the service opens it."""

    def __init__(
        self,
        path: Path,
        *,
        outputs: Sequence[OutputSlot] = (OutputSlot(0, "billing"),),
        max_bytes: int = 8 << 30,
        max_held: int = 100,
        now_ms: int = T0,
        aside_ms: int | None = None,
    ) -> None:
        self.path = path / "usage.db"
        self.database = Database(self.path, max_bytes=max_bytes, aside_ms=aside_ms)
        self.queue = Queue(self.database)
        self.checkpoints = Checkpoints(self.database, max_held=max_held)
        self.slots = self.queue.register(outputs, now_ms)
        self.recovered = self.checkpoints.recover()
        self.checkpoints.begin(LAYOUT, self.slots, {})
        self.mint = mint()

    @classmethod
    def around(
        cls, database: Database, queue: Queue, checkpoints: Checkpoints, slots: tuple[OutputSlot, ...]
    ) -> Store:
        """The parts of a store that somebody else opened."""
        store = cls.__new__(cls)
        store.path, store.database, store.queue = database.path, database, queue
        store.checkpoints, store.slots, store.mint = checkpoints, slots, mint()
        return store

    @property
    def db(self) -> sqlite3.Connection:
        return self.database.db

    @property
    def output(self) -> int:
        return self.slots[0].output

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    def close_window(self, *cells: Cell, now_ms: int = T0) -> tuple[Event, ...]:
        following = replace(turn(*cells), number=self.database.known.turn + 1)
        return self.checkpoints.commit(following, self.mint, now_ms)

    def add(self, *tenants: str, now_ms: int = T0) -> list[str]:
        """One event of one request per tenant, in this order; gives their ids."""
        cells = [cell((1, 0, 0, 0), key=key(tenant), id=number) for number, tenant in enumerate(tenants, 1)]
        return [event.id for event in self.close_window(*cells, now_ms=now_ms)]

    def lease(self, now_ms: int = T0, **settings: Any) -> Any:
        """The next batch of the first output; ``Idle`` where there is none."""
        wanted = {"output": self.output, "events": 100, "max_bytes": 1 << 20, "linger_ms": 0} | settings
        return self.queue.lease(now_ms=now_ms, **wanted)

    def batch(self, now_ms: int = T0, **settings: Any) -> Batch:
        leased = self.lease(now_ms, **settings)
        assert isinstance(leased, Batch), leased
        return leased

    def batches(self, now_ms: int = T0, **settings: Any) -> list[Batch]:
        """All batches that are handed out while none is settled."""
        taken: list[Batch] = []
        while isinstance(
            leased := self.lease(now_ms, busy=frozenset(batch.id for batch in taken), **settings), Batch
        ):
            taken.append(leased)
        return taken

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self.db.execute(sql, parameters).fetchall()

    def fates(self) -> dict[str, int]:
        """Events of the first output by fate, where there are any."""
        return {fate: n for (output, fate), n in self.queue.tallies().items() if output == self.output and n}

    def remainders(self) -> Counter[str]:
        """Carried base units by meter."""
        carried: Counter[str] = Counter()
        for (text,) in self.rows("SELECT remainders FROM keys"):
            carried.update(json.loads(text))
        return carried

    def held(self) -> Counter[str]:
        """Held base units by meter."""
        held: Counter[str] = Counter()
        for (text,) in self.rows("SELECT amounts FROM held"):
            held.update(json.loads(text))
        return held

    def counters(self, name: str) -> Counter[str]:
        """Sums over the life of the store, by label."""
        rows = self.rows("SELECT label, value FROM counters WHERE name=?", name)
        return Counter({label: int(value) for label, value in rows})

    def tallies(self) -> dict[tuple[int, str, str], tuple[int, int]]:
        """``(output, fate, meter) → (events, value)`` as the store keeps count of them; zeros left out."""
        rows = self.rows("SELECT output, fate, meter, events, value FROM tallies")
        return {(o, fate, meter): (n, int(v)) for o, fate, meter, n, v in rows if n or int(v)}

    def recount(self) -> dict[tuple[int, str, str], tuple[int, int]]:
        """The same from the rows that say what became of each event. (``minted`` has no rows of its own.)"""
        found = self.rows(
            "SELECT d.output, 'pending', e.meter, e.value FROM deliveries d JOIN events e ON e.seq=d.seq"
            " UNION ALL"
            " SELECT d.output, 'dead', e.meter, e.value FROM dead d JOIN events e ON e.seq=d.seq"
            " UNION ALL SELECT output, fate, meter, value FROM ledger WHERE output != 0"
        )
        sums: dict[tuple[int, str, str], tuple[int, int]] = {}
        for output, fate, meter, value in found:
            events, total = sums.get((output, fate, meter), (0, 0))
            sums[output, fate, meter] = (events + 1, total + value)
        return sums

    def check_tallies(self, names: Sequence[str] = NAMES) -> None:
        """The tallies say what the tables say, and each output's fates add up to what was minted."""
        tallies = self.tallies()
        assert {place: sums for place, sums in tallies.items() if place[0]} == self.recount()
        for output in {place[0] for place in tallies if place[0]}:
            for name in names:
                own = [sums for place, sums in tallies.items() if (place[0], place[2]) == (output, name)]
                both = tuple(map(sum, zip(*own, strict=True))) if own else (0, 0)
                assert both == tallies.get((0, "minted", name), (0, 0)), (output, name)
