"""Where rows came from: noted beside the money, told to the store in slices, kept within bounds."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from inner_sink import InnerSink, full, roomy, settings
from money import DAY_MS, HOUR_MS, T0, Store, cell, key
from wire import NOW_MS, http_row

from proxy_usage import origins as noting
from proxy_usage.errors import StoreFull
from proxy_usage.model import Key
from proxy_usage.origins import HOLD_MS, Origins, RowOrigin
from proxy_usage.pipeline import Port
from proxy_usage.service.build import build_attributor, build_folds
from proxy_usage.store import Retention, Turn, WantedHeld
from proxy_usage.store import origins as module
from proxy_usage.windows import WindowTurn

HOUR = NOW_MS - NOW_MS % HOUR_MS
TAG, HEADER = "0 custom_tag: project_name", "1 request_header: x-project"


def stored(sink: InnerSink) -> Counter[tuple[str, str, str]]:
    """Rows by tenant, rule and node."""
    rows = sink.books.rows(
        "SELECT k.tenant, s.rule, s.node, o.rows FROM origins o"
        " JOIN keys k USING(key) JOIN sources s USING(source)"
    )
    return Counter({row[:3]: row[3] for row in rows})


# --- what waits ---------------------------------------------------------------------------------------


def test_rows_of_one_place_are_added_up_until_they_are_due() -> None:
    origins = Origins(hold_ms=1_000)
    origins.note(key(), T0, TAG, "node-a", 2, 0)
    origins.note(key(), T0 + 60_000, TAG, "node-a", 3, 900)
    origins.note(key(), T0 + HOUR_MS, TAG, "node-a", 5, 900)
    assert origins.begin(999) == ()
    assert origins.begin(1_000) == (RowOrigin(T0, key(), TAG, "node-a", 5),)
    assert origins.begin(1_000) == ()
    assert origins.begin(1_900) == (RowOrigin(T0 + HOUR_MS, key(), TAG, "node-a", 5),)
    assert len(origins) == 0


def test_at_the_end_nothing_is_held_back() -> None:
    origins = Origins()
    origins.note(key(), T0, TAG, "node-a", 2, T0)
    assert not origins.due(T0)
    origins.ending = True
    assert [one.rows for one in origins.begin(T0)] == [2]
    assert not origins.due(T0)


def test_a_clock_that_goes_back_holds_nothing_up() -> None:
    origins = Origins()
    origins.note(key(), T0, TAG, "node-a", 2, T0)
    assert [one.rows for one in origins.begin(T0 - 1)] == [2]


def test_a_turn_takes_a_slice_and_what_was_refused_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noting, "SLICE", 2)
    origins = Origins(hold_ms=0)
    for number in range(3):
        origins.note(key(f"t{number}"), T0, TAG, "node-a", 1, T0)
    taken = origins.begin(T0)
    assert len(taken) == 2
    origins.note(key("t0"), T0, TAG, "node-a", 1, T0)
    origins.rollback(taken)
    rows: Counter[str] = Counter()
    while again := origins.begin(T0):
        for one in again:
            assert one.key is not None
            rows[one.key.tenant] += one.rows
    assert rows == {"t0": 2, "t1": 1, "t2": 1}


def test_past_the_bound_only_the_number_of_rows_is_known() -> None:
    origins = Origins(hold_ms=0, max_waiting=2)
    for number in range(5):
        origins.note(key(f"t{number}"), T0, TAG, "x" * 5_000, 1, T0)
    assert len(origins) == 3
    taken = origins.begin(T0)
    assert [(one.key is None, one.rows) for one in taken] == [(False, 1), (False, 1), (True, 3)]
    assert max(len(one.node) for one in taken) == noting.MAX_TEXT


# --- from rows to the store -----------------------------------------------------------------------------


def test_rows_are_told_by_the_rule_they_matched_and_their_node(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(*(http_row(tags={"project_name": "alpha"}) for _ in range(3)), node="envoy-1")
        sink.read(http_row(tags={"project_name": "alpha"}), node="envoy-2")
        sink.read(http_row(headers={"x-project": "bravo"}), node="envoy-2")
        sink.read(http_row(tags={"project_name": "Not.A.Project"}), node="envoy-2")
        sink.turn()
        assert stored(sink) == {}
        sink.turn(sink.now_ms + HOLD_MS)
        assert stored(sink) == {
            ("alpha", TAG, "envoy-1"): 3,
            ("alpha", TAG, "envoy-2"): 1,
            ("bravo", HEADER, "envoy-2"): 1,
        }
        assert sink.books.rows("SELECT DISTINCT hour_ms FROM origins") == [(HOUR,)]
        sink.check_books()


def test_an_old_figure_keeps_the_rule_of_its_time(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(http_row(tags={"project_name": "alpha"}))
        sink.pipeline.drain(sink.now_ms)
        rules = [{"custom_tag": "project_name", "pattern": "^[a-z]+$"}]
        config = settings(tmp_path, tenant={"rules": rules})
        attributor = build_attributor(config)
        sink.pipeline.replace(build_folds(config, attributor), attributor, sink.now_ms)
        sink.read(http_row(tags={"project_name": "alpha"}))
        sink.turn()
        sink.turn(sink.now_ms + HOLD_MS)
        assert stored(sink) == {
            ("alpha", TAG, "envoy-1"): 1,
            ("alpha", f"{TAG}, pattern: ^[a-z]+$", "envoy-1"): 1,
        }


def test_a_store_that_refuses_is_told_later_and_once(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        names = [f"t{number}" for number in range(200)]
        sink.read(*(http_row(tags={"project_name": name}) for name in names))
        sink.pipeline.drain(sink.now_ms)
        sink.now_ms += HOLD_MS
        full(sink)
        with pytest.raises(StoreFull):
            sink.turn()
        assert stored(sink) == {}
        roomy(sink)
        sink.turn()
        assert stored(sink) == {(name, TAG, "envoy-1"): 1 for name in names}
        sink.turn(sink.now_ms + HOUR_MS)
        assert stored(sink) == {(name, TAG, "envoy-1"): 1 for name in names}


def test_a_crash_costs_what_was_not_told_and_no_usage(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(http_row(tags={"project_name": "alpha"}))
        sink.turn()
        sink.turn(sink.now_ms + HOLD_MS)
        sink.read(http_row(tags={"project_name": "alpha"}))
        sink.turn()
        sink.crash()
        sink.close_all()
        assert stored(sink) == {("alpha", TAG, "envoy-1"): 1}
        sink.check_books()
        assert (
            sum(value for (value,) in sink.books.rows("SELECT value FROM events WHERE meter='requests'")) == 2
        )


def test_replayed_usage_says_that_it_was_held(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(http_row(tags={"project_name": "Not.A.Project"}), node="envoy-7")
        sink.turn()
        sink.storage.checkpoints.release(
            WantedHeld(), lambda *_: Key("alpha", ("", "any")), sink.mint, sink.now_ms
        )
        assert stored(sink) == {("alpha", noting.REPLAYED, "envoy-7"): 1}


# --- bounds in the store ----------------------------------------------------------------------------------


def told(store: Store, *origins: RowOrigin, now_ms: int = T0) -> None:
    empty = WindowTurn()
    store.checkpoints.commit(Turn(empty, (0, 0, 0, 0), origins=origins), store.mint, now_ms)


def keeper(store: Store, **bounds: int) -> Retention:
    usual = {
        "ledger_max_bytes": 1 << 30,
        "keep_delivered_ms": 7 * DAY_MS,
        "keep_sums_ms": 400 * DAY_MS,
        "keep_held_ms": 90 * DAY_MS,
    }
    return Retention(store.database, **usual | bounds)


def repeat(step: Callable[[], int]) -> int:
    total = 0
    while gone := step():
        total += gone
    return total


def test_an_hour_has_a_bound_and_nodes_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ORIGINS", 3)
    monkeypatch.setattr(module, "MAX_SOURCES", 2)
    with Store(tmp_path) as store:
        told(store, *(RowOrigin(T0, key(f"t{number}"), TAG, "a", 1) for number in range(5)))
        told(store, RowOrigin(T0, key("t0"), TAG, "a", 1))
        rows = store.rows("SELECT key, source, rows FROM origins ORDER BY key")
        assert rows[0] == (module.OTHERS, module.OTHERS, 2)
        assert [row[2] for row in rows[1:]] == [2, 1, 1]
        told(store, *(RowOrigin(T0 + HOUR_MS, key("t0"), TAG, node, 1) for node in "abcd"))
        assert store.rows(
            "SELECT source, rows FROM origins WHERE hour_ms=? ORDER BY source", T0 + HOUR_MS
        ) == [
            (module.OTHERS, 2),
            (1, 1),
            (2, 1),
        ]
        told(store, RowOrigin(T0 + 2 * HOUR_MS, None, "", "", 9))
        assert store.rows("SELECT key, source, rows FROM origins WHERE hour_ms>?", T0 + HOUR_MS) == [
            (0, 0, 9)
        ]
        kept = store.rows("SELECT count(*) FROM origins")[0][0]
        assert store.counters("origins") == {"kept": kept}


def test_origins_go_with_the_sums_of_their_hour(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        told(store, *(RowOrigin(T0 + at * HOUR_MS, key(), TAG, f"n{at}", 1) for at in range(4)))
        house = keeper(store, keep_sums_ms=DAY_MS)
        assert repeat(lambda: house.forget(T0 + DAY_MS + 2 * HOUR_MS)) == 2
        assert store.rows("SELECT min(hour_ms) FROM origins") == [(T0 + 2 * HOUR_MS,)]
        assert store.rows("SELECT node FROM sources ORDER BY node") == [("n2",), ("n3",)]
        assert store.counters("origins") == {"kept": 2}
        told(store, RowOrigin(T0 + 3 * HOUR_MS, key(), TAG, "n0", 1))  # as if it had never been forgotten
        assert store.rows("SELECT count(*) FROM origins o JOIN sources s USING(source)") == [(3,)]


def test_beyond_the_bound_the_oldest_hours_go_first(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        told(store, *(RowOrigin(T0 + at * HOUR_MS, key(), TAG, "n", 1) for at in range(40)))
        house = keeper(store, ledger_max_bytes=1_000)
        assert repeat(lambda: house.forget(T0 + 41 * HOUR_MS)) == 20
        assert store.rows("SELECT min(hour_ms) FROM origins") == [(T0 + 20 * HOUR_MS,)]


def test_a_key_that_origins_name_is_not_swept(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        told(
            store, RowOrigin(T0, key("alpha"), TAG, "n", 1), RowOrigin(T0 + DAY_MS, key("bravo"), TAG, "n", 1)
        )
        house = keeper(store, keep_sums_ms=100 * DAY_MS)
        later_ms = T0 + 100 * DAY_MS + 2 * HOUR_MS
        for expected in (["alpha", "bravo"], ["bravo"]):
            done = False
            while not done:
                _, done = house.sweep_keys(later_ms)
            assert [name for (name,) in store.rows("SELECT tenant FROM keys ORDER BY tenant")] == expected
            repeat(lambda: house.forget(later_ms))
        told(store, RowOrigin(T0 + 2 * DAY_MS, key("bravo"), TAG, "n", 1), now_ms=later_ms)
        assert store.rows("SELECT used_ms FROM keys") == [(later_ms,)]


def test_an_origin_takes_at_most_50_bytes(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*(cell(key=key(f"t{number}"), id=number) for number in range(1_000)))
        used = "SELECT page_count - freelist_count FROM pragma_page_count, pragma_freelist_count"
        before = store.rows(used)[0][0]
        for hour in range(10):
            told(
                store,
                *(
                    RowOrigin(T0 + hour * HOUR_MS, key(f"t{number}"), TAG, f"node-{number % 3}", 1 << 20)
                    for number in range(1_000)
                ),
            )
        assert store.rows("SELECT count(*) FROM origins") == [(10_000,)]
        assert (store.rows(used)[0][0] - before) * 4_096 <= 50 * 10_000


def test_the_ports_of_a_pipeline_share_their_origins(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        assert set(sink.pipeline._folds) == {Port.ALL}
        sink.read(http_row(tags={"project_name": "alpha"}))
        sink.pipeline.drain(sink.now_ms)
        assert len(sink.pipeline.origins) == 1
