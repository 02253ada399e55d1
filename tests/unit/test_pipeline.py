"""From a message's bytes to a turn: which window, tenant and fate; and what a refused turn leaves."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from inner_sink import InnerSink, full, roomy
from money import DAY_MS, HOUR_MS, MINUTE_MS, T0
from wire import DOWNSTREAM_START, http_row, message, tcp_row

from proxy_usage.attribution import Attributor
from proxy_usage.errors import StoreError, StoreFull
from proxy_usage.holding import OVERFLOW
from proxy_usage.intake import by_node
from proxy_usage.model import NS_PER_MS, NS_PER_SECOND
from proxy_usage.pipeline import Port
from proxy_usage.service.build import build_attributor, build_folds

ALPHA = {"project_name": "alpha"}
ROUTE = "httproute/ns-1/web/rule/0/match/0/*"


def row(end_ns: int = T0 * NS_PER_MS, duration_ns: int = 1_000_000, **how: Any) -> Any:
    """A request of alpha that ended at a moment."""
    how = {"tags": ALPHA, "route": ROUTE, "wire": (10, 100)} | how
    return http_row(start_ns=end_ns - duration_ns, duration_ns=duration_ns, **how)


def closed(sink: InnerSink) -> dict[int, int]:
    """Closes everything: requests by start of their window, relative to T0."""
    sink.close_all()
    rows = sink.books.rows(
        "SELECT window_ms, sum(value) FROM events WHERE meter='requests' GROUP BY window_ms"
    )
    return {window_ms - T0: value for window_ms, value in rows}


# --- which window ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end_ns", "window"),
    [
        (T0 * NS_PER_MS, 0),  # midnight itself is of the new day
        (T0 * NS_PER_MS - 1, -MINUTE_MS),  # a nanosecond before it is of the old one
        (T0 * NS_PER_MS + 1, 0),
        ((T0 + MINUTE_MS) * NS_PER_MS - 1, 0),
        ((T0 + MINUTE_MS) * NS_PER_MS, MINUTE_MS),
    ],
)
@pytest.mark.parametrize("duration_ns", [0, 1, 90 * NS_PER_SECOND])
def test_a_row_belongs_to_the_window_in_which_it_ended_to_the_nanosecond(
    tmp_path: Path, end_ns: int, window: int, duration_ns: int
) -> None:
    with InnerSink(tmp_path, now_ms=T0 + MINUTE_MS) as sink:
        sink.read(row(end_ns, duration_ns))
        assert closed(sink) == {window: 1}
        sink.check_books()


@pytest.mark.parametrize(
    ("end_ms", "window", "note"),
    [
        (T0 + 299_999, 240_000, None),
        (T0 + 300_000, 300_000, None),
        (T0 + 300_001, 0, "future"),
        (T0 + 5 * 366 * DAY_MS, 0, "future"),  # 2031
        (T0 - 29 * DAY_MS, -29 * DAY_MS, None),
        (T0 - 29 * DAY_MS - 1, 0, "past_horizon"),
    ],
)
def test_what_is_not_credible_is_counted_in_the_present_window_and_noted(
    tmp_path: Path, end_ms: int, window: int, note: str | None
) -> None:
    with InnerSink(tmp_path, now_ms=T0) as sink:
        sink.read(row(end_ms * NS_PER_MS))
        assert closed(sink) == {window: 1}
        assert sink.pipeline.observe().notes == ({note: 1} if note else {})
        sink.check_books()


def test_a_row_without_a_start_is_counted_in_the_present_window(tmp_path: Path) -> None:
    with InnerSink(tmp_path, now_ms=T0 + 1) as sink:
        sink.read(http_row(start_ns=None, duration_ns=5, tags=ALPHA, wire=(1, 2)))
        sink.read(http_row(start_ns=None, duration_ns=None, tags=ALPHA))
        assert closed(sink) == {0: 2}
        assert sink.pipeline.observe().notes["no_start_time"] == 2
        assert sink.check_books()["connection_seconds"]["remainders"] == 5


@pytest.mark.parametrize("behind_ms", [0, 10_000, 65_000])
def test_an_hour_of_an_envoy_that_is_always_behind_is_counted_whole(tmp_path: Path, behind_ms: int) -> None:
    with InnerSink(tmp_path, now_ms=T0) as sink:
        late = Counter[tuple[str, int]]()
        for at_ms in range(T0, T0 + HOUR_MS, 5_000):
            sink.read(row((at_ms - behind_ms) * NS_PER_MS), at_ms=at_ms)
            for event in sink.turn():
                if at_ms >= event.window_ms + 2 * MINUTE_MS + 15_000:  # grace and spread are over
                    late[sink.meters[event.meter].name, at_ms // MINUTE_MS] += 1
        assert max(late.values(), default=0) <= 1  # per meter and minute
        assert sum(closed(sink).values()) == 720
        sink.check_books()


# --- which fate -----------------------------------------------------------------------------------


def test_each_row_has_one_fate_and_a_bad_one_costs_itself_alone(tmp_path: Path) -> None:
    rows = [
        row(),
        row(type=DOWNSTREAM_START),
        row(wire=(1 << 60, 0)),
        row(duration_ns=-1),
        row(duration_ns=401 * DAY_MS * NS_PER_MS),
        row(tags={}, route=""),  # a scanner: nobody's, and not worth holding
        row(tags={}),  # routed: somebody's
        row(tags={"project_name": "Not A Project"}),
        row(tags={}, headers={"x-project": "beta"}),
    ]
    raw = message(*rows)
    at = raw.index(b"Not A Project")
    spoiled = raw[:at] + b"\xff" + raw[at + 1 :]
    with InnerSink(tmp_path) as sink:
        sink.read_raw(raw)
        sink.read_raw(spoiled)
        sink.read_raw(b"\x12\x04\x0a\x02\xff\xff")  # one row, two bytes that are none
        sink.read_raw(raw[:-1])  # cut off: the last row is lost, and was never read
        sink.read_raw(b"\xff" * 50)
        sink.turn()
        assert sink.books.counters("rows") == {
            "counted/": 4 + 4 + 3,
            "skipped/start": 3,
            "skipped/no_route": 3,
            "invalid/bytes": 3,
            "invalid/duration": 6,
            "invalid/malformed": 1,
        }
        reasons = dict(sink.books.rows("SELECT reason, sum(rows) FROM held GROUP BY reason"))
        assert reasons == {"no_tenant": 3, "invalid_tenant": 2, "invalid_utf8": 1}
        assert sink.pipeline.observe().notes["malformed_message"] >= 1
        sink.check_books()


def test_held_usage_keeps_the_raw_identity_and_every_amount(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        for _ in range(3):
            sink.read(row(tags={"project_name": "No Project"}, duration_ns=7))
        sink.turn()
        assert sink.books.held() == {
            "requests": 3,
            "ingress_bytes": 30,
            "egress_bytes": 300,
            "connection_seconds": 21,
        }
        ((identity, rows),) = sink.books.rows("SELECT identity, rows FROM held")
        assert b"No Project" in identity
        assert rows == 3
        assert closed(sink) == {}


def test_ten_thousand_tenants_of_a_clients_choosing_are_bounded_and_held_beyond(tmp_path: Path) -> None:
    with InnerSink(tmp_path, tenant={"max_tenants": 50, "unattributed": {"max_identities": 100}}) as sink:
        for start in range(0, 10_000, 500):
            sink.read(*(row(tags={}, headers={"x-project": f"made-up-{start + n}"}) for n in range(500)))
            sink.turn()
        assert sink.pipeline.windows.tenants == 50
        ((identities, rows, reason),) = sink.books.rows("SELECT count(*), sum(rows), max(reason) FROM held")
        assert (identities <= 102, rows, reason) == (True, 9_950, "tenant_limit")
        assert sum(closed(sink).values()) == 50
        assert sink.check_books()["requests"]["held"] == 9_950


def test_the_identities_held_between_two_turns_are_bounded_and_their_sums_exact(tmp_path: Path) -> None:
    with InnerSink(tmp_path, tenant={"unattributed": {"max_identities": 10}}) as sink:
        for number in range(200):
            sink.read(row(tags={"project_name": f"No {number}"}, wire=(number, 0)))
            sink.pipeline.drain(sink.now_ms)
        turn = sink.pipeline.begin(sink.now_ms)
        assert len(turn.held) == 11
        assert [held.rows for held in turn.held if held.identity == OVERFLOW] == [190]
        assert sum(held.amounts[1] for held in turn.held) == sum(range(200)) == turn.counted[1]


def test_random_host_names_do_not_multiply_identities(tmp_path: Path) -> None:
    """No rule reads the authority here, and what no rule reads is not looked at."""
    with InnerSink(tmp_path) as sink:
        for start in range(0, 5_000, 500):
            sink.read(*(row(authority=f"x{start + n}.apps.example") for n in range(500)))
        turn = sink.pipeline.begin(sink.now_ms)
        ((_, rows, *_),) = turn.windows.changed
        assert rows == 5_000


def test_a_connection_of_bytes_is_no_request(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(tcp_row(sizes=(5, 7), tags=ALPHA, duration_ns=2 * NS_PER_SECOND))
        sink.close_all()
        assert sink.books.counters("counted") == {
            "ingress_bytes": 5,
            "egress_bytes": 7,
            "connection_seconds": 2 * NS_PER_SECOND,
        }
        sink.check_books()


def test_so_many_identities_that_the_fold_is_full_are_drained_in_between(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.pipeline._folds[Port.ALL]._limit = 5_000  # type: ignore[attr-defined]
        for number in range(14):
            sink.read(*(row(tags={"project_name": f"t-{number}-{n}"}) for n in range(1_000)))
            assert not sink.pipeline._folds[Port.ALL].full
        # At least as many were booked as were read since the fold was full for the first time.
        assert sink.pipeline.windows.tenants >= 9_000
        sink.turn()
        assert sink.rows() == {"counted": 14_000}


def test_other_rules_apply_to_what_comes_after_them(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        both = {"project_name": "alpha", "other": "beta"}
        sink.read(row(tags=both))
        config = sink.config.model_copy(
            update={"tenant": sink.config.tenant.model_validate({"rules": [{"custom_tag": "other"}]})}
        )
        attributor: Attributor = build_attributor(config)
        sink.pipeline.replace(build_folds(config, attributor), attributor, sink.now_ms)
        sink.read(row(tags=both))
        sink.close_all()
        tenants = sink.books.rows(
            "SELECT k.tenant FROM events e JOIN keys k USING(key) WHERE meter='requests'"
        )
        assert sorted(tenants) == [("alpha",), ("beta",)]


# --- turns that are refused -----------------------------------------------------------------------


def test_a_refused_turn_is_in_the_next_one_with_what_came_meanwhile(tmp_path: Path) -> None:
    with InnerSink(tmp_path, now_ms=T0) as sink:
        sink.read(row(), row(tags={"project_name": "No"}), row(type=DOWNSTREAM_START))
        sink.storage.database.db.execute("PRAGMA query_only=1")
        for number in range(3):
            with pytest.raises(StoreError):
                sink.turn(
                    T0 + 2 * MINUTE_MS + number,
                    meanwhile=lambda: sink.read(row(), row(tags={"project_name": "No"})),
                )
        sink.storage.database.reopen()
        sink.turn()
        assert sink.rows() == {"counted": 8, "skipped": 1}
        assert sum(closed(sink).values()) == 4
        assert sink.check_books()["requests"]["held"] == 4
        assert by_node(sink.storage.intake.counts()) == {"envoy-1": 9}


def test_end_rows_are_counted_by_node_whatever_becomes_of_them_and_survive_a_crash(tmp_path: Path) -> None:
    """Envoy's counters of requests are compared with them, and Envoy knows of no tenant."""
    with InnerSink(tmp_path, now_ms=T0) as sink:
        sink.read(row(), row(tags={"project_name": "No"}), row(route=""))
        sink.read(tcp_row())
        sink.read(row(details="internal_redirect"), row(type=DOWNSTREAM_START), node="envoy-2")
        sink.storage.database.db.execute("PRAGMA query_only=1")
        with pytest.raises(StoreError):
            sink.turn()
        sink.storage.database.reopen()
        sink.turn()
        assert sink.pipeline.ended == {"envoy-1": 3, "envoy-2": 1}
        sink.read(row())
        sink.crash()
        assert sink.pipeline.ended == {"envoy-1": 3, "envoy-2": 1}


def test_while_the_store_is_full_nothing_read_is_lost(tmp_path: Path) -> None:
    with InnerSink(tmp_path, now_ms=T0) as sink:
        full(sink)
        refused = 0
        for number in range(60):
            sink.read(*(row(tags={"project_name": f"t-{number}-{n}"}, wire=(n, 1)) for n in range(100)))
            try:
                sink.turn(T0 + number * 5_000)
            except StoreFull:
                refused += 1
        assert refused > 50
        roomy(sink)
        sink.close_all()
        sink.turn()
        terms = sink.check_books()
        assert terms["requests"]["minted"] == 6_000
        assert terms["ingress_bytes"]["minted"] == 60 * sum(range(100))


def test_a_turn_of_nothing_says_so(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        assert sink.pipeline.begin(sink.now_ms).is_empty
        sink.read(row(type=DOWNSTREAM_START))
        assert not sink.pipeline.begin(sink.now_ms).is_empty


# --- another configuration ------------------------------------------------------------------------


def reopened(sink: InnerSink, **changes: Any) -> None:
    sink.config = sink.config.model_copy(update=changes)
    sink.crash()


def test_windows_open_under_other_meters_close_under_those(tmp_path: Path) -> None:
    with InnerSink(tmp_path, now_ms=T0) as sink:
        sink.read(row(duration_ns=1_700_000_000))
        sink.turn()
        meters = dict(sink.config.meters)
        reopened(sink, meters={name: meters[name] for name in ("connection_seconds", "requests")})
        assert len(sink.pipeline.windows) == 0
        rows = sink.books.rows("SELECT meter, value FROM events ORDER BY meter")
        assert rows == [
            ("connection_seconds", 1),
            ("egress_bytes", 100),
            ("ingress_bytes", 10),
            ("requests", 1),
        ]
        sink.minted |= dict(sink.books.rows("SELECT id, body FROM events"))
        sink.read(row(duration_ns=300_000_000))
        sink.close_all()  # the carried remainder goes on under the meter's new place
        assert sink.books.remainders() == {}
        assert sink.books.tallies()[0, "minted", "connection_seconds"] == (2, 2)


def test_windows_open_under_another_length_are_dated_within_themselves(tmp_path: Path) -> None:
    """A minute before midnight must not become an hour of the next day, and of the next bill."""
    with InnerSink(tmp_path, now_ms=T0 - 1) as sink:
        sink.read(row(T0 * NS_PER_MS - 1))
        sink.turn()
        reopened(sink, windows=sink.config.windows.model_copy(update={"length": HOUR_MS}))
        bodies = [body for (body,) in sink.books.rows("SELECT body FROM events")]
        assert bodies
        assert all(b'"time":"2026-11-21T23:59:59.999Z"' in body for body in bodies)
