"""Configured outputs being delivered from one store, as the service wires them.

async with running(tmp_path, [OutputConfig(…), …]) as one:
    one.store.add("alpha", now_ms=clock_ms())
    await one.until("billing", delivered=1)
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from money import Store

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.delivery import Courier, CourierSettings, Policy, RetrySettings, StoredBacklog
from proxy_usage.metrics import Metrics
from proxy_usage.service.build import clock_ms
from proxy_usage.service.couriers import build_sender
from proxy_usage.store import OutputSlot
from proxy_usage.store.thread import StoreThread

PATIENCE_S = 60.0


class Running:
    """A store and the couriers of its outputs."""

    def __init__(self, path: Path, configured: Sequence[OutputConfig]) -> None:
        self.store = Store(path, outputs=[OutputSlot(0, one.name) for one in configured])
        self.thread = StoreThread()
        self.couriers: list[Courier] = []
        for one, slot in zip(configured, self.store.slots, strict=True):
            retry = RetrySettings(one.retry.initial, one.retry.max, one.dedup_window)
            policy = Policy(retry, below=random.Random(5).randrange)
            sender = build_sender(one, 60_000, policy)
            assert sender is not None
            self.couriers.append(
                Courier(
                    CourierSettings(slot.name, slot.output, one.batch.events, 0, 1),
                    StoredBacklog(self.store.queue, self.thread),
                    sender,
                    policy,
                    Metrics(),
                    clock_ms,
                )
            )

    async def until(self, name: str, **fates: int) -> None:
        (output,) = (slot.output for slot in self.store.slots if slot.name == name)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                tallies = await self.thread.run(self.store.queue.tallies)
                if {
                    fate: events for (of, fate), events in tallies.items() if of == output and events
                } == fates:
                    return
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(path: Path, configured: Sequence[OutputConfig]) -> AsyncIterator[Running]:
    one = Running(path, configured)
    tasks = [asyncio.create_task(courier.run()) for courier in one.couriers]
    try:
        yield one
    finally:
        for courier in one.couriers:
            await courier.stop(0.1)
        await asyncio.gather(*tasks)
        one.thread.close()
        one.store.database.close()
