"""Long streams over turns: what a store holds of them, what a start reads back, what is billed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from envoy.service.accesslog.v3 import als_pb2
from metering import LEFT_OUT, Metering
from stream_rows import DAY_MS, OTHER, QUANTITIES, SILENT_MS, START_MS, Store, booked, owner, row, same_shard
from wire import captured, message, truth

from proxy_usage.model import Key, Origin
from proxy_usage.pipeline import Port
from proxy_usage.store.streams import load_streams, relay_streams
from proxy_usage.streams import SHARDS, stream_digest

PERIODIC = {"envoy": {"flush_interval": "1s"}}


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.db.close()


def test_a_turn_holds_what_changed_and_at_most_one_shard_more() -> None:
    streams = owner()
    for number in range(5_000):
        booked(streams, number)
    turn = streams.begin()
    assert len(turn.changed) == 5_000
    for _ in range(300):
        booked(streams, 17, 2)
        turn = streams.begin()
        assert turn.changed.keys() == {stream_digest(row(17))}
        assert turn.shard is not None
        assert turn.whole == streams._shards[turn.shard]
        assert turn.whole is not streams._shards[turn.shard]  # rows go on while it is saved
    assert len(turn.whole) < 100
    assert turn.record_size == 16 + 13 + 8 * len(QUANTITIES)  # and no more than that of a stream


def test_nothing_changed_is_nothing_to_save() -> None:
    streams = owner()
    assert streams.begin().is_empty
    booked(streams)
    assert not streams.begin().is_empty
    assert streams.begin().is_empty


def test_the_log_is_bounded_and_says_what_memory_says_after_any_turn(store: Store) -> None:
    """Thousands of turns, each with a few of many streams: a start at any point reads them all back."""
    streams = owner()
    longest = 0
    for turn in range(3_000):
        for step in range(3):
            booked(streams, (turn * 7 + step * 131) % 1_000, turn + 1)
        store.save(streams.begin())
        longest = max(longest, store.count("stream_log"))
        if turn % 61 == 0 or turn < 10:
            assert store.read()._shards == streams._shards
    assert 100 < longest <= SHARDS


def test_the_log_is_bounded_when_no_process_lives_long(store: Store) -> None:
    streams = owner()
    longest = 0
    for turn in range(2_000):
        for step in range(3):
            booked(streams, (turn * 7 + step * 131) % 600, turn + 1)
        store.save(streams.begin())
        longest = max(longest, store.count("stream_log"))
        if turn % 20 == 19:
            memory, streams = streams._shards, store.read()
            assert streams._shards == memory
    assert longest <= SHARDS


def test_a_store_that_is_at_rest_has_no_log(store: Store) -> None:
    streams = owner()
    for number in range(50):
        booked(streams, number)
    for _ in range(SHARDS + 1):
        store.save(streams.begin())
    assert store.count("stream_log") == 0
    assert streams.begin().is_empty
    assert store.read()._shards == streams._shards
    read = store.read()
    booked(read, 51)
    store.save(read.begin())  # turns go on with numbers of their own
    assert store.read()._shards == read._shards


def test_a_refused_turn_is_in_the_next(store: Store) -> None:
    streams = owner()
    booked(streams, 1)
    booked(streams, 2)
    refused = streams.begin()
    booked(streams, 2, 5, key=OTHER)
    booked(streams, 3)
    streams.rollback(refused)
    store.save(streams.begin())
    assert store.read()._shards == streams._shards
    assert store.read()._keys._keys == streams._keys._keys


def test_a_shard_whose_save_was_refused_stays_as_old_as_it_was(store: Store) -> None:
    """Else the log of its other streams would be taken for obsolete, and be gone after the next start."""
    first, second = same_shard(2)
    streams = owner()
    # A log turn that alone knows the first stream; its shard waits behind another.
    booked(streams, 1, 2)
    booked(streams, first, 2)
    store.save(streams.begin())
    booked(streams, second)
    refused = streams.begin()
    assert refused.shard == stream_digest(row(first))[0]
    booked(streams, second, 2)
    booked(streams, 1, 3)
    streams.rollback(refused)
    for _ in range(2):
        store.save(streams.begin())
        assert store.read()._shards == streams._shards


def test_a_stream_that_comes_again_in_the_turn_that_forgot_it_is_there(store: Store) -> None:
    streams = owner()
    booked(streams, 1, end=True)
    store.save(streams.begin())
    streams.expire(START_MS + 31 * DAY_MS)
    assert len(streams) == 0
    booked(streams, 1, 2, now_ms=START_MS + 31 * DAY_MS)
    turn = streams.begin()
    assert not turn.forgotten
    streams.rollback(turn)
    store.save(streams.begin())
    assert store.read()._shards == streams._shards
    assert len(store.read()) == 1


def test_what_a_refused_turn_forgot_may_be_back(store: Store) -> None:
    streams = owner()
    later_ms = START_MS + 31 * DAY_MS
    for number in range(10):
        booked(streams, number, end=True)
    store.save(streams.begin())
    streams.expire(later_ms)
    refused = streams.begin()
    assert len(refused.forgotten) == 10
    for number in range(5):
        booked(streams, number, now_ms=later_ms)
    streams.rollback(refused)
    store.save(streams.begin())
    assert store.read()._shards == streams._shards
    assert len(streams) == 5


def test_what_a_refused_turn_changed_may_be_forgotten(store: Store) -> None:
    streams = owner()
    for number in range(10):
        booked(streams, number, end=True)
    refused = streams.begin()
    streams.expire(START_MS + 31 * DAY_MS)
    streams.rollback(refused)
    turn = streams.begin()
    assert not turn.changed
    store.save(turn)
    assert len(store.read()) == len(streams) == 0


def test_keys_that_are_the_same_under_fewer_dimensions_become_one(store: Store) -> None:
    streams = owner()
    for number, region in enumerate(("eu", "us", "eu")):
        booked(streams, number, key=Key("alpha", (region, "web")))
    store.save(streams.begin())
    relay_streams(store.db, (0, 1, 2, 3), (1, None))
    read = store.read()
    assert load_streams(store.db).keys == ((1, Key("alpha", ("web", ""))),)
    for number in range(3):
        assert booked(read, number, 2, end=True, key=None) == (1, 10, 20, 30)
    store.save(read.begin())
    assert store.count("stream_keys") == 0


def test_keys_that_no_stream_refers_to_are_dropped(store: Store) -> None:
    streams = owner()
    for number in range(100):
        booked(streams, 1, number + 1, key=Key("alpha", (f"{number}",)))
        store.save(streams.begin())
        assert store.count("stream_keys") == 1
    booked(streams, 2, key=OTHER)
    store.save(streams.begin())
    assert store.count("stream_keys") == 2
    read = store.read()
    booked(read, 2, 2, end=True, key=None)
    store.save(read.begin())
    assert store.count("stream_keys") == 1
    assert store.read().expire(0) == []
    (_, key), *rest = load_streams(store.db).keys
    assert (key, rest) == (Key("alpha", ("99",)), [])


def test_nobody_was_silent_while_nobody_listened(store: Store) -> None:
    streams = owner()
    booked(streams)
    store.save(streams.begin())
    read = store.read()
    started_ms = START_MS + DAY_MS
    assert read.expire(started_ms) == []
    assert read.expire(started_ms + SILENT_MS - 1) == []
    assert len(read.expire(started_ms + SILENT_MS)) == 1


# ── in the pipeline ──


@pytest.mark.parametrize("crash", [False, True], ids=["", "crash"])
@pytest.mark.parametrize(
    ("former", "later"),
    [
        ({}, {"meters": {"ingress_bytes": LEFT_OUT}}),
        ({"meters": {"ingress_bytes": LEFT_OUT}}, {}),
        ({}, {"dimensions": {"gateway": LEFT_OUT, "region": LEFT_OUT}}),
        ({"dimensions": {"gateway": LEFT_OUT, "region": LEFT_OUT}}, {}),
    ],
    ids=["a meter less", "a meter more", "dimensions less", "dimensions more"],
)
def test_meters_and_dimensions_may_change_under_open_streams(
    former: dict[str, Any], later: dict[str, Any], crash: bool, tmp_path: Path
) -> None:
    """Totals go by the meters' names. The store has one layout, even if the process dies at once."""
    with Metering(tmp_path, {**PERIODIC, **former}) as metering:
        metering.capture("websocket_periodic", last=1)
        metering.restart({**PERIODIC, **later})
        for _ in range(crash):
            metering.capture("websocket_periodic", first=2, last=2)
            metering.restart()
        metering.capture("websocket_periodic", first=2, last=3)
        metering.settle()
        sums = metering.by_meter()["alpha"]
    # What was not metered until now is booked from the stream's beginning; what no longer is, so far.
    left_out = "ingress_bytes" in later.get("meters", {})
    assert sums == {
        "requests": 1,
        "ingress_bytes": 4_207 if left_out else 7_231,
        "egress_bytes": 7_209,
        "connection_seconds": 3_507_172_665,
    }


def test_a_stream_that_expires_under_other_dimensions_has_them(tmp_path: Path) -> None:
    fewer = {"dimensions": {"gateway": LEFT_OUT}}
    with Metering(tmp_path, PERIODIC) as metering:
        metering.capture("websocket_periodic", last=0)
        metering.restart({**PERIODIC, **fewer})
        metering.turn()
        metering.settle()
        assert metering.by_meter()["alpha"]["requests"] == 1


def test_a_refused_turn_books_nothing_twice(tmp_path: Path) -> None:
    with Metering(tmp_path, PERIODIC) as metering:
        for place, _ in enumerate(captured("websocket_periodic")):
            refused = metering.pipeline.begin(metering.now_ms)
            metering.pipeline.rollback(refused)
            metering.capture("websocket_periodic", first=place, last=place)
        metering.settle()
        metering.check()
        driven = truth("websocket_periodic")["driven"]
        assert [sums[:3] for sums in metering.billed().values()] == [
            (1, run["tx_wire"], run["rx_wire"]) for run in driven
        ]


@pytest.mark.parametrize("name", ["websocket_periodic", "sse_and_delay", "client_aborts"])
def test_rows_split_by_envoy_over_two_ports_add_up_to_the_same(name: str, tmp_path: Path) -> None:
    """Ends below 0.9 intervals anywhere, all rows of longer streams to their one owner."""
    two_ports = {**PERIODIC, "listen": {"streams": "127.0.0.1:9002"}}
    origin = Origin("", "envoy-1", "http", ("",))
    with Metering(tmp_path, two_ports) as metering:
        for _, raw in captured(name):
            for entry in als_pb2.StreamAccessLogsMessage.FromString(raw).http_logs.log_entry:
                common = entry.common_properties
                short = common.access_log_type == 6 and common.duration.ToMilliseconds() < 900
                metering.take(origin, message(entry), Port.SHORT if short else Port.STREAMS)
        metering.settle()
        metering.check()
        driven = truth(name)["driven"]
        assert [sums[:2] for sums in metering.billed().values()] == [(1, run["tx_wire"]) for run in driven]
        assert "skipped/misrouted" not in metering.rows()


def test_rows_of_long_streams_are_misrouted_at_the_port_for_short_ones(tmp_path: Path) -> None:
    """They are refused there, since several sinks would each book the same running totals."""
    two_ports = {**PERIODIC, "listen": {"streams": "127.0.0.1:9002"}}
    with Metering(tmp_path, two_ports) as metering:
        origin = Origin("", "envoy-1", "http", ("",))
        for stream, raw in captured("websocket_periodic"):
            if stream == 1:
                metering.take(origin, raw, Port.SHORT)
        metering.settle()
        assert metering.rows() == {"skipped/misrouted": 5}
