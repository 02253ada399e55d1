"""How often turns are taken: they never fill more than a tenth of a core, and wait for no disk's sake."""

import pytest

from proxy_usage.service.turns import pause_s


@pytest.mark.parametrize("worked_s", [0.0, 0.001, 0.012, 0.0278, 0.05, 0.4, 0.55])
def test_a_turn_that_works_long_is_taken_less_often(worked_s: float) -> None:
    pause = pause_s(0.25, worked_s, worked_s)
    assert pause >= 0.25
    assert worked_s <= (worked_s + pause) / 10 + 1e-9


@pytest.mark.parametrize("lasted_s", [0.0, 0.1, 0.25])
def test_waiting_for_the_disk_keeps_the_interval(lasted_s: float) -> None:
    """Nor does reading streams in between: what is read is what a crash would lose."""
    assert pause_s(0.25, 0.0125, lasted_s) == 0.25  # a twentieth of the interval: 5 % of a core


def test_a_slow_disk_has_half_of_its_time_for_others() -> None:
    assert pause_s(0.25, 0.01, 1.5) == 1.5


def test_a_disk_that_stalled_does_not_keep_the_next_turn_away() -> None:
    assert pause_s(0.25, 0.01, 60) == 5
    assert pause_s(0.25, 60, 60) == 5
