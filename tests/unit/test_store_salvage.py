"""What can be read of a store set aside is kept, once, to be decided on, and the sums stay exact."""

import json
from pathlib import Path

import pytest
from made_store import MINUTE, START, MadeStore
from money import T0, Store
from salvaging import BOTH, LATER, LAYOUT, bodies, check_sums, letters, many, mint_of, replaced, salvage_of

from proxy_usage.errors import StoreFull
from proxy_usage.store import Fate, Idle
from proxy_usage.store import salvage as salvage_module
from proxy_usage.store.database import counters
from proxy_usage.store.letters import Letters, Wanted
from proxy_usage.store.reader import Reader
from proxy_usage.store.report import Aside, asides
from proxy_usage.store.retention import DAY_MS, Retention
from proxy_usage.store.salvage import Salvage

# --- a file that is sound: what becomes of what ----------------------------------------------------------


def test_every_state_becomes_a_dead_letter_that_tells_of_it(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with MadeStore(path, BOTH) as store:
        made = {}
        for tenant in ("sent", "refused", "taken", "gone", "waits"):
            store.use(tenant, 7, 0)
            (made[tenant],) = store.close_windows()
        batch = store.send(1)  # "sent" stays under way
        store.queue.postpone(batch.id, START, "503 come back")
        for tenant, fate in (
            ("refused", Fate("dead", 200, "not_accepted", "no account")),
            ("taken", Fate("delivered", 200)),
            ("gone", Fate("delivered", 200)),
        ):
            taken = store.queue.lease(
                store.slots[0].output, START, events=1, max_bytes=1 << 20, linger_ms=0, again=False
            )
            assert not isinstance(taken, Idle)
            assert taken.events[0].id == made[tenant]
            store.answer(taken, fate)
        store.queue.settle(
            other := store.send(4, output=1),
            {event.seq: Fate("delivered", 200) for event in other.events if event.id == made["gone"]},
            START,
        )
        before = bodies(path)
    assert made["gone"] not in before  # settled everywhere: its bytes are gone
    with replaced(path, BOTH) as store:
        report = salvage_of(store).run(LATER)
        found = {(one.tenant, one.output): one for one in letters(store)}
        assert {place: one.reason for place, one in found.items()} == dict.fromkeys(
            [
                *((tenant, "billing") for tenant in ("sent", "refused", "waits")),
                *((tenant, "mirror") for tenant in ("sent", "refused", "taken", "waits")),
            ],
            "salvaged",
        )
        assert found["sent", "billing"].answer == "was sent, attempts that failed: 1: 503 come back"
        assert found["refused", "billing"].answer == "was a dead letter: not_accepted: no account"
        assert found["waits", "billing"].answer == "was waiting"
        assert found["taken", "mirror"].answer == "was sent, attempts that failed: 0: "
        assert found["sent", "billing"].first_attempt_ms == START + 3 * MINUTE
        assert found["waits", "billing"].first_attempt_ms is None
        assert all(one.id == made[one.tenant] and one.at_ms == LATER for one in found.values())
        with Reader(path) as reader:
            taken_view = reader.event(made["taken"])
        assert taken_view is not None
        assert {place.output: place.state for place in taken_view.places} == {
            "billing": "elsewhere",
            "mirror": "dead",
        }
        assert bodies(path) == before
        check_sums(store)
        assert (
            counters(store.database.db, "salvaged")
            == counters(store.database.db, "counted")
            == {"requests": 28}
        )
    assert (report.state, report.events, report.known, report.gaps, report.senseless, report.unclear) == (
        "done",
        4,
        0,
        0,
        0,
        0,
    )
    assert report.missing == {}
    assert report.brought == {"billing/requests": (3, 21), "mirror/requests": (4, 28)}


def test_nothing_of_it_is_sent_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    many(path, 10)
    with replaced(path) as store:
        salvage_of(store).run(LATER)
        leased = store.queue.lease(store.slots[0].output, LATER, events=10, max_bytes=1 << 20, linger_ms=0)
        assert isinstance(leased, Idle)
        assert store.queue.replay(None, [], "salvaged") == 10
        assert len(store.send().events) > 0
        check_sums(store)


def test_open_windows_become_events_and_what_they_leave_is_said(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with MadeStore(path) as store:
        store.use("carries", 0, 400_000_000)
        store.close_windows()  # below a second: a remainder
        store.use("alpha", 3, 2_500_000_000)
        store.use("beta", 2, 0)
        store.hold("no_tenant", b"nobody", 11, 0)
        store.turn()
    with replaced(path) as store:
        report = salvage_of(store).run(LATER)
        assert sorted((one.tenant, one.meter, one.value) for one in letters(store)) == [
            ("alpha", "connection_seconds", 2),
            ("alpha", "requests", 3),
            ("beta", "requests", 2),
        ]
        assert {(one.reason, one.answer) for one in letters(store)} == {("salvaged", "was an open window")}
        assert {one.window_ms for one in letters(store)} == {START}
        check_sums(store)
        for body in bodies(path).values():
            assert json.loads(body)["data"]["dimensions"] == {"region": "eu"}
    assert (report.state, report.events, report.windows) == ("done", 3, 2)
    assert report.rests == {"connection_seconds": 500_000_000, "requests": 0}
    assert report.remainders == {"connection_seconds": 400_000_000}
    assert report.held == {"requests": 11, "connection_seconds": 0}


def test_an_output_that_is_new_has_no_part_in_it_and_one_that_is_gone_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    made = many(path, 3, ("former",))
    with replaced(path, ("new",)) as store:
        salvage_of(store).run(LATER)
        assert [(one.output, one.reason) for one in letters(store)] == [("former", "salvaged")] * 3
        store.use("tenant-0", 5, 0)
        store.close_windows()
        check_sums(store)
        assert made.items() <= bodies(path).items()


# --- steps, crashes, repetitions ------------------------------------------------------------------------


def contents(store: MadeStore) -> list[tuple[str, str, str, int]]:
    return sorted((one.output, one.tenant, one.meter, one.value) for one in letters(store))


def lively(path: Path) -> None:
    """Events and open windows, more than a step takes."""
    with MadeStore(path, BOTH) as store:
        for number in range(7):
            store.use(f"tenant-{number}", 1 + number, 0)
        store.close_windows()
        for number in range(5):
            store.use(f"open-{number}", 1 + number, 1_500_000_000)
        store.turn()


def test_a_salvage_that_is_cut_short_after_any_step_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(salvage_module, "STEP", 2)
    path = tmp_path / "usage.db"
    lively(path)
    with replaced(path, BOTH) as store:
        steps = 0
        while not (salvage := salvage_of(store)).aside.report.ended:
            salvage.read()  # read, and not written: the next one reads it again
            salvage = salvage_of(store)
            salvage.write(salvage.read(), LATER)
            steps += 1
            check_sums(store)
        assert steps > 7
        cut = contents(store)
        report = salvage.aside.report
    whole = tmp_path / "whole" / "usage.db"
    whole.parent.mkdir()
    lively(whole)
    with replaced(whole, BOTH) as store:
        at_once = salvage_of(store).run(LATER)
        assert contents(store) == cut
    assert (at_once.events, at_once.windows, at_once.brought, at_once.rests, at_once.missing) == (
        report.events,
        report.windows,
        report.brought,
        report.rests,
        report.missing,
    )


def test_a_full_disk_changes_nothing_and_the_same_piece_goes_in_later(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    many(path)
    with replaced(path) as store:
        salvage = salvage_of(store)
        piece = salvage.read()
        db = store.database.db
        db.execute(f"PRAGMA max_page_count={db.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(StoreFull):
            salvage.write(piece, LATER)
        assert letters(store) == []
        db.execute("PRAGMA max_page_count=1000000")
        assert salvage.write(piece, LATER) == {"billing": salvage_module.STEP}
        salvage.run(LATER)
        assert len(letters(store)) == 400
        check_sums(store)


def test_what_is_here_already_is_not_brought_over_again(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    many(path, 20)
    with replaced(path) as store:
        salvage_of(store).run(LATER)
        before = contents(store)
        (aside,) = asides(store.database.db)
        again = Salvage(store.database, aside, store.slots, LAYOUT, mint_of)
        assert again.run(LATER) == aside.report  # it is done: the file is not even opened
        forgotten = Aside(aside.file, aside.reason, aside.at_ms)
        report = Salvage(store.database, forgotten, store.slots, LAYOUT, mint_of).run(LATER)
        assert (report.events, report.known, report.missing) == (0, 20, {})
        assert contents(store) == before
        check_sums(store)


def test_a_key_that_a_search_takes_for_unused_is_kept_when_an_event_of_it_is_brought(tmp_path: Path) -> None:
    for name in ("other", "own"):
        (tmp_path / name).mkdir()
    with Store(tmp_path / "other") as damaged:
        (brought,) = damaged.add("alpha")
    with Store(tmp_path / "own") as store:
        store.add("alpha")
        batch = store.batch()
        store.queue.settle(batch, {event.seq: Fate("delivered", 200) for event in batch.events}, T0)
        retention = Retention(
            store.database,
            ledger_max_bytes=1 << 30,
            keep_delivered_ms=DAY_MS,
            keep_sums_ms=DAY_MS,
            keep_held_ms=DAY_MS,
        )
        later = T0 + 60 * DAY_MS
        while retention.roll(later) or retention.forget(later):
            pass
        for _ in range(2):  # the key is noted, and no event refers to it
            retention.sweep_keys(later)
        name = "usage.db.aside-20260101T000000Z"
        (tmp_path / "other" / "usage.db").rename(store.path.with_name(name))
        salvage = Salvage(store.database, Aside(name, "damaged", later), store.slots, LAYOUT, mint_of)
        assert salvage.run(later).events == 1
        done = False
        while not done:
            _, done = retention.sweep_keys(later)
        assert Letters(store.database).replay(Wanted()).taken == 1
        store.add("beta", now_ms=later)  # would be given the number of a key that is gone
        assert [(event.id, event.tenant) for event in store.batch(later).events] == [(brought, "alpha")]
