"""A tenant's usage out of real stores: every event in one line an output, wherever it is by now."""

import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from money import DAY_MS, HOUR_MS, MINUTE_MS, T0, Store, cell, key, turn
from old_stores import made_old

from proxy_usage.errors import UsageError
from proxy_usage.model import Cell, Identity, Origin
from proxy_usage.origins import RowOrigin
from proxy_usage.store import Fate, Held, Merger, OutputSlot, Retention, Turn
from proxy_usage.store import usage as module
from proxy_usage.store.reader import Reader
from proxy_usage.store.usage import UsageLine
from proxy_usage.store.usage_sums import UsageSums
from proxy_usage.windows import WindowTurn

BOTH = (OutputSlot(0, "billing"), OutputSlot(0, "shadow"))
RULE = "0 custom_tag: project_name"


def lines(
    store: Store, tenant: str = "alpha", from_ms: int = T0, to_ms: int = T0 + DAY_MS
) -> list[UsageLine]:
    with Reader(store.path) as reader:
        return [line for hour in reader.usage(tenant, from_ms, to_ms) for line in hour.lines]


def settle(store: Store, *fates: Fate, now_ms: int = T0, output: int = 0) -> None:
    """Sends what waits and settles it: the first events as said, the others accepted."""
    batch = store.batch(now_ms, output=store.slots[output].output)
    store.queue.settle(
        batch,
        {
            event.seq: fates[place] if place < len(fates) else Fate("delivered", 200)
            for place, event in enumerate(batch.events)
        },
        now_ms,
    )


def merge(store: Store, now_ms: int = T0) -> None:
    merger, done = Merger(store.database, store.mint), False
    while not done:
        done = merger.step(now_ms).done


def keeper(store: Store, **bounds: int) -> Retention:
    settings = {
        "ledger_max_bytes": 1 << 30,
        "keep_delivered_ms": 7 * DAY_MS,
        "keep_sums_ms": 400 * DAY_MS,
        "keep_held_ms": 90 * DAY_MS,
    }
    return Retention(store.database, **settings | bounds)


def told(store: Store, *origins: RowOrigin, now_ms: int = T0) -> None:
    empty = WindowTurn()
    store.checkpoints.commit(Turn(empty, (0, 0, 0, 0), origins=origins), store.mint, now_ms)


def requests(*window_ms: int, value: int = 1) -> list[Cell]:
    return [cell((value, 0, 0, 0), id=at, window_ms=ms) for at, ms in enumerate(window_ms, 1)]


# --- lines ------------------------------------------------------------------------------------------


def test_an_event_has_a_line_per_output_wherever_it_is(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=BOTH) as store:
        (event,) = store.close_window(cell((7, 0, 0, 0), window_ms=T0), now_ms=T0 + 61_000)
        assert [(one.output, one.fate, one.at_ms) for one in lines(store)] == [
            ("billing", "pending", None),
            ("shadow", "pending", None),
        ]
        batch = store.batch(T0 + 62_000)
        assert [(one.fate, one.at_ms) for one in lines(store)] == [
            ("attempted", T0 + 62_000),
            ("pending", None),
        ]
        store.queue.settle(batch, {batch.events[0].seq: Fate("delivered", 202)}, T0 + 63_000)
        settle(store, Fate("dead", 200, "not_accepted", "no account"), now_ms=T0 + 64_000, output=1)
        billing, shadow = lines(store)
        assert (billing.fate, billing.at_ms, billing.status) == ("delivered", T0 + 63_000, 202)
        assert (shadow.fate, shadow.at_ms, shadow.reason, shadow.answer) == (
            "dead",
            T0 + 64_000,
            "not_accepted",
            "no account",
        )
        for line in (billing, shadow):
            assert (line.id, line.minted_ms, line.window_ms) == (event.id, T0 + 61_000, T0)
            assert (line.meter, line.value, line.events, line.late, line.merged) == (
                "requests",
                7,
                1,
                False,
                0,
            )
            assert line.dimensions == {"region": "eu", "httproute_name": "web"}


def test_only_the_tenants_windows_of_the_time_are_shown(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*requests(T0 - MINUTE_MS, T0, T0 + MINUTE_MS, T0 + 2 * MINUTE_MS))
        store.close_window(cell((9, 0, 0, 0), key=key("bravo"), window_ms=T0))
        settle(store)
        found = lines(store, from_ms=T0, to_ms=T0 + 2 * MINUTE_MS)
        assert [one.window_ms for one in found] == [T0, T0 + MINUTE_MS]
        assert [one.value for one in lines(store, "bravo")] == [9]
        assert lines(store, "nobody") == []


def test_late_parts_are_told_from_the_first(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for minute in (1, 9, 4):
            store.close_window(*requests(T0), now_ms=T0 + minute * MINUTE_MS)
        settle(store)
        found = {one.minted_ms: one.late for one in lines(store)}
        assert found == {T0 + MINUTE_MS: False, T0 + 4 * MINUTE_MS: True, T0 + 9 * MINUTE_MS: True}


def test_a_merged_event_says_for_which_windows_it_stands(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=BOTH) as store:
        store.close_window(*requests(T0, T0 + MINUTE_MS, T0 + 2 * MINUTE_MS))
        merge(store)
        store.close_window(*requests(T0 + 5 * MINUTE_MS))
        merge(store)  # what was merged is merged again
        merged = [one for one in lines(store) if one.id]
        assert [(one.output, one.merged, one.merged_from_ms, one.window_ms, one.value) for one in merged] == [
            (output, 4, T0, T0 + 5 * MINUTE_MS, 4) for output in ("billing", "shadow")
        ]
        sums = [one for one in lines(store) if not one.id]
        assert [(one.fate, one.events, one.value) for one in sums] == [("merged", 3, 0)] * 2
        settle(store)
        assert {(one.merged, one.fate) for one in lines(store) if one.id} == {
            (4, "delivered"),
            (4, "pending"),
        }
        # The one output's row is rolled up, the other's event still tells.
        assert keeper(store).roll(T0, short=True) == 1
        assert [(one.output, one.merged) for one in lines(store) if one.id] == [("shadow", 4)]
        settle(store, output=1)
        assert keeper(store).roll(T0, short=True) == 1
        assert store.rows("SELECT * FROM merges") == []


def test_old_events_are_known_by_the_hour(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*requests(*(T0 + minute * MINUTE_MS for minute in range(90))))
        settle(store)
        before = lines(store)
        assert len(before) == 90
        keeper(store).roll(T0, short=True)
        found = lines(store)
        assert [(one.window_ms, one.events, one.value, one.id) for one in found] == [
            (T0, 60, 60, ""),
            (T0 + HOUR_MS, 30, 30, ""),
        ]
        with Reader(store.path) as reader:
            notes = reader.usage_notes("alpha", T0, T0 + DAY_MS)
            assert (notes.summed, notes.single_since_ms) == (True, None)
        with pytest.raises(UsageError, match=r"T00:30:00.000Z lies within an hour"):
            lines(store, from_ms=T0 + 30 * MINUTE_MS)


def test_a_replaced_event_is_not_added_to_what_was_used(tmp_path: Path) -> None:
    from proxy_usage.store import Letters, Wanted

    with Store(tmp_path, outputs=BOTH) as store:
        store.close_window(*requests(T0, value=5))
        settle(store, Fate("dead", 200, "not_accepted"))
        Letters(store.database).redate(Wanted(), store.mint, T0 + HOUR_MS)
        settle(store, now_ms=T0 + HOUR_MS)
        settle(store, now_ms=T0 + HOUR_MS, output=1)
        sums = UsageSums()
        with Reader(store.path) as reader:
            for hour in reader.usage("alpha", T0, T0 + DAY_MS):
                sums.add(hour)
        assert {(one.output, one.used, one.delivered) for one in sums.sums()} == {
            ("billing", 5, 5),
            ("shadow", 5, 5),
        }
        assert {fate for one in sums.sums() for fate in one.fates} == {"delivered", "redated", "elsewhere"}


def test_the_order_is_the_keys_then_the_windows(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for route in ("web", "api"):
            store.close_window(
                *(
                    cell((1, 2, 0, 0), key=key(route=route), id=at, window_ms=T0 + at * MINUTE_MS)
                    for at in (2, 1)
                )
            )
        found = [(one.dimensions["httproute_name"], one.window_ms, one.meter) for one in lines(store)]
        assert found == [
            (route, T0 + at * MINUTE_MS, meter)
            for route in ("api", "web")
            for at in (1, 2)
            for meter in ("ingress_bytes", "requests")
        ]


# --- where it came from -------------------------------------------------------------------------------


def test_nodes_and_rules_are_those_of_the_hour(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*requests(T0, T0 + HOUR_MS))
        told(
            store,
            RowOrigin(T0, key(), RULE, "node-a", 3),
            RowOrigin(T0, key(), "1 authority: true", "node-b", 9),
            RowOrigin(T0 + HOUR_MS, key(), RULE, "node-a", 4),
            RowOrigin(T0, key("bravo"), RULE, "node-c", 1),
        )
        told(store, RowOrigin(T0, key(), RULE, "node-a", 2))
        first, second = lines(store)
        assert [(one.node, one.rule, one.rows) for one in first.sources] == [
            ("node-b", "1 authority: true", 9),
            ("node-a", RULE, 5),
        ]
        assert [(one.node, one.rows) for one in second.sources] == [("node-a", 4)]
        sums = UsageSums()
        with Reader(store.path) as reader:
            for hour in reader.usage("alpha", T0, T0 + DAY_MS):
                sums.add(hour)
        rows = {(one.node, one.rule): one.rows for one in sums.sources()}
        assert rows == {("node-a", RULE): 9, ("node-b", "1 authority: true"): 9}


def test_notes_tell_what_is_not_in_the_lines(tmp_path: Path) -> None:
    identity = Identity(Origin("", "node-a", "http"), -1, b"x", (), routed=True)
    with Store(tmp_path) as store:
        held = [
            Held(T0, "unmapped", identity, 3, (3, 10, 0, 0)),
            Held(T0, "unmapped", identity._replace(value=b"y"), 1, (1, 0, 0, 0)),
            Held(T0 + DAY_MS, "no_match", identity, 7, (7, 0, 0, 0)),
        ]
        store.checkpoints.commit(turn(held=held), store.mint, T0)
        with Reader(store.path) as reader:
            notes = reader.usage_notes("alpha", T0, T0 + DAY_MS)
        (hour,) = notes.held
        assert (hour.hour_ms, hour.reason, hour.rows) == (T0, "unmapped", 4)
        assert hour.amounts["requests"] == 4
        assert (notes.summed, notes.known_since_ms, notes.open_windows) == (False, None, 0)
        store.close_window(*requests(T0))
        settle(store)
        keeper(store).roll(T0, short=True)
        keeper(store).forget(T0 + 500 * DAY_MS)
        store.close_window(*requests(T0 + DAY_MS))
        settle(store)
        keeper(store).roll(T0, short=True)
        with Reader(store.path) as reader:
            assert reader.usage_notes("alpha", T0, T0 + DAY_MS).known_since_ms == T0 + DAY_MS


# --- how it is read -----------------------------------------------------------------------------------


def test_many_keys_are_read_some_at_a_time_and_no_transaction_is_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEYS", 3)
    with Store(tmp_path) as store:
        store.close_window(*(cell((1, 0, 0, 0), key=key(route=f"r{at}"), id=at) for at in range(8)))
        with Reader(store.path) as reader:
            sizes = []
            for hour in reader.usage("alpha", T0, T0 + DAY_MS):
                assert not reader._db.in_transaction
                sizes.append(len(hour.lines))
        assert sizes == [3, 3, 2]


def test_what_moves_while_it_is_read_is_shown_once(tmp_path: Path) -> None:
    """Settled, merged and rolled up between two hours: the sum is what was used all the same."""
    with Store(tmp_path) as store:
        for hour in range(4):
            store.close_window(*requests(*(T0 + hour * HOUR_MS + minute * MINUTE_MS for minute in range(3))))
        moves: list[Callable[[], object]] = [
            lambda: merge(store),
            lambda: settle(store),
            lambda: keeper(store).roll(T0, short=True),
        ]
        values = 0
        with Reader(store.path) as reader:
            for hour_ in reader.usage("alpha", T0, T0 + DAY_MS):
                values += sum(line.value for line in hour_.lines)
                if moves:
                    moves.pop(0)()
        assert not moves
        assert values == 12


def test_a_time_is_found_by_index_and_not_by_reading_everything(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for hour in range(40):  # more than one span
            store.close_window(*requests(*(T0 + hour * HOUR_MS + at * MINUTE_MS for at in range(20))))
            settle(store)
        with Reader(store.path) as reader:
            statements: list[str] = []
            reader._db.set_trace_callback(statements.append)
            found = list(reader.usage("alpha", T0 + HOUR_MS, T0 + 2 * HOUR_MS))
            reader._db.set_trace_callback(None)
            assert sum(len(hour_.lines) for hour_ in found) == 20
            plans: set[str] = set()
            for statement in statements:
                if statement.startswith("SELECT"):
                    plans |= {row[3] for row in reader._db.execute(f"EXPLAIN QUERY PLAN {statement}")}
        # A few numbered rows, and no more: outputs, fates, the keys that are asked for.
        small = ("o", "outputs", "tallies", "f", "j", "json_each", "CONSTANT ROW", "(subquery")
        scans = {plan for plan in plans if plan.startswith("SCAN") and plan.split()[1] not in small}
        assert {plan for plan in scans if "CONSTANT ROW" not in plan} == set(), plans
        for wanted in (
            "SEARCH e USING INDEX events_window (window_ms>? AND window_ms<?)",
            "SEARCH s USING COVERING INDEX spans_last (last_ms>?)",
            "SEARCH l USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)",
            "SEARCH s USING PRIMARY KEY (hour_ms=? AND output=? AND fate=? AND key=?)",
            "SEARCH o USING PRIMARY KEY (hour_ms=? AND key=?)",
        ):
            assert wanted in plans, plans


def test_spans_follow_the_ledger(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for hour in range(20):
            store.close_window(*requests(*(T0 + hour * HOUR_MS + at * MINUTE_MS for at in range(30))))
            settle(store)
        expected = "SELECT entry >> 8, min(window_ms), max(window_ms) FROM ledger GROUP BY entry >> 8"
        assert store.rows("SELECT * FROM spans ORDER BY span") == store.rows(expected)
        assert len(store.rows("SELECT * FROM spans")) == 3
        kept = keeper(store)
        assert kept.roll(T0, short=True) == 600
        store.close_window(*requests(T0))
        settle(store)
        assert [row[1:] for row in store.rows("SELECT * FROM spans")] == [(T0, T0)]


def test_every_line_is_a_tally_and_every_tally_a_line(tmp_path: Path) -> None:
    fates = [Fate("dead", 200, "not_accepted"), Fate("unconfirmed", 200), Fate("delivered_ambiguous", 200)]
    with Store(tmp_path, outputs=BOTH) as store:
        store.close_window(*requests(*(T0 + at * MINUTE_MS for at in range(6))))
        settle(store, *fates)
        keeper(store).roll(T0, short=True)
        found: Counter[tuple[str, str]] = Counter()
        values: Counter[tuple[str, str]] = Counter()
        for line in lines(store):
            found[line.output, line.fate] += line.events
            values[line.output, line.fate] += line.value
        names = dict(store.rows("SELECT output, name FROM outputs"))
        kept = {(names[o], fate): sums for (o, fate, _), sums in store.tallies().items() if o}
        assert {place: (found[place], values[place]) for place in found} == kept


# --- one event ----------------------------------------------------------------------------------------


def test_an_event_is_traced_from_its_rows_to_its_answers(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=BOTH) as store:
        (first,) = store.close_window(*requests(T0), now_ms=T0 + MINUTE_MS)
        (late,) = store.close_window(*requests(T0), now_ms=T0 + 3 * MINUTE_MS)
        told(store, RowOrigin(T0, key(), RULE, "node-a", 2))
        settle(store, now_ms=T0 + 4 * MINUTE_MS)
        with Reader(store.path) as reader:
            trace = reader.explain(late.id)
            assert trace is not None
            assert trace.late
            assert trace.others == (first.id,)
            assert (trace.minted_ms, trace.hour_ms, trace.merged) == (T0 + 3 * MINUTE_MS, T0, 0)
            assert [(one.node, one.rule, one.rows) for one in trace.sources] == [("node-a", RULE, 2)]
            places = {place.output: place for place in trace.event.places}
            assert (places["billing"].state, places["billing"].status) == ("delivered", 200)
            assert places["shadow"].state == "pending"
            before = reader.explain(first.id)
            assert before is not None
            assert (before.late, before.others) == (False, (late.id,))
            assert reader.explain("01ARZ3NDEKTSV4RRFFQ69G5FAV") is None


def test_a_settled_event_is_looked_for_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from proxy_usage.store import reader as reading

    monkeypatch.setattr(reading, "LOOK", 7)
    with Store(tmp_path) as store:
        events = store.close_window(*requests(*(T0 + at * MINUTE_MS for at in range(30))))
        settle(store)
        with Reader(store.path) as reader:
            begun: list[str] = []
            reader._db.set_trace_callback(lambda text: begun.append(text) if text == "BEGIN" else None)
            view = reader.event(events[20].id)
            assert view is not None
            assert view.places[0].state == "delivered"
            assert len(begun) == 1 + 30 // 7 + 2


# --- stores of before ---------------------------------------------------------------------------------


def test_a_store_of_version_1_gets_what_it_lacks(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for hour in range(20):
            store.close_window(*requests(*(T0 + hour * HOUR_MS + at * MINUTE_MS for at in range(30))))
            settle(store)
        path = store.path
    db = sqlite3.connect(path)
    spans = db.execute("SELECT * FROM spans").fetchall()
    db.close()
    made_old(path, 1)
    with Store(tmp_path) as store:
        assert store.rows("SELECT * FROM spans") == spans
        assert len(lines(store)) == 600
        assert lines(store)[0].sources == ()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    with Store(fresh) as store, Store(tmp_path) as old:
        schema = "SELECT type, name, sql FROM sqlite_master ORDER BY type, name"
        assert store.rows(schema) == old.rows(schema)
        assert store.rows("PRAGMA max_page_count") == old.rows("PRAGMA max_page_count")
