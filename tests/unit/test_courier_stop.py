"""A courier that is told to stop: what is under way is given its time, and no more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from money import T0, Store
from senders import PlainSender

from proxy_usage.delivery import Courier, CourierSettings, Policy, RetrySettings, StoredBacklog
from proxy_usage.metrics import Metrics
from proxy_usage.outputs.base import Settled, Verdict
from proxy_usage.store import Fate, Queued
from proxy_usage.store.thread import StoreThread

PATIENCE_S = 60.0


class Parts(NamedTuple):
    courier: Courier
    store: Store
    thread: StoreThread


class SlowEndpoint(PlainSender):
    """Accepts everything once ``answer`` is set."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    async def send(self, events: Sequence[Queued]) -> Verdict:
        self.asked.set()
        await self.answer.wait()
        return Settled({event.seq: Fate("delivered", 200) for event in events})


@asynccontextmanager
async def delivering(directory: Path, endpoint: SlowEndpoint, tenants: int) -> AsyncIterator[Parts]:
    thread = StoreThread()
    with Store(directory) as store:
        store.add(*(f"t-{number}" for number in range(tenants)))
        courier = Courier(
            CourierSettings("billing", store.output, batch_events=1, linger_ms=0, concurrency=2),
            StoredBacklog(store.queue, thread),
            endpoint,
            Policy(RetrySettings(1, 1), below=lambda _: 0),
            Metrics(),
            lambda: T0,
        )
        running = asyncio.create_task(courier.run())
        async with asyncio.timeout(PATIENCE_S):
            yield Parts(courier, store, thread)
            await running
        thread.close()


@pytest.mark.parametrize(("timeout_s", "fates"), [(PATIENCE_S, {"delivered": 1}), (0.05, {"pending": 1})])
async def test_what_is_under_way_may_end_within_the_time_of_a_stop(
    tmp_path: Path, timeout_s: float, fates: dict[str, int]
) -> None:
    endpoint = SlowEndpoint()
    async with delivering(tmp_path, endpoint, tenants=1) as (courier, store, thread):
        await endpoint.asked.wait()
        await thread.run(int)  # the next lease is over: nothing but the batch is under way
        stopping = asyncio.create_task(courier.stop(timeout_s))
        if timeout_s < 1:
            await stopping
        else:
            for _ in range(10):  # a stop that waits for nothing would have ended it by now
                await asyncio.sleep(0)
            endpoint.answer.set()
            await stopping
        assert await thread.run(store.fates) == fates


async def test_a_batch_that_is_leased_as_the_stop_comes_is_sent(tmp_path: Path) -> None:
    endpoint = SlowEndpoint()
    endpoint.answer.set()
    async with delivering(tmp_path, endpoint, tenants=1) as (courier, store, thread):
        blocked = threading.Event()
        waiting = asyncio.ensure_future(thread.run(blocked.wait))  # the store is busy as the loop begins
        await asyncio.sleep(0)
        stopping = asyncio.create_task(courier.stop(PATIENCE_S))
        await asyncio.sleep(0)
        blocked.set()
        await stopping
        await waiting
        assert endpoint.asked.is_set()
        assert await thread.run(store.fates) == {"delivered": 1}
