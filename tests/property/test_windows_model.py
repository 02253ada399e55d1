"""Windows against a model that is a dictionary of sums, for any order of rows, turns and clocks."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from money import DEFAULTS, HOUR_MS, MINUTE_MS, T0, key, windows

from proxy_usage.model import Cell, Key
from proxy_usage.windows import CELL_LIMIT, WindowTurn

keys = st.builds(key, st.sampled_from(["alpha", "beta", "gamma"]), route=st.sampled_from(["web", "api", "x"]))
amounts = st.one_of(st.integers(0, 10), st.integers(0, 3 * CELL_LIMIT))


@pytest.fixture(autouse=True, scope="module")
def small_steps() -> Iterator[None]:
    """Turns are packed cell by cell."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("proxy_usage.windows.PACK", 1)
        yield


class WindowsModel(RuleBasedStateMachine):
    """What went in is open, under way, or closed: once."""

    @initialize(max_keys=st.sampled_from([2, 5, 1_000]), max_tenants=st.sampled_from([2, 3]))
    def open(self, max_keys: int, max_tenants: int) -> None:
        self.bounds = {"max_keys": max_keys, "max_tenants": max_tenants, "spread_ms": 10_000}
        self.windows = windows(**self.bounds)
        self.now_ms = T0
        self.added: Counter[tuple[Key, int]] = Counter()  # by key and window
        self.rows = 0
        self.closed: list[Cell] = []
        self.saved: dict[int, tuple[Any, tuple[int, ...]]] = {}  # births and states, as the store has them
        self.under_way: WindowTurn | None = None

    @rule(whose=keys, minutes=st.integers(-4, 2), amount=amounts, rows=st.integers(0, 3))
    def add(self, whose: Key, minutes: int, amount: int, rows: int) -> None:
        self._add(whose, minutes, amount, rows)

    def _add(self, whose: Key, minutes: int, amount: int, rows: int) -> None:
        window_ms = self.now_ms - self.now_ms % MINUTE_MS + minutes * MINUTE_MS
        if self.windows.add(whose, window_ms, rows, (amount,), self.now_ms):
            self.added[whose, window_ms] += amount
            self.rows += rows
        else:
            assert self.windows.tenants >= self.bounds["max_tenants"]

    @rule(by_ms=st.one_of(st.integers(0, 90_000), st.sampled_from([-5_000, -HOUR_MS, HOUR_MS])))
    def wait(self, by_ms: int) -> None:
        self.now_ms += by_ms

    @precondition(lambda self: self.under_way is None)
    @rule(limit=st.integers(1, 5), everything=st.booleans())
    def begin(self, limit: int, everything: bool) -> None:
        before = self.windows.next_due_ms()
        self.under_way = self.windows.begin(self.now_ms, limit=limit, everything=everything)
        assert len(self.under_way.closing) <= limit
        due = before is not None and (everything or before <= self.now_ms)
        assert bool(self.under_way.closing) == due
        changed = {state[0] for state in self.under_way.changed}
        assert {birth[0] for birth in self.under_way.born} <= changed

    @precondition(lambda self: self.under_way is None)
    @rule(
        limit=st.integers(1, 5),
        adds=st.lists(st.tuples(keys, st.integers(-4, 2), amounts, st.integers(0, 3)), max_size=8),
    )
    def begin_in_steps(self, limit: int, adds: list[tuple[Key, int, int, int]]) -> None:
        """As ``begin``, with usage added while it is packed: the turn is what there was at the cut."""
        closing: list[Any] = []
        for _ in self.windows.close_due(closing, self.now_ms, limit=limit):
            pass
        cells = {cell.id: (cell.id, cell.rows, *cell.amounts) for cell in self.windows._cells.values()}
        noted = {cell.id for cell in self.windows._cells.values() if cell.noted >= self.windows._since}
        # A cell that nothing was added to may be noted, one that differs from what the store has must be.
        known = {number: (number, *state) for number, (_, state) in self.saved.items()}
        assert noted >= {number for number, state in cells.items() if state != known.get(number)}
        expected = {number: cells[number] for number in noted}
        born = noted - self.saved.keys()
        self.windows.cut()
        for _ in self.windows.pack():
            if adds:
                self._add(*adds.pop())
        self.under_way = self.windows.turn(closing)
        assert {state[0]: state for state in self.under_way.changed} == expected
        assert len(self.under_way.changed) == len(expected)
        assert sorted(birth[0] for birth in self.under_way.born) == sorted(born)

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def commit(self) -> None:
        assert self.under_way is not None
        turn, self.under_way = self.under_way, None
        self.windows.commit(turn)
        for birth in turn.born:
            assert birth[0] not in self.saved
            self.saved[birth[0]] = (birth, ())
        for number, *state in turn.changed:
            self.saved[number] = (self.saved[number][0], tuple(state))
        for cell in turn.closing:
            self.saved.pop(cell.id, None)
        self.closed += turn.closing

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def rollback(self) -> None:
        assert self.under_way is not None
        self.windows.rollback(self.under_way)
        self.under_way = None

    @precondition(lambda self: self.under_way is None)
    @rule()
    def restart(self) -> None:
        """All is saved, and another process goes on with it."""
        self.under_way = self.windows.begin(self.now_ms, limit=1)
        self.commit()
        there = windows(**self.bounds)
        cells = []
        for (number, window_ms, tenant, dimensions, due_ms), (rows, *state) in self.saved.values():
            cells.append((Cell(number, window_ms, Key(tenant, dimensions), rows, tuple(state)), due_ms))
        there.restore(cells)
        assert there.open_amounts() == self.windows.open_amounts()
        assert there.next_due_ms() == self.windows.next_due_ms()
        assert len(there) == len(self.windows)
        self.windows = there

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        closing = () if self.under_way is None else self.under_way.closing
        cells = [*self.closed, *closing]
        inside = sum(self.windows.open_amounts())
        assert inside + sum(cell.amounts[0] for cell in cells) == sum(self.added.values())
        assert len({cell.id for cell in closing}) == len(closing)

    @invariant()
    def no_cell_passes_its_limit(self) -> None:
        assert all(cell.amounts[0] <= CELL_LIMIT for cell in self.closed)

    def teardown(self) -> None:
        if not hasattr(self, "windows"):
            return
        if self.under_way is not None:
            self.rollback()
        while len(self.windows):
            self.under_way = self.windows.begin(self.now_ms, everything=True)
            self.commit()
        assert sum(cell.rows for cell in self.closed) == self.rows
        found: Counter[tuple[Key, int]] = Counter()
        of_tenants: Counter[str] = Counter()
        for cell in self.closed:
            found[cell.key, cell.window_ms] += cell.amounts[0]
            of_tenants[cell.key.tenant] += cell.amounts[0]
        for (whose, window_ms), amount in found.items():  # what has its own dimensions has its own window
            assert whose.dimensions == DEFAULTS or amount <= sum(
                added for (other, _), added in self.added.items() if other == whose
            ), (whose, window_ms)
        for (whose, _), amount in self.added.items():
            of_tenants[whose.tenant] -= amount
        assert not any(of_tenants.values())
        if self.bounds["max_keys"] == 1_000:
            assert +found == +self.added


TestWindows = WindowsModel.TestCase
TestWindows.settings = settings(stateful_step_count=40)
