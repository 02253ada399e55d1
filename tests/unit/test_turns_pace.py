"""How often turns are taken: they never fill more than a tenth of the time, however long one takes."""

import pytest

from proxy_usage.service.turns import pause_s


@pytest.mark.parametrize("spent_s", [0.0, 0.001, 0.012, 0.0278, 0.05, 0.4, 0.55])
def test_a_turn_that_takes_long_is_taken_less_often(spent_s: float) -> None:
    pause = pause_s(0.25, spent_s)
    assert pause >= 0.25
    assert spent_s <= (spent_s + pause) / 10 + 1e-9


def test_a_disk_that_stalled_does_not_keep_the_next_turn_away() -> None:
    assert pause_s(0.25, 60) == 5


def test_a_turn_that_takes_little_keeps_the_interval() -> None:
    assert pause_s(0.25, 0.0125) == 0.25  # a twentieth of the interval: 5 % of a core
