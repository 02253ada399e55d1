"""What the page's figures are kept in: names that may be anything, an hour of points, who used most."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_usage.model import Cell, Key
from proxy_usage.page.names import MOST, name, octets, visible
from proxy_usage.page.ring import LEVELS, POINTS, RATES, STEP_MS, Ring
from proxy_usage.page.tops import HOUR_MS, Tops

NOW = 1_800_000_000_000
HOUR = NOW - NOW % HOUR_MS


@given(st.text(max_size=300))
def test_whatever_a_name_is_it_is_shown_on_one_line_and_short(text: str) -> None:
    shown = name(text)
    assert shown.isprintable()
    assert len(shown) <= 2 * MOST + len("… (300 characters)")
    assert octets(text.encode("utf-8", "surrogatepass")).isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain-1", "plain-1"),
        ("<b>&amp;", "<b>&amp;"),  # markup is text: it is never shown otherwise
        ("a\u202eb", "a\\u202eb"),
        ("a\x1b[2Jb\r\n\x00", "a\\x1b[2Jb\\r\\n\\x00"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("x" * 4_096, "x" * MOST + "… (4096 characters)"),
    ],
)
def test_what_cannot_be_seen_is_escaped_and_what_is_long_is_cut(text: str, shown: str) -> None:
    assert name(text) == shown


def test_a_long_name_of_invisible_characters_stays_short() -> None:
    assert len(name("\u202e" * 4_096)) < 200
    assert visible("\u202e" * 3) == "\\u202e" * 3
    assert octets(b"\xff\xfeok") == "\\xff\\xfeok"


def put(ring: Ring, step: int, total: int, level: int = 0) -> None:
    ring.add(NOW + step * STEP_MS, dict.fromkeys(RATES, total), dict.fromkeys(LEVELS, level))


def test_points_are_what_came_since_the_one_before() -> None:
    ring = Ring()
    for step, total in enumerate((100, 107, 107, 120)):
        put(ring, step, total, level=step)
    history = ring.history()
    assert history.end_ms == NOW + 3 * STEP_MS
    assert history.columns["entries"] == (0, 7, 0, 13)
    assert history.columns["queued"] == (0, 1, 2, 3)


def test_moments_at_which_nobody_looked_are_gaps() -> None:
    ring = Ring()
    put(ring, 0, 1)
    put(ring, 3, 4)
    assert ring.history().columns["entries"] == (0, None, None, 3)
    put(ring, 3 + 2 * POINTS, 9)
    assert ring.history().columns["entries"] == (5,)


def test_a_clock_that_is_moved_back_a_little_adds_no_second_point_for_a_moment() -> None:
    ring = Ring()
    put(ring, 10, 1)
    put(ring, 10, 2)
    put(ring, 4, 3)
    assert len(ring) == 1
    put(ring, 11, 5)
    assert ring.history().columns["entries"] == (0, 4)
    put(ring, -2 * POINTS, 6)
    assert ring.history().columns["entries"] == (1,)


def test_an_hour_and_no_more_is_kept() -> None:
    ring = Ring()
    for step in range(2 * POINTS):
        put(ring, step, step)
    columns = ring.history().columns
    assert {len(column) for column in columns.values()} == {POINTS}
    assert POINTS * STEP_MS == HOUR_MS
    assert sum(point or 0 for point in columns["entries"]) == POINTS


def cells(*usage: tuple[str, int]) -> list[Cell]:
    return [Cell(1, HOUR, Key(tenant, ()), 1, (amount, 1)) for tenant, amount in usage]


def test_who_has_most_of_this_hour_and_the_one_before() -> None:
    tops = Tops(2)
    tops.add(cells(("a", 5), ("b", 3)), HOUR)
    tops.add(cells(("b", 4), ("c", 1)), HOUR + HOUR_MS)
    top = tops.top(0, HOUR + HOUR_MS, count=2)
    assert (top.first, top.rest, top.tenants) == ((("b", 7), ("a", 5)), 1, 3)
    assert tops.since_ms(HOUR + HOUR_MS) == HOUR
    assert tops.top(0, HOUR + 2 * HOUR_MS).first == (("b", 4), ("c", 1))
    assert tops.top(0, HOUR + 9 * HOUR_MS).first == ()


def test_past_the_bound_no_usage_is_left_out_and_no_tenant_kept() -> None:
    tops = Tops(2, most=3)
    tops.add(cells(*((f"t{number}", 10) for number in range(1_000))), HOUR)
    top = tops.top(0, HOUR)
    assert len(top.first) == 3
    assert sum(value for _, value in top.first) + top.rest == 10_000
    tops.add(cells(("t0", 1)), HOUR - 5 * HOUR_MS)  # a clock that went back
    assert tops.top(0, HOUR).rest == 9_970


def test_a_tenant_without_any_of_a_meter_is_not_shown_for_it() -> None:
    tops = Tops(2)
    tops.add(cells(("a", 0)), HOUR)
    assert tops.top(0, HOUR) == ((), 0, 0)
    assert tops.top(1, HOUR).first == (("a", 1),)
