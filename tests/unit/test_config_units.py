"""Durations and sizes: what is read is what was meant, and nothing is rounded."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_usage.config.units import (
    DURATION_PATTERN,
    SIZE_PATTERN,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("30s", 30_000),
        ("250ms", 250),
        ("5m", 300_000),
        ("29d", 2_505_600_000),
        ("1h30m", 5_400_000),
        ("0s", 0),
    ],
)
def test_durations(text: str, ms: int) -> None:
    assert parse_duration(text) == ms


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 67_108_864),
        ("8GiB", 8 << 30),
        ("500kB", 500_000),
        (1024, 1024),
        ("7", 7),
        ("1 TiB", 1 << 40),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("30", "'30' has no unit"),
        (30, "'30' has no unit"),
        (1.5, "'1.5' is not a whole number with a unit"),
        ("1.5h", "'1.5h' is not a whole number with a unit"),
        ("-5s", "negative durations"),
        (-5, "negative durations"),
        ("5m3h", "'5m3h' is not a duration"),
        ("1h1h", "'1h1h' is not a duration"),
        ("5 s", "'5 s' is not a duration"),
        ("٣s", "'٣s' is not a duration"),
        ("", "'' is not a duration"),
        (True, "is not a duration"),
        (None, "is not a duration"),
        ("99999999999999d", "longer than can be counted"),
    ],
)
def test_what_is_no_duration(text: object, what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(what)):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (1.5, "'1.5' is not a whole number"),
        ("1,5GiB", "'1,5GiB' is not a whole number"),
        (-1, "negative sizes"),
        ("-1MiB", "negative sizes"),
        ("64mb", "unit 'mb' is not known (did you mean MB?)"),
        ("64M", "unit 'M' is not known (did you mean MiB?)"),
        ("64 blocks", "unit 'blocks' is not known"),
        ("much", "'much' is not a size"),
        (False, "is not a size"),
        ([], "is not a size"),
        ("9223372036854775808", "more than can be counted"),
    ],
)
def test_what_is_no_size(text: object, what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(what)):
        parse_size(text)


@given(st.integers(0, (1 << 63) - 1))
def test_durations_round_trip(ms: int) -> None:
    text = format_duration(ms)
    assert parse_duration(text) == ms
    assert re.fullmatch(DURATION_PATTERN, text)  # the schema accepts what is shown


@given(st.integers(0, (1 << 63) - 1) | st.integers(0, 4096).map(lambda n: n << 30))
def test_sizes_round_trip(size: int) -> None:
    text = format_size(size)
    assert parse_size(text) == size
    assert isinstance(text, int) or re.fullmatch(SIZE_PATTERN, text)


@given(st.text(max_size=12) | st.from_regex(r"[0-9]{0,3}[dhms.kKMGTiB -]{0,4}"))
def test_anything_else_is_a_value_error_or_whole(text: str) -> None:
    for parse in (parse_duration, parse_size):
        try:
            value = parse(text)
        except ValueError:
            continue
        else:
            assert type(value) is int
            assert value >= 0
