"""Long streams: what one row does, what silence does, and what is bounded."""

from typing import Any

import pytest
from stream_rows import DAY_MS, KEY, ORIGIN, SILENT_MS, START_MS, booked, owner, row

from proxy_usage.streams import MOVES, SCAN, SHARDS

# ── rows ──


def test_differences_of_running_totals_are_booked() -> None:
    streams = owner()
    assert booked(streams, total=1) == (0, 10, 20, 30)
    assert booked(streams, total=1) == (0, 0, 0, 0)
    assert booked(streams, total=4) == (0, 30, 60, 90)
    assert booked(streams, total=2) == (0, 0, 0, 0)
    assert booked(streams, total=5, end=True) == (1, 10, 20, 30)
    assert booked(streams, total=5, end=True) == (0, 0, 0, 0)
    assert booked(streams, total=3) == (0, 0, 0, 0)
    assert len(streams) == 1


def test_each_meter_has_a_highest_total_of_its_own() -> None:
    streams = owner()
    assert booked(streams, amounts=(0, 10, 5, 0)) == (0, 10, 5, 0)
    assert booked(streams, amounts=(0, 8, 9, 3)) == (0, 0, 4, 3)


@pytest.mark.parametrize(
    "other",
    [
        {"origin": ORIGIN._replace(peer="spiffe://b")},
        {"origin": ORIGIN._replace(node_id="envoy-2")},
        {"conn_id": b"2"},
        {"start_ns": START_MS * 1_000_000 + 1_000},
        {"stream_id": b"1"},
        {"conn_id": b"", "stream_id": b"10"},  # not to be confused by where one part ends
        {"conn_id": b"10", "stream_id": b""},
    ],
)
def test_a_stream_is_known_by_all_that_is_known_of_it(other: dict[str, Any]) -> None:
    streams = owner()
    booked(streams, total=7)
    assert booked(streams, total=7, **other) == (0, 70, 140, 210)


def test_the_log_that_brought_a_row_does_not_matter() -> None:
    streams = owner()
    booked(streams, total=7)
    assert booked(streams, total=7, origin=ORIGIN._replace(log_name="open")) == (0, 0, 0, 0)


def test_a_row_without_a_tenant_leaves_what_it_says_to_the_next() -> None:
    streams = owner()
    assert streams.advance(row(), None) == (("skipped", "awaits_tenant"), None)
    assert len(streams) == 0
    assert booked(streams, total=3) == (0, 30, 60, 90)
    assert streams.advance(row(total=9), None).amounts is None
    assert streams.advance(row(total=10, end=True), None).amounts == (1, 70, 140, 210)
    assert booked(streams, total=10, end=True) == (0, 0, 0, 0)


# ── silence ──


def test_a_silent_stream_is_one_estimated_request_and_goes_on_when_it_speaks() -> None:
    streams = owner()
    booked(streams, total=3)
    assert streams.expire(START_MS + SILENT_MS - 1) == []
    assert streams.expire(START_MS + SILENT_MS) == [(KEY, START_MS + SILENT_MS, (1, 0, 0, 0))]
    assert streams.expire(START_MS + 2 * SILENT_MS) == []
    assert streams.estimated == 1
    late_ms = START_MS + DAY_MS
    assert booked(streams, total=4, now_ms=late_ms) == (0, 10, 20, 30)
    assert streams.expire(late_ms + SILENT_MS) == []  # silent again: its request is booked
    assert booked(streams, total=6, end=True, now_ms=late_ms + DAY_MS) == (0, 20, 40, 60)


def test_a_silent_connection_is_no_request() -> None:
    streams = owner()
    booked(streams, http=False)
    assert streams.expire(START_MS + SILENT_MS) == []
    assert streams.estimated == 1
    assert booked(streams, total=2, end=True, http=False) == (0, 10, 20, 30)


def test_a_stream_that_ended_is_not_silent_and_is_forgotten_in_time() -> None:
    streams = owner()
    booked(streams, end=True)
    assert streams.expire(START_MS + 30 * DAY_MS) == []
    assert len(streams) == 1
    assert streams.expire(START_MS + 30 * DAY_MS + 1) == []
    assert len(streams) == 0


def test_an_expired_stream_is_remembered_from_its_expiry_on() -> None:
    streams = owner()
    booked(streams, total=2)
    expired_ms = START_MS + 5 * DAY_MS
    streams.expire(expired_ms)
    streams.expire(expired_ms + 30 * DAY_MS)
    assert booked(streams, total=2, now_ms=expired_ms + 30 * DAY_MS) == (0, 0, 0, 0)


# ── the limit ──


def test_past_the_limit_a_stream_is_metered_at_its_end() -> None:
    streams = owner(2)
    booked(streams, 1)
    booked(streams, 2)
    assert streams.advance(row(3, 5), KEY) == (("skipped", "stream_limit"), None)
    assert booked(streams, 2, 2) == (0, 10, 20, 30)
    assert booked(streams, 3, 9, end=True) == (1, 90, 180, 270)
    assert len(streams) == 2
    assert streams.at_limit == 2


def test_an_end_at_the_limit_is_remembered_in_case_it_comes_again() -> None:
    streams = owner(8)
    for number in range(8):
        booked(streams, number)
    assert booked(streams, 8, 9, end=True) == (1, 90, 180, 270)
    assert booked(streams, 8, 9, end=True) == (0, 0, 0, 0)
    assert booked(streams, 8, 5) == (0, 0, 0, 0)
    assert streams.at_limit == 0


def test_ended_streams_make_room_and_those_that_may_speak_again_do_not() -> None:
    streams = owner(8)
    for number in range(8):
        booked(streams, number, end=number < 4)
    assert streams.advance(row(9), KEY).amounts is None
    streams.expire(START_MS + SILENT_MS)
    assert len(streams) == 4
    assert booked(streams, 9, now_ms=START_MS + SILENT_MS) == (0, 10, 20, 30)
    assert booked(streams, 5, 2, end=True) == (0, 10, 20, 30)  # expired, its request booked


def test_expired_streams_are_kept_when_there_is_no_room() -> None:
    streams = owner(8)
    for number in range(8):
        booked(streams, number)
    assert len(streams.expire(START_MS + SILENT_MS)) == 8
    assert streams.expire(START_MS + 3 * SILENT_MS) == []
    assert len(streams) == 8
    assert booked(streams, 5, 2, end=True) == (0, 10, 20, 30)


def test_ended_streams_are_kept_while_there_is_room() -> None:
    streams = owner(16)
    for number in range(14):
        booked(streams, number, end=True)
    streams.expire(START_MS + DAY_MS)
    assert len(streams) == 14


# ── how much at a time ──


def test_a_look_sees_a_bounded_part_and_all_in_turn() -> None:
    streams = owner()
    for number in range(12_000):
        booked(streams, number, end=True)
    places = []
    for _ in range(6):
        place = streams._next_shard
        streams.expire(START_MS + 1)
        looked = (streams._next_shard - place) % SHARDS
        seen = sum(len(streams._shards[(place + step) % SHARDS]) for step in range(looked))
        assert 0 < seen <= SCAN
        places.append(looked)
    assert sum(places) >= SHARDS


def test_however_many_fall_silent_at_once_each_is_expired_once() -> None:
    streams = owner()
    for number in range(3_000):
        booked(streams, number)
    expired = []
    while deltas := streams.expire(START_MS + SILENT_MS):
        assert len(deltas) <= MOVES
        expired.append(len(deltas))
    assert sum(expired) == streams.estimated == 3_000
    for number in range(0, 3_000, 100):
        assert booked(streams, number, 2, end=True) == (0, 10, 20, 30)


def test_however_many_are_forgotten_at_once_all_are_in_the_end() -> None:
    streams = owner()
    for number in range(3_000):
        booked(streams, number, end=True)
    left = len(streams)
    while len(streams):
        streams.expire(START_MS + 31 * DAY_MS)
        assert left - MOVES <= len(streams) < left
        left = len(streams)
