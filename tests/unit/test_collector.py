"""The collector of cycles leaves alone what is held, and takes a thousandth of the time."""

import gc
import sys

import pytest

from proxy_usage.service.collector import MAX_PAUSE_S, MIN_PAUSE_S, pause_s, settle


@pytest.mark.parametrize(
    ("spent_s", "pause"), [(0.0, MIN_PAUSE_S), (0.02, MIN_PAUSE_S), (0.5, 500.0), (9.0, MAX_PAUSE_S)]
)
def test_full_collections_are_as_rare_as_they_are_long(spent_s: float, pause: float) -> None:
    assert pause_s(spent_s) == pause


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
    gc.collect()
    before = gc.get_stats()[2]["collections"]
    held = [[number] for number in range(1_000_000)]
    assert gc.get_stats()[2]["collections"] > before
    assert held
