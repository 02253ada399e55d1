"""Housekeeping: the ledger gives way first, then events are merged, then usage is refused; it heals."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from money import DAY_MS, HOUR_MS, MINUTE_MS, T0, Store, cell, key, leave_room, turn

from proxy_usage.errors import StoreFull
from proxy_usage.metrics import Metrics
from proxy_usage.service.housekeeping import REST_MS, ROUND_MS, Housekeeping, Pressure
from proxy_usage.store import Batch, Fate, Merger, Retention
from proxy_usage.store.reader import Reader
from proxy_usage.store.thread import StoreThread


@contextmanager
def house(store: Store, **changes: Any) -> Iterator[Housekeeping]:
    settings: dict[str, Any] = {
        "ledger_max_bytes": 1 << 30,
        "keep_delivered_ms": 7 * DAY_MS,
        "keep_sums_ms": 400 * DAY_MS,
        "keep_held_ms": 90 * DAY_MS,
    }
    thread = StoreThread()
    try:
        yield Housekeeping(
            store.database,
            store.checkpoints,
            Retention(store.database, **settings | changes),
            Merger(store.database, store.mint),
            thread,
            Metrics(),
        )
    finally:
        thread.close()


def pressure(keeper: Housekeeping) -> Pressure:
    """The pressure now: it changes where mypy does not see it."""
    return keeper.pressure


async def rest(keeper: Housekeeping, now_ms: int, *, refused: bool = False) -> list[Pressure]:
    """Until nothing is left to do. Gives the pressures that were seen, each once."""
    seen = []
    for _ in range(10_000):
        await keeper.run(now_ms, refused=refused)
        if keeper.pressure not in seen:
            seen.append(keeper.pressure)
        if not keeper.busy:
            return seen
    raise AssertionError("housekeeping without end")


def add(store: Store, tenants: int, minute: int, now_ms: int = T0) -> None:
    cells = [
        cell((1, 10, 0, 0), key=key(f"t{number}"), window_ms=T0 + minute * MINUTE_MS)
        for number in range(tenants)
    ]
    store.checkpoints.commit(turn(*cells, counted=(tenants, 10 * tenants, 0, 0)), store.mint, now_ms)


def deliver(store: Store, now_ms: int = T0) -> None:
    while isinstance(batch := store.lease(now_ms, events=1_000), Batch):
        store.queue.settle(batch, {event.seq: Fate("delivered", 200) for event in batch.events}, now_ms)


def conserved(store: Store) -> None:
    with Reader(store.path) as reader:
        found = reader.conservation(deep=True)
    assert found.differences == ()
    assert found.balanced


def value(keeper: Housekeeping, name: str, **labels: str) -> float | None:
    return keeper._metrics.registry.get_sample_value(f"proxy_usage_{name}", labels)


async def test_with_room_enough_only_what_is_old_goes(tmp_path: Path) -> None:
    with Store(tmp_path, max_bytes=64 << 20) as store, house(store) as keeper:
        for minute in range(5):
            add(store, 20, minute)
        deliver(store)
        add(store, 20, 5)
        assert await rest(keeper, T0) == [Pressure.NONE]
        assert store.rows("SELECT count(*) FROM ledger") == [(200,)]
        assert await rest(keeper, T0 + 7 * DAY_MS + 1) == [Pressure.NONE]
        assert store.rows("SELECT count(*) FROM ledger") == [(0,)]
        assert store.fates() == {"delivered": 200, "pending": 40}
        assert value(keeper, "ledger_rolled_rows_total") == 200
        conserved(store)


async def test_chores_are_done_once_a_round_and_after_the_clock_was_moved_back(tmp_path: Path) -> None:
    with Store(tmp_path) as store, house(store, keep_delivered_ms=1) as keeper:
        for round_, now_ms in enumerate((T0, T0 + ROUND_MS, T0 - DAY_MS), 1):
            add(store, 1, 0, now_ms - 10)
            deliver(store, now_ms - 10)
            await rest(keeper, now_ms)
            assert value(keeper, "ledger_rolled_rows_total") == 2 * round_
        add(store, 1, 0, T0 - DAY_MS)
        deliver(store, T0 - DAY_MS)
        await rest(keeper, T0 - DAY_MS + ROUND_MS - 1)
        assert store.rows("SELECT count(*) FROM ledger") == [(2,)]


async def test_short_of_room_the_ledger_gives_way_before_anything_is_merged(tmp_path: Path) -> None:
    with Store(tmp_path) as store, house(store) as keeper:
        for minute in range(30):
            add(store, 100, minute)
        deliver(store)
        for minute in range(30, 35):
            add(store, 100, minute)
        leave_room(store.database, -store.rows("PRAGMA freelist_count")[0][0])
        await rest(keeper, T0)
        assert keeper.pressure is Pressure.NONE
        rolled = value(keeper, "ledger_rolled_rows_total")
        assert rolled is not None
        assert 2_000 <= rolled <= 6_000  # until it was enough
        assert value(keeper, "events_merged_total") == 0
        assert store.fates() == {"delivered": 6_000, "pending": 1_000}
        conserved(store)


async def test_then_pending_events_are_merged(tmp_path: Path) -> None:
    with Store(tmp_path) as store, house(store) as keeper:
        for minute in range(40):
            add(store, 50, minute)
        leave_room(store.database, 0)
        await rest(keeper, T0)
        assert keeper.pressure is Pressure.NONE
        merged = value(keeper, "events_merged_total")
        assert merged is not None
        assert merged >= 1_000
        assert store.fates()["merged"] == merged
        assert keeper.relieved
        conserved(store)


async def test_at_last_there_is_nothing_left_and_usage_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path) as store, house(store) as keeper:
        add(store, 1_000, 0)  # one window of each: nothing to merge
        leave_room(store.database, 0)
        await rest(keeper, T0)
        with pytest.raises(StoreFull):
            add(store, 1_000, 1)
        assert "nothing is left to merge" in keeper.describe()
        assert keeper.describe().startswith("store full: ")
        keeper.gauges()
        assert value(keeper, "store_pressure") == 3
        measure = keeper.measure
        assert measure is not None
        assert value(keeper, "store_bytes", part="used") == measure.used
        assert value(keeper, "store_limit_bytes") == measure.limit
        assert value(keeper, "store_reserve") == 1
        assert keeper.status()["pressure"] == "exhausted"
        # The backlog is left alone for a while, then gone through once more.
        leave_room(store.database)
        add(store, 5, 1)
        leave_room(store.database, 0)
        await rest(keeper, T0 + REST_MS - 1, refused=True)
        assert value(keeper, "events_merged_total") == 0
        await rest(keeper, T0 + REST_MS, refused=True)
        assert value(keeper, "events_merged_total") == 10
        leave_room(store.database)
        await rest(keeper, T0 + REST_MS)
        assert keeper.status()["pressure"] == "none"
        add(store, 1_000, 1)
        conserved(store)


async def test_a_refusal_is_reason_enough_wherever_it_comes_from(tmp_path: Path) -> None:
    """A quota, say, that no file system tells of."""
    with Store(tmp_path) as store, house(store) as keeper:
        for minute in range(3):
            add(store, 10, minute)
        await keeper.run(T0)
        assert value(keeper, "events_merged_total") == 0
        await rest(keeper, T0, refused=True)
        assert value(keeper, "events_merged_total") == 40


async def test_a_step_that_the_disk_refuses_waits(tmp_path: Path) -> None:
    with Store(tmp_path) as store, house(store, keep_delivered_ms=1) as keeper:
        add(store, 10, 0)
        deliver(store)
        store.db.execute("PRAGMA query_only=1")  # SQLITE_READONLY, as on a disk that broke
        await keeper.run(T0 + HOUR_MS)
        assert not keeper.busy
        assert store.rows("SELECT count(*) FROM ledger") == [(20,)]
        store.database.reopen()  # as the next turn does
        await rest(keeper, T0 + 2 * HOUR_MS)
        assert store.rows("SELECT count(*) FROM ledger") == [(0,)]
        conserved(store)


async def test_pages_that_became_free_are_given_back(tmp_path: Path) -> None:
    with Store(tmp_path) as store, house(store, keep_delivered_ms=1, keep_sums_ms=1) as keeper:
        for at in range(12):
            store.add(*(f"t{number}" for number in range(2_000)), now_ms=T0 + at)
        deliver(store)
        pages = store.rows("PRAGMA page_count")[0][0]
        await rest(keeper, T0 + DAY_MS)
        assert store.rows("PRAGMA page_count")[0][0] < pages * 3 // 4
        conserved_fates(store)


def conserved_fates(store: Store) -> None:
    with Reader(store.path) as reader:
        assert reader.conservation(deep=True).differences == ()
