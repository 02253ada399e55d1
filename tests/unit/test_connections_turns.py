"""Connection time over turns: what a store holds of it, what a start reads back, what is billed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from connection_rows import CONN, HTTP, MS, START_NS, closed, key, saw, shares
from metering import LEFT_OUT, Metering
from wire import NOT_SET, http_row, message, tcp_row

from proxy_usage.connections import SETTLE_MS, WAIT_MS, Connections
from proxy_usage.model import Origin
from proxy_usage.store.connections import load_connections, relay_connections, save_connections
from proxy_usage.store.schema import connect


class Store:
    """A file, and who reads it back."""

    def __init__(self, path: Path) -> None:
        self.db = connect(path, 1 << 30)

    def save(self, connections: Connections) -> None:
        self.db.execute("BEGIN")
        save_connections(self.db, connections.begin())
        self.db.execute("COMMIT")

    def read(self) -> Connections:
        connections = Connections(limit=10)
        connections.restore(load_connections(self.db))
        return connections


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "usage.db")
    yield store
    store.db.close()


def test_a_start_goes_on_with_what_waited(store: Store) -> None:
    connections = Connections(limit=10)
    saw(connections, "alpha")
    saw(connections, "beta")
    closed(connections, open_ns=10)
    closed(connections, b"2", open_ns=7)
    store.save(connections)
    again = store.read()
    assert again._ties == connections._ties
    assert shares(again) == [("alpha", 5), ("beta", 5)]
    store.save(again)
    third = store.read()
    assert len(third) == 0
    saw(third, "gamma", b"2")
    assert shares(third) == [("gamma", 7)]
    closed(third, b"3")
    store.save(third)
    assert shares(store.read(), WAIT_MS) == [(None, 1_000 * MS)]


def test_a_number_given_anew_within_a_turn_is_saved_without_its_former_tenants(store: Store) -> None:
    connections = Connections(limit=10)
    saw(connections, "alpha")
    closed(connections)
    store.save(connections)
    shares(connections)
    saw(connections, "beta", start_ns=START_NS + 5_000 * MS)
    store.save(connections)
    assert store.read()._ties == connections._ties
    (of_one,) = connections._ties.values()
    assert list(of_one) == [key("beta")]


def test_a_refused_turn_is_in_the_next(store: Store) -> None:
    connections = Connections(limit=10)
    saw(connections, "alpha")
    saw(connections, "alpha", b"2")
    closed(connections, b"3")
    store.save(connections)
    closed(connections)
    closed(connections, b"2", open_ns=3)
    saw(connections, "gamma", b"4")
    refused = connections.begin()
    assert shares(connections) == [("alpha", 1_000 * MS), ("alpha", 3)]
    saw(connections, "beta", start_ns=START_NS + 5_000 * MS)
    connections.rollback(refused)
    store.save(connections)
    again = store.read()
    assert again._ties == connections._ties
    assert shares(again, WAIT_MS) == [(None, 1_000 * MS)]  # the third; the others are booked


def test_a_refused_turn_that_untied_does_so_again(store: Store) -> None:
    connections = Connections(limit=10)
    saw(connections, "alpha")
    closed(connections)
    store.save(connections)
    shares(connections)
    refused = connections.begin()
    saw(connections, "beta", start_ns=START_NS + 5_000 * MS)
    connections.rollback(refused)
    store.save(connections)
    again = store.read()
    assert again._ties == connections._ties
    assert shares(again, WAIT_MS) == []


def test_nothing_changed_is_nothing_to_save() -> None:
    connections = Connections(limit=10)
    assert connections.begin().is_empty
    saw(connections, "alpha")
    assert not connections.begin().is_empty
    saw(connections, "alpha")
    assert connections.begin().is_empty


def test_ties_go_by_the_names_of_dimensions(store: Store) -> None:
    connections = Connections(limit=10)
    saw(connections, key("alpha", "eu"), start_ns=START_NS + MS)
    saw(connections, key("alpha", "us"), start_ns=START_NS + 9 * MS)
    store.save(connections)
    relay_connections(store.db, (None,))
    (tie,) = load_connections(store.db).ties
    assert (tie.key, tie.first_ns, tie.last_ns) == (key("alpha", ""), START_NS + MS, START_NS + 9 * MS)


# ── in the pipeline ──

BY_CONNECTION = {"meters": {"connection_seconds": {"count": "connections"}}}


def rows(*requests: tuple[str, str], open_ms: int = 2_000) -> list[tuple[Origin, bytes]]:
    """Requests of ``(tenant, connection)``, then the row of each connection, in messages of their own."""
    start_ns = START_NS
    sent = [
        message(
            http_row(
                start_ns=start_ns + MS, wire=(10, 20), tags={"project_name": tenant, "conn_id": connection}
            )
        )
        for tenant, connection in requests
    ]
    listener = [
        message(
            tcp_row(
                type=NOT_SET,
                start_ns=start_ns,
                duration_ns=open_ms * MS + 1,
                sizes=(10, 20),
                wire=(0, 0),
                tags={"conn_id": connection},
            )
        )
        for connection in sorted({connection for _, connection in requests})
    ]
    return [(HTTP, raw) for raw in sent] + [(CONN, raw) for raw in listener]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("restarts", [False, True])
def test_connections_are_billed_in_any_order_of_their_rows(
    backwards: bool, restarts: bool, tmp_path: Path
) -> None:
    sent = rows(("alpha", "1"), ("beta", "1"), ("alpha", "2"), ("alpha", "2"))
    with Metering(tmp_path, BY_CONNECTION) as metering:
        for origin, raw in reversed(sent) if backwards else sent:
            metering.take(origin, raw)
            metering.turn()
            if restarts:
                metering.restart()
        metering.settle()
        metering.check()
        assert metering.billed() == {
            "alpha": (3, 30, 60, 1_000_000_001 + 2_000_000_001),
            "beta": (1, 10, 20, 1_000_000_000),
        }
        assert metering.held() == {}
        assert metering.rows() == {"counted": 6}


def test_connections_may_name_their_owner(tmp_path: Path) -> None:
    """By SNI; then whose requests they carried does not matter, and plaintext has no owner."""
    by_name = {"tenant": {"rules": [{"custom_tag": "project_name"}, {"sni": True, "map_file": "names.yaml"}]}}
    (tmp_path / "names.yaml").write_text("beta.example: beta\n")
    named = tcp_row(type=NOT_SET, start_ns=START_NS, duration_ns=5, sni="beta.example", tags={"conn_id": "1"})
    silent = tcp_row(type=NOT_SET, start_ns=START_NS, duration_ns=7, tags={"conn_id": "2"})
    with Metering(tmp_path, {**BY_CONNECTION, **by_name}) as metering:
        metering.take(HTTP, rows(("alpha", "1"))[0][1])
        metering.take(CONN, message(named, silent))
        metering.settle()
        metering.check()
        assert metering.billed() == {"alpha": (1, 10, 20, 0), "beta": (0, 0, 0, 5)}
        assert metering.held() == {"no_owner": (0, 0, 0, 7)}


def test_a_tcp_connection_has_its_time_from_one_of_its_two_rows(tmp_path: Path) -> None:
    """Envoy's TCP proxy writes a row as well; it says whose, the listener's says how long."""
    proxied = tcp_row(
        start_ns=START_NS + MS,
        duration_ns=2_000 * MS,
        sizes=(4_200, 4_300),
        cluster="echo",
        tags={"project_name": "alpha", "conn_id": "1"},
        stream_id="same",
    )
    listener = tcp_row(
        type=NOT_SET,
        start_ns=START_NS,
        duration_ns=2_001 * MS,
        sizes=(4_200, 4_300),
        tags={"conn_id": "1"},
        stream_id="same",
    )
    for flush in ("off", "1s"):
        path = tmp_path / flush
        path.mkdir()
        with Metering(path, {**BY_CONNECTION, "envoy": {"flush_interval": flush}}) as metering:
            metering.take(HTTP._replace(log_name="tcp"), message(proxied))
            metering.take(CONN, message(listener))
            metering.settle()
            metering.check()
            assert metering.billed() == {"alpha": (0, 4_200, 4_300, 2_001 * MS)}
            assert metering.rows() == {"counted": 2}


def test_where_streams_are_counted_listener_rows_are_not(tmp_path: Path) -> None:
    with Metering(tmp_path) as metering:
        for origin, raw in rows(("alpha", "1")):
            metering.take(origin, raw)
        metering.settle()
        assert metering.rows() == {"counted": 1, "skipped/listener": 1}
        assert metering.billed()["alpha"][3] == 1_234_567


def test_dimensions_may_change_under_open_connections(tmp_path: Path) -> None:
    fewer: dict[str, Any] = {"dimensions": {"gateway": LEFT_OUT}}
    request, listener = rows(("alpha", "1"))
    with Metering(tmp_path, BY_CONNECTION) as metering:
        metering.take(*request)
        metering.turn()
        metering.restart({**BY_CONNECTION, **fewer})
        metering.take(*listener)
        metering.settle()
        assert metering.by_meter()["alpha"]["connection_seconds"] == 2_000_000_001


def test_a_refused_turn_books_nothing_twice(tmp_path: Path) -> None:
    with Metering(tmp_path, BY_CONNECTION) as metering:
        for origin, raw in rows(("alpha", "1"), ("beta", "1")):
            metering.take(origin, raw)
            metering.pipeline.rollback(metering.pipeline.begin(metering.now_ms))
        metering.turn()
        metering.restart()  # what waits was in refused turns alone
        metering.now_ms += SETTLE_MS
        metering.pipeline.rollback(metering.pipeline.begin(metering.now_ms))
        metering.turn()
        metering.restart()
        metering.settle()
        metering.check()
        assert [sums[3] for sums in metering.billed().values()] == [1_000_000_001, 1_000_000_000]
