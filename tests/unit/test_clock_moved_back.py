"""A clock that was ahead and was set right: what was noted under it holds nothing up and hides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from couriers import running
from money import DAY_MS, HOUR_MS, MINUTE_MS, T0, Store
from stream_events import NoStream, message

from proxy_usage.config.outputs import FileConfig, OutputConfig
from proxy_usage.delivery.policy import Policy, RetrySettings
from proxy_usage.outputs.answers import MAX_RETRY_AFTER_MS
from proxy_usage.outputs.base import Paused, Retry, Settled, Shortfall
from proxy_usage.service.build import clock_ms
from proxy_usage.store import Batch, Fate, Idle, OutputSlot
from proxy_usage.store.ages import AHEAD_MS

AHEAD = T0 + DAY_MS
"""What the clock said before it was set right."""
DEDUP_MS = 600_000
DELIVERED = Fate("delivered", 200)


def policy(max_ms: int = 60_000) -> Policy:
    return Policy(RetrySettings(500, max_ms, DEDUP_MS), below=lambda n: n - 1)


# --- attempts ---------------------------------------------------------------------------------------


def test_a_batch_postponed_under_a_clock_that_was_ahead_is_due(tmp_path: Path) -> None:
    longest_ms = policy().longest_wait_ms
    with Store(tmp_path) as store:
        store.add("a", now_ms=AHEAD)
        batch = store.batch(AHEAD)
        store.queue.postpone(batch.id, AHEAD + 60_000, "503")
    with Store(tmp_path) as store:  # the restart, and the clock is right
        for fresh in (True, False):
            again = store.batch(T0, fresh=fresh, longest_ms=longest_ms)
            assert (again.id, again.resent) == (batch.id, True)
        assert store.queue.attempted(store.output) == 1


def test_the_longest_wait_that_can_be_is_waited_for(tmp_path: Path) -> None:
    it = policy()
    with Store(tmp_path) as store:
        store.add("a")
        batch = store.batch()
        wait_ms = it.decide(batch, Retry("throttled", "429", 9 * DAY_MS), T0).wait_ms
        assert wait_ms == it.longest_wait_ms == MAX_RETRY_AFTER_MS
        store.queue.postpone(batch.id, T0 + wait_ms, "429")
        for now_ms in (T0, T0 + wait_ms - 1):
            assert store.lease(now_ms, longest_ms=wait_ms) == Idle(T0 + wait_ms)
        assert store.batch(T0 + wait_ms, longest_ms=wait_ms).id == batch.id


def test_a_batch_that_is_due_only_now_goes_before_one_of_another_clock(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b")
        of_another, waiting = store.batch(events=1), store.batch(events=1, again=False)
        store.queue.postpone(of_another.id, AHEAD, "503")
        store.queue.postpone(waiting.id, T0 + 500, "503")
        settings: dict[str, Any] = {"fresh": False, "longest_ms": HOUR_MS}
        assert store.lease(T0, **settings) == Idle(T0 + 500)
        assert store.batch(T0 + 500, **settings).id == waiting.id
        assert store.batch(T0 + 500, busy=frozenset({waiting.id}), **settings).id == of_another.id


def test_a_longer_retry_is_believed_as_well() -> None:
    it = policy(max_ms=2 * HOUR_MS)
    assert it.longest_wait_ms == 2 * HOUR_MS
    batch = Batch(1, 1, (), 0, T0, confirm=False)
    assert it.decide(batch, Paused("unauthorized", "401", 9 * HOUR_MS), T0).wait_ms == 2 * HOUR_MS


async def test_a_courier_sends_what_was_postponed_for_a_day(tmp_path: Path) -> None:
    archive = FileConfig(path=tmp_path / "usage.ndjson")
    archive.path.touch()  # it is older than the attempt: there is no doubt what was written
    with Store(tmp_path, outputs=[OutputSlot(0, "archive")]) as store:
        store.add("a", now_ms=clock_ms())
        store.queue.postpone(store.batch(clock_ms()).id, clock_ms() + DAY_MS, "503")
    async with running(tmp_path, [OutputConfig(name="archive", format="file", file=archive)]) as one:
        await one.until("archive", delivered=1)


async def test_a_forwarder_does_not_wait_for_that_clock_either() -> None:
    one = NoStream()
    one.now_ms = AHEAD
    one.taking._take(message())
    batch = await one.batch()
    await one.backlog.postpone(batch.id, AHEAD + 500, "503", unanswered=True, clean=False)
    one.now_ms = T0
    assert (await one.batch(longest_ms=HOUR_MS)).id == batch.id
    await one.backlog.postpone(batch.id, T0 + HOUR_MS, "429", unanswered=True, clean=False)
    assert await one.lease(longest_ms=HOUR_MS) == Idle(T0 + HOUR_MS)


# --- doubt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_ms", "fate"), [(AHEAD, "delivered_ambiguous"), (T0 + DEDUP_MS // 3, "delivered")]
)
def test_nobody_knows_how_long_ago_an_attempt_was_that_lies_ahead(first_ms: int, fate: str) -> None:
    """But for one that lies ahead by little: then little was corrected."""
    with_doubt = Batch(1, 1, (), 1, first_ms, confirm=False, resent=True)
    assert policy().decide(with_doubt, Settled({1: DELIVERED}), T0).fates[1].name == fate


def test_an_answer_that_is_short_condemns_nothing_that_may_have_been_stored_long_ago(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", now_ms=AHEAD)
        store.batch(AHEAD)
        step = policy().decide(store.batch(T0, longest_ms=HOUR_MS), Shortfall({}, "0 of 1"), T0)
        assert {fate.name for fate in step.fates.values()} == {"unconfirmed"}


# --- ages -------------------------------------------------------------------------------------------


def test_the_age_of_what_is_stuck_grows_though_it_was_made_by_a_clock_ahead(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", "b", now_ms=AHEAD)
        store.lease(AHEAD, events=1)
        assert store.queue.oldest_ms(store.output) == AHEAD
    with Store(tmp_path, now_ms=T0) as store:
        for passed_ms in (0, MINUTE_MS, HOUR_MS):
            store.lease(T0 + passed_ms, fresh=False)
            assert store.queue.oldest_ms(store.output) == T0
        store.lease(T0 - HOUR_MS, fresh=False)  # moved back once more
        assert store.queue.oldest_ms(store.output) == T0 - HOUR_MS
        batch = store.batch(T0, fresh=False, longest_ms=HOUR_MS)
        store.queue.settle(batch, {batch.events[0].seq: DELIVERED}, T0)
        store.lease(T0 + MINUTE_MS, fresh=False)
        assert store.queue.oldest_ms(store.output) == T0 + MINUTE_MS  # of the next one: it goes on
        store.lease(AHEAD, fresh=False)
        assert store.queue.oldest_ms(store.output) == AHEAD


def test_an_event_that_is_newer_than_the_last_look_at_the_clock_is_as_old_as_it_is(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("a", now_ms=T0 + AHEAD_MS)
        assert store.queue.oldest_ms(store.output) == T0 + AHEAD_MS


def test_what_a_server_ahead_of_us_published_ages_from_when_it_came() -> None:
    one = NoStream()
    one.taking._take(message(published_ms=AHEAD))
    assert one.taking.oldest_ms() == T0
    one.taking._take(message(seq=6, published_ms=T0 - 5))
    assert one.taking.oldest_ms() == T0 - 5
