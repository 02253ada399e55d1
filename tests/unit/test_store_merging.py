"""Merging: pending events that differ only in their window become one, and the books stay right."""

import json
from collections import Counter
from pathlib import Path

import pytest
from money import DIMENSIONS, HOUR_MS, METERS, MINUTE_MS, SOURCE, T0, Store, cell, key, mint, turn

from proxy_usage.errors import StoreError
from proxy_usage.events import Mint
from proxy_usage.model import MAX_EVENT_VALUE, Cell
from proxy_usage.store import Fate, Merger, OutputSlot
from proxy_usage.store import merging as module
from proxy_usage.store.merging import Progress
from proxy_usage.store.reader import Reader

BOTH = (OutputSlot(0, "billing"), OutputSlot(0, "second"))


def windows_of(*tenants: str, minutes: int = 10, start_ms: int = T0) -> list[Cell]:
    """One cell per tenant and minute: one request, and bytes that tell the minute."""
    return [
        cell((1, 10 + minute, 0, 0), key=key(tenant), window_ms=start_ms + minute * MINUTE_MS)
        for minute in range(minutes)
        for tenant in tenants
    ]


def merge(store: Store, *, now_ms: int = T0 + HOUR_MS, gather: int = 100_000) -> int:
    """Goes through the backlog until nothing is left to merge. Returns how many events are gone."""
    merger, total, before = Merger(store.database, store.mint, gather=gather), 0, -1
    while total != before:
        before, done = total, False
        while not done:
            looked = merger.step(now_ms)
            total, done = total + looked.merged, looked.done
            conserved(store)
    return total


def conserved(store: Store) -> None:
    """What the tables say is what the sums say, and each output has one fate for each event."""
    with Reader(store.path) as reader:
        found = reader.conservation(deep=True)
    assert found.differences == ()
    assert all(terms.balanced is not False for terms in found.outputs), found.outputs


def pending(store: Store) -> Counter[tuple[str, str, int]]:
    """Value by tenant, meter and hour, of events as they would be sent now."""
    found: Counter[tuple[str, str, int]] = Counter()
    for tenant, meter, window_ms, value, body in store.rows(
        "SELECT k.tenant, e.meter, e.window_ms, e.value, e.body FROM events e JOIN keys k ON k.key=e.key"
    ):
        said = json.loads(body)
        assert (said["data"]["value"], said["subject"]) == (str(value), f"projects/{tenant}")
        found[tenant, meter, window_ms // HOUR_MS] += value
    return found


def test_windows_of_an_hour_become_one_event_per_key_and_meter(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        made = store.close_window(*windows_of("alpha", "beta", minutes=10))
        before, old = pending(store), {event.id for event in made}
        assert merge(store) == 36
        assert pending(store) == before
        assert store.fates() == {"pending": 4, "merged": 36}
        rows = store.rows("SELECT id, meter, window_ms, value, minted_ms, outputs, given, body FROM events")
        assert len(rows) == 4
        for id_, meter, window_ms, value, minted_ms, outputs, given, body in rows:
            assert id_ not in old
            assert value == {"requests": 10, "ingress_bytes": sum(range(10, 20))}[meter]
            assert (window_ms, minted_ms, outputs, given) == (T0 + 9 * MINUTE_MS, T0, 1, 1)
            (last,) = [
                event
                for event in made
                if event.window_ms == window_ms
                and METERS[event.meter].name == meter
                and json.loads(event.body)["subject"] == json.loads(body)["subject"]
            ]
            renewed = {"id": id_, "data": json.loads(last.body)["data"] | {"value": str(value)}}
            assert json.loads(body) == json.loads(last.body) | renewed
        sent = store.batch(T0 + HOUR_MS)
        store.queue.settle(sent, {event.seq: Fate("delivered", 200) for event in sent.events}, T0 + HOUR_MS)
        assert store.fates() == {"delivered": 4, "merged": 36}
        conserved(store)


def test_hours_are_kept_apart(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*windows_of("alpha", minutes=4, start_ms=T0 + HOUR_MS - 2 * MINUTE_MS))
        before = pending(store)
        assert merge(store) == 4
        assert pending(store) == before
        assert len({hour for _, _, hour in before}) == 2


def test_a_merged_event_takes_the_place_of_its_first_in_the_queue(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("alpha", now_ms=T0)
        (lone,) = store.add("lone", now_ms=T0 + 1)
        store.close_window(cell((5, 0, 0, 0), key=key("alpha"), window_ms=T0 + MINUTE_MS), now_ms=T0 + 2)
        merge(store)
        batch = store.batch(T0 + HOUR_MS)
        assert [(event.tenant, event.value) for event in batch.events] == [("alpha", 6), ("lone", 1)]
        assert batch.events[1].id == lone
        assert store.queue.oldest_ms(store.output) == T0


def test_events_that_an_output_has_attempted_stay_as_they_are(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=BOTH) as store:
        made = store.close_window(*windows_of("alpha", minutes=8))
        one, two = (slot.output for slot in store.slots)
        now_ms = T0 + HOUR_MS
        attempted = store.batch(now_ms, events=4)  # two minutes of two meters
        settled = store.batch(now_ms, output=two, events=8)
        fates = {event.seq: Fate("delivered", 200) for event in settled.events[:6]}
        fates |= {event.seq: Fate("dead", 422, "refused") for event in settled.events[6:]}
        store.queue.settle(settled, fates, now_ms)
        kept = {event.id for event in (*attempted.events, *settled.events)}
        assert len(kept) == 8
        assert merge(store) == 6
        left = {id_ for (id_,) in store.rows("SELECT id FROM events")}
        assert kept <= left
        assert len(left) == 10
        assert {event.id for event in made} & left == kept
        store.queue.postpone(attempted.id, now_ms, "")
        assert store.batch(now_ms).events == attempted.events  # the same bytes
        assert store.tallies()[one, "pending", "requests"][0] == 5
        conserved(store)


def test_a_replayed_dead_letter_is_never_merged(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        made = store.close_window(*windows_of("alpha", minutes=3))
        batch = store.batch()
        store.queue.settle(batch, {event.seq: Fate("dead", 422, "refused") for event in batch.events}, T0)
        assert merge(store) == 0
        assert {id_ for (id_,) in store.rows("SELECT id FROM events")} == {event.id for event in made}


def test_outputs_that_keep_the_ledger_alone_or_begin_later_keep_their_books(tmp_path: Path) -> None:
    outputs = (
        OutputSlot(0, "billing"),
        OutputSlot(0, "shadow", keeps_only=True),
        OutputSlot(0, "later", from_ms=T0 + 5 * MINUTE_MS),
    )
    with Store(tmp_path, outputs=outputs) as store:
        store.close_window(*windows_of("alpha", minutes=10))
        # Five minutes belong to one output, five to two: sets of outputs are not mixed.
        assert merge(store) == 16
        assert store.rows("SELECT count(*), sum(outputs) FROM events") == [(4, 6)]
        totals = {
            slot.name: sum(
                events
                for (output, _, meter), (events, _) in store.tallies().items()
                if (output, meter) == (slot.output, "requests")
            )
            for slot in store.slots
        }
        assert totals == {"billing": 10, "shadow": 10, "later": 10}


def test_what_passes_an_int64_becomes_as_few_events_as_can_be(tmp_path: Path) -> None:
    most = MAX_EVENT_VALUE
    values = (most - 1, most - 2, 5, 7, most)
    with Store(tmp_path) as store:
        store.close_window(
            *(cell((value, 0, 0, 0), window_ms=T0 + at * MINUTE_MS) for at, value in enumerate(values))
        )
        assert merge(store) == 1
        found = [value for (value,) in store.rows("SELECT value FROM events ORDER BY seq")]
        assert (sum(found), len(found)) == (sum(values), 4)
        assert max(found) <= most
        assert merge(store) == 0


def test_events_with_other_bodies_are_not_merged(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*windows_of("alpha", minutes=2))
        store.mint = Mint(METERS, DIMENSIONS, SOURCE + "/renamed", MINUTE_MS)
        store.close_window(*windows_of("alpha", minutes=3, start_ms=T0 + 10 * MINUTE_MS))
        assert merge(store) == 4
        sources = Counter(json.loads(body)["source"] for (body,) in store.rows("SELECT body FROM events"))
        assert sources == {SOURCE: 4, SOURCE + "/renamed": 2}


def test_a_damaged_body_is_left_alone(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*windows_of("alpha", minutes=3))
        store.db.execute("UPDATE events SET body='{' WHERE seq=(SELECT max(seq) FROM events)")
        assert merge(store) == 2  # of the other meter


@pytest.mark.parametrize("gather", [7, 60, 1_000])
def test_keys_that_are_too_many_to_remember_are_merged_all_the_same(tmp_path: Path, gather: int) -> None:
    tenants = [f"t{number}" for number in range(40)]
    with Store(tmp_path) as store:
        for minute in range(6):
            store.close_window(*windows_of(*tenants, minutes=1, start_ms=T0 + minute * MINUTE_MS))
        before = pending(store)
        assert merge(store, gather=gather) == 2 * 40 * 5
        assert pending(store) == before


def test_what_was_taken_between_finding_and_merging_is_left_alone(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*windows_of("alpha", minutes=3))
        merger = Merger(store.database, store.mint)
        while not merger.step(T0).looked:
            continue
        merger.step(T0)  # the end of the backlog: what was found is ready
        batch = store.batch(events=2)
        assert merger.step(T0).merged == 0
        assert store.rows("SELECT count(*) FROM events") == [(6,)]
        store.queue.settle(batch, {event.seq: Fate("delivered", 200) for event in batch.events}, T0)
        conserved(store)


def test_a_merge_that_fails_at_any_point_changes_nothing(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(*windows_of("alpha", "beta", minutes=5))
        before = list(store.db.iterdump())
        failures = 0
        for fail_at in range(0, 1_000_000, 97):
            merger, steps = Merger(store.database, store.mint), iter(range(1 << 30))
            merger.step(T0)
            merger.step(T0)
            store.db.set_progress_handler(lambda: next(steps) == fail_at, 1)  # noqa: B023 (called in this round)
            try:
                merger.step(T0)
            except StoreError:
                store.db.set_progress_handler(None, 1)
                failures += 1
                assert list(store.db.iterdump()) == before
            else:
                break
        store.db.set_progress_handler(None, 1)
        assert failures > 10
        conserved(store)


def test_looking_for_what_belongs_together_uses_the_tables_order(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        plans = {
            statement: [row[3] for row in store.rows(f"EXPLAIN QUERY PLAN {statement}", *arguments)]
            for statement, arguments in (
                (module.SCAN, (0, 1)),
                (module.WAITING, (1, 0, 9)),
                (module.LOAD, ("[1]",)),
                (module.UNTOUCHED, ("[1]", 1)),
            )
        }
    assert plans[module.SCAN] == ["SEARCH events USING INTEGER PRIMARY KEY (rowid>?)"]
    assert plans[module.WAITING] == ["SEARCH deliveries USING PRIMARY KEY (output=? AND seq>? AND seq<?)"]
    assert "SEARCH e USING INTEGER PRIMARY KEY (rowid=?)" in plans[module.LOAD]
    assert "SEARCH d USING PRIMARY KEY (output=? AND seq=?)" in plans[module.UNTOUCHED]


def test_a_step_looks_at_a_slice_however_long_the_backlog(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        cells = windows_of(*(f"t{number}" for number in range(100)), minutes=60)
        for at in range(0, len(cells), 1_000):
            store.checkpoints.commit(turn(*cells[at : at + 1_000]), mint(), T0)
        merger = Merger(store.database, store.mint)
        looked: list[Progress] = []
        while not looked or looked[-1].looked:
            looked.append(merger.step(T0))
        assert [step.looked for step in looked] == [4_000, 4_000, 4_000, 0]
        step = merger.step(T0)
        assert module.AT_ONCE * 59 // 60 <= step.merged <= module.AT_ONCE + module.GROUP
        conserved(store)
