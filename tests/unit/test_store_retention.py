"""What becomes of ledger rows, hourly sums, held usage and keys once they are old; and how large rows are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from money import DAY_MS, HOUR_MS, MINUTE_MS, T0, Store, cell, key, turn

from proxy_usage.model import MAX_EVENT_VALUE, NS_PER_SECOND, Identity, Origin
from proxy_usage.store import Batch, Fate, Held, Merger, Retention
from proxy_usage.store import retention as module
from proxy_usage.store.checkpoint import REMAINDER_IDLE_MS
from proxy_usage.store.reader import Reader

WEEK_MS = 7 * DAY_MS
YEAR_MS = 400 * DAY_MS


def retention(store: Store, **changes: Any) -> Retention:
    settings: dict[str, Any] = {
        "ledger_max_bytes": 1 << 30,
        "keep_delivered_ms": WEEK_MS,
        "keep_sums_ms": YEAR_MS,
        "keep_held_ms": 90 * DAY_MS,
    }
    return Retention(store.database, **settings | changes)


def deliver(store: Store, now_ms: int, fate: str = "delivered") -> None:
    """Settles everything that is pending."""
    while isinstance(batch := store.lease(now_ms, events=1_000), Batch):
        store.queue.settle(batch, {event.seq: Fate(fate, 200) for event in batch.events}, now_ms)


def use(store: Store, *tenants: str, minutes: int, start_ms: int = T0, fate: str = "delivered") -> None:
    """Closes windows, each minute's as it ends, and delivers their events at once."""
    for minute in range(minutes):
        window_ms = start_ms + minute * MINUTE_MS
        cells = [cell((1, 10, 0, 0), key=key(tenant), window_ms=window_ms) for tenant in tenants]
        store.checkpoints.commit(
            turn(*cells, counted=(len(cells), 10 * len(cells), 0, 0)), store.mint, window_ms
        )
        deliver(store, window_ms, fate)


def repeat(step: Callable[[], int]) -> int:
    """Until there is nothing more to do."""
    total = 0
    while count := step():
        total += count
    return total


def conserved(store: Store) -> None:
    with Reader(store.path) as reader:
        found = reader.conservation(deep=True)
    assert found.differences == ()
    assert found.balanced


def test_old_ledger_rows_become_hourly_sums(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        use(store, "alpha", "beta", minutes=90)
        keeper = retention(store)
        before, shown = store.tallies(), store.rows("SELECT count(*) FROM ledger")
        assert keeper.roll(T0 + WEEK_MS) == 0
        assert store.rows("SELECT count(*) FROM ledger") == shown == [(360,)]
        assert repeat(lambda: keeper.roll(T0 + WEEK_MS + HOUR_MS)) == 240  # those of the first hour
        conserved(store)
        assert store.rows("SELECT hour_ms, output, fate, meter, events, value FROM sums WHERE key=1") == [
            (T0, store.output, "delivered", "ingress_bytes", 60, "600"),
            (T0, store.output, "delivered", "requests", 60, "60"),
        ]
        assert repeat(lambda: keeper.roll(T0 + WEEK_MS + DAY_MS)) == 120
        assert store.tallies() == before
        assert store.rows("SELECT count(*), sum(events) FROM sums") == [(8, 360)]
        assert store.counters("sums") == {"kept": 8}
        conserved(store)


def test_a_sum_passes_64_bits(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*(cell((MAX_EVENT_VALUE, 0, 0, 0), key=key("alpha"), id=n) for n in range(5)))
        deliver(store, T0)
        assert retention(store).roll(T0, short=True) == 5
        assert store.rows("SELECT value FROM sums") == [(str(5 * MAX_EVENT_VALUE),)]
        assert retention(store).forget(T0 + YEAR_MS + 2 * HOUR_MS) == 1
        assert store.counters("forgotten_value") == {
            f"{store.output}/delivered/requests": 5 * MAX_EVENT_VALUE
        }
        found = Reader(store.path)
        assert found.conservation(deep=True).differences == ()
        found.close()


def test_short_of_room_young_rows_are_rolled_up_too(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        use(store, "alpha", minutes=3)
        assert retention(store).roll(T0 + HOUR_MS) == 0
        assert retention(store).roll(T0 + HOUR_MS, short=True) == 6
        assert store.rows("SELECT count(*) FROM ledger") == [(0,)]
        conserved(store)


def test_beyond_its_bound_the_ledger_is_rolled_up_and_then_loses_its_oldest_sums(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for hour in range(30):
            use(store, "alpha", minutes=2, start_ms=T0 + hour * HOUR_MS)
        keeper = retention(store, ledger_max_bytes=5_000)
        now_ms = T0 + 2 * DAY_MS
        assert repeat(lambda: keeper.roll(now_ms)) == 120
        assert repeat(lambda: keeper.forget(now_ms)) == 10
        assert store.counters("sums") == {"kept": 50}
        assert store.rows("SELECT min(hour_ms) FROM sums") == [(T0 + 5 * HOUR_MS,)]
        assert repeat(lambda: keeper.forget(now_ms)) == 0
        conserved(store)


def test_sums_are_removed_after_their_time_and_counted(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        use(store, "alpha", minutes=2)
        use(store, "alpha", minutes=2, start_ms=T0 + DAY_MS, fate="unconfirmed")
        keeper = retention(store)
        keeper.roll(T0 + 30 * DAY_MS)
        assert keeper.forget(T0 + YEAR_MS) == 0
        assert keeper.forget(T0 + YEAR_MS + HOUR_MS) == 2
        assert store.counters("forgotten_events") == {
            f"{store.output}/delivered/{meter}": 2 for meter in ("requests", "ingress_bytes")
        }
        conserved(store)
        assert keeper.forget(T0 + YEAR_MS + 2 * DAY_MS) == 2
        assert store.rows("SELECT count(*) FROM sums") == [(0,)]
        conserved(store)


def test_rows_written_while_the_clock_was_ahead_are_not_in_the_way(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        use(store, "alpha", minutes=1, start_ms=T0 + 50 * YEAR_MS)
        use(store, "alpha", minutes=1)
        assert retention(store).roll(T0 + WEEK_MS + HOUR_MS) == 4
        conserved(store)


def test_remainders_written_off_are_rolled_up_and_forgotten_like_the_rest(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.checkpoints.commit(
            turn(cell((0, 0, 0, NS_PER_SECOND // 2)), counted=(0, 0, 0, NS_PER_SECOND // 2)), store.mint, T0
        )
        now_ms = T0 + REMAINDER_IDLE_MS + 1
        assert store.checkpoints.write_off(now_ms) == 1
        conserved(store)
        keeper = retention(store)
        assert keeper.roll(now_ms + WEEK_MS + 1) == 1
        conserved(store)
        assert keeper.forget(now_ms + YEAR_MS + 2 * HOUR_MS) == 1
        conserved(store)


def test_held_usage_that_nobody_claims_expires(tmp_path: Path) -> None:
    def held(value: bytes, hour_ms: int) -> Held:
        identity = Identity(Origin("", "envoy-1", "http"), -1, value, (b"eu",), routed=True)
        return Held(hour_ms, "no_match", identity, 1, (1, 2, 3, 4))

    with Store(tmp_path, max_held=2) as store:
        for number, age_ms in enumerate((0, 30 * DAY_MS)):
            usage = held(b"x%d" % number, T0 + age_ms)
            store.checkpoints.commit(turn(held=[usage], counted=(1, 2, 3, 4)), store.mint, T0 + age_ms)
        keeper = retention(store)
        assert keeper.expire_held(T0 + 90 * DAY_MS) == 0
        assert keeper.expire_held(T0 + 91 * DAY_MS) == 1
        store.checkpoints.forget_held(1)
        assert store.counters("expired") == dict(
            zip(
                ("requests", "ingress_bytes", "egress_bytes", "connection_seconds"), (1, 2, 3, 4), strict=True
            )
        )
        assert store.held()["requests"] == 1
        conserved(store)
        # There is room again for an identity of its own.
        later_ms = T0 + 91 * DAY_MS
        store.checkpoints.commit(
            turn(held=[held(b"y", later_ms)], counted=(1, 2, 3, 4)), store.mint, later_ms
        )
        assert store.rows("SELECT count(*) FROM held WHERE identity=x''") == [(0,)]
        conserved(store)


# --- keys -----------------------------------------------------------------------------------------


def sweep(keeper: Retention, now_ms: int) -> int:
    """One search for unused keys, to its end."""
    total, done = 0, False
    while not done:
        gone, done = keeper.sweep_keys(now_ms)
        total += gone
    return total


def tenants(store: Store) -> set[str]:
    return {tenant for (tenant,) in store.rows("SELECT tenant FROM keys")}


def test_keys_go_when_nothing_refers_to_them(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        keeper = retention(store)
        use(store, "delivered", minutes=1)
        store.close_window(cell(key=key("dead")))
        batch = store.batch()
        store.queue.settle(batch, {event.seq: Fate("dead", 422, "refused") for event in batch.events}, T0)
        store.close_window(cell(key=key("pending")))
        store.close_window(cell((0, 0, 0, 5), key=key("remainder")))
        everybody = {"delivered", "dead", "pending", "remainder"}
        assert sweep(keeper, T0 + WEEK_MS + 2 * DAY_MS) == 0
        now_ms = T0 + 30 * DAY_MS
        keeper.roll(now_ms)
        assert sweep(keeper, now_ms) == 0
        assert tenants(store) == everybody
        late_ms = T0 + YEAR_MS + DAY_MS
        assert repeat(lambda: keeper.forget(late_ms)) == 2
        assert sweep(keeper, late_ms) == 1
        assert tenants(store) == everybody - {"delivered"}
        use(store, "delivered", minutes=1, start_ms=late_ms)  # it comes back as a new one
        assert tenants(store) == everybody
        conserved_fates(store)


def test_a_key_that_is_used_while_the_search_goes_on_stays(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        keeper, now_ms = retention(store), T0 + 30 * DAY_MS
        use(store, "alpha", "beta", minutes=1)
        keeper.roll(now_ms)
        keeper.forget(now_ms + YEAR_MS)
        assert keeper.sweep_keys(now_ms) == (0, False)
        store.add("alpha", now_ms=now_ms)
        assert sweep(keeper, now_ms) == 1
        assert tenants(store) == {"alpha"}


def test_a_reference_that_moves_while_the_search_goes_on_is_met(tmp_path: Path) -> None:
    """An event is settled and its ledger row rolled up, each when its new table was not yet looked at."""
    with Store(tmp_path) as store:
        keeper, now_ms = retention(store), T0 + 30 * DAY_MS
        store.close_window(cell(key=key("alpha")))
        keeper.sweep_keys(now_ms)
        deliver(store, now_ms - DAY_MS)
        keeper.sweep_keys(now_ms)  # looks at events: there is none
        keeper.roll(now_ms, short=True)
        assert sweep(keeper, now_ms) == 0
        assert tenants(store) == {"alpha"}


def test_all_keys_are_looked_at_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path) as store:
        monkeypatch.setattr(module, "KEYS", 3)
        monkeypatch.setattr(module, "LOOK", 2)
        names = [f"t{number}" for number in range(8)]
        use(store, *names, minutes=1)
        keeper, now_ms = retention(store), T0 + 30 * DAY_MS
        keeper.roll(now_ms)
        repeat(lambda: keeper.forget(now_ms + YEAR_MS))
        assert [sweep(keeper, now_ms) for _ in range(3)] == [3, 3, 2]
        assert tenants(store) == set()


# --- size -----------------------------------------------------------------------------------------


def test_a_delivered_event_leaves_at_most_100_bytes(tmp_path: Path) -> None:
    rows = 40_000
    with Store(tmp_path) as store:
        meters = ("requests", "ingress_bytes", "egress_bytes", "connection_seconds")
        amounts = (300, 1 << 33, 1 << 36, 3_000 * NS_PER_SECOND)
        before = store.rows("PRAGMA page_count")[0][0] - store.rows("PRAGMA freelist_count")[0][0]
        for at in range(0, rows // len(meters), 1_000):
            cells = [cell(amounts, key=key(f"t{at + number}"), id=number) for number in range(1_000)]
            store.close_window(*cells, now_ms=T0 + at)
            deliver(store, T0 + at)
        assert store.rows("SELECT count(*) FROM ledger") == [(rows,)]
        assert store.rows("SELECT count(*) FROM events") == [(0,)]
        # All that grew beside the ledger are keys: these are counted apart, by a copy without the ledger.
        after = store.rows("PRAGMA page_count")[0][0] - store.rows("PRAGMA freelist_count")[0][0]
        store.db.execute("DELETE FROM ledger")
        without = store.rows("PRAGMA page_count")[0][0] - store.rows("PRAGMA freelist_count")[0][0]
        assert before < without
        assert (after - without) * 4_096 <= 100 * rows


def test_an_hourly_sum_takes_at_most_100_bytes(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for hour in range(10):
            cells = [
                cell(
                    (1, 1 << 33, 1 << 36, NS_PER_SECOND), key=key(f"t{number}"), window_ms=T0 + hour * HOUR_MS
                )
                for number in range(250)
            ]
            store.close_window(*cells)
        deliver(store, T0)
        keeper = retention(store)
        assert repeat(lambda: keeper.roll(T0, short=True)) == 10_000
        used = store.rows("PRAGMA page_count")[0][0] - store.rows("PRAGMA freelist_count")[0][0]
        store.db.execute("DELETE FROM sums")
        without = store.rows("PRAGMA page_count")[0][0] - store.rows("PRAGMA freelist_count")[0][0]
        assert (used - without) * 4_096 <= 100 * 10_000


def test_free_pages_are_given_back_step_by_step(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for at in range(5):
            store.add(*(f"t{number}" for number in range(1_000)), now_ms=T0 + at)
        deliver(store, T0)
        keeper = retention(store)
        repeat(lambda: keeper.roll(T0, short=True))
        pages, free = (store.rows(f"PRAGMA {name}_count")[0][0] for name in ("page", "freelist"))
        assert free > module.PAGES
        assert keeper.vacuum() == module.PAGES
        assert store.rows("PRAGMA page_count") == [(pages - module.PAGES,)]
        repeat(keeper.vacuum)
        assert store.rows("PRAGMA freelist_count") == [(0,)]
        store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        assert store.path.stat().st_size <= (pages - free) * 4_096 + 4_096
        conserved_fates(store)


def conserved_fates(store: Store) -> None:
    with Reader(store.path) as reader:
        assert reader.conservation(deep=True).differences == ()


def test_steps_find_their_rows_by_the_order_of_their_tables(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        statements: list[str] = []
        store.db.set_trace_callback(statements.append)
        keeper = retention(store)
        keeper.roll(T0)
        keeper.forget(T0)
        keeper.expire_held(T0)
        store.add("alpha")
        done = False
        while not done:
            _, done = keeper.sweep_keys(T0 + YEAR_MS)
        store.checkpoints.write_off(T0)
        store.db.set_trace_callback(None)
        plans = {
            line[3]
            for statement in statements
            if statement.startswith(("SELECT", "DELETE"))
            for line in store.rows(f"EXPLAIN QUERY PLAN {statement}")
        }
    # A scan in the order of the table ends at its LIMIT.
    scans = {plan for plan in plans if plan.startswith("SCAN") and plan != "SCAN CONSTANT ROW"}
    assert scans <= {"SCAN ledger"}, plans
    assert not [plan for plan in plans if "TEMP B-TREE" in plan], plans


def test_merged_events_and_rolled_ones_add_up_together(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for minute in range(6):
            store.checkpoints.commit(
                turn(cell((1, 10, 0, 0), window_ms=T0 + minute * MINUTE_MS), counted=(1, 10, 0, 0)),
                store.mint,
                T0,
            )
        merger, done = Merger(store.database, store.mint), False
        while not done:
            done = merger.step(T0).done
        deliver(store, T0)
        conserved(store)
        keeper = retention(store)
        assert keeper.roll(T0, short=True) == 2
        conserved(store)
        found = dict(store.rows("SELECT fate, sum(events) FROM sums GROUP BY fate"))
        assert found == {"delivered": 2, "merged": 10}
        assert keeper.forget(T0 + YEAR_MS + 2 * HOUR_MS) == 4
        conserved(store)
