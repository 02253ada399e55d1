"""When a delivery may be the second of its event: after the endpoint has forgotten an attempt in doubt."""

from __future__ import annotations

from pathlib import Path

import pytest
from money import T0, Store

from proxy_usage.delivery.policy import Policy, RetrySettings, Step
from proxy_usage.outputs.base import Ambiguous, Paused, Refused, Retry, Settled, Verdict
from proxy_usage.store import Batch, Fate
from proxy_usage.store.reader import Reader

DEDUP_MS = 600_000
ACCEPTED = "accepted"


class Bench:
    """One output's queue and policy, a clock, and answers given by hand."""

    def __init__(self, store: Store) -> None:
        self.store, self.now_ms = store, T0
        self.policy = Policy(RetrySettings(1, 1, DEDUP_MS), below=lambda _: 0)

    def attempt(self, verdict: Verdict | str, *, after_ms: int = 0, crash: bool = False) -> Step:
        """One attempt of the head batch ``after_ms`` later; a crash forgets its answer."""
        self.now_ms += after_ms
        batch = self.store.batch(self.now_ms)
        if verdict == ACCEPTED:
            verdict = Settled({event.seq: Fate("delivered", 200) for event in batch.events})
        assert not isinstance(verdict, str)
        step = self.policy.decide(batch, verdict, self.now_ms)
        if not crash:
            self._persist(batch, step)
        return step

    def _persist(self, batch: Batch, step: Step) -> None:
        clean = step.refused and not batch.resent
        if step.wait_ms is not None:
            self.store.queue.postpone(
                batch.id, self.now_ms, step.answer, unanswered=step.unanswered, clean=clean
            )
        else:
            self.store.queue.settle(
                batch, step.fates, self.now_ms, rest=step.rest, confirm=step.confirm, clean=clean
            )


@pytest.mark.parametrize(
    ("verdict", "in_doubt"),
    [
        (Retry("timeout"), True),
        (Retry("broken_answer"), True),
        (Retry("throttled"), True),  # it keeps what it stored before its log was full
        (Retry("server_error"), True),
        (Ambiguous("200: a page"), True),
        (Retry("connect"), False),
        (Paused("tls", ""), False),
        (Paused("unauthorized", ""), False),
        (Paused("misconfigured", ""), False),
        (Paused("redirected", ""), False),
        (Refused(400, "no"), False),
    ],
)
def test_only_an_attempt_that_may_have_stored_something_makes_a_late_delivery_ambiguous(
    tmp_path: Path, verdict: Verdict, in_doubt: bool
) -> None:
    with Store(tmp_path) as store:
        (made,) = store.add("alpha")
        bench = Bench(store)
        bench.attempt(verdict)
        bench.attempt(verdict, after_ms=DEDUP_MS)
        bench.attempt(ACCEPTED, after_ms=1)
        assert store.fates() == {"delivered_ambiguous" if in_doubt else "delivered": 1}
        assert store.counters("unanswered") == ({str(store.output): 2} if in_doubt else {})
        store.check_tallies()
        with Reader(store.path) as reader:
            assert reader.conservation(deep=True).differences == ()
            (status,) = reader.status().outputs
            assert (status.delivered, status.ambiguous) == (1, int(in_doubt))
            assert status.unanswered == 2 * in_doubt
            assert [one.id for one in reader.ambiguous()] == [made] * in_doubt
            assert reader.ambiguous("billing", 0) == ()


def test_within_the_window_a_second_delivery_is_recognised(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("alpha")
        bench = Bench(store)
        bench.attempt(Retry("timeout"))
        bench.attempt(ACCEPTED, after_ms=DEDUP_MS)
        assert store.fates() == {"delivered": 1}


def test_a_first_attempt_is_never_in_doubt_however_long_it_waited(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("alpha")
        Bench(store).attempt(ACCEPTED, after_ms=10 * DEDUP_MS)
        assert store.fates() == {"delivered": 1}


def test_an_attempt_of_a_process_that_died_is_in_doubt(tmp_path: Path) -> None:
    """It was marked before its first byte left, and nobody knows how many left."""
    with Store(tmp_path) as store:
        store.add("alpha")
        Bench(store).attempt(Retry("connect"), crash=True)
    with Store(tmp_path) as store:
        bench = Bench(store)
        bench.attempt(Retry("connect"))
        bench.attempt(ACCEPTED, after_ms=DEDUP_MS + 1)
        assert store.fates() == {"delivered_ambiguous": 1}


def test_a_refused_attempt_does_not_clear_the_doubt_of_the_one_before(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("alpha")
        bench = Bench(store)
        bench.attempt(Retry("timeout"))
        bench.attempt(Retry("connect"), after_ms=5)
        bench.attempt(ACCEPTED, after_ms=DEDUP_MS)
        assert store.fates() == {"delivered_ambiguous": 1}


@pytest.mark.parametrize(
    ("first", "expected"), [(None, "delivered"), (Retry("timeout"), "delivered_ambiguous")]
)
def test_the_parts_of_a_split_batch_keep_its_doubt(
    tmp_path: Path, first: Verdict | None, expected: str
) -> None:
    with Store(tmp_path) as store:
        store.add("alpha", "beta")
        bench = Bench(store)
        if first is not None:
            bench.attempt(first)
        bench.attempt(Refused(400, "no"))
        for _ in range(2):
            bench.attempt(ACCEPTED, after_ms=DEDUP_MS + 1)
        assert store.fates() == {expected: 2}


def test_an_outage_that_stored_nothing_leaves_time_to_ask_event_by_event(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("alpha")
        bench = Bench(store)
        bench.attempt(Retry("connect"))
        bench.now_ms += 10 * DEDUP_MS
        batch = store.batch(bench.now_ms)
        assert (batch.first_attempt_ms, batch.resent) == (bench.now_ms, False)
        assert store.rows("SELECT first_attempt_ms FROM deliveries") == [(bench.now_ms,)]
