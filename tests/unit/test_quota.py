"""Identities per node: who invents them is held, the others are billed as before."""

from pathlib import Path

from inner_sink import InnerSink
from wire import http_row

from proxy_usage import quota
from proxy_usage.model import Identity, Origin
from proxy_usage.quota import HOUR_MS, MAX_IDENTITY_BYTES, MAX_KEPT_BYTES, Quota, trimmed


def identity(node: str, value: str, *dimensions: bytes) -> Identity:
    return Identity(Origin("", node, "http"), 0, value.encode(), dimensions, routed=True)


def admits(some: Quota, one: Identity, now_ms: int) -> bool:
    return some.admits(one, hash(one), now_ms)


def test_so_many_and_the_known_ones_go_on() -> None:
    some = Quota(2)
    assert [admits(some, identity("a", value), 0) for value in "xyzxyz"] == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    assert admits(some, identity("b", "z"), 0)  # each node has its own
    mine = identity("a", "z")  # and each peer: another's claims to be node a cost it nothing
    assert admits(some, mine._replace(origin=mine.origin._replace(peer="spiffe://other")), 0)


def test_each_hour_begins_anew() -> None:
    some = Quota(1)
    assert admits(some, identity("a", "x"), HOUR_MS - 1)
    assert not admits(some, identity("a", "y"), HOUR_MS - 1)
    assert admits(some, identity("a", "y"), HOUR_MS)


def test_what_is_remembered_of_all_nodes_together_is_bounded() -> None:
    some = Quota(10)
    for number in range(quota.MAX_TRACKED + 5):
        admits(some, identity(str(number), "x"), 0)
    assert some._tracked == len(some._brought) == sum(map(len, some._seen)) == 5


def test_long_values_are_cut_where_they_are_kept() -> None:
    short = identity("a", "x", b"y" * 100)
    assert trimmed(short) is short
    cut = trimmed(identity("a", "x" * MAX_IDENTITY_BYTES, b"y" * MAX_IDENTITY_BYTES, b"z"))
    assert [len(text) for text in (cut.value, *cut.dimensions)] == [MAX_KEPT_BYTES, MAX_KEPT_BYTES, 1]


def test_a_node_past_its_quota_is_held_as_one_and_nothing_is_lost(tmp_path: Path) -> None:
    with InnerSink(tmp_path, listen={"limits": {"identities": 3}}) as sink:
        for number in range(5):
            sink.read(http_row(tags={"project_name": f"tenant-{number}"}, wire=(1, 2)), node="loud")
        sink.read(http_row(tags={"project_name": "tenant-9"}, wire=(1, 2)), node="quiet")
        sink.close_all()
        sink.check_books()
        held = sink.books.rows("SELECT reason, rows FROM held")
        assert [tuple(row) for row in held] == [("identity_limit", 2)]
        billed = sink.books.rows("SELECT DISTINCT tenant FROM keys ORDER BY tenant")
        assert [row[0] for row in billed] == ["tenant-0", "tenant-1", "tenant-2", "tenant-9"]


def test_scanners_count_towards_no_quota(tmp_path: Path) -> None:
    with InnerSink(tmp_path, listen={"limits": {"identities": 1}}) as sink:
        for number in range(20):
            sink.read(http_row(tags={"region": f"r-{number}"}))
        sink.read(http_row(tags={"project_name": "alpha"}, route="r"))
        sink.close_all()
        assert [row[0] for row in sink.books.rows("SELECT tenant FROM keys")] == ["alpha"]
