"""What a courier notes of a pause while several batches are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from money import T0, Store
from senders import PlainSender

from proxy_usage.delivery import Courier, CourierSettings, Policy, RetrySettings, StoredBacklog
from proxy_usage.metrics import Metrics
from proxy_usage.outputs.base import Paused, Retry, Verdict
from proxy_usage.store import Queued
from proxy_usage.store.reader import Reader
from proxy_usage.store.thread import StoreThread


class TwoAnswers(PlainSender):
    """Refuses one of two batches that are under way together. The other's answer, none, comes after that."""

    def __init__(self) -> None:
        self.asked = 0
        self.both = asyncio.Event()

    async def send(self, events: Sequence[Queued]) -> Verdict:
        self.asked += 1
        number = self.asked
        if number == 2:
            self.both.set()
        await self.both.wait()
        return Paused("unauthorized", "401") if number == 2 else Retry("timeout", "no whole answer in time")


async def test_a_pause_is_noted_with_the_answer_that_is_its_reason(tmp_path: Path) -> None:
    thread = StoreThread()
    with Store(tmp_path) as store:
        store.add("alpha", "bravo")
        courier = Courier(
            CourierSettings("billing", store.output, batch_events=1, linger_ms=0, concurrency=2),
            StoredBacklog(store.queue, thread),
            TwoAnswers(),
            Policy(RetrySettings(60_000, 60_000), below=lambda most: most - 1),
            Metrics(),
            lambda: T0,
        )
        running = asyncio.create_task(courier.run())
        with Reader(store.path) as reader:
            async with asyncio.timeout(60):
                while (output := reader.status().outputs[0]).paused is None:
                    await asyncio.sleep(0.005)
        await courier.stop(0.1)
        await running
        thread.close()
    assert (output.paused, output.detail) == ("unauthorized", "401")
