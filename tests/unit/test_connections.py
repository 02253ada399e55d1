"""Connection time: whose a connection was, when that is known, and how much is settled at a time."""

import pytest
from connection_rows import MS, NOBODY, START_MS, START_NS, closed, key, saw, shares

from proxy_usage.connections import MOVES, SETTLE_MS, WAIT_MS, Connections, Share
from proxy_usage.model import Origin

# ── whose ──


def test_a_connection_is_its_tenants() -> None:
    connections = Connections(limit=10)
    saw(connections, "alpha")
    closed(connections)
    assert shares(connections, SETTLE_MS - 1) == []
    assert shares(connections) == [("alpha", 1_000 * MS)]
    assert shares(connections, WAIT_MS) == []
    assert len(connections) == 0


def test_several_tenants_have_equal_parts_and_the_first_by_name_what_is_left() -> None:
    connections = Connections(limit=10)
    for tenant in ("gamma", "alpha", "beta"):
        saw(connections, tenant)
    closed(connections, open_ns=1_000_000_001)
    due = connections.due(START_MS + SETTLE_MS)
    assert [(share.key, share.open_ns, share.last) for share in due] == [
        (key("alpha"), 333_333_335, False),
        (key("beta"), 333_333_333, False),
        (key("gamma"), 333_333_333, True),
    ]


def test_several_keys_of_a_tenant_are_one_part() -> None:
    connections = Connections(limit=10)
    saw(connections, key("alpha", "us"))
    saw(connections, key("alpha", "eu"))
    saw(connections, "beta")
    closed(connections, open_ns=10)
    due = connections.due(START_MS + SETTLE_MS)
    assert [(share.key, share.open_ns) for share in due] == [(key("alpha", "eu"), 5), (key("beta"), 5)]


def test_a_connection_waits_for_rows_that_come_after_its_own() -> None:
    connections = Connections(limit=10)
    closed(connections)
    assert shares(connections, WAIT_MS - 2) == []
    saw(connections, "alpha")
    assert shares(connections, WAIT_MS - 1) == [("alpha", 1_000 * MS)]


def test_tenants_that_come_within_the_first_moments_share() -> None:
    connections = Connections(limit=10)
    closed(connections, open_ns=10)
    saw(connections, "beta")
    saw(connections, "alpha")
    assert shares(connections) == [("alpha", 5), ("beta", 5)]


def test_a_connection_that_nobody_used_is_nobodys() -> None:
    connections = Connections(limit=10)
    closed(connections)
    assert shares(connections, WAIT_MS - 1) == []
    assert shares(connections, WAIT_MS) == [(None, 1_000 * MS)]


def test_a_row_that_does_not_say_which_connection_waits_for_nobody() -> None:
    connections = Connections(limit=10)
    saw(connections, "alpha", b"")
    closed(connections, b"")
    assert shares(connections) == [(None, 1_000 * MS)]


def test_a_row_that_names_its_owner_waits_for_nobody() -> None:
    connections = Connections(limit=10)
    saw(connections, "alpha")
    assert closed(connections, owner=key("beta")) == Share(
        key("beta"), NOBODY, START_MS, 1_000 * MS, last=True
    )
    assert shares(connections, WAIT_MS) == []
    assert len(connections) == 0


@pytest.mark.parametrize(
    "other",
    [
        Origin("", "envoy-2", "http"),
        Origin("spiffe://b", "envoy-1", "http"),
        Origin("", "envoy-1", "http", host="10.0.0.2"),
    ],
)
def test_two_envoys_have_connections_of_the_same_number(other: Origin) -> None:
    connections = Connections(limit=10)
    saw(connections, "alpha")
    saw(connections, "beta", origin=other)
    closed(connections, open_ns=10)
    closed(connections, open_ns=20, origin=other._replace(log_name="conn"))
    assert shares(connections) == [("alpha", 10), ("beta", 20)]


# ── the same number again ──


def restarted(connections: Connections, tenants: tuple[str, str]) -> None:
    """Connection 1 for a second, and after 300 ms the next connection 1 of an Envoy started again."""
    saw(connections, tenants[0], start_ns=START_NS + 10 * MS)
    saw(connections, tenants[0], start_ns=START_NS + 900 * MS)
    saw(connections, tenants[1], start_ns=START_NS + 1_301 * MS)
    saw(connections, tenants[1], start_ns=START_NS + 1_800 * MS)


@pytest.mark.parametrize("tenants", [("alpha", "beta"), ("beta", "alpha"), ("alpha", "alpha")])
def test_a_number_given_anew_is_another_connection(tenants: tuple[str, str]) -> None:
    """The first row is settled when rows of the second connection have come already."""
    connections = Connections(limit=10)
    closed(connections, open_ns=1_000 * MS)
    restarted(connections, tenants)
    assert shares(connections) == [(tenants[0], 1_000 * MS)]
    closed(connections, start_ns=START_NS + 1_300 * MS, open_ns=700 * MS)
    assert shares(connections) == [(tenants[1], 700 * MS)]
    assert len(connections) == 0


def test_a_connection_without_a_row_of_its_own_leaves_nothing_to_its_successor() -> None:
    """An Envoy that is killed writes none."""
    connections = Connections(limit=10)
    restarted(connections, ("alpha", "beta"))
    closed(connections, start_ns=START_NS + 1_300 * MS, open_ns=700 * MS)
    assert shares(connections) == [("beta", 700 * MS)]
    assert len(connections) == 0


def test_rows_of_its_successor_own_no_connection() -> None:
    connections = Connections(limit=10)
    closed(connections)
    assert shares(connections) == []
    saw(connections, "beta", start_ns=START_NS + 1_301 * MS)
    assert shares(connections, WAIT_MS - 1) == []
    assert shares(connections, WAIT_MS) == [(None, 1_000 * MS)]
    closed(connections, start_ns=START_NS + 1_300 * MS, now_ms=START_MS + WAIT_MS)
    assert shares(connections, WAIT_MS + SETTLE_MS) == [("beta", 1_000 * MS)]


# ── bounds ──


def test_past_the_limit_the_oldest_connection_is_forgotten() -> None:
    connections = Connections(limit=2)
    for number in (b"1", b"2", b"3"):
        saw(connections, "alpha", number)
        saw(connections, "beta", number)
    assert len(connections) == 2
    closed(connections, b"1", open_ns=2)
    closed(connections, b"3", open_ns=4)
    assert shares(connections) == [("alpha", 2), ("beta", 2)]
    assert shares(connections, WAIT_MS) == [(None, 2)]


def test_past_the_limit_the_oldest_row_is_settled_at_once() -> None:
    connections = Connections(limit=2)
    closed(connections, b"1", open_ns=1)
    assert shares(connections) == []
    saw(connections, "alpha", b"3")
    saw(connections, "alpha", b"4")
    for number in (b"2", b"3", b"4"):
        closed(connections, number, open_ns=int(number), now_ms=START_MS + SETTLE_MS)
    assert shares(connections) == [(None, 2), (None, 1)]
    assert shares(connections, 2 * SETTLE_MS) == [("alpha", 3), ("alpha", 4)]


def test_however_many_are_due_a_look_settles_a_part() -> None:
    connections = Connections(limit=10_000)
    for number in range(2_500):
        if number % 2:
            saw(connections, "alpha", b"%d" % number)
        closed(connections, b"%d" % number)
    settled: list[tuple[str | None, int]] = []
    for _ in range(3):
        part = shares(connections)
        assert len(part) <= MOVES
        settled += part
    assert settled == [("alpha", 1_000 * MS)] * 1_250
    for _ in range(2):
        part = shares(connections, WAIT_MS)
        assert 0 < len(part) <= MOVES
        settled += part
    assert settled[1_250:] == [(None, 1_000 * MS)] * 1_250
    assert shares(connections, WAIT_MS) == []
