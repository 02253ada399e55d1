"""Dead letters: what is too old, what may be stored, and what people decide; the books balance throughout."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from money import DAY_MS, HOUR_MS, MINUTE_MS, T0, Store, cell, key
from ulid import ULID

from proxy_usage.errors import ConfigError, UsageError
from proxy_usage.store import Batch, Fate, Idle, Letters, OutputSlot, Wanted
from proxy_usage.store.letters import may_be_stored
from proxy_usage.store.reader import Reader

TWO = (OutputSlot(0, "a"), OutputSlot(0, "b"))
HORIZON_MS = 29 * DAY_MS
NOW_MS = T0 + 3 * DAY_MS + 12_345


def letters(store: Store) -> Letters:
    return Letters(store.database)


def bury(store: Store, *names: str, reason: str = "refused", at_ms: int = T0) -> list[str]:
    """Events that were sent and became dead letters."""
    made = store.add(*names)
    batch = store.batch(at_ms)
    store.queue.settle(batch, {event.seq: Fate("dead", 400, reason) for event in batch.events}, at_ms)
    return made


def deliver(store: Store, now_ms: int, output: int | None = None) -> list[str]:
    """Delivers all that waits at an output."""
    ids: list[str] = []
    output = store.output if output is None else output
    while isinstance(batch := store.lease(now_ms, output=output), Batch):
        store.queue.settle(batch, {event.seq: Fate("delivered", 200) for event in batch.events}, now_ms)
        ids += [event.id for event in batch.events]
    return ids


def check(store: Store) -> None:
    """Every sum is what its tables say, and every event has one fate at each output."""
    store.check_tallies()
    with Reader(store.path) as reader:
        conservation = reader.conservation(deep=True)
        assert conservation.differences == ()
        assert all(terms.balanced for terms in conservation.outputs)


# --- the late horizon -----------------------------------------------------------------------------


@pytest.mark.parametrize("attempted", [False, True], ids=["never attempted", "attempted"])
def test_what_nears_the_late_horizon_becomes_a_dead_letter_and_is_never_sent(
    tmp_path: Path, attempted: bool
) -> None:
    with Store(tmp_path) as store:
        store.add("alpha", "beta")
        if attempted:
            store.queue.postpone(store.batch(T0 + 1).id, T0, "503", unanswered=True)
        last_ms = T0 + HORIZON_MS
        assert isinstance(store.lease(last_ms, late_ms=last_ms - HORIZON_MS, linger_ms=MINUTE_MS), Batch)
        store.queue.postpone(1, T0, "503", unanswered=True)
        late = store.lease(last_ms + 1, late_ms=last_ms + 1 - HORIZON_MS)
        assert late == Idle(last_ms + 1, too_late=2)
        assert store.lease(last_ms + 1, late_ms=last_ms + 1 - HORIZON_MS) == Idle(None)
        assert store.fates() == {"dead": 2}
        assert store.rows("SELECT DISTINCT reason, at_ms FROM dead") == [("too_late", last_ms + 1)]
        assert store.rows("SELECT count(*) FROM batches") == [(0,)]
        check(store)


def test_of_a_batch_only_what_is_too_old_is_taken_out(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.close_window(
            cell((1, 0, 0, 0), key=key("old"), id=1),
            cell((1, 0, 0, 0), key=key("new"), id=2, window_ms=T0 + HOUR_MS),
        )
        store.queue.postpone(store.batch().id, T0, "503", unanswered=True)
        late_ms = T0 + MINUTE_MS
        batch = store.batch(late_ms=late_ms)
        assert (batch.too_late, batch.resent, [event.tenant for event in batch.events]) == (1, True, ["new"])
        check(store)


def test_a_backlog_that_is_too_old_is_worked_off_in_steps_and_what_is_new_is_sent(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(*(f"t{number}" for number in range(250)))
        store.close_window(cell((1, 0, 0, 0), key=key("new"), window_ms=T0 + HOUR_MS))
        found: list[int] = []
        while isinstance(leased := store.lease(late_ms=T0 + 1), Idle):
            found.append(leased.too_late)
        assert found == [100, 100, 50]
        assert [event.tenant for event in leased.events] == ["new"]
        check(store)


# --- what may be stored ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "first_attempt_ms", "expected"),
    [
        ("INVALID_VALUE_TYPE", T0, False),
        ("not_accepted", T0, False),
        ("refused", T0, False),
        ("too_large", T0, False),
        ("a code of the endpoint's", T0, False),
        ("too_late", None, False),
        ("too_late", T0, True),
        ("restored", None, True),
        ("salvaged", None, True),
        ("restored", T0, True),
    ],
)
def test_what_proves_that_nothing_is_stored(
    tmp_path: Path, reason: str, first_attempt_ms: int | None, expected: bool
) -> None:
    assert may_be_stored(reason, first_attempt_ms) is expected
    with Store(tmp_path) as store:
        (old,) = bury(store, "alpha", reason=reason)
        store.db.execute("UPDATE dead SET first_attempt_ms=?", (first_attempt_ms,))
        assert letters(store).count(Wanted()) == int(expected)
        if expected:
            with pytest.raises(UsageError, match=f"may have been stored .*{old}"):
                letters(store).redate(Wanted(ids=[old]), store.mint, NOW_MS)
        assert letters(store).redate(Wanted(), store.mint, NOW_MS).taken == int(not expected)
        assert letters(store).redate(Wanted(), store.mint, NOW_MS, accept_duplicates=True).taken == int(
            expected
        )
        assert store.fates() == {"redated": 1, "pending": 1}
        check(store)


def test_a_replayed_event_that_may_be_stored_counts_as_attempted_since_its_first_attempt(
    tmp_path: Path,
) -> None:
    with Store(tmp_path) as store:
        store.add(*"abc")
        store.queue.postpone(store.batch(T0 + 7).id, T0, "", unanswered=True)
        assert store.lease(T0 + 8, late_ms=T0 + 1) == Idle(T0 + 8, 3)
        store.add("fresh", now_ms=T0 + 9)
        assert letters(store).replay(Wanted(), together=2).taken == 3
        leased = store.batches(T0 + HOUR_MS)
        assert [[event.tenant for event in batch.events] for batch in leased] == [
            ["a", "b"],
            ["c"],
            ["fresh"],
        ]
        assert [(batch.first_attempt_ms, batch.resent) for batch in leased] == [
            (T0 + 7, True),
            (T0 + 7, True),
            (T0 + HOUR_MS, False),
        ]
        check(store)


def test_a_restored_event_without_a_mark_is_never_taken_for_one_that_was_not_sent(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        bury(store, "alpha", reason="restored")
        store.db.execute("UPDATE dead SET first_attempt_ms=NULL")
        store.queue.replay(None, [], None)
        assert store.rows("SELECT batch IS NULL, first_attempt_ms FROM deliveries") == [(0, T0)]
        assert store.batch(T0 + 5).resent


# --- replay ---------------------------------------------------------------------------------------


def test_a_replay_leaves_what_is_too_old_and_says_so_of_what_is_named(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        (old,) = bury(store, "alpha")
        with pytest.raises(UsageError, match=f"too old .*{old}") as caught:
            letters(store).replay(Wanted(ids=[old]), late_ms=T0 + 1)
        assert "--redate" in caught.value.hint
        assert letters(store).replay(Wanted(), late_ms=T0 + 1).taken == 0
        assert letters(store).count(Wanted(), late_ms=T0 + 1) == 1
        assert letters(store).replay(Wanted(), late_ms=T0).taken == 1


def test_a_walk_through_the_dead_letters_meets_none_twice(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        bury(store, *"abcde")
        wanted = Wanted(until=letters(store).last())
        met = 0
        while True:
            part = letters(store).replay(Wanted(after=wanted.after, until=wanted.until), limit=2)
            if part.position is None:
                break
            met += part.taken
            batch = store.batch()  # all are refused again at once
            store.queue.settle(batch, {event.seq: Fate("dead", 400, "refused") for event in batch.events}, T0)
            wanted = Wanted(after=part.position, until=wanted.until)
        assert met == 5


# --- redate ---------------------------------------------------------------------------------------


def test_a_redated_event_is_the_same_usage_under_another_id_in_the_present_window(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        (old,) = bury(store, "alpha")
        before = json.loads(store.rows("SELECT body FROM events")[0][0])
        assert letters(store).redate(Wanted(), store.mint, NOW_MS).taken == 1
        (batch,) = store.batches(NOW_MS)
        (event,) = batch.events
        after = json.loads(event.body)
        assert event.id != old
        assert ULID.from_str(event.id).milliseconds == NOW_MS
        assert after.pop("id") == event.id
        assert before.pop("id") == old
        assert before.pop("time") == "2026-11-22T00:00:59.999Z"
        assert after.pop("time") == "2026-11-25T00:00:59.999Z"
        assert after == before
        assert store.rows("SELECT fate, id FROM ledger") == [("redated", old)]
        assert store.rows("SELECT id FROM events") == [(event.id,)]
        assert deliver(store, NOW_MS) == [event.id]
        check(store)


def test_a_redated_event_is_for_the_output_that_refused_it_alone(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=TWO) as store:
        store.close_window(cell((3, 0, 0, 5_000_000_000), key=key("alpha")))
        a, b = (slot.output for slot in store.slots)
        refused = store.batch(output=a)
        store.queue.settle(refused, {e.seq: Fate("dead", 400, "refused") for e in refused.events}, T0)
        there = deliver(store, T0, b)
        assert letters(store).redate(Wanted("a"), store.mint, NOW_MS).taken == 2
        here = deliver(store, NOW_MS, a)
        assert deliver(store, NOW_MS, b) == []
        assert len(set(here) | set(there)) == 4
        tallies = store.queue.tallies()
        assert {fate: n for (output, fate), n in tallies.items() if output == a and n} == {
            "redated": 2,
            "delivered": 2,
        }
        assert {fate: n for (output, fate), n in tallies.items() if output == b and n} == {
            "delivered": 2,
            "elsewhere": 2,
        }
        check(store)
        with Reader(store.path) as reader:
            terms = {meter.meter: meter for meter in reader.conservation().meters}
        assert (terms["requests"].minted, terms["requests"].redated) == ((2, 6), (1, 3))
        assert terms["requests"].difference == -3  # made by hand: nothing was counted for it


def test_bytes_that_are_no_event_are_not_redated_and_nothing_changes(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        bury(store, "a", "b")
        store.db.execute("UPDATE events SET body=x'ff' WHERE seq=2")
        with pytest.raises(Exception, match="no JSON object"):
            letters(store).redate(Wanted(), store.mint, NOW_MS)
        assert store.fates() == {"dead": 2}
        check(store)


# --- retire ---------------------------------------------------------------------------------------


def test_an_output_that_is_gone_is_given_up_with_all_it_had(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=TWO) as store:
        store.add(*(f"t{number}" for number in range(25)))
        gone, kept = (slot.output for slot in store.slots)
        refused = store.batch(output=gone, events=5)
        store.queue.settle(refused, {e.seq: Fate("dead", 400, "refused") for e in refused.events}, T0)
        store.batch(output=gone, events=5)  # attempted
        deliver(store, T0, kept)
        with pytest.raises(ConfigError, match="'a' is gone"):
            store.queue.register([OutputSlot(0, "b")], T0)
        steps = []
        while count := letters(store).retire("a", ["b"], T0 + 9, limit=10):
            steps.append(count)
        assert steps == [10, 10, 5]
        assert store.rows("SELECT count(*) FROM events") == [(0,)]
        assert store.rows("SELECT count(*) FROM batches") == [(0,)]
        assert store.fates() == {"retired": 25}
        check(store)
        store.checkpoints.outputs = store.queue.register([OutputSlot(0, "b")], T0)
        store.add("later")
        with Reader(store.path) as reader:
            sums = reader.conservation(deep=True)
            assert sums.differences == ()
            assert all(
                terms.balanced is not False for terms in sums.outputs
            )  # what was minted without it is not missed there
            (first, second) = reader.status().outputs
        assert (first.given_up, first.pending, second.pending) == (25, 0, 1)


def test_an_output_that_is_configured_or_unknown_is_not_retired(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("alpha")
        with pytest.raises(UsageError, match="'billing' is configured"):
            letters(store).retire("billing", ["billing"], T0)
        with pytest.raises(UsageError, match="there is no output 'nonesuch'"):
            letters(store).retire("nonesuch", ["billing"], T0)
        assert store.fates() == {"pending": 1}


# --- export ---------------------------------------------------------------------------------------


def test_all_dead_letters_are_read_in_slices_with_their_bytes(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=TWO) as store:
        made = [id_ for _ in range(12) for id_ in store.add(*(f"t{number}" for number in range(100)))]
        for slot in store.slots:
            while isinstance(batch := store.lease(output=slot.output), Batch):
                reason = f"from {slot.name}"
                store.queue.settle(batch, {e.seq: Fate("dead", 400, reason) for e in batch.events}, T0)
        with Reader(store.path) as reader:
            found = list(reader.letters())
            assert [letter.id for letter, _ in found] == made * 2
            assert all(json.loads(body)["id"] == letter.id for letter, body in found)
            assert len(list(reader.letters("b"))) == len(list(reader.letters(reason="from a"))) == 1_200
            assert list(reader.letters("b", "from a")) == []


# --- anything, in any order -----------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["send", "bury", "age", "replay", "redate", "force", "deliver"]),
            st.integers(0, 1),
        ),
        max_size=25,
    )
)
def test_whatever_is_decided_each_event_has_one_fate_and_nothing_is_billed_twice(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    with Store(tmp_path_factory.mktemp("store"), outputs=TWO) as store:
        store.add(*(f"t{number}" for number in range(6)))
        now_ms = T0
        for step, which in steps:
            now_ms += HOUR_MS
            output = store.slots[which].output
            if step == "age":
                store.lease(now_ms, output=output, events=2, late_ms=T0 + 1)
            elif step == "replay":
                letters(store).replay(Wanted(store.slots[which].name))
            elif step in ("redate", "force"):
                force = step == "force"
                letters(store).redate(Wanted(), store.mint, now_ms, accept_duplicates=force, limit=2)
            elif isinstance(batch := store.lease(now_ms, output=output, events=2), Batch):
                name = {"bury": "dead", "deliver": "delivered"}.get(step)
                if name is None:
                    store.queue.postpone(batch.id, now_ms, "", unanswered=True)
                else:
                    fate = Fate(name, 400, "refused")
                    store.queue.settle(batch, {event.seq: fate for event in batch.events}, now_ms)
            check(store)
        letters(store).redate(Wanted(), store.mint, now_ms, accept_duplicates=True)
        for slot in store.slots:
            deliver(store, now_ms, slot.output)
        check(store)
        for slot in store.slots:
            billed = "SELECT sum(value) FROM ledger WHERE output=? AND fate='delivered'"
            assert store.rows(billed, slot.output) == [(6,)]
