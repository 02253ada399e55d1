"""A courier that is told to stop: what is under way is given its time, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from money import T0, Store

from proxy_usage.delivery import Courier, CourierSettings, Policy, RetrySettings, StoredBacklog
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust
from proxy_usage.metrics import Metrics
from proxy_usage.outputs.base import Settled, Verdict
from proxy_usage.store import Fate, Queued
from proxy_usage.store.thread import StoreThread

PATIENCE_S = 60.0


class SlowEndpoint:
    """Accepts everything once ``answer`` is set."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def trust(self, token: TokenFile | None, trust: Trust) -> None:
        raise AssertionError("nobody renews anything")

    async def send(self, events: Sequence[Queued]) -> Verdict:
        self.asked.set()
        await self.answer.wait()
        return Settled({event.seq: Fate("delivered", 200) for event in events})


@pytest.mark.parametrize(("timeout_s", "fates"), [(PATIENCE_S, {"delivered": 1}), (0.05, {"pending": 1})])
async def test_what_is_under_way_may_end_within_the_time_of_a_stop(
    tmp_path: Path, timeout_s: float, fates: dict[str, int]
) -> None:
    endpoint, thread = SlowEndpoint(), StoreThread()
    with Store(tmp_path) as store:
        store.add("alpha")
        courier = Courier(
            CourierSettings("billing", store.output, linger_ms=0),
            StoredBacklog(store.queue, thread),
            endpoint,
            Policy(RetrySettings(1, 1), below=lambda _: 0),
            Metrics(),
            lambda: T0,
        )
        running = asyncio.create_task(courier.run())
        async with asyncio.timeout(PATIENCE_S):
            await endpoint.asked.wait()
            stopping = asyncio.create_task(courier.stop(timeout_s))
            if timeout_s < 1:
                await stopping
            else:
                for _ in range(10):  # a stop that waits for nothing would have ended it by now
                    await asyncio.sleep(0)
                endpoint.answer.set()
                await stopping
            await running
        assert await thread.run(store.fates) == fates
        thread.close()
