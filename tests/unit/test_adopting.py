"""Taking over a store: long streams and connections, and everything that can be in the way of it.

What two stores hold in tables of usage and events is tests/property/test_adoption.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from adoption import books
from connection_rows import START_NS, closed, key, saw, shares
from damage import leaves, overwrite
from inner_sink import InnerSink
from money import T0, leave_room
from stream_rows import KEY, OTHER, SILENT_MS, START_MS, Store, booked, owner
from wire import http_row

from proxy_usage.config.workers import worker_path, worker_stores
from proxy_usage.connections import Connections
from proxy_usage.errors import ConfigError, StoreError, StoreFull, StoreLocked
from proxy_usage.intake import HTTP, OTHERS, PLACES, Intake, by_node
from proxy_usage.service.adopting import adopt_all
from proxy_usage.service.build import open_storage
from proxy_usage.store import Database
from proxy_usage.store.audits import Audits
from proxy_usage.store.bringing import TABLES_LEFT, TABLES_TAKEN
from proxy_usage.store.connections import load_connections, merge_connections, save_connections
from proxy_usage.store.database import counters
from proxy_usage.store.reader import Reader
from proxy_usage.store.salvage import SALVAGED
from proxy_usage.store.schema import Lock
from proxy_usage.store.streams import load_streams, merge_streams, record_size
from proxy_usage.streams import Streams

OTHER_OUTPUT = {"name": "archive", "url": "http://127.0.0.1:9/events"}

# --- long streams -------------------------------------------------------------------------------------------


def merged(one: Streams, other: Streams) -> tuple[Store, Streams]:
    """One store's streams with another's."""
    mine, theirs = Store(), Store()
    mine.save(one.begin())
    theirs.save(other.begin())
    merge_streams(mine.db, load_streams(theirs.db), record_size(theirs.db))
    theirs.db.close()
    return mine, mine.read()


def test_a_stream_goes_on_from_the_highest_totals_of_either_store() -> None:
    one, other = owner(), owner()
    booked(one, 1, 10)
    booked(one, 2, 10)
    booked(other, 2, 30, key=OTHER)
    booked(other, 3, 5, key=OTHER)
    store, both = merged(one, other)
    assert len(both) == 3
    assert booked(both, 1, 11) == (0, 10, 20, 30)
    assert booked(both, 2, 31, key=OTHER) == (0, 10, 20, 30)
    assert booked(both, 3, 5, key=OTHER) == (0, 0, 0, 0)
    assert booked(both, 4, 1) == (0, 10, 20, 30)
    store.db.close()


def test_an_ended_stream_stays_known_and_its_late_rows_book_nothing() -> None:
    one, other = owner(), owner()
    booked(one, 1, 50, end=True)
    booked(other, 1, 20, now_ms=START_MS + 1)  # a row of it that came to the other, later
    booked(other, 2, 70, end=True)
    store, both = merged(one, other)
    assert booked(both, 1, 50, end=True) == (0, 0, 0, 0)
    assert booked(both, 2, 70, end=True) == (0, 0, 0, 0)
    both.expire(START_MS)
    assert both.expire(START_MS + SILENT_MS) == []  # neither is open
    store.db.close()


def test_an_adopted_stream_that_fell_silent_is_still_its_keys() -> None:
    one, other = owner(), owner()
    booked(one, 1, 1)
    booked(other, 2, 1, key=OTHER)
    store, both = merged(one, other)
    both.expire(START_MS)
    assert {delta.key for delta in both.expire(START_MS + SILENT_MS)} == {KEY, OTHER}
    store.db.close()


@pytest.mark.parametrize("empty", ["mine", "theirs"])
def test_where_only_one_store_knows_streams(empty: str) -> None:
    full = owner()
    booked(full, 1, 10)
    store, both = merged(*((owner(), full) if empty == "mine" else (full, owner())))
    assert booked(both, 1, 10) == (0, 0, 0, 0)
    turn = both.begin()
    store.save(turn)  # what is saved from now on is read back with it
    assert booked(store.read(), 1, 11) == (0, 10, 20, 30)
    store.db.close()


# --- connections --------------------------------------------------------------------------------------------


def test_connections_and_waiting_rows_of_both_stores_are_settled() -> None:
    one, other = Connections(limit=10), Connections(limit=10)
    saw(one, "alpha", b"1")
    saw(other, "beta", b"1", start_ns=START_NS + 5)
    saw(other, "alpha", b"1", start_ns=START_NS + 9)
    closed(one, b"1", open_ns=100)
    closed(other, b"2", open_ns=7)
    saw(other, "gamma", b"2")
    mine, theirs = Store(), Store()
    save_connections(mine.db, one.begin())
    save_connections(theirs.db, other.begin())
    merge_connections(mine.db, load_connections(theirs.db))
    both = Connections(limit=10)
    both.restore(load_connections(mine.db))
    ties = {(tie.key, tie.first_ns, tie.last_ns) for tie in load_connections(mine.db).ties}
    assert (key("alpha"), START_NS + 9, START_NS + 1_000_000) in ties
    assert sorted(shares(both)) == [("alpha", 50), ("beta", 50), ("gamma", 7)]
    mine.db.close()
    theirs.db.close()


def test_every_table_is_taken_over(tmp_path: Path) -> None:
    """A new table: say in ``store/bringing.py`` how it is brought over, and try it in the property test."""
    database = Database(tmp_path / "usage.db")
    names = "SELECT name FROM sqlite_master WHERE type='table' AND name NOT LIKE 'sqlite_%'"
    tables = {name for (name,) in database.db.execute(names)}
    database.close()
    taken = set(TABLES_TAKEN.split())
    assert {"merges", "origins", "audits"} <= tables  # of all versions
    assert tables - {"meta"} == taken | TABLES_LEFT.keys()
    assert not taken & TABLES_LEFT.keys()


# --- what is in the way -------------------------------------------------------------------------------------


def two_stores(place: Path, **second: Any) -> InnerSink:
    """Worker 0's sink, closed, and a store of worker 1 beside it that has events and open windows."""
    for worker in range(2):
        changes = second if worker else {}
        path = worker_path(place / "usage.db", worker)
        with InnerSink(place, now_ms=T0, workers=2, store={"path": str(path)}, **changes) as sink:
            sink.read(http_row(tags={"project_name": "alpha"}, wire=(5, 6), duration_ns=5))
            sink.close_all()
            sink.read(http_row(tags={"project_name": "beta"}, wire=(5, 6), duration_ns=5))
            sink.turn()
            if not worker:
                first = sink
    return first


def held(path: Path, sink: InnerSink) -> Any:
    with Reader(path) as reader:
        return books(reader._db, [meter.name for meter in sink.meters], sink.config.dimensions)


def refused(sink: InnerSink, kind: type[Exception], match: str, **changes: Any) -> None:
    """Alone, worker 0 does not start, says why, and both stores are as they were."""
    store = sink.config.store.path
    other = worker_path(store, 1)
    before = held(store, sink), held(other, sink)
    with pytest.raises(kind, match=match):
        open_storage(sink.config.model_copy(update={"workers": 1, **changes}))
    assert (held(store, sink), held(other, sink)) == before


def test_an_output_that_is_gone_and_has_events_there_is_named(tmp_path: Path) -> None:
    sink = two_stores(tmp_path, outputs=[{"name": "billing", "format": "none"}, OTHER_OUTPUT])
    refused(sink, ConfigError, r"worker-1\.db, left by a worker, cannot be taken over: outputs: 'archive'")


def test_a_store_that_somebody_has_open_is_left_to_him(tmp_path: Path) -> None:
    sink = two_stores(tmp_path)
    lock = Lock(worker_path(sink.config.store.path, 1))
    refused(sink, StoreLocked, r"worker-1\.db, left by a worker, cannot be taken over: .* in use by pid")
    lock.release()
    open_storage(sink.config.model_copy(update={"workers": 1})).close()
    assert worker_stores(sink.config.store.path) == {}


def test_a_copy_is_no_second_store(tmp_path: Path) -> None:
    sink = two_stores(tmp_path)
    store = sink.config.store.path
    shutil.copyfile(store, worker_path(store, 1))
    refused(sink, StoreError, "holds event .*, and so does the store beside it")


def test_without_room_it_stays_where_it_is(tmp_path: Path) -> None:
    sink = two_stores(tmp_path)
    path = worker_path(sink.config.store.path, 1)
    with InnerSink(tmp_path, now_ms=T0, workers=2, store={"path": str(path)}) as second:
        second.read(*(http_row(tags={"project_name": f"t{number}"}, wire=(5, 6)) for number in range(400)))
        second.close_all()
    alone = sink.config.model_copy(update={"workers": 1})
    storage = open_storage(alone, adopts=False)
    leave_room(storage.database, -100_000)
    before = held(path, sink)
    layout = storage.recovered.layout
    assert layout is not None
    with pytest.raises(StoreFull, match="left by a worker"):
        adopt_all(
            alone,
            storage.database,
            storage.intake,
            layout,
            T0,
            lambda config: open_storage(config, adopts=False),
        )
    storage.close()
    assert held(path, sink) == before


def test_windows_of_another_layout_are_closed_under_it_first(tmp_path: Path) -> None:
    former = {"dimensions": {"region": {"custom_tag": "region", "default": "old"}}}
    sink = two_stores(tmp_path, **former)
    storage = open_storage(sink.config.model_copy(update={"workers": 1}))
    rows = storage.database.db.execute("SELECT DISTINCT dimensions FROM keys ORDER BY dimensions").fetchall()
    assert rows == [('{"httproute_name":"any","region":""}',), ('{"region":"old"}',)]
    assert len(storage.recovered.cells) == 1  # its own
    storage.close()
    with Reader(sink.config.store.path) as reader:
        assert reader.conservation(deep=True).balanced


def test_rows_that_a_killed_worker_lost_are_reported_by_who_takes_over(tmp_path: Path) -> None:
    sink = two_stores(tmp_path)
    path = worker_path(sink.config.store.path, 1)
    with InnerSink(tmp_path, now_ms=T0, workers=2, store={"path": str(path)}) as second:
        second.read(http_row(), http_row(), http_row(), node="envoy-9")  # and never saved
    for start in range(2):
        storage = open_storage(sink.config.model_copy(update={"workers": 1}))
        assert by_node(storage.loss.rows) == ({} if start else {"envoy-9": 3})
        assert storage.loss.unknown == ()
        assert by_node(storage.intake.counts())["envoy-9"] == 3
        storage.close()
    with Reader(sink.config.store.path) as reader:
        assert reader.status().crash_lost == {"envoy-9": 3}


def test_audits_are_told_whose_rows_are_in_it_now(tmp_path: Path) -> None:
    sink = two_stores(tmp_path)
    path = worker_path(sink.config.store.path, 1)
    databases = [Database(store) for store in (sink.config.store.path, path)]
    own, other = [Audits(database, keep_ms=1).sink(T0 + 5) for database in databases]
    for database in databases:
        database.close()
    storage = open_storage(sink.config.model_copy(update={"workers": 1}))
    audits = Audits(storage.database, keep_ms=1)
    assert (audits.sink(0), audits.adopted()) == (own, {other.id: T0 + 5})
    assert by_node(storage.intake.counts()) == {"envoy-1": 4}
    assert counters(storage.database.db, "ended") == {"envoy-1": 4}
    storage.close()


def test_a_store_that_no_audit_knows_by_name_is_told_of_all_the_same(tmp_path: Path) -> None:
    sink = two_stores(tmp_path)
    storage = open_storage(sink.config.model_copy(update={"workers": 1}))
    assert list(Audits(storage.database, keep_ms=1).adopted().values()) == [0]
    storage.close()


def test_a_node_that_is_counted_with_others_from_now_on_is_unknown_to_audits(tmp_path: Path) -> None:
    sink = two_stores(tmp_path)
    path = worker_path(sink.config.store.path, 1)
    with InnerSink(tmp_path, now_ms=T0, workers=2, store={"path": str(path)}) as second:
        second.read(http_row(), node="envoy-9")
        second.turn()
    intake = Intake(sink.config.store.path.with_name("usage.db.intake"))
    for number in range(PLACES):
        intake.add(f"n{number}", 1, "http", HTTP)
    intake.close()
    storage = open_storage(sink.config.model_copy(update={"workers": 1}))
    assert "envoy-9" not in by_node(storage.intake.counts())
    assert counters(storage.database.db, "crash_unknown") == {"envoy-9": 1}
    assert counters(storage.database.db, "ended") == {"envoy-1": 4, OTHERS: 1}
    storage.close()


def test_a_damaged_store_is_salvaged_by_who_takes_over(tmp_path: Path) -> None:
    sink = two_stores(tmp_path)
    path = worker_path(sink.config.store.path, 1)
    with Reader(path) as reader:
        waiting = {event.id for event in reader.queue()}
    assert waiting
    overwrite(path, leaves(path, "counters"))
    storage = open_storage(sink.config.model_copy(update={"workers": 1}))
    (salvage,) = storage.past.salvages
    assert salvage.aside.file.startswith("usage.worker-1.db.aside-")
    salvage.run(T0)
    storage.close()
    assert worker_stores(sink.config.store.path) == {}
    with Reader(sink.config.store.path) as reader:
        letters = reader.dead_letters(reason=SALVAGED)
        assert waiting <= {letter.id for letter in letters}
        assert reader.conservation(deep=True).balanced
