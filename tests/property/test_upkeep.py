"""In whatever order usage, deliveries, merging and removing come: the books are right after each step."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from money import DAY_MS, HOUR_MS, MINUTE_MS, T0, Store, cell, key, leave_room, turn

from proxy_usage.errors import StoreFull
from proxy_usage.model import MAX_EVENT_VALUE, NS_PER_SECOND
from proxy_usage.store import Batch, Fate, Letters, Merger, OutputSlot, Retention, Wanted
from proxy_usage.store.reader import Reader

OUTPUTS = (
    OutputSlot(0, "billing"),
    OutputSlot(0, "second", until_ms=T0 + 90 * MINUTE_MS),
    OutputSlot(0, "shadow", keeps_only=True),
)

uses = st.tuples(
    st.just("use"),
    st.integers(0, 3),  # tenant
    st.integers(0, 130),  # minute
    st.one_of(st.integers(0, 50), st.just(MAX_EVENT_VALUE), st.just(MAX_EVENT_VALUE - 7)),
    st.integers(0, 3 * NS_PER_SECOND),
)
steps = st.one_of(
    uses,
    uses,
    st.tuples(
        st.just("send"), st.integers(0, 1), st.integers(1, 4), st.sampled_from(["delivered", "dead", "later"])
    ),
    st.tuples(st.just("merge"), st.integers(1, 12)),
    st.tuples(st.just("roll"), st.booleans()),
    st.tuples(st.just("forget"), st.integers(0, 500)),
    st.tuples(st.just("wait"), st.integers(1, 40)),
    st.tuples(st.just("sweep")),
    st.tuples(st.just("replay")),
    st.tuples(st.just("full"), st.integers(0, 3), st.integers(1, 60)),
    st.tuples(st.just("reopen")),
)


class World:
    """A store, its upkeep, and what it was told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now_ms = T0
        self.used: Counter[tuple[str, str]] = Counter()
        self.open()

    def open(self) -> None:
        self.store = Store(self.path, outputs=OUTPUTS)
        self.merger = Merger(self.store.database, self.store.mint, gather=9, at_once=5)
        self.keeper = Retention(
            self.store.database,
            ledger_max_bytes=3_000,
            keep_delivered_ms=DAY_MS,
            keep_sums_ms=30 * DAY_MS,
            keep_held_ms=30 * DAY_MS,
        )

    def use(self, tenant: int, minute: int, requests: int, open_ns: int) -> None:
        name = f"t{tenant}"
        used = cell((requests, 0, 0, open_ns), key=key(name), window_ms=T0 + minute * MINUTE_MS)
        self.store.checkpoints.commit(
            turn(used, counted=(requests, 0, 0, open_ns)), self.store.mint, self.now_ms
        )
        self.used[name, "requests"] += requests

    def send(self, output: int, events: int, fate: str) -> None:
        batch = self.store.lease(self.now_ms, output=self.store.slots[output].output, events=events)
        if not isinstance(batch, Batch):
            return
        if fate == "later":
            self.store.queue.postpone(batch.id, self.now_ms + MINUTE_MS, "503")
            return
        fates = {event.seq: Fate(fate, 200, "refused" if fate == "dead" else "") for event in batch.events}
        self.store.queue.settle(batch, fates, self.now_ms)

    def merge(self, times: int) -> None:
        for _ in range(times):
            self.merger.step(self.now_ms)

    def roll(self, short: bool) -> None:
        self.keeper.roll(self.now_ms, short=short)

    def forget(self, days: int) -> None:
        self.keeper.forget(self.now_ms + days * DAY_MS)

    def wait(self, days: int) -> None:
        self.now_ms += days * DAY_MS
        self.store.checkpoints.write_off(self.now_ms)

    def sweep(self) -> None:
        done = False
        while not done:
            _, done = self.keeper.sweep_keys(self.now_ms)

    def replay(self) -> None:
        Letters(self.store.database).replay(Wanted())

    def full(self, pages: int, uses: int) -> None:
        leave_room(self.store.database, pages)
        for number in range(uses):
            try:
                self.use(100 + number, 5, 1, 0)
            except StoreFull:
                break
        leave_room(self.store.database)

    def reopen(self) -> None:
        self.store.database.close()
        self.open()

    def check(self) -> None:
        with Reader(self.store.path) as reader:
            found = reader.conservation(deep=True)
        assert found.differences == ()
        assert found.balanced
        referred = {
            number
            for table in ("events", "ledger", "sums")
            for (number,) in self.store.rows(f"SELECT DISTINCT key FROM {table}")
        }
        assert referred <= {number for (number,) in self.store.rows("SELECT key FROM keys")}
        across = self.store.rows(
            "SELECT count(*) FROM deliveries d LEFT JOIN events e ON e.seq=d.seq WHERE e.seq IS NULL"
        )
        assert across == [(0,)]
        for body, value, window_ms in self.store.rows("SELECT body, value, window_ms FROM events"):
            assert b'"value":"%d"' % value in body
            assert window_ms % HOUR_MS % MINUTE_MS == 0


@given(st.lists(steps, max_size=25))
def test_the_books_are_right_after_every_step(taken: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        try:
            for step in taken:
                getattr(world, step[0])(*step[1:])
                world.check()
            minted = {
                meter: value
                for (_, fate, meter), (_, value) in world.store.tallies().items()
                if fate == "minted"
            }
            assert minted.get("requests", 0) == sum(
                amount for (_, meter), amount in world.used.items() if meter == "requests"
            )
        finally:
            world.store.database.close()
