"""A turn in steps: how much each does, whatever there is to do, and what may come in between."""

from __future__ import annotations

import gc
from pathlib import Path
from types import ModuleType

import pytest
from inner_sink import InnerSink
from money import HOUR_MS, T0, key, windows
from wire import DOWNSTREAM_PERIODIC, http_row, message

from proxy_usage.bulk import PAGE
from proxy_usage.cells import Closing
from proxy_usage.decode.choice import CHOICE
from proxy_usage.intake import by_node
from proxy_usage.model import NS_PER_MS
from proxy_usage.pipeline import BOOK, BOOK_ROWS, STEPS_A_PART, Port, next_step
from proxy_usage.turn import Turn
from proxy_usage.windows import CLOSE, PACK


def rows(count: int, first: int = 0, **how: object) -> bytes:
    """A message of as many rows, each of a tenant of its own."""
    start_ns = (T0 - 1_000) * NS_PER_MS
    return message(
        *(
            http_row(start_ns=start_ns, tags={"project_name": f"t-{first + number}"}, route="r", **how)  # type: ignore[arg-type]
            for number in range(count)
        )
    )


def test_a_turn_of_many_keys_is_made_in_steps_of_a_bounded_number_of_them(tmp_path: Path) -> None:
    with InnerSink(tmp_path, now_ms=T0) as sink:
        sink.read_raw(rows(1_700))
        assert len(sink.pipeline.windows) == 0  # still folded
        steps, most, before = sink.pipeline.beginning(T0), 0, 0
        turn: Turn | None = None
        while turn is None:
            turn = next_step(steps)
            most, before = max(most, len(sink.pipeline.windows) - before), len(sink.pipeline.windows)
        assert 0 < most <= BOOK // 2
        assert len(turn.windows.changed) == len(turn.windows.born) == 1_700
        assert turn.fates == {("counted", ""): 1_700}


@pytest.mark.parametrize("native", [None, gc], ids=["protobuf", "compiled"])
def test_young_objects_are_walked_after_each_step_with_the_protobuf_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: ModuleType | None
) -> None:
    """A step lets go of as much as it makes, so that Python's own count never says that it is time."""
    # Any module will do: what is asked is whether there is one.
    monkeypatch.setattr("proxy_usage.service.build.CHOICE", CHOICE._replace(native=native))
    walked = []

    def look(phase: str, told: dict[str, int]) -> None:
        if phase == "start" and told["generation"] == 1:
            walked.append(gc.get_count()[0])

    with InnerSink(tmp_path, now_ms=T0) as sink:
        sink.read_raw(rows(1_700))
        threshold = gc.get_threshold()
        gc.set_threshold(1 << 30)
        gc.callbacks.append(look)
        try:
            steps = sum(1 for _ in sink.pipeline.draining(T0))
        finally:
            gc.callbacks.remove(look)
            gc.set_threshold(*threshold)
        assert steps > 1_700 // BOOK
        assert len(walked) == (0 if native else steps)


def test_packing_and_letting_go_take_a_bounded_number_of_cells_at_a_time() -> None:
    open_windows = windows(max_keys=10_000, max_tenants=10_000)
    for number in range(2 * PAGE + 10):
        open_windows.add(key(f"t-{number}"), T0, 1, (1,), T0)
    open_windows.cut()
    assert open_windows._cut is not None
    packed = [0, *(len(open_windows._cut.changed) for _ in open_windows.pack()), 2 * PAGE + 10]
    assert packed == [*range(0, 2 * PAGE + 1, PACK), 2 * PAGE + 10]
    turn = open_windows.turn([])
    assert len(turn.changed) == len(turn.born) == 2 * PAGE + 10
    sizes = [(len(turn.changed), len(turn.born)) for _ in turn.release()]
    assert sizes == [(2 * PAGE, 2 * PAGE), (PAGE, PAGE), (0, 0)]
    closing: Closing = []
    taken = [len(closing) for _ in open_windows.close_due(closing, T0 + HOUR_MS, limit=120)]
    assert taken == [*range(CLOSE, 120, CLOSE)]
    assert len(closing) == 120


def test_a_full_fold_is_booked_along_with_the_parts_that_follow(tmp_path: Path) -> None:
    """No part waits for all that was folded, and what is set aside does not grow."""
    with InnerSink(tmp_path, now_ms=T0, windows={"max_keys": 100_000}) as sink:
        sink.pipeline._folds[Port.ALL]._limit = 5_000  # type: ignore[attr-defined]
        before = longest = 0
        for first in range(0, 24_000, 50):
            sink.read_raw(rows(50, first))
            now = len(sink.pipeline.windows)
            longest, before = max(longest, now - before), now
            assert len(sink.pipeline._aside) <= 2
        assert longest == STEPS_A_PART * BOOK // 2 > 50
        assert before >= 15_000
        sink.turn()
        assert len(sink.pipeline.windows) == 24_000
        sink.check_rows()


def test_rows_of_long_streams_are_booked_as_fast_as_they_come(tmp_path: Path) -> None:
    with InnerSink(tmp_path, now_ms=T0, envoy={"flush_interval": 60_000}) as sink:
        tags = {"project_name": "alpha", "dur_ms": "60000", "emit_us": f"{T0 * 1_000}", "conn_id": "7"}
        row = http_row(type=DOWNSTREAM_PERIODIC, start_ns=(T0 - 60_000) * NS_PER_MS, tags=tags, wire=(1, 1))
        raw = message(*[row] * 50)
        streams = sink.pipeline.streams
        assert streams is not None
        for _ in range(400):
            sink.read_raw(raw)
            assert len(sink.pipeline._aside) <= 4
        assert STEPS_A_PART * BOOK_ROWS > 50
        sink.turn()
        sink.check_rows()


def test_rows_taken_after_the_first_step_belong_to_the_next_turn(tmp_path: Path) -> None:
    with InnerSink(tmp_path, now_ms=T0) as sink:
        sink.read_raw(rows(250))
        steps = sink.pipeline.beginning(T0)
        next(steps)
        made = None
        while made is None:
            sink.read_raw(rows(10))
            made = next_step(steps)
        assert by_node(made.intake) == {"envoy-1": 250}
        assert made.fates == {("counted", ""): 250}
        assert made.counted[0] == sum(cell[2] for cell in made.windows.changed) == 250
        sink.pipeline.commit(made)
        later = sink.pipeline.begin(T0)
        assert sum(later.fates.values()) == by_node(later.intake)["envoy-1"] - 250 > 0
        assert sum(cell[2] for cell in later.windows.changed) > later.counted[0]


def test_a_turn_that_is_rolled_back_after_steps_is_in_the_next_one_whole(tmp_path: Path) -> None:
    with InnerSink(tmp_path, now_ms=T0) as sink:
        sink.read_raw(rows(700))
        turn = sink.pipeline.begin(T0)
        sink.read_raw(rows(5))
        sink.pipeline.rollback(turn)
        again = sink.pipeline.begin(T0)
        assert again.fates == {("counted", ""): 705}
        assert len(again.windows.changed) == len(again.windows.born) == 700
        assert sum(state[1] for state in again.windows.changed) == 705
