"""An event that was in another forwarder's hands while this one held it: perhaps that one sent it."""

from __future__ import annotations

import pytest
from money import T0
from stream_events import ACK_WAIT_MS, NoStream, message

from proxy_usage.delivery.policy import Policy, RetrySettings
from proxy_usage.outputs.base import Settled
from proxy_usage.store import Batch, Fate

DEDUP_MS = 600_000
WAIT_MS = 900_000
"""For so long the link is down: past what the endpoint remembers."""


def fate(batch: Batch, now_ms: int) -> str:
    """What becomes of its events when all of them are accepted."""
    policy = Policy(RetrySettings(500, 60_000, DEDUP_MS), below=lambda _: 0)
    answer = Settled({event.seq: Fate("delivered", 200) for event in batch.events})
    (name,) = {fate.name for fate in policy.decide(batch, answer, now_ms).fates.values()}
    return name


def cut_off(one: NoStream) -> None:
    """The server heard nothing for so long that it handed out to others what is held here."""
    one.monotonic_s += WAIT_MS / 1_000
    one.now_ms += WAIT_MS
    one.taking.check()


def connected(one: NoStream) -> None:
    one.taking._lived = one.monotonic_s


async def test_a_redelivery_of_what_waits_here_says_that_somebody_else_had_it() -> None:
    one = NoStream()
    one.taking._take(message())
    cut_off(one)
    one.taking._take(message(deliveries=3))
    connected(one)
    batch = await one.batch()
    assert (batch.resent, batch.first_attempt_ms) == (True, T0)
    assert fate(batch, one.now_ms) == "delivered_ambiguous"


@pytest.mark.parametrize("clean", [True, False])
async def test_a_redelivery_of_what_was_tried_here_puts_its_batch_in_doubt(clean: bool) -> None:
    one = NoStream()
    one.now_ms += 1_000  # it waited so long in the stream
    for seq in (5, 6):
        one.taking._take(message(seq))
    batch = await one.batch()
    await one.backlog.postpone(batch.id, one.now_ms, "", unanswered=not clean, clean=clean)
    cut_off(one)
    for seq in (5, 6):
        one.taking._take(message(seq, deliveries=2))
    connected(one)
    again = await one.batch()
    assert (again.id, again.resent, again.first_attempt_ms) == (batch.id, True, T0)
    assert fate(again, one.now_ms) == "delivered_ambiguous"


async def test_the_parts_of_a_batch_in_another_s_hands_are_in_doubt() -> None:
    one = NoStream()
    for seq in (5, 6):
        one.taking._take(message(seq))
    batch = await one.batch()
    cut_off(one)
    one.taking._take(message(5, deliveries=2))
    one.taking._take(message(6, deliveries=2))
    connected(one)
    parts = await one.backlog.settle(batch, {}, one.now_ms, rest=[[5], [6]], clean=True)
    for number in parts:
        part = await one.batch(busy=frozenset(set(parts) - {number}))
        assert (part.id, part.resent, part.first_attempt_ms) == (number, True, T0)


async def test_what_was_under_way_when_it_lapsed_was_perhaps_sent_by_another() -> None:
    one = NoStream()
    one.taking._take(message())
    batch = await one.batch()
    cut_off(one)
    await one.lease(busy=frozenset({batch.id}))  # it is kept: its answer may settle it
    connected(one)
    await one.backlog.postpone(batch.id, one.now_ms, "refused", unanswered=False, clean=True)
    again = await one.batch()
    assert (again.id, again.resent, again.first_attempt_ms) == (batch.id, True, T0)


async def test_what_nobody_else_had_is_not_in_doubt() -> None:
    one = NoStream()
    one.taking._take(message())
    batch = await one.batch()
    assert not batch.resent
    await one.backlog.postpone(batch.id, one.now_ms, "refused", unanswered=False, clean=True)
    one.now_ms += WAIT_MS
    assert ACK_WAIT_MS < WAIT_MS
    again = await one.batch()
    assert (again.resent, again.first_attempt_ms) == (False, one.now_ms)
    assert fate(again, one.now_ms) == "delivered"
