"""Turns: all of one is durable or none of it, and what a restart reads back is what was in memory."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from money import (
    DAY_MS,
    DIMENSIONS,
    HOUR_MS,
    LAYOUT,
    METERS,
    MINUTE_MS,
    NAMES,
    T0,
    Store,
    cell,
    key,
    leave_room,
    mint,
    turn,
    windows,
)

from proxy_usage.errors import ConfigError, StoreError, StoreFull
from proxy_usage.intake import HTTP, Source
from proxy_usage.model import NS_PER_SECOND, Cell, Identity, Origin
from proxy_usage.store import Held, Layout, OutputSlot, Turn
from proxy_usage.store.checkpoint import REMAINDER_IDLE_MS
from proxy_usage.windows import Windows


def identity(value: bytes) -> Identity:
    return Identity(Origin("peer", "envoy-1", "http"), 0, value, (b"eu",), routed=True)


def held(value: bytes, amounts: tuple[int, ...] = (1, 2, 3, 4), **changes: Any) -> Held:
    return Held(T0, "no_match", identity(value), 1, amounts)._replace(**changes)


def everything(store: Store) -> list[str]:
    """All that the store holds, as text."""
    return list(store.db.iterdump())


def busy_turn() -> Turn:
    """A turn with something of everything: open, born, changed and closing windows, held usage, counts."""
    open_windows = windows()
    for number in range(6):
        window_ms = T0 + number % 2 * MINUTE_MS
        open_windows.add(key(f"t{number}"), window_ms, 1, (1, 2, 3, NS_PER_SECOND + number), T0)
    return turn(
        windows=open_windows.begin(T0 + MINUTE_MS + 5_000),
        counted=(8, 20, 30, 6 * NS_PER_SECOND + 15),
        held=[held(b"x"), held(b"y")],
        fates={("counted", ""): 8, ("skipped", "start"): 2, ("invalid", "duration"): 1},
        intake={Source("envoy-1", "http", HTTP): 11, Source("envoy-2"): 0},
    )


# --- all or nothing -------------------------------------------------------------------------------


def test_a_turn_that_fails_at_any_point_changes_nothing_and_succeeds_when_it_is_tried_again(
    tmp_path: Path,
) -> None:
    with Store(tmp_path) as store:
        store.add("before")
        before, wanted = everything(store), busy_turn()
        steps, fail_at, statement = itertools.count(), -1, [""]
        # SQLite asks the handler a last time when a COMMIT is done: too late to refuse it.
        store.db.set_trace_callback(lambda sql: statement.__setitem__(0, sql))
        store.db.set_progress_handler(lambda: next(steps) == fail_at and statement[0] != "COMMIT", 1)
        failures = 0
        for fail_at in range(0, 100_000, 17):  # noqa: B007 (the handler reads it)
            steps = itertools.count()
            try:
                store.checkpoints.commit(wanted, store.mint, T0)
            except StoreError:
                failures += 1
                assert not store.db.in_transaction
                assert everything(store) == before
            else:
                break
        store.db.set_progress_handler(None, 1)
        store.db.set_trace_callback(None)
        assert failures > 100
        assert store.counters("counted")["requests"] == 8
        assert store.counters("rows") == {"counted/": 8, "skipped/start": 2, "invalid/duration": 1}
        assert store.held() == {"requests": 2, "ingress_bytes": 4, "egress_bytes": 6, "connection_seconds": 8}
        assert store.recount()[store.output, "pending", "connection_seconds"] == (3, 3)
        store.check_tallies()


def test_a_turn_that_finds_the_store_full_is_told_so_and_is_not_lost(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("before")
        before = everything(store)
        open_windows = windows()
        for number in range(500):
            open_windows.add(key(f"t{number}"), T0, 1, (1, number, 0, 0), T0)
        leave_room(store.database, 2)
        due_ms = T0 + HOUR_MS
        for _ in range(3):
            refused = open_windows.begin(due_ms)
            with pytest.raises(StoreFull):
                store.checkpoints.commit(turn(windows=refused), store.mint, due_ms)
            open_windows.rollback(refused)
            open_windows.add(key("t7"), T0, 1, (1, 0, 0, 0), T0)
            assert everything(store) == before
        leave_room(store.database)
        taken = open_windows.begin(due_ms)
        events = store.checkpoints.commit(turn(windows=taken), store.mint, due_ms)
        open_windows.commit(taken)
        sums = Counter[str]()
        for event in events:
            sums[NAMES[event.meter]] += event.value
        assert sums == {"requests": 503, "ingress_bytes": sum(range(500))}
        assert len(open_windows) == 0
        store.check_tallies()


def test_held_usage_of_a_refused_turn_does_not_use_up_the_bound(tmp_path: Path) -> None:
    usage = [held(b"x"), held(b"y")]
    too_much = {
        Source(f"node {number} {'x' * 200}"): 1 for number in range(2_000)
    }  # stored behind held usage
    with Store(tmp_path, max_held=2) as store:
        leave_room(store.database, 2)
        for _ in range(5):
            with pytest.raises(StoreFull):
                store.checkpoints.commit(turn(held=usage, intake=too_much), store.mint, T0)
        store.checkpoints.commit(turn(held=usage), store.mint, T0)
        assert store.rows("SELECT count(*) FROM held WHERE identity = x''") == [(0,)]


# --- restarts -------------------------------------------------------------------------------------


def closing(open_windows: Windows) -> list[tuple[int, Cell]]:
    """Everything that is open, with the moment at which it is due, in the order of closing."""
    found = []
    while (due_ms := open_windows.next_due_ms()) is not None:
        found.append((due_ms, open_windows.begin(due_ms, limit=1).closing[0]))
    return found


keys = st.builds(key, st.sampled_from(["alpha", "beta"]), route=st.sampled_from(["web", "api"]))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), keys, st.integers(-3, 2), st.integers(0, 1 << 61)),
        st.tuples(st.just("wait"), st.sampled_from([250, 10_000, 66_000, 130_000])),
        st.just(("turn",)),
        st.just(("refused",)),
        st.just(("fold",)),
        st.just(("restart",)),
    ),
    max_size=60,
)


@given(steps=steps)
def test_after_any_turns_a_restart_finds_the_windows_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Any, ...]]
) -> None:
    path = tmp_path_factory.mktemp("store")
    store, open_windows, now_ms, added, minted = Store(path), windows(), T0, 0, 0

    def take() -> int:
        wanted = open_windows.begin(now_ms)
        events = store.checkpoints.commit(turn(windows=wanted), store.mint, now_ms)
        open_windows.commit(wanted)
        return sum(event.value for event in events)

    for step in [*steps, ("restart",)]:
        match step:
            case ("add", whose, minutes, amount):
                window_ms = now_ms - now_ms % MINUTE_MS + minutes * MINUTE_MS
                assert open_windows.add(whose, window_ms, 1, (0, amount, 0, 0), now_ms)
                added += amount
            case ("wait", by_ms):
                now_ms += by_ms
            case ("turn",):
                minted += take()
            case ("refused",):
                open_windows.rollback(open_windows.begin(now_ms))
            case ("fold",):
                before = store.checkpoints.recover()
                store.checkpoints.fold()
                assert store.checkpoints.recover() == before
                assert len(store.rows("SELECT seq FROM log")) == 1
            case _:  # a restart
                minted += take()
                store.database.close()
                store = Store(path)
                there = windows()
                there.restore(store.recovered.cells)
                again = windows()
                again.restore(store.recovered.cells)
                assert closing(there) == closing(open_windows)
                assert sum(again.open_amounts()) + minted == added
                open_windows = again
    store.check_tallies()
    store.database.close()


def test_what_was_not_in_a_turn_is_not_there_after_a_restart(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        open_windows = windows()
        open_windows.add(key(), T0, 1, (1, 0, 0, 0), T0)
        taken = open_windows.begin(T0)
        store.checkpoints.commit(turn(windows=taken), store.mint, T0)
        open_windows.commit(taken)
        open_windows.add(key(), T0, 5, (5, 0, 0, 0), T0)
    with Store(tmp_path) as store:
        ((found, due_ms),) = store.recovered.cells
        assert found == Cell(1, T0, key(), 1, (1, 0, 0, 0))
        assert due_ms == T0 + MINUTE_MS + 5_000


@pytest.mark.parametrize("fold", [False, True])
def test_a_window_that_was_saved_and_then_closed_is_not_open_after_a_restart(
    tmp_path: Path, fold: bool
) -> None:
    with Store(tmp_path) as store:
        open_windows = windows()
        open_windows.add(key(), T0, 1, (1, 0, 0, 0), T0)
        open_windows.add(key("beta"), T0 + MINUTE_MS, 1, (7, 0, 0, 0), T0)
        for now_ms in (T0, T0 + MINUTE_MS + 5_000):
            taken = open_windows.begin(now_ms)
            store.checkpoints.commit(turn(windows=taken), store.mint, now_ms)
            open_windows.commit(taken)
        if fold:
            store.checkpoints.fold()
    with Store(tmp_path) as store:
        assert [found.amounts[0] for found, _ in store.recovered.cells] == [7]
        assert store.fates() == {"pending": 1}


def test_the_log_is_folded_when_it_has_outgrown_what_it_describes(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        open_windows = windows(max_keys=10_000)
        folds, longest = 0, 0
        for number in range(200):
            for tenant in range(300):
                open_windows.add(key(f"tenant-{tenant}"), T0, 1, (1, number, 0, 0), T0)
            taken = open_windows.begin(T0)
            store.checkpoints.commit(turn(windows=taken), store.mint, T0)
            open_windows.commit(taken)
            if store.checkpoints.wants_fold:
                store.checkpoints.fold()
                folds += 1
            longest = max(longest, store.rows("SELECT sum(length(record)) FROM log")[0][0])
        assert folds >= 2
        assert longest < 1 << 20
        cells = [found for found, _ in store.checkpoints.recover().cells]
        assert {found.amounts for found in cells} == {(200, sum(range(200)), 0, 0)}


def test_a_fold_that_fails_changes_nothing(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.checkpoints.commit(busy_turn(), store.mint, T0)
        before = everything(store)
        store.db.execute("PRAGMA query_only=1")
        with pytest.raises(StoreError):
            store.checkpoints.fold()
        assert everything(store) == before


def test_rows_read_are_stored_absolute_and_a_crashs_loss_is_reported_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.checkpoints.commit(turn(intake={Source("a"): 5, Source("b"): 1}), store.mint, T0)
        store.checkpoints.commit(turn(intake={Source("a"): 9, Source("b"): 1}), store.mint, T0)
        assert store.checkpoints.recover().intake == {Source("a"): 9, Source("b"): 1}
        store.checkpoints.begin(LAYOUT, store.slots, {Source("a"): 3, Source("c"): 2})
        assert store.checkpoints.recover().intake == {Source("a"): 12, Source("b"): 1, Source("c"): 2}
        store.checkpoints.begin(LAYOUT, store.slots, {Source("a"): 1})
        assert store.checkpoints.crash_lost() == {"a": 4, "c": 2}


# --- remainders -----------------------------------------------------------------------------------


def seconds(store: Store, amount_ns: int, now_ms: int = T0, **how: Any) -> int:
    """Closes a window with so much connection time; gives the seconds that were billed."""
    events = store.close_window(cell((0, 0, 0, amount_ns), **how), now_ms=now_ms)
    return sum(event.value for event in events)


def test_a_keys_remainder_is_taken_by_whichever_of_its_windows_closes_next_even_after_a_restart(
    tmp_path: Path,
) -> None:
    with Store(tmp_path) as store:
        assert seconds(store, 1_700_000_000) == 1
        assert seconds(store, 800_000_000, key=key(route="other")) == 0
        assert store.remainders() == {"connection_seconds": 1_500_000_000}
    with Store(tmp_path) as store:
        assert seconds(store, 299_999_999, window_ms=T0 - DAY_MS) == 0
        assert seconds(store, 1) == 1
        assert store.remainders() == {"connection_seconds": 800_000_000}


def test_two_windows_of_a_key_in_one_turn_share_its_remainder(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        cells = [cell((0, 0, 0, 600_000_000), window_ms=T0 + n * MINUTE_MS, id=n) for n in range(5)]
        events = store.close_window(*cells)
        assert [(event.window_ms - T0) // MINUTE_MS for event in events] == [1, 3, 4]
        assert store.remainders() == {}


def test_a_remainder_is_written_off_after_35_days_unused_and_not_before(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        seconds(store, 1_700_000_000)
        seconds(store, 5, key=key("beta"), now_ms=T0 + 1)
        assert store.checkpoints.write_off(T0 + REMAINDER_IDLE_MS) == 0
        assert store.checkpoints.write_off(T0 + REMAINDER_IDLE_MS + 1) == 1
        assert store.remainders() == {"connection_seconds": 5}
        assert store.counters("written_off") == {"connection_seconds": 700_000_000}
        assert store.rows("SELECT value, meter, at_ms FROM ledger WHERE fate='written_off'") == [
            (700_000_000, "connection_seconds", T0 + REMAINDER_IDLE_MS + 1)
        ]
        assert seconds(store, 300_000_000) == 0  # begun anew, not completed


def test_a_remainder_in_use_is_not_written_off(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for day in range(0, 105, 35):
            seconds(store, 1, now_ms=T0 + day * DAY_MS)
            assert store.checkpoints.write_off(T0 + (day + 35) * DAY_MS) == 0
        assert store.remainders() == {"connection_seconds": 3}


def test_remainders_are_written_off_in_slices(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*(cell((0, 0, 0, 1), key=key(f"t{n}"), id=n) for n in range(7)))
        later_ms = T0 + 36 * DAY_MS
        assert [store.checkpoints.write_off(later_ms, limit=3) for _ in range(4)] == [3, 3, 1, 0]
        assert store.counters("written_off") == {"connection_seconds": 7}


# --- another layout -------------------------------------------------------------------------------


def test_remainders_belong_to_meters_by_name_not_by_place(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        seconds(store, 1_700_000_000)
        turned = mint(METERS[::-1])
        (event,) = store.checkpoints.commit(turn(cell((300_000_000, 0, 0, 0))), turned, T0)
        assert (event.value, turned.meters[event.meter].name) == (1, "connection_seconds")


def test_the_remainder_of_a_meter_that_is_gone_waits_to_be_written_off(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        seconds(store, 1_700_000_000)
        fewer = mint(METERS[:1])
        store.checkpoints.commit(turn(cell((1,)), counted=(1,)), fewer, T0 + DAY_MS)
        assert store.remainders() == {"connection_seconds": 700_000_000}
        assert store.checkpoints.write_off(T0 + 37 * DAY_MS) == 1
        assert store.counters("written_off") == {"connection_seconds": 700_000_000}


def test_a_layout_is_read_back_as_it_was_stored(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.recovered.layout is None
        assert store.checkpoints.recover().layout == LAYOUT
        other = Layout.of(METERS[::-1], DIMENSIONS[::-1])
        store.checkpoints.begin(other, store.slots, {})
        assert store.checkpoints.recover().layout == other != LAYOUT


# --- held usage -----------------------------------------------------------------------------------


def test_held_usage_is_added_up_per_hour_reason_and_identity(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        usage = [
            held(b"x"),
            held(b"x", (10, 0, 0, 1 << 70)),
            held(b"y"),
            held(b"x", reason="unmapped"),
            held(b"x", hour_ms=T0 + HOUR_MS),
        ]
        store.checkpoints.commit(turn(held=usage[:1]), store.mint, T0 + 1)
        store.checkpoints.commit(turn(held=usage[1:]), store.mint, T0 + 2)
        found = store.rows("SELECT rows, first_ms - ?, last_ms - ?, amounts FROM held ORDER BY rows", T0, T0)
        assert [row[:3] for row in found] == [(1, 2, 2)] * 3 + [(2, 1, 2)]
        assert f'"connection_seconds":{(1 << 70) + 4}' in found[3][3]
        assert store.held()["requests"] == 14


@pytest.mark.parametrize("restart", [False, True])
def test_past_the_bound_identities_share_a_row_per_hour_and_reason_and_sums_stay_exact(
    tmp_path: Path, restart: bool
) -> None:
    def batches() -> Iterator[list[Held]]:
        for number in range(100):
            yield [held(b"%d" % number, reason=f"r{number % 2}"), held(b"0", reason="r0")]

    store = Store(tmp_path, max_held=5)
    for usage in batches():
        store.checkpoints.commit(turn(held=usage), store.mint, T0)
        if restart:
            store.database.close()
            store = Store(tmp_path, max_held=5)
    assert store.rows("SELECT count(*), sum(rows) FROM held") == [(5 + 2, 200)]
    assert store.rows("SELECT count(*) FROM held WHERE identity = x''") == [(2,)]
    assert store.held()["connection_seconds"] == 800
    assert store.rows("SELECT rows FROM held ORDER BY rows DESC LIMIT 1") == [(101,)]
    store.database.close()


# --- outputs --------------------------------------------------------------------------------------


def test_an_output_bounds_which_windows_it_sends_and_the_ledger_says_what_became_of_the_rest(
    tmp_path: Path,
) -> None:
    slots = [
        OutputSlot(0, "old", until_ms=T0),
        OutputSlot(0, "new", from_ms=T0),
        OutputSlot(0, "shadow", keeps_only=True),
    ]
    with Store(tmp_path, outputs=slots) as store:
        before = [cell((1, 0, 0, 0), window_ms=T0 - MINUTE_MS), cell((2, 0, 0, 0), window_ms=T0)]
        store.close_window(*before)
        old, new, shadow = (slot.output for slot in store.slots)
        assert {place[:2]: sums for place, sums in store.tallies().items()} == {
            (0, "minted"): (2, 3),
            (old, "pending"): (1, 1),
            (old, "after_end"): (1, 2),
            (new, "before_start"): (1, 1),
            (new, "pending"): (1, 2),
            (shadow, "recorded"): (2, 3),
        }
        store.check_tallies()
        assert store.rows("SELECT count(*), sum(outputs) FROM events") == [(2, 2)]


def test_an_event_that_no_output_sends_leaves_its_ledger_row_and_no_bytes(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=[OutputSlot(0, "shadow", keeps_only=True)]) as store:
        (id_,) = store.add("alpha")
        assert store.rows("SELECT count(*) FROM events") == [(0,)]
        assert store.rows("SELECT fate, id, value, window_ms FROM ledger") == [("recorded", id_, 1, T0)]


def test_events_of_a_turn_follow_each_other_and_no_number_comes_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for _ in range(2):
            (last,) = store.rows("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name='events'")[0]
            ids = store.add(*(f"t{number}" for number in range(5)))
            assert store.rows("SELECT seq, id FROM events ORDER BY seq") == [
                (last + place, id_) for place, id_ in enumerate(ids, start=1)
            ]
            assert store.rows("SELECT seq FROM deliveries ORDER BY seq") == [(last + n,) for n in range(1, 6)]
            store.db.execute("DELETE FROM events")
            store.db.execute("DELETE FROM deliveries")


def test_outputs_keep_their_numbers_and_a_new_one_gets_what_is_minted_after_it(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=[OutputSlot(0, "b")]) as store:
        store.add("alpha")
        (b,) = store.slots
    with Store(tmp_path, outputs=[OutputSlot(0, "a"), OutputSlot(0, "b")]) as store:
        assert store.slots[1] == b
        store.add("beta")
        assert store.queue.tallies() == {
            (0, "minted"): 2,
            (store.slots[0].output, "pending"): 1,
            (b.output, "pending"): 2,
        }


def test_an_output_cannot_disappear_with_events_to_deliver(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=[OutputSlot(0, "old")]) as store:
        store.add("alpha")
        dump = everything(store)
        with pytest.raises(ConfigError, match="'old' is gone from the configuration") as caught:
            store.queue.register([OutputSlot(0, "new")], T0)
        assert "outputs retire old" in caught.value.hint
        assert everything(store) == dump


def test_an_output_with_events_to_deliver_cannot_become_one_that_sends_nothing(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=[OutputSlot(0, "old")]) as store:
        store.add("alpha")
        dump = everything(store)
        with pytest.raises(ConfigError, match="'old' has events to deliver, and format none") as caught:
            store.queue.register([OutputSlot(0, "old", keeps_only=True)], T0)
        assert "set until" in caught.value.hint
        assert everything(store) == dump
    with Store(tmp_path / "other", outputs=[OutputSlot(0, "old", keeps_only=True)]) as store:
        store.add("alpha")
        assert store.queue.register([OutputSlot(0, "old")], T0)[0].output == store.slots[0].output


def test_an_output_with_nothing_to_deliver_may_go_and_come_back_under_its_number(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=[OutputSlot(0, "old")]) as store:
        (old,) = store.slots
        (new,) = store.queue.register([OutputSlot(0, "new")], T0)
        assert new.output != old.output
        assert store.queue.register([OutputSlot(0, "old")], T0) == (old,)
