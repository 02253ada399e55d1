"""What is done about an answer: the table of delivery/policy.py row by row, and its long runs."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from money import HOUR_MS, T0, Store

from proxy_usage.delivery.policy import (
    GROW_AFTER,
    MAX_AMBIGUOUS,
    MAX_APART,
    REFUSING_EVERYTHING,
    Policy,
    RetrySettings,
)
from proxy_usage.outputs.base import (
    Ambiguous,
    Paused,
    Refused,
    Retry,
    Settled,
    Shortfall,
    Verdict,
)
from proxy_usage.store import Batch, Fate, Queued

SETTINGS = RetrySettings(initial_ms=500, max_ms=60_000, dedup_window_ms=600_000)
DELIVERED = Fate("delivered", 200)


def batch(
    count: int, *, number: int = 1, first_ms: int = T0, confirm: bool = False, size: int = 100
) -> Batch:
    events = tuple(
        Queued(seq, f"id-{seq}", f"t{seq}", "requests", 1, b"x" * size) for seq in range(1, count + 1)
    )
    return Batch(number, 1, events, 0, first_ms, confirm)


def policy(below: Callable[[int], int] = lambda n: n - 1, **settings: int) -> Policy:
    """The dice fall as high as they can, unless told otherwise."""
    return Policy(SETTINGS, below=below, **settings)


def accepted(of: Batch) -> Settled:
    return Settled({event.seq: DELIVERED for event in of.events})


# --- Settled --------------------------------------------------------------------------------------


def test_a_settled_batch_ends_each_event_as_the_answer_says() -> None:
    fates = {1: DELIVERED, 2: Fate("dead", 207, "INVALID_ULID", "x")}
    step = policy().decide(batch(2), Settled(fates), T0)
    assert (step.outcome, step.fates, step.rest, step.wait_ms) == ("partial", fates, (), None)


def test_a_batch_accepted_in_full_is_delivered() -> None:
    step = policy().decide(batch(3), accepted(batch(3)), T0)
    assert step.outcome == "delivered"
    assert set(step.fates.values()) == {DELIVERED}


def test_whoever_accepts_is_well_again() -> None:
    it = policy()
    it.decide(batch(1), Paused("unauthorized", "401"), T0)
    it.decide(batch(1), Retry("server_error", "503"), T0)
    assert (it.failures, it.paused, it.detail) == (2, "unauthorized", "503")
    it.decide(batch(1), accepted(batch(1)), T0)
    assert (it.failures, it.paused, it.detail) == (0, None, "")


# --- Shortfall ------------------------------------------------------------------------------------


def test_a_shortfall_is_asked_about_one_by_one_and_its_tenants_are_batched_apart() -> None:
    it = policy()
    known = {1: Fate("dead", 207, "INVALID_ULID")}
    step = it.decide(batch(3), Shortfall(known, "1 of 3"), T0 + 299_999)
    assert (step.outcome, step.fates, step.rest, step.confirm) == (
        "asked_one_by_one",
        known,
        ((2,), (3,)),
        True,
    )
    assert step.wait_ms is None
    assert it.apart == {"t2", "t3"}


def test_alone_what_was_not_accepted_is_a_dead_letter_that_says_so() -> None:
    step = policy().decide(batch(1), Shortfall({}, "0 of 1"), T0 + 299_999)
    assert step.fates == {1: Fate("dead", 200, "not_accepted", "0 of 1")}


@pytest.mark.parametrize("count", [1, 3])
def test_past_half_the_endpoints_memory_nobody_can_say_and_that_is_what_is_said(count: int) -> None:
    it = policy()
    known = {1: Fate("dead", 207, "INVALID_ULID")} if count > 1 else {}
    step = it.decide(batch(count), Shortfall(known, "x"), T0 + 300_000)
    assert {seq: fate.name for seq, fate in step.fates.items()} == {
        seq: "dead" if seq in known else "unconfirmed" for seq in range(1, count + 1)
    }
    assert step.rest == ()
    assert it.apart == frozenset()


def test_a_tenant_is_batched_with_others_again_when_it_was_accepted_in_full_in_a_batch() -> None:
    it = policy()
    it.decide(batch(3), Shortfall({}, "2 of 3"), T0)
    alone = batch(1, confirm=True)
    it.decide(alone, accepted(alone), T0)
    assert it.apart == {"t1", "t2", "t3"}  # a question answered is not yet a batch accepted
    it.decide(batch(1), accepted(batch(1)), T0)
    assert it.apart == {"t2", "t3"}
    it.decide(batch(3), Settled({1: DELIVERED, 2: DELIVERED, 3: Fate("dead")}), T0)
    assert it.apart == {"t2", "t3"}


def test_the_tenants_batched_apart_are_bounded() -> None:
    it = policy()
    it.decide(batch(MAX_APART + 200), Shortfall({}, "x"), T0)
    it.decide(batch(10, number=2), Shortfall({}, "x"), T0)
    assert len(it.apart) == MAX_APART


# --- Refused --------------------------------------------------------------------------------------


def test_a_refused_batch_is_split_in_half() -> None:
    it = policy()
    step = it.decide(batch(5, confirm=True), Refused(400, "no"), T0)
    assert (step.outcome, step.rest, step.fates, step.confirm) == ("split", ((1, 2), (3, 4, 5)), {}, True)
    assert it.failures == 0


def test_one_event_with_a_code_of_its_own_is_a_dead_letter() -> None:
    step = policy().decide(batch(1), Refused(400, "no", event_code="INVALID_ULID"), T0)
    assert step.fates == {1: Fate("dead", 400, "INVALID_ULID", "no")}


def test_one_event_refused_without_evidence_pauses_the_output_and_moves_nothing() -> None:
    it = policy()
    for _ in range(3):
        step = it.decide(batch(1), Refused(400, "no"), T0)
        assert step.fates == {}
        assert step.wait_ms is not None
        assert it.paused == REFUSING_EVERYTHING


def test_one_event_refused_when_another_was_accepted_since_is_a_dead_letter() -> None:
    it = policy()
    it.decide(batch(1), Refused(400, "no"), T0)
    other = batch(1, number=2)
    it.decide(other, accepted(other), T0)
    step = it.decide(batch(1), Refused(422, "no"), T0)
    assert step.fates == {1: Fate("dead", 422, "refused", "no")}


def test_what_was_accepted_before_the_first_refusal_proves_nothing() -> None:
    it = policy()
    it.decide(batch(50), accepted(batch(50)), T0)
    step = it.decide(batch(1, number=2), Refused(400, "no"), T0)
    assert step.fates == {}


def test_the_parts_of_a_refused_batch_were_first_refused_when_it_was() -> None:
    it = policy()
    whole = batch(2)
    it.decide(whole, Refused(400, "no"), T0)
    it.inherit(whole, [11, 12])
    good = batch(1, number=11)
    it.decide(good, accepted(good), T0)
    step = it.decide(batch(1, number=12), Refused(400, "no"), T0)
    assert {fate.reason for fate in step.fates.values()} == {"refused"}


@pytest.mark.parametrize(
    "verdict",
    [
        Refused(400, "", event_code="INVALID_ULID"),
        Refused(413, "", too_large=True),
        Shortfall({}, "0 of 1"),
    ],
)
def test_an_endpoint_that_judges_one_event_is_well(verdict: Verdict) -> None:
    """With failures on its account and nothing left to try again, an output would wait for ever."""
    it = policy()
    it.decide(batch(1), Paused("unauthorized", "401"), T0)
    it.decide(batch(1), verdict, T0)
    assert (it.failures, it.paused, it.wait_ms(T0)) == (0, None, 0)


def test_a_batch_too_large_is_split_and_later_ones_are_made_smaller() -> None:
    it = policy(max_bytes=1 << 20)
    step = it.decide(batch(4, size=99), Refused(413, "", too_large=True), T0)
    assert step.rest == ((1, 2), (3, 4))
    assert it.max_bytes == 200
    it.decide(batch(100, size=99), Refused(413, "", too_large=True), T0)
    assert it.max_bytes == 200


def test_larger_batches_are_dared_again_after_many_that_were_taken() -> None:
    it = policy(max_bytes=1_000)
    it.decide(batch(4, size=99), Refused(413, "", too_large=True), T0)
    sizes = []
    for _ in range(4 * GROW_AFTER):
        it.decide(batch(2), Settled({1: Fate("delivered"), 2: Fate("delivered")}), T0)
        sizes.append(it.max_bytes)
    assert sorted(set(sizes)) == [200, 400, 800, 1_000]
    assert sizes.count(200) == GROW_AFTER - 1


def test_one_event_too_large_is_a_dead_letter() -> None:
    it = policy()
    step = it.decide(batch(1), Refused(413, "no", too_large=True), T0)
    assert step.fates == {1: Fate("dead", 413, "too_large", "no")}
    assert it.max_bytes == 1 << 20


# --- Retry, Paused, Ambiguous ---------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [Retry("server_error", "503"), Paused("unauthorized", "401")])
def test_the_wait_doubles_up_to_its_maximum_and_is_random_below_it(verdict: Verdict) -> None:
    asked: list[int] = []

    def below(n: int) -> int:
        asked.append(n)
        return n - 1

    it = policy(below)
    waits = [it.decide(batch(1), verdict, T0).wait_ms for _ in range(40)]
    assert waits[:8] == [500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000]
    assert set(waits[8:]) == {60_000}
    assert asked[:3] == [501, 1_001, 2_001]
    lowest = policy(lambda n: 0)
    assert {lowest.decide(batch(1), verdict, T0).wait_ms for _ in range(40)} == {0}


@pytest.mark.parametrize("dice", [0, 1])
@pytest.mark.parametrize("after_ms", [7_000, 3_600_000])
def test_retry_after_is_a_minimum(after_ms: int, dice: int) -> None:
    it = policy(lambda n: dice * (n - 1))
    for verdict in (Retry("throttled", "429", after_ms), Paused("unauthorized", "401", after_ms)):
        assert it.decide(batch(1), verdict, T0).wait_ms == after_ms


def test_the_wait_is_the_whole_outputs() -> None:
    it = policy()
    assert it.wait_ms(T0) == 0
    it.decide(batch(1), Retry("throttled", "", 7_000), T0)
    assert [it.wait_ms(T0 + passed) for passed in (0, 1, 6_999, 7_000, 9_000)] == [7_000, 6_999, 1, 0, 0]
    assert it.wait_ms(T0 - HOUR_MS) == 0  # the clock was moved back: nobody knows how long it has been


def test_retry_after_does_not_shorten_the_wait() -> None:
    it = policy()
    for _ in range(10):
        it.decide(batch(1), Retry("server_error"), T0)
    assert it.decide(batch(1), Retry("throttled", "", 1_000), T0).wait_ms == 60_000


def test_a_failure_that_may_pass_is_no_pause() -> None:
    it = policy()
    step = it.decide(batch(1), Retry("timeout", "none in time"), T0)
    assert (step.outcome, step.fates, step.rest, step.answer) == ("timeout", {}, (), "none in time")
    assert (it.failures, it.paused) == (1, None)


def test_the_third_ambiguous_answer_in_a_row_pauses() -> None:
    it = policy()
    for number in range(1, 5):
        step = it.decide(batch(1), Ambiguous("200: <html>"), T0)
        assert (step.outcome, step.fates) == ("ambiguous", {})
        assert it.paused == ("ambiguous" if number >= MAX_AMBIGUOUS else None)
    it.decide(batch(1), accepted(batch(1)), T0)
    it.decide(batch(1), Ambiguous("200: <html>"), T0)
    assert it.paused is None


# --- a queue, a policy and an endpoint ------------------------------------------------------------


class Bench:
    """The courier's loop without its sockets: lease, ask the endpoint, decide, settle; time is given."""

    def __init__(self, store: Store, endpoint: Callable[[Batch], Verdict], seed: int = 1) -> None:
        self.store, self.endpoint, self.now_ms = store, endpoint, T0
        self.policy = Policy(SETTINGS, below=random.Random(seed).randrange)
        self.requests = 0

    def run(self, for_ms: int) -> None:
        """Until the time is over or nothing is left to do."""
        until_ms = self.now_ms + for_ms
        while self.now_ms < until_ms:
            self.now_ms += self.policy.wait_ms(self.now_ms)
            leased = self.store.lease(
                self.now_ms,
                fresh=not self.policy.failures,
                apart=self.policy.apart,
                max_bytes=self.policy.max_bytes,
            )
            if not isinstance(leased, Batch):
                if leased.until_ms is None:
                    return
                self.now_ms = leased.until_ms
                continue
            self.requests += 1
            step = self.policy.decide(leased, self.endpoint(leased), self.now_ms)
            queue, clean = self.store.queue, step.refused and not leased.resent
            if step.wait_ms is not None:
                queue.postpone(leased.id, self.now_ms + step.wait_ms, step.answer, clean=clean)
            else:
                rest, confirm = step.rest, step.confirm
                parts = queue.settle(leased, step.fates, self.now_ms, rest=rest, confirm=confirm, clean=clean)
                self.policy.inherit(leased, parts)
            self.now_ms += 1


def refusing(poisoned: Iterable[str] = (), *, everything: bool = False) -> Callable[[Batch], Verdict]:
    """Answers 400 to a batch that holds a poisoned tenant, or to every batch."""
    bad = frozenset(poisoned)

    def answer(of: Batch) -> Verdict:
        if everything or any(event.tenant in bad for event in of.events):
            return Refused(400, "INVALID_REQUEST: on demand")
        return accepted(of)

    return answer


def test_an_hour_of_400s_makes_no_dead_letter_and_everything_is_delivered_when_it_ends(
    tmp_path: Path,
) -> None:
    with Store(tmp_path) as store:
        names = [f"t{number}" for number in range(250)]
        store.add(*names)
        bench = Bench(store, refusing(everything=True))
        bench.run(HOUR_MS)
        assert store.fates() == {"pending": 250}
        assert bench.policy.detail == "INVALID_REQUEST: on demand"
        assert 199 < bench.requests < 199 + 3_600 // 10  # a hundred split apart, then one by one, after waits
        untouched = store.rows("SELECT count(*) FROM deliveries WHERE first_attempt_ms IS NULL")
        assert untouched == [(150,)]  # only the head of the queue was ever sent
        bench.endpoint = refusing()
        bench.run(HOUR_MS)
        assert store.fates() == {"delivered": 250}
        assert bench.policy.paused is None
        store.check_tallies()


def test_one_poisoned_event_among_good_ones_is_the_only_dead_letter(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(*(f"t{number}" for number in range(250)))
        bench = Bench(store, refusing({"t7", "t249"}))
        bench.run(HOUR_MS)
        dead = (
            "SELECT k.tenant, d.reason, d.answer FROM dead d JOIN events e USING(seq) JOIN keys k USING(key)"
        )
        assert sorted(store.rows(dead)) == [
            ("t249", "refused", "INVALID_REQUEST: on demand"),
            ("t7", "refused", "INVALID_REQUEST: on demand"),
        ]
        assert store.fates() == {"delivered": 248, "dead": 2}
        assert store.queue.attempted(store.output) == 0


def test_after_a_restart_a_refused_event_needs_evidence_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("bad")
        Bench(store, refusing({"bad"})).run(HOUR_MS)
        assert store.fates() == {"pending": 1}
        again = Bench(store, refusing({"bad"}), seed=2)
        again.now_ms = T0 + HOUR_MS
        again.run(HOUR_MS)
        assert store.fates() == {"pending": 1}


def test_an_endpoint_that_swallows_some_tenants_costs_only_their_events(tmp_path: Path) -> None:
    def endpoint(of: Batch) -> Verdict:
        taken = sum(event.tenant != "t3" for event in of.events)
        return accepted(of) if taken == len(of.events) else Shortfall({}, f"{taken} of {len(of.events)}")

    with Store(tmp_path) as store:
        store.add(*(f"t{number % 10}" for number in range(100)))
        bench = Bench(store, endpoint)
        bench.run(HOUR_MS)
        assert store.fates() == {"delivered": 90, "dead": 10}
        assert store.rows("SELECT DISTINCT reason FROM dead") == [("not_accepted",)]
        store.add(*(f"t{number % 10}" for number in range(100)), now_ms=bench.now_ms)
        before = bench.requests
        bench.run(HOUR_MS)
        assert store.fates() == {"delivered": 180, "dead": 20}
        assert (
            bench.requests - before < 30
        )  # the tenant is batched apart: the others are not asked one by one


def test_what_was_not_accepted_is_replayed_as_often_as_it_takes(tmp_path: Path) -> None:
    """An account that is made ready a day later: until then each replay is a dead letter again."""
    ready = False

    def endpoint(of: Batch) -> Verdict:
        taken = sum(ready or event.tenant != "late" for event in of.events)
        return accepted(of) if taken == len(of.events) else Shortfall({}, f"{taken} of {len(of.events)}")

    with Store(tmp_path) as store:
        store.add("late", "good")
        bench = Bench(store, endpoint)
        for _ in range(3):
            bench.run(HOUR_MS)
            assert store.fates()["dead"] == 1
            bench.now_ms += 24 * HOUR_MS
            store.add("good", now_ms=bench.now_ms)
            assert store.queue.replay(None, [], "not_accepted") == 1
        ready = True
        bench.run(HOUR_MS)
        assert store.fates() == {"delivered": 5}


def test_outages_of_every_kind_lose_and_double_nothing(tmp_path: Path) -> None:
    dice = random.Random(7)
    ends: tuple[Verdict, ...] = (
        Retry("timeout"),
        Ambiguous("200: "),
        Paused("unauthorized", "401"),
        Retry("throttled", "", 5),
    )
    stored: dict[str, bytes] = {}

    def endpoint(of: Batch) -> Verdict:
        for event in of.events:
            assert stored.setdefault(event.id, event.body) == event.body
        return accepted(of) if dice.randrange(3) == 0 else ends[dice.randrange(len(ends))]

    with Store(tmp_path) as store:
        store.add(*(f"t{number}" for number in range(330)))
        Bench(store, endpoint).run(24 * HOUR_MS)
        assert store.fates() == {"delivered": 330}
        assert len(stored) == 330
