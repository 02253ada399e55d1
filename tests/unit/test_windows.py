"""Windows at their edges: boundaries, lateness, clocks that jump, bounds that are met, turns that fail."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

import pytest
from money import DAY_MS, DEFAULTS, GRACE_MS, HOUR_MS, MINUTE_MS, T0, key, windows

from proxy_usage.model import Cell, Key
from proxy_usage.windows import CELL_LIMIT, SWEEP, TENANT_IDLE_MS, Windows

END_MS = T0 + MINUTE_MS + GRACE_MS
"""When the window that begins at T0 stops taking rows as being in time, and is due."""


def take(open_windows: Windows, now_ms: int, **how: int | bool) -> tuple[Cell, ...]:
    """A turn that succeeds: the cells that closed."""
    turn = open_windows.begin(now_ms, **how)  # type: ignore[arg-type]  # limit and everything
    open_windows.commit(turn)
    return turn.closing


def add(open_windows: Windows, now_ms: int, window_ms: int = T0, amount: int = 1, whose: Key = key()) -> bool:  # noqa: B008 (immutable)
    return open_windows.add(whose, window_ms, 1, (amount,), now_ms)


# --- when a window closes -------------------------------------------------------------------------


def test_a_window_closes_when_its_grace_is_over_and_not_a_millisecond_before() -> None:
    open_windows = windows()
    add(open_windows, T0)
    assert open_windows.next_due_ms() == END_MS
    assert take(open_windows, END_MS - 1) == ()
    (closed,) = take(open_windows, END_MS)
    assert closed == Cell(1, T0, key(), 1, (1,))
    assert len(open_windows) == 0
    assert open_windows.next_due_ms() is None
    assert take(open_windows, END_MS + DAY_MS) == ()


def test_a_row_is_in_time_until_the_last_millisecond_of_the_grace() -> None:
    open_windows = windows(reopen_ms=17)
    add(open_windows, END_MS - 1)
    assert open_windows.late_rows == 0
    assert open_windows.next_due_ms() == END_MS


def test_a_row_that_comes_as_the_grace_ends_is_late_and_keeps_its_window_open_for_reopen() -> None:
    open_windows = windows(reopen_ms=17)
    add(open_windows, END_MS)
    assert open_windows.late_rows == 1
    assert open_windows.next_due_ms() == END_MS + 17


def test_a_row_after_the_grace_that_finds_its_window_still_open_is_not_late() -> None:
    open_windows = windows(spread_ms=10_000)
    add(open_windows, T0)
    due_ms = open_windows.next_due_ms()
    assert due_ms is not None
    assert END_MS <= due_ms < END_MS + 10_000
    add(open_windows, max(END_MS, due_ms - 1))
    assert open_windows.late_rows == 0
    assert [cell.amounts for cell in take(open_windows, due_ms)] == [(2,)]


def test_the_windows_on_both_sides_of_midnight_are_two() -> None:
    open_windows = windows()
    add(open_windows, T0 + 1, window_ms=T0 - MINUTE_MS, amount=3)
    add(open_windows, T0 + 1, window_ms=T0, amount=5)
    first, second = take(open_windows, END_MS)
    assert (first.window_ms, first.amounts) == (T0 - MINUTE_MS, (3,))
    assert (second.window_ms, second.amounts) == (T0, (5,))


def test_cells_close_in_the_order_in_which_they_are_due_and_a_turn_takes_no_more_than_it_may() -> None:
    open_windows = windows()
    for number in range(7):
        add(open_windows, T0, whose=key(f"t{number}"))
    add(open_windows, T0, window_ms=T0 - MINUTE_MS, whose=key("before"))
    first = take(open_windows, END_MS, limit=3)
    assert [cell.key.tenant for cell in first] == ["before", "t0", "t1"]
    assert [len(take(open_windows, END_MS, limit=3)) for _ in range(3)] == [3, 2, 0]


def test_everything_closes_on_demand_due_or_not() -> None:
    open_windows = windows()
    add(open_windows, T0)
    add(open_windows, T0, whose=key("beta"))
    assert len(take(open_windows, T0, everything=True)) == 2


def test_the_keys_of_a_window_are_spread_and_two_processes_spread_them_differently() -> None:
    names = [key(f"tenant-{number}") for number in range(500)]

    def closings(salt: bytes) -> dict[str, int]:
        open_windows = windows(spread_ms=15_000, salt=salt)
        for name in names:
            add(open_windows, T0, whose=name)
        return {tenant: due_ms for _, _, tenant, _, due_ms in open_windows.begin(T0).born}

    here, there = closings(b"here"), closings(b"there")
    assert here == closings(b"here")
    for dues in (here, there):
        assert all(END_MS <= due_ms < END_MS + 15_000 for due_ms in dues.values())
        thirds = Counter((due_ms - END_MS) // 5_000 for due_ms in dues.values())
        assert set(thirds) == {0, 1, 2}
        assert min(thirds.values()) > 100
    assert sum(here[name.tenant] == there[name.tenant] for name in names) < 10


# --- Envoys that are late -------------------------------------------------------------------------


def drive(open_windows: Windows, rows: Iterator[tuple[int, int]], until_ms: int) -> list[tuple[int, Cell]]:
    """Feeds ``(arrival, end)`` in the order of arrival and takes a turn every second: ``(when, cell)``."""
    closed: list[tuple[int, Cell]] = []
    arrival = next(rows, None)
    for now_ms in range(T0, until_ms, 1_000):
        while arrival is not None and arrival[0] <= now_ms:
            add(open_windows, arrival[0], window_ms=arrival[1] - arrival[1] % MINUTE_MS)
            arrival = next(rows, None)
        closed += [(now_ms, cell) for cell in take(open_windows, now_ms)]
    assert arrival is None
    return closed


@pytest.mark.parametrize("behind_ms", [0, 4_999, 5_000, 10_000, 59_999, 65_000, 600_000])
@pytest.mark.parametrize("spread_ms", [1, 15_000])
def test_an_envoy_that_is_always_behind_makes_at_most_one_late_event_per_reopen(
    behind_ms: int, spread_ms: int
) -> None:
    open_windows = windows(spread_ms=spread_ms)
    every_ms = 250
    rows = ((T0 + at + behind_ms, T0 + at) for at in range(0, HOUR_MS, every_ms))
    closed = drive(open_windows, rows, T0 + 2 * HOUR_MS)
    assert len(open_windows) == 0
    sums: dict[int, int] = defaultdict(int)
    for _, cell in closed:
        sums[cell.window_ms] += cell.amounts[0]
    assert dict(sums) == {T0 + at: MINUTE_MS // every_ms for at in range(0, HOUR_MS, MINUTE_MS)}
    late = [at for at, cell in closed if at > cell.window_ms + MINUTE_MS + GRACE_MS + spread_ms + 1_000]
    assert all(after - before >= MINUTE_MS for before, after in pairwise(late)), late
    assert len(late) <= 60
    assert len(closed) - len(late) <= 60


def test_rows_that_trickle_in_late_are_one_event_as_long_as_the_window_is_reopened() -> None:
    open_windows = windows()
    rows = iter([(END_MS + after, T0) for after in range(0, MINUTE_MS, 1_000)])
    closed = drive(open_windows, rows, T0 + HOUR_MS)
    assert [(at, cell.amounts) for at, cell in closed] == [(END_MS + MINUTE_MS, (60,))]


# --- clocks ---------------------------------------------------------------------------------------


def test_a_clock_moved_back_closes_late_and_loses_nothing() -> None:
    open_windows = windows()
    add(open_windows, T0 + 30_000)
    back_ms = T0 - HOUR_MS
    assert take(open_windows, back_ms) == ()
    add(open_windows, back_ms, window_ms=back_ms)
    add(open_windows, back_ms, window_ms=T0)
    assert [cell.amounts for cell in take(open_windows, back_ms + MINUTE_MS + GRACE_MS)] == [(1,)]
    assert [cell.amounts for cell in take(open_windows, END_MS)] == [(2,)]


def test_a_clock_moved_back_does_not_shut_new_tenants_out_for_as_long_as_it_was_moved() -> None:
    open_windows = windows(max_tenants=1)
    assert add(open_windows, T0)
    assert not add(open_windows, T0 + MINUTE_MS, whose=key("beta"))
    back_ms = T0 - 2 * TENANT_IDLE_MS
    assert add(open_windows, back_ms)
    later_ms = back_ms + TENANT_IDLE_MS + 1
    assert add(open_windows, later_ms, window_ms=later_ms, whose=key("beta"))


# --- bounds ---------------------------------------------------------------------------------------


def test_past_max_keys_a_tenants_new_keys_share_one_and_its_sum_stays_exact() -> None:
    open_windows = windows(max_keys=4)
    sent: Counter[str] = Counter()
    for number in range(100):
        tenant = f"t{number % 3}"
        sent[tenant] += number
        assert add(open_windows, T0, amount=number, whose=key(tenant, route=f"r{number}"))
    assert len(open_windows) <= 4 + 3
    got: Counter[str] = Counter()
    shared = 0
    for cell in take(open_windows, END_MS):
        got[cell.key.tenant] += cell.amounts[0]
        shared += cell.key.dimensions == DEFAULTS
    assert got == sent
    assert shared == 3
    assert open_windows.overflow_rows == 96


def test_a_key_that_has_its_cell_keeps_its_dimensions_past_max_keys() -> None:
    open_windows = windows(max_keys=1)
    add(open_windows, T0)
    add(open_windows, T0, whose=key(route="new"))
    add(open_windows, T0, amount=7)
    assert {cell.key: cell.amounts for cell in take(open_windows, END_MS)} == {
        key(): (8,),
        Key("alpha", DEFAULTS): (1,),
    }


def test_past_twice_max_keys_windows_of_many_hours_are_counted_in_the_present_hours() -> None:
    open_windows = windows(max_keys=3)
    now_ms = T0 + DAY_MS
    for back in range(200):
        add(open_windows, now_ms, window_ms=now_ms - back * MINUTE_MS)
    assert len(open_windows) <= 7
    assert sum(cell.amounts[0] for cell in take(open_windows, now_ms + DAY_MS)) == 200


def test_while_nothing_can_be_closed_a_tenant_takes_one_window_an_hour() -> None:
    """A store that refuses for ten hours: memory is bounded, and no unit is lost."""
    open_windows = windows(max_keys=100)
    for minute in range(600):
        now_ms = T0 + minute * MINUTE_MS
        for tenant in range(10):
            add(open_windows, now_ms, window_ms=now_ms - now_ms % MINUTE_MS, whose=key(f"t-{tenant}"))
        open_windows.rollback(open_windows.begin(now_ms))
    assert len(open_windows) <= 200 + 10 * (10 + 1)
    assert sum(cell.amounts[0] for cell in take(open_windows, T0 + 30 * DAY_MS)) == 6_000


def test_one_tenant_too_many_is_refused_and_nothing_of_it_is_added() -> None:
    open_windows = windows(max_tenants=2)
    assert add(open_windows, T0, whose=key("a"))
    assert add(open_windows, T0, whose=key("b"))
    assert not add(open_windows, T0, whose=key("c"))
    assert add(open_windows, T0, whose=key("a", route="other"))
    assert open_windows.tenants == 2
    assert open_windows.open_amounts() == (3,)


def test_a_tenant_unseen_for_a_day_makes_room_for_another() -> None:
    open_windows = windows(max_tenants=2)
    add(open_windows, T0, whose=key("a"))
    add(open_windows, T0 + 1, whose=key("b"))
    later_ms = T0 + TENANT_IDLE_MS
    assert add(open_windows, later_ms, window_ms=later_ms, whose=key("c"))
    assert not add(open_windows, later_ms + 1, window_ms=later_ms, whose=key("d"))


def test_tenants_unseen_for_a_day_are_looked_for_a_few_at_a_time() -> None:
    open_windows = windows(max_tenants=3_000)
    for number in range(3_000):
        assert add(open_windows, T0 + (number % 10 > 0), whose=key(f"t-{number}"))
    later_ms = T0 + TENANT_IDLE_MS  # one in ten is unseen for a day
    before = open_windows.tenants
    for number in range(300):
        assert add(open_windows, later_ms, window_ms=later_ms, whose=key(f"new-{number}"))
        assert before - open_windows.tenants < 50
        before = open_windows.tenants
    refused = 0
    while not add(open_windows, later_ms + MINUTE_MS, window_ms=later_ms, whose=key("one-more")):
        refused += 1
        assert refused <= 3_000 // SWEEP
    for number in range(1_000):
        add(open_windows, later_ms + MINUTE_MS, window_ms=later_ms, whose=key(f"newer-{number}"))
        assert open_windows.tenants <= 3_000


@pytest.mark.parametrize("max_keys", [100, 1])
def test_no_cell_passes_the_limit_and_nothing_is_lost_at_it(max_keys: int) -> None:
    open_windows = windows(max_keys=max_keys)
    amounts = [CELL_LIMIT, 1, CELL_LIMIT - 1, 3 * CELL_LIMIT + 5, 0, CELL_LIMIT // 2, CELL_LIMIT // 2 + 1]
    for number, amount in enumerate(amounts):
        open_windows.add(key(route=f"r{number % 2}"), T0, 1, (1, amount), T0)
    closed = take(open_windows, END_MS)
    assert all(max(cell.amounts) <= CELL_LIMIT for cell in closed)
    assert sum(cell.amounts[1] for cell in closed) == sum(amounts)
    assert sum(cell.amounts[0] for cell in closed) == sum(cell.rows for cell in closed) == len(amounts)
    assert len({cell.id for cell in closed}) == len(closed)


# --- turns ----------------------------------------------------------------------------------------


def test_a_turn_tells_the_store_of_births_and_of_what_changed_and_only_once() -> None:
    open_windows = windows()
    add(open_windows, T0, amount=2)
    turn = open_windows.begin(T0)
    assert [*turn.born] == [(1, T0, *key(), END_MS)]
    assert [*turn.changed] == [(1, 1, 2)]
    open_windows.commit(turn)
    assert [*open_windows.begin(T0).changed] == []
    add(open_windows, T0, amount=3)
    turn = open_windows.begin(T0)
    assert ([*turn.born], [*turn.changed]) == ([], [(1, 2, 5)])


def test_rows_that_come_while_a_turn_is_under_way_belong_to_the_next() -> None:
    open_windows = windows()
    add(open_windows, T0, amount=2)
    turn = open_windows.begin(T0)
    add(open_windows, T0, amount=5)
    assert [*turn.changed] == [(1, 1, 2)]
    open_windows.commit(turn)
    turn = open_windows.begin(T0)
    assert ([*turn.born], [*turn.changed]) == ([], [(1, 2, 7)])


def test_a_cell_that_is_being_closed_gets_a_successor_of_its_own() -> None:
    open_windows = windows()
    add(open_windows, T0, amount=2)
    turn = open_windows.begin(END_MS)
    add(open_windows, END_MS, amount=5)
    open_windows.commit(turn)
    (late,) = take(open_windows, END_MS + MINUTE_MS)
    assert turn.closing == (Cell(1, T0, key(), 1, (2,)),)
    assert late == Cell(2, T0, key(), 1, (5,))


def test_a_turn_that_was_rolled_back_was_never_taken() -> None:
    open_windows = windows()
    add(open_windows, T0, amount=2)
    add(open_windows, T0, window_ms=T0 + MINUTE_MS, amount=3)
    first = open_windows.begin(END_MS)
    told = first.closing, set(first.born), set(first.changed)
    assert (len(told[0]), len(told[1]), len(told[2])) == (1, 1, 1)
    open_windows.rollback(first)
    second = open_windows.begin(END_MS)
    assert (second.closing, set(second.born), set(second.changed)) == told
    assert open_windows.open_amounts() == (3,)


def test_rows_that_come_before_a_rollback_are_neither_lost_nor_counted_twice() -> None:
    open_windows = windows()
    add(open_windows, T0, amount=2)
    add(open_windows, T0, window_ms=T0 + MINUTE_MS, amount=30)
    turn = open_windows.begin(END_MS)
    add(open_windows, END_MS, amount=5)
    add(open_windows, END_MS, window_ms=T0 + MINUTE_MS, amount=40)
    open_windows.rollback(turn)
    add(open_windows, END_MS, amount=7)
    assert open_windows.open_amounts() == (84,)
    closed = take(open_windows, END_MS + HOUR_MS)
    assert sum(cell.amounts[0] for cell in closed) == 84
    assert {cell.window_ms: cell.amounts for cell in closed}[T0 + MINUTE_MS] == (70,)
    assert sum(cell.rows for cell in closed) == 5


# --- going on after a restart ---------------------------------------------------------------------


def test_restored_cells_go_on_where_they_were_under_ids_that_nobody_reuses() -> None:
    cells = [(Cell(4, T0, key(), 2, (5,)), END_MS), (Cell(9, T0, key("beta"), 1, (1,)), END_MS + 7)]
    open_windows = windows()
    open_windows.restore(cells)
    add(open_windows, T0 + 1, amount=10)
    add(open_windows, T0 + 1, whose=key("gamma"))
    turn = open_windows.begin(T0 + 1)
    assert [number for number, *_ in turn.born] == [10]
    assert {number: (rows, amount) for number, rows, amount in turn.changed} == {4: (3, 15), 10: (1, 1)}
    open_windows.commit(turn)
    assert [cell.id for cell in take(open_windows, END_MS + 7)] == [4, 10, 9]


def test_of_two_restored_cells_of_one_key_both_close_and_one_goes_on() -> None:
    """A cell that was retired at its limit and its successor."""
    open_windows = windows()
    open_windows.restore([(Cell(n, T0, key(), 1, (CELL_LIMIT if n == 1 else 1,)), END_MS) for n in (1, 2)])
    add(open_windows, T0)
    assert [(cell.id, cell.amounts) for cell in take(open_windows, END_MS)] == [
        (1, (CELL_LIMIT,)),
        (2, (2,)),
    ]
