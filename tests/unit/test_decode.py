"""Rows into totals: every line of the table of row types, every edge of size and time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import wire
from folding import (
    COUNTED,
    DAY_MS,
    EVERYTHING,
    LONG,
    MINUTE_MS,
    ORIGIN,
    PRESENT_MS,
    STREAM,
    Both,
    fold,
    only,
    plan,
    stream_of,
)
from wire import NOW_MS, START_NS, http_row, message, tcp_row

from proxy_usage.decode import EnvoySettings, StreamRow
from proxy_usage.model import MAX_BYTES, MAX_DURATION_NS, NS_PER_MS, NS_PER_SECOND, Identity, Quantity

INTERVAL_MS = 60_000


# ── the table of row types ──


def test_a_downstream_end_is_one_request_with_its_bytes_and_time() -> None:
    drained = fold(http_row(wire=(80, 1176), body=(7, 1000), duration_ns=1_234_567))
    assert drained.fates == {COUNTED: 1}
    identity, window_ms, total = only(drained)
    assert identity == Identity(ORIGIN, -1, b"", (), routed=False)
    assert window_ms == PRESENT_MS
    assert total == [1, 1, 80, 1176, 7, 1000, 1_234_567]
    assert not drained.notes
    assert not drained.complaints


def test_a_tcp_connection_end_is_no_request_and_its_bytes_are_wire_and_body() -> None:
    drained = fold(tcp_row(sizes=(4200, 4300), wire=(1, 2)))
    assert only(drained)[2] == [1, 0, 4200, 4300, 4200, 4300, wire.DURATION_NS]


def test_the_type_decides_what_a_row_is_not_the_kind_of_logger() -> None:
    tcp_by_http_grpc = http_row(type=wire.TCP_CONNECTION_END, wire=(5, 6), body=(5, 6))
    assert only(fold(tcp_by_http_grpc))[2][:6] == [1, 0, 5, 6, 5, 6]
    http_by_tcp_grpc = tcp_row(type=wire.DOWNSTREAM_END, sizes=(10, 20), wire=(110, 120))
    assert only(fold(http_by_tcp_grpc))[2][:6] == [1, 1, 110, 120, 10, 20]


@pytest.mark.parametrize(
    ("type_", "reason"),
    [
        (wire.TCP_UPSTREAM_CONNECTED, "connected"),
        (wire.DOWNSTREAM_START, "start"),
        (wire.TCP_CONNECTION_START, "start"),
        (wire.DOWNSTREAM_TUNNEL, "tunnel"),
        (wire.UPSTREAM_POOL_READY, "upstream"),
        (wire.UPSTREAM_PERIODIC, "upstream"),
        (wire.UPSTREAM_END, "upstream"),
        (wire.NOT_SET, "untyped"),
        (wire.TCP_PERIODIC, "periodic"),
        (wire.DOWNSTREAM_PERIODIC, "periodic"),
        (11, "unknown_type"),
        (2**31 - 1, "unknown_type"),
        (-5, "unknown_type"),
    ],
)
@pytest.mark.parametrize("row", [http_row, tcp_row])
def test_rows_that_never_count(type_: int, reason: str, row: Callable[..., Any]) -> None:
    drained = fold(row(type=type_), row(type=type_))
    assert drained.fates == {("skipped", reason): 2}
    assert not drained.totals
    assert not drained.long_rows


@pytest.mark.parametrize("type_", [wire.DOWNSTREAM_START, wire.DOWNSTREAM_TUNNEL, wire.UPSTREAM_END])
def test_a_flush_interval_changes_nothing_about_them(type_: int) -> None:
    assert [fate for fate, _ in fold(http_row(type=type_), envoy=LONG).fates] == ["skipped"]


def test_an_unknown_type_is_complained_about_once() -> None:
    folder = Both(plan(), accepts=lambda _rule, _text: True, envoy=EnvoySettings())
    for _ in range(3):
        folder.message(ORIGIN, message(http_row(type=77), http_row(type=77)), NOW_MS)
    (complaint,) = folder.drain().complaints
    assert "77" in complaint
    assert "envoy-1" in complaint
    folder.message(ORIGIN, message(http_row(type=77)), NOW_MS)
    assert folder.drain().complaints == []


def test_rows_of_listener_logs_are_connections() -> None:
    conn = ORIGIN._replace(log_name="conn")
    assert fold(tcp_row(type=wire.NOT_SET), origin=conn).fates == {("skipped", "listener"): 1}
    assert fold(http_row(type=wire.NOT_SET), origin=conn).fates == {("skipped", "listener"): 1}
    end = EnvoySettings(untyped="end")
    assert fold(tcp_row(type=wire.NOT_SET), origin=conn, envoy=end).fates == {("skipped", "listener"): 1}
    other = EnvoySettings(connection_logs=frozenset({"listeners"}))
    assert fold(tcp_row(type=wire.NOT_SET), origin=conn, envoy=other).fates == {("skipped", "untyped"): 1}


def test_untyped_rows_can_be_ends() -> None:
    end = EnvoySettings(untyped="end")
    assert only(fold(http_row(type=wire.NOT_SET, wire=(1, 2)), envoy=end))[2][:4] == [1, 1, 1, 2]
    assert only(fold(tcp_row(type=wire.NOT_SET, sizes=(1, 2)), envoy=end))[2][:4] == [1, 0, 1, 2]


def test_untyped_rows_of_open_streams_are_periodic() -> None:
    for row in (http_row(type=wire.NOT_SET), tcp_row(type=wire.NOT_SET)):
        row.common_properties.intermediate_log_entry = True
        assert fold(row, envoy=EnvoySettings(untyped="end")).fates == {("skipped", "periodic"): 1}
        drained = fold(row, envoy=replace(LONG, untyped="end"))
        assert drained.fates == {STREAM: 1}
        assert not drained.long_rows[0].end


@pytest.mark.parametrize("type_", [wire.DOWNSTREAM_END, wire.DOWNSTREAM_PERIODIC])
def test_an_internal_redirect_is_not_a_second_request(type_: int) -> None:
    row = http_row(type=type_, details="internal_redirect", status=302, wire=(80, 0))
    assert fold(row, envoy=LONG).fates == {("skipped", "internal_redirect"): 1}


# ── finished or long ──


@pytest.mark.parametrize(
    ("duration_ns", "finished"),
    [
        (0, True),
        (INTERVAL_MS * 900_000 - 1, True),
        (INTERVAL_MS * 900_000, False),
        (INTERVAL_MS * NS_PER_MS, False),
    ],
)
@pytest.mark.parametrize("row", [http_row, tcp_row])
def test_a_row_is_finished_below_nine_tenths_of_the_interval(
    duration_ns: int, finished: bool, row: Callable[..., Any]
) -> None:
    drained = fold(row(duration_ns=duration_ns), envoy=LONG)
    assert drained.fates == {COUNTED if finished else STREAM: 1}
    assert len(drained.long_rows) == (not finished)
    assert len(drained.totals) == finished


def test_an_odd_interval_is_compared_without_rounding() -> None:
    seven = EnvoySettings(flush_interval_ms=7)  # 6.3 ms
    assert fold(http_row(duration_ns=6_299_999), envoy=seven).fates == {COUNTED: 1}
    assert fold(http_row(duration_ns=6_300_000), envoy=seven).fates == {STREAM: 1}


def test_without_an_interval_every_end_is_finished() -> None:
    assert fold(http_row(duration_ns=MAX_DURATION_NS)).fates == {COUNTED: 1}


def test_an_end_that_does_not_say_how_long_may_be_a_long_one() -> None:
    assert stream_of(http_row(duration_ns=None), envoy=LONG).end
    assert fold(http_row(duration_ns=None)).fates == {COUNTED: 1}


def test_a_long_end_leaves_as_running_totals() -> None:
    duration_ns = 90 * NS_PER_SECOND + 5
    tags = {"conn_id": "17", "project_name": "alpha"}
    started_ns = START_NS - 90 * NS_PER_SECOND
    row = stream_of(
        http_row(
            start_ns=started_ns, duration_ns=duration_ns, wire=(1, 2), body=(3, 4), tags=tags, stream_id="s-1"
        ),
        envoy=LONG,
        quantities=(Quantity.OPEN_NS, Quantity.WIRE_OUT, Quantity.REQUESTS),
    )
    assert row == StreamRow(
        origin=ORIGIN,
        conn_id=b"17",
        start_ns=started_ns,
        stream_id=b"s-1",
        identity=Identity(ORIGIN, 0, b"alpha", (), routed=False),
        window_ms=PRESENT_MS,
        amounts=(duration_ns, 2, 1),
        end=True,
        http=True,
        emit_ms=NOW_MS - 2_000,
        now_ms=NOW_MS,
    )


def test_a_periodic_row_takes_its_times_from_tags() -> None:
    emitted_ms = NOW_MS - 41_000  # in the window before
    tags = {"dur_ms": "61500", "emit_us": f"{emitted_ms}999", "conn_id": "1"}
    row = stream_of(
        http_row(type=wire.DOWNSTREAM_PERIODIC, duration_ns=None, wire=(10, 20), body=(1, 2), tags=tags),
        envoy=LONG,
    )
    assert row.amounts == (0, 10, 20, 1, 2, 61_500 * NS_PER_MS)
    assert row.emit_ms == emitted_ms
    assert row.window_ms == PRESENT_MS - MINUTE_MS
    assert not row.end


def test_a_tcp_periodic_row_counts_its_connection() -> None:
    row = stream_of(
        tcp_row(
            type=wire.TCP_PERIODIC,
            sizes=(10, 20),
            wire=(1, 2),
            tags={"dur_ms": "60005", "emit_us": str(NOW_MS * 1_000)},
        ),
        envoy=LONG,
    )
    assert row.amounts == (0, 10, 20, 10, 20, 60_005 * NS_PER_MS)
    assert not row.http


@pytest.mark.parametrize("text", ["", "-", "12.5", "-3", "1_000", " 7", "9" * 19])
def test_a_periodic_row_without_usable_tags_is_of_now(text: str) -> None:
    tags = {"dur_ms": text, "emit_us": text}
    drained = fold(http_row(type=wire.DOWNSTREAM_PERIODIC, duration_ns=None, tags=tags), envoy=LONG)
    assert drained.notes == {"no_duration": 1}
    (row,) = drained.long_rows
    assert row.amounts[5] == 0
    assert row.emit_ms == NOW_MS


def test_tag_names_are_the_operators() -> None:
    envoy = EnvoySettings(flush_interval_ms=1_000, connection_id="c", duration_ms="d", emit_us="e")
    tags = {"c": "9", "d": "1003", "e": str(NOW_MS * 1_000 - 1)}
    row = stream_of(http_row(type=wire.DOWNSTREAM_PERIODIC, tags=tags), envoy=envoy)
    assert (row.conn_id, row.amounts[5], row.emit_ms) == (b"9", 1_003 * NS_PER_MS, NOW_MS - 1)


def test_without_an_emit_time_a_periodic_row_counts_its_bytes_alone() -> None:
    tags = {"dur_ms": "60000"}
    drained = fold(http_row(type=wire.DOWNSTREAM_PERIODIC, wire=(10, 20), tags=tags), envoy=LONG)
    assert drained.notes == {"no_emit_time": 1}
    (row,) = drained.long_rows
    assert (row.amounts[1:3], row.amounts[5], row.emit_ms) == ((10, 20), 0, NOW_MS)


@pytest.mark.parametrize(("open_ms", "early"), [(1, True), (53_999, True), (54_000, False), (60_000, False)])
def test_a_periodic_row_sooner_than_the_interval_is_not_booked(open_ms: int, early: bool) -> None:
    """Envoy flushes more often than we were told: end rows below 0.9 intervals book all of their stream."""
    tags = {"dur_ms": str(open_ms), "emit_us": str(NOW_MS * 1_000)}
    for row in (
        http_row(type=wire.DOWNSTREAM_PERIODIC, tags=tags),
        tcp_row(type=wire.TCP_PERIODIC, tags=tags),
    ):
        drained = fold(row, envoy=LONG)
        assert drained.fates == {("skipped", "early_periodic") if early else STREAM: 1}
        assert len(drained.long_rows) == (not early)


@pytest.mark.parametrize(
    ("duration_ns", "fate"),
    [(54_000 * NS_PER_MS - 1, COUNTED), (54_000 * NS_PER_MS, ("skipped", "misrouted"))],
)
def test_where_only_short_rows_go_a_long_end_row_is_misrouted(duration_ns: int, fate: object) -> None:
    envoy = EnvoySettings(flush_interval_ms=60_000, short_only=True)
    start_ns = PRESENT_MS * NS_PER_MS - duration_ns
    assert fold(http_row(start_ns=start_ns, duration_ns=duration_ns), envoy=envoy).fates == {fate: 1}


# ── sizes and times ──


@pytest.mark.parametrize("size", [MAX_BYTES, 2**63, 2**64 - 1])
@pytest.mark.parametrize("place", range(4))
def test_absurd_and_negative_sizes_are_invalid(size: int, place: int) -> None:
    sizes = [0, 0, 0, 0]
    sizes[place] = size
    drained = fold(http_row(wire=(sizes[0], sizes[1]), body=(sizes[2], sizes[3])), http_row(wire=(1, 1)))
    assert drained.fates == {("invalid", "bytes"): 1, COUNTED: 1}
    (complaint,) = drained.complaints
    assert "bytes" in complaint
    assert "envoy-1" in complaint
    assert fold(tcp_row(sizes=(sizes[0] + sizes[2], sizes[1] + sizes[3]))).fates == {("invalid", "bytes"): 1}


def test_the_largest_sizes_are_counted() -> None:
    assert only(fold(http_row(wire=(MAX_BYTES - 1, MAX_BYTES - 1))))[2][2:4] == [MAX_BYTES - 1] * 2


@pytest.mark.parametrize(
    ("seconds", "nanos", "fate"),
    [
        (0, 999_999_999, COUNTED),
        (0, 1_000_000_000, ("invalid", "duration")),
        (0, -1, ("invalid", "duration")),
        (-1, 0, ("invalid", "duration")),
        (-1, 999_999_999, ("invalid", "duration")),
        (400 * 86_400, 0, COUNTED),
        (400 * 86_400, 1, ("invalid", "duration")),
        (2**63 - 1, 0, ("invalid", "duration")),
        (-(2**63), 0, ("invalid", "duration")),
    ],
)
@pytest.mark.parametrize("name", ["duration", "time_to_last_downstream_tx_byte"])
def test_durations_at_the_edges(seconds: int, nanos: int, fate: tuple[str, str], name: str) -> None:
    row = http_row(duration_ns=None)
    duration = getattr(row.common_properties, name)
    duration.seconds, duration.nanos = seconds, nanos
    assert fold(row).fates == {fate: 1}


def test_a_tagged_duration_can_be_too_long() -> None:
    longest_ms = MAX_DURATION_NS // NS_PER_MS
    row = http_row(type=wire.DOWNSTREAM_PERIODIC, tags={"dur_ms": str(longest_ms)})
    assert fold(row, envoy=LONG).fates == {STREAM: 1}
    row = http_row(type=wire.DOWNSTREAM_PERIODIC, tags={"dur_ms": str(longest_ms + 1)})
    assert fold(row, envoy=LONG).fates == {("invalid", "duration"): 1}


@pytest.mark.parametrize(("seconds", "nanos"), [(1, -1), (1, 10**9), (-1, 0), (2**40, 0), (2**63 - 1, 0)])
def test_impossible_start_times_are_invalid(seconds: int, nanos: int) -> None:
    row = http_row()
    row.common_properties.start_time.seconds, row.common_properties.start_time.nanos = seconds, nanos
    assert fold(row).fates == {("invalid", "start_time"): 1}


def test_the_longest_time_to_a_last_byte_stands_in_for_a_duration() -> None:
    row = http_row(duration_ns=None)
    row.common_properties.time_to_last_rx_byte.nanos = 5
    row.common_properties.time_to_last_upstream_tx_byte.seconds = 3
    row.common_properties.time_to_last_upstream_rx_byte.nanos = 7
    row.common_properties.time_to_last_downstream_tx_byte.seconds = 2
    drained = fold(row)
    assert only(drained)[2][6] == 3 * NS_PER_SECOND
    assert not drained.notes


def test_a_row_without_any_duration_counts_no_time() -> None:
    drained = fold(http_row(duration_ns=None))
    assert only(drained)[2][6] == 0
    assert drained.notes == {"no_duration": 1}
    assert not fold(http_row(duration_ns=0)).notes


def test_a_row_without_start_is_of_the_present() -> None:
    drained = fold(http_row(start_ns=None, duration_ns=5))
    assert only(drained)[1:] == (PRESENT_MS, [1, 1, 0, 0, 0, 0, 5])
    assert drained.notes == {"no_start_time": 1}


@pytest.mark.parametrize(("before_ns", "window_ms"), [(1, PRESENT_MS - MINUTE_MS), (0, PRESENT_MS)])
def test_a_row_belongs_to_the_window_in_which_it_ended(before_ns: int, window_ms: int) -> None:
    duration_ns = 30 * NS_PER_SECOND
    start_ns = PRESENT_MS * NS_PER_MS - duration_ns - before_ns
    assert only(fold(http_row(start_ns=start_ns, duration_ns=duration_ns)))[1] == window_ms


@pytest.mark.parametrize(
    ("end_ns", "window_ms", "note"),
    [
        ((NOW_MS + 300_000) * NS_PER_MS, PRESENT_MS + 5 * MINUTE_MS, None),
        ((NOW_MS + 300_000) * NS_PER_MS + 1, PRESENT_MS, "future"),
        (1_924_992_000 * NS_PER_SECOND, PRESENT_MS, "future"),  # 2031
        ((NOW_MS - 29 * DAY_MS) * NS_PER_MS, PRESENT_MS - 29 * DAY_MS, None),
        ((NOW_MS - 29 * DAY_MS) * NS_PER_MS - 1, PRESENT_MS, "past_horizon"),
        (2_000_000, PRESENT_MS, "past_horizon"),
    ],
)
def test_incredible_times_are_booked_now(end_ns: int, window_ms: int, note: str | None) -> None:
    drained = fold(http_row(start_ns=end_ns - wire.DURATION_NS))
    assert only(drained)[1] == window_ms
    assert drained.notes == ({note: 1} if note else {})
    periodic = http_row(
        type=wire.DOWNSTREAM_PERIODIC, tags={"emit_us": str(end_ns // 1_000 + 1), "dur_ms": "60001"}
    )
    if note == "future":
        assert fold(periodic, envoy=LONG).long_rows[0].emit_ms == NOW_MS


@pytest.mark.parametrize(
    "quantities", [(), (Quantity.OPEN_NS,), (Quantity.BODY_OUT, Quantity.REQUESTS), EVERYTHING]
)
def test_amounts_are_the_plans_in_the_plans_order(quantities: tuple[Quantity, ...]) -> None:
    row = http_row(wire=(1, 2), body=(3, 4), duration_ns=5)
    amounts = dict(zip(EVERYTHING, [1, 1, 2, 3, 4, 5], strict=True))
    expected = [amounts[quantity] for quantity in quantities]
    assert only(fold(row, quantities=quantities))[2] == [1, *expected]
    long = http_row(wire=(1, 2), body=(3, 4), duration_ns=None)
    long.common_properties.time_to_last_rx_byte.nanos = 5
    assert list(stream_of(long, envoy=LONG, quantities=quantities).amounts) == expected


def test_rows_of_one_identity_and_window_add_up() -> None:
    alpha, beta = {"project_name": "alpha"}, {"project_name": "beta"}
    drained = fold(
        http_row(tags=alpha, wire=(1, 10), duration_ns=3),
        http_row(tags=beta, wire=(100, 1), duration_ns=1),
        http_row(tags=alpha, wire=(2, 20), body=(1, 1), duration_ns=4),
    )
    assert {identity.value: total for (identity, _), total in drained.totals.items()} == {
        b"alpha": [2, 2, 3, 30, 1, 1, 7],
        b"beta": [1, 1, 100, 1, 0, 0, 1],
    }
