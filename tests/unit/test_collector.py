"""The collector of cycles leaves alone what is held until memory grows, and is a thousandth of the time."""

import asyncio
import gc
import resource
import sys

import pytest

from proxy_usage.service.collector import GROWN_BYTES, collect_seldom, collect_young, due, settle


@pytest.mark.parametrize(
    ("passed_s", "spent_s", "grown", "expected"),
    [
        (60, 0.0, GROWN_BYTES, True),
        (60, 0.0, GROWN_BYTES - 1, False),
        (60, 0.95, GROWN_BYTES, False),
        (950, 0.95, GROWN_BYTES, True),
        (86_400, 0.95, 0, True),
        (86_399, 0.95, 0, False),
        (86_400, 90.0, GROWN_BYTES, False),
    ],
)
def test_full_collections_come_when_memory_grew_and_as_seldom_as_they_are_long(
    passed_s: float, spent_s: float, grown: int, expected: bool
) -> None:
    assert due(passed_s, spent_s, grown) is expected


async def test_cycles_that_grew_old_are_collected_once_memory_has_grown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("proxy_usage.service.collector.LOOK_S", 0.01)
    freed: list[None] = []

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append(None)

    Cycle()
    gc.disable()
    collecting = asyncio.create_task(collect_seldom())
    try:
        await asyncio.sleep(0.1)
        assert not freed
        grown = bytearray(_most() + GROWN_BYTES)
        async with asyncio.timeout(60):
            while not freed:
                await asyncio.sleep(0.01)
        assert grown
    finally:
        gc.enable()
        collecting.cancel()


def _most() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_python_starts_no_full_collection_by_itself() -> None:
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    try:
        settle()
        before = gc.get_stats()[2]["collections"]
        held = [[number] for number in range(300_000)]
        assert gc.get_stats()[1]["collections"] > 10
        assert gc.get_stats()[2]["collections"] == before
        assert len(held) == 300_000
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
        sys.setswitchinterval(interval)


def test_it_would_without() -> None:
    threshold = gc.get_threshold()
    try:
        gc.set_threshold(700, 10, 10)  # Python's own: a service that ran in this process has set others
        gc.collect()
        before = gc.get_stats()[2]["collections"]
        # Python wants a quarter more than there was.
        held = [[number] for number in range(300_000 + len(gc.get_objects()) // 2)]
        assert gc.get_stats()[2]["collections"] > before
        assert held
    finally:
        gc.set_threshold(*threshold)


class _Row:
    """Something that the collector knows, as the rows and keys of a turn."""

    def __init__(self, number: int) -> None:
        self.number = [number]


@pytest.mark.parametrize("walked", [False, True])
def test_steps_that_let_go_of_as_much_as_they_make_leave_no_pile_of_young_objects(*, walked: bool) -> None:
    """A turn takes totals out of a fold, and makes keys and windows of them."""
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    folded = [_Row(number) for number in range(30_000)]
    young = 0
    try:
        settle()
        held: list[_Row] = []
        while folded:
            held.extend(_Row(folded.pop().number[0]) for _ in range(24))
            if walked:
                collect_young()
            young = max(young, len(gc.get_objects(0)) + len(gc.get_objects(1)))
        assert len(held) == 30_000
        assert (young < 3_000) is walked
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
