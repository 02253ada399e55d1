"""The queue: marked before it is sent, resent byte for byte, settled once."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from money import T0, Store

from proxy_usage.errors import StoreError, UsageError
from proxy_usage.store import Batch, Fate, Idle, OutputSlot

DELIVERED = Fate("delivered", 200)
TWO = (OutputSlot(0, "a"), OutputSlot(0, "b"))
MANY = 5_000


def ids(batch: Batch) -> list[str]:
    return [event.id for event in batch.events]


def tenants(batch: Batch) -> list[str]:
    return [event.tenant for event in batch.events]


def settle(store: Store, batch: Batch, fate: Fate = DELIVERED) -> list[int]:
    return store.queue.settle(batch, {event.seq: fate for event in batch.events}, T0)


# --- marked before it is sent ---------------------------------------------------------------------


def test_when_a_batch_is_handed_out_its_mark_is_durable(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        sent = store.add("alpha", "beta")
        batch = store.batch(T0 + 5)
        other = sqlite3.connect(f"file:{store.path}?mode=ro", uri=True)
        marks = other.execute("SELECT batch, first_attempt_ms FROM deliveries ORDER BY seq").fetchall()
        other.close()
        assert ids(batch) == sent
        assert marks == [(batch.id, T0 + 5)] * 2


def test_a_lease_that_cannot_be_marked_hands_nothing_out(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("alpha")
        store.db.execute("PRAGMA query_only=1")
        with pytest.raises(StoreError):
            store.lease()
        store.db.execute("PRAGMA query_only=0")
        assert store.rows("SELECT batch, first_attempt_ms FROM deliveries") == [(None, None)]


def test_events_are_in_the_order_in_which_they_were_minted(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        sent = store.add(*(f"t{number % 7}" for number in range(250)))
        leased = store.batches()
        assert [len(batch.events) for batch in leased] == [100, 100, 50]
        assert [id_ for batch in leased for id_ in ids(batch)] == sent


# --- how much, and when ---------------------------------------------------------------------------


def test_a_batch_that_is_not_full_waits_for_more_until_its_oldest_has_lingered(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        assert store.lease(T0 + 999, linger_ms=1_000) == Idle(T0 + 1_000)
        assert len(store.batch(T0 + 1_000, linger_ms=1_000).events) == 2


def test_a_full_batch_waits_for_nothing(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        assert len(store.batch(T0, linger_ms=1_000, events=2).events) == 2
        store.add("c")
        assert tenants(store.batch(T0, linger_ms=1_000)) == ["a", "b"]


def test_a_clock_moved_back_by_an_hour_does_not_hold_events_up_for_it(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", now_ms=T0 + 3_600_000)
        assert len(store.batch(T0, linger_ms=1_000).events) == 1


def test_a_batch_is_bound_in_bytes_and_holds_one_event_whatever_its_size(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(*"abcde")
        size = store.rows("SELECT length(body) FROM events LIMIT 1")[0][0]
        found: list[Batch] = []
        for bound, count in ((2 * (size + 1), 2), (2 * (size + 1) - 1, 1), (1, 1)):
            found.append(store.batch(max_bytes=bound, busy=frozenset(batch.id for batch in found)))
            assert len(found[-1].events) == count


# --- sent again -----------------------------------------------------------------------------------


def test_after_a_restart_the_same_batch_goes_out_with_the_same_bytes(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b", "c")
        batch = store.batch(events=2)
    with Store(tmp_path) as store:
        store.add("d")
        assert store.batch(T0 + 60_000) == batch
        assert tenants(store.batch(T0 + 60_000, busy=frozenset({batch.id}))) == ["c", "d"]


def test_a_postponed_batch_is_not_handed_out_before_its_time_and_is_first_then(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        first = store.batch(events=1)
        store.queue.postpone(first.id, T0 + 500, "503")
        second = store.batch(T0 + 499, events=1)
        assert tenants(second) == ["b"]
        store.queue.postpone(second.id, T0 + 10_000, "503")
        assert store.lease(T0 + 499) == Idle(T0 + 500)
        again = store.batch(T0 + 500)
        assert (again.id, again.events, again.attempts) == (first.id, first.events, 1)
        assert again.first_attempt_ms == first.first_attempt_ms == T0


def test_while_an_output_fails_what_was_never_attempted_stays_so(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        first = store.batch(events=1)
        store.queue.postpone(first.id, T0 + 500, "503")
        assert store.lease(T0, fresh=False) == Idle(T0 + 500)
        assert store.batch(T0 + 500, fresh=False).id == first.id
        assert store.rows("SELECT count(*) FROM deliveries WHERE first_attempt_ms IS NULL") == [(1,)]


def test_while_an_output_fails_and_nothing_was_attempted_something_new_is(tmp_path: Path) -> None:
    """Else nothing would ever be sent again."""
    with Store(tmp_path) as store:
        store.add("a")
        batch = store.batch(fresh=False)
        assert tenants(batch) == ["a"]
        store.add("b")
        assert store.lease(fresh=False, busy=frozenset({batch.id})) == Idle(None)
        store.queue.postpone(batch.id, T0 + 1, "503")
        assert tenants(store.batch(T0, again=False)) == ["b"]


def test_what_is_under_way_is_not_handed_out_twice(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(*"abcd")
        busy: set[int] = set()
        for _ in range(4):
            busy.add(store.batch(events=1, busy=frozenset(busy)).id)
        assert len(busy) == 4
        assert store.lease(busy=frozenset(busy)) == Idle(None)
        assert store.queue.attempted(store.output) == 4


# --- settled --------------------------------------------------------------------------------------


def test_a_settled_batch_leaves_a_ledger_row_for_each_event_and_no_bytes(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        batch = store.batch()
        assert settle(store, batch, Fate("delivered", 207)) == []
        assert store.rows("SELECT count(*) FROM events") == [(0,)]
        assert store.rows("SELECT count(*) FROM batches") == [(0,)]
        assert store.rows("SELECT id, fate, answer, value FROM ledger ORDER BY entry") == [
            (id_, "delivered", 207, 1) for id_ in ids(batch)
        ]
        store.check_tallies()


def test_an_answer_that_is_read_twice_counts_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        batch = store.batch()
        settle(store, batch)
        settle(store, batch)
        settle(store, batch, Fate("dead", 400, "refused"))
        assert store.fates() == {"delivered": 2}
        store.check_tallies()


def test_a_split_that_is_made_twice_leaves_no_batch_without_events(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        batch = store.batch()
        one, other = ([event.seq] for event in batch.events)
        parts = store.queue.settle(batch, {}, T0, rest=[one, other])
        assert store.queue.settle(batch, {}, T0, rest=[one, other]) == []
        leased = store.batches()
        assert [part.id for part in leased] == parts
        for part in leased:
            settle(store, part)
        assert store.lease() == Idle(None)
        assert store.fates() == {"delivered": 2}


def test_a_split_batch_goes_on_as_its_parts_with_their_attempts_and_first_attempt(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(*"abcd")
        batch = store.batch(T0 + 1)
        seqs = [event.seq for event in batch.events]
        dead = {seqs[0]: Fate("dead", 400, "refused", "no")}
        first, second = store.queue.settle(batch, dead, T0 + 2, rest=[seqs[1:3], seqs[3:]], confirm=True)
        leased = store.batches(T0 + 2)
        assert [(part.id, tenants(part)) for part in leased] == [(first, ["b", "c"]), (second, ["d"])]
        assert {(part.attempts, part.first_attempt_ms, part.confirm) for part in leased} == {
            (1, T0 + 1, True)
        }
        assert store.rows("SELECT count(*) FROM batches") == [(2,)]
        assert store.fates() == {"pending": 3, "dead": 1}
        store.check_tallies()


def test_what_an_answer_does_not_speak_of_stays_in_its_batch(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        batch = store.batch()
        store.queue.settle(batch, {batch.events[0].seq: DELIVERED}, T0)
        again = store.batch()
        assert (again.id, tenants(again)) == (batch.id, ["b"])


def test_an_event_of_a_batch_that_goes_on_ends_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        batch = store.batch()
        for _ in range(2):
            store.queue.settle(batch, {batch.events[0].seq: DELIVERED}, T0)
        assert store.fates() == {"delivered": 1, "pending": 1}
        store.check_tallies()


def test_settling_fails_as_a_whole(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        batch = store.batch()
        store.db.execute("PRAGMA query_only=1")
        with pytest.raises(StoreError):
            settle(store, batch)
        store.database.reopen()
        assert store.batch() == batch
        assert store.fates() == {"pending": 2}


# --- tenants batched apart ------------------------------------------------------------------------


def test_a_tenant_batched_apart_is_alone_and_the_head_of_the_queue_decides(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("bad", "a", "bad", "worse", "b", "bad", "a")
        apart = frozenset({"bad", "worse"})
        assert [tenants(batch) for batch in store.batches(events=3, apart=apart)] == [
            ["bad", "bad", "bad"],
            ["a", "b", "a"],
            ["worse"],
        ]


def test_a_head_that_is_not_apart_leaves_those_out_who_are(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "bad", "b")
        assert [tenants(batch) for batch in store.batches(apart=frozenset({"bad"}))] == [["a", "b"], ["bad"]]


# --- several outputs ------------------------------------------------------------------------------


def test_an_event_keeps_its_bytes_until_every_output_has_settled_it(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=TWO) as store:
        (id_,) = store.add("alpha")
        a, b = (store.batch(output=slot.output) for slot in store.slots)
        assert (a.id, a.output) != (b.id, b.output)
        assert ids(a) == ids(b) == [id_]
        settle(store, a)
        assert store.rows("SELECT outputs, body FROM events") == [(1, b.events[0].body)]
        settle(store, a)  # twice: not the other output's share
        assert store.rows("SELECT outputs FROM events") == [(1,)]
        settle(store, b, Fate("unconfirmed"))
        assert store.rows("SELECT count(*) FROM events") == [(0,)]
        store.check_tallies()


def test_a_slow_output_does_not_hold_up_another(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=TWO) as store:
        store.add(*"abc")
        slow, fast = (slot.output for slot in store.slots)
        store.queue.postpone(store.batch(output=slow).id, T0 + 3_600_000, "503")
        settle(store, store.batch(output=fast))
        assert store.queue.oldest_ms(fast) is None
        assert store.queue.oldest_ms(slow) == T0


def test_an_event_that_is_a_dead_letter_here_is_delivered_there(tmp_path: Path) -> None:
    with Store(tmp_path, outputs=TWO) as store:
        store.add("alpha")
        a, b = (store.batch(output=slot.output) for slot in store.slots)
        settle(store, a, Fate("dead", 400, "refused"))
        settle(store, b)
        assert store.rows("SELECT count(*) FROM events") == [(1,)]
        store.check_tallies()
        assert store.queue.replay("a", [], None) == 1
        settle(store, store.batch(output=a.output))
        assert store.rows("SELECT count(*) FROM events") == [(0,)]
        store.check_tallies()


# --- dead letters ---------------------------------------------------------------------------------


def bury(store: Store, *names: str, reason: str = "refused", answer: str = "no") -> list[str]:
    found = store.add(*names)
    settle(store, store.batch(), Fate("dead", 400, reason, answer))
    return found


def test_a_dead_letter_keeps_reason_answer_and_first_attempt(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        bury(store, "alpha", answer="x" * 10_000)
        assert store.rows("SELECT reason, answer, at_ms, first_attempt_ms FROM dead") == [
            ("refused", "x" * 500, T0, T0)
        ]
        assert store.lease() == Idle(None)
        assert store.fates() == {"dead": 1}


def test_a_replayed_dead_letter_is_the_same_event_to_the_byte(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("alpha", "beta")
        batch = store.batch()
        settle(store, batch, Fate("dead", 400, "refused"))
    with Store(tmp_path) as store:
        assert store.queue.replay(None, [], None) == 2
        again = store.batch(T0 + 9_000_000)
        assert again.events == batch.events
        assert store.fates() == {"pending": 2}
        store.check_tallies()
        assert store.queue.replay(None, [], None) == 0


def test_a_replayed_event_counts_as_attempted_at_once_but_is_remembered_from_its_new_attempt_on(
    tmp_path: Path,
) -> None:
    """It may have bytes out there, so it is never merged; but it was refused, so nothing of it is stored."""
    with Store(tmp_path) as store:
        bury(store, "alpha")
        store.queue.replay(None, [], None)
        assert store.rows("SELECT batch, first_attempt_ms FROM deliveries") == [(None, T0)]
        store.add("fresh", now_ms=T0 + 9_000_000)
        batch = store.batch(T0 + 9_000_000)
        assert tenants(batch) == ["alpha", "fresh"]
        assert batch.first_attempt_ms == T0 + 9_000_000


def test_dead_letters_are_replayed_by_output_id_and_reason(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        a, b = bury(store, "a", "b")
        (c,) = bury(store, "c", reason="too_large")
        assert store.queue.replay("billing", [], "too_large") == 1
        assert ids(store.batch()) == [c]
        assert store.queue.replay("billing", [b], None) == 1
        assert store.queue.replay(None, [], "nonesuch") == 0
        assert store.fates() == {"pending": 2, "dead": 1}
        assert store.rows("SELECT e.id FROM dead d JOIN events e ON e.seq=d.seq") == [(a,)]


def test_dead_letters_are_replayed_in_slices(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        bury(store, *"abcde")
        assert [store.queue.replay(None, [], None, limit=2) for _ in range(3)] == [2, 2, 1]


def test_replaying_what_is_no_dead_letter_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        (a,) = bury(store, "a")
        (pending,) = store.add("b")
        with pytest.raises(UsageError, match=f"not a dead letter: {pending}"):
            store.queue.replay(None, [a, pending], None)
        with pytest.raises(UsageError, match="there is no output 'nonesuch'"):
            store.queue.replay("nonesuch", [], None)
        assert store.fates() == {"pending": 1, "dead": 1}


def test_any_number_of_dead_letters_may_be_named(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        wanted = [id_ for _ in range(12) for id_ in bury(store, *(f"t{number}" for number in range(100)))]
        assert store.queue.replay(None, wanted, None) == 1_200


# --- figures and plans --------------------------------------------------------------------------------


def test_a_pause_is_noted_with_its_reason_since_when_and_its_end(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        look = "SELECT paused, paused_ms, detail FROM outputs"
        store.queue.pause(store.output, "unauthorized", "401: " + "x" * 1_000, T0)
        store.queue.pause(store.output, "unauthorized", "403", T0 + 5)
        assert store.rows(look) == [("unauthorized", T0, "403")]
        store.queue.pause(store.output, "redirected", "302", T0 + 6)
        assert store.rows(look) == [("redirected", T0 + 6, "302")]
        store.queue.pause(store.output, None, "", T0 + 7)
        assert store.rows(look)[0][0] is None


def test_the_oldest_event_is_the_oldest_that_is_not_settled(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.queue.oldest_ms(store.output) is None
        store.add("a", now_ms=T0 + 1)
        store.add("b", now_ms=T0 + 2)
        assert store.queue.oldest_ms(store.output) == T0 + 1
        settle(store, store.batch(T0 + 2, events=1))
        assert store.queue.oldest_ms(store.output) == T0 + 2


@pytest.mark.parametrize("analyzed", [False, True])
def test_no_statement_of_the_loops_reads_a_whole_table(tmp_path: Path, analyzed: bool) -> None:
    """All that leasing, settling, closing and watching run, as SQLite plans it over many rows."""
    with Store(tmp_path) as store:
        for start in range(0, MANY, 1_000):
            store.add(*(f"t{start + number}" for number in range(1_000)))
        settle(store, store.batch(), Fate("dead", 400, "refused"))
        busy: set[int] = set()
        for _ in range(20):
            busy.add(store.batch(events=50, busy=frozenset(busy)).id)
        if analyzed:
            store.db.execute("ANALYZE")
        statements: set[str] = set()
        store.db.set_trace_callback(statements.add)
        store.add("new")
        fresh = store.batch(busy=frozenset(busy))
        store.batch(busy=frozenset({*busy, fresh.id}), apart=frozenset({"t1"}))
        store.queue.postpone(fresh.id, T0, "503")
        seqs = [event.seq for event in fresh.events]
        store.queue.settle(fresh, {seqs[0]: DELIVERED}, T0, rest=[seqs[1:]])
        store.queue.oldest_ms(store.output)
        store.queue.attempted(store.output)
        store.checkpoints.write_off(T0)
        store.db.set_trace_callback(None)
        plans = {
            (row[3], sql)
            for sql in statements
            if sql.split()[0] in {"SELECT", "UPDATE", "DELETE", "INSERT"}
            for row in store.rows(f"EXPLAIN QUERY PLAN {sql}")
        }
        assert len(plans) > 20
        assert [found for found in plans if found[0].startswith("SCAN") and "CONSTANT" not in found[0]] == []
        pending = {plan for plan, sql in plans if "batch IS NULL" in sql and plan.startswith("SEARCH d ")}
        assert pending == {"SEARCH d USING INDEX deliveries_pending (output=?)"}


@given(st.lists(st.sampled_from(["lease", "settle", "split", "bury", "postpone", "replay"]), max_size=40))
def test_whatever_happens_to_batches_every_event_is_in_one_place(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    with Store(tmp_path_factory.mktemp("store")) as store:
        sent = set(store.add(*(f"t{number % 3}" for number in range(12))))
        leased: list[Batch] = []
        for step in [*steps, "replay"]:
            if step == "lease":
                found = store.lease(events=5, busy=frozenset(batch.id for batch in leased))
                leased += [found] if isinstance(found, Batch) else []
            elif step == "replay":
                store.queue.replay(None, [], None)
            elif leased:
                batch = leased.pop(0)
                seqs = [event.seq for event in batch.events]
                if step == "postpone":
                    store.queue.postpone(batch.id, T0, "")
                elif step == "split" and len(seqs) > 1:
                    store.queue.settle(batch, {}, T0, rest=[seqs[:1], seqs[1:]])
                else:
                    settle(store, batch, Fate("dead", 400, "x") if step == "bury" else DELIVERED)
            store.check_tallies()
        while isinstance(found := store.lease(), Batch):
            settle(store, found)
        assert store.fates() == {"delivered": 12}
        assert {row[0] for row in store.rows("SELECT id FROM ledger")} == sent
