"""What a courier says of its batches: failures as warnings, each of them once a minute at the most."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from money import MINUTE_MS, T0, Store
from senders import PlainSender
from structlog.testing import capture_logs

from proxy_usage.delivery import Courier, CourierSettings, Policy, RetrySettings, StoredBacklog
from proxy_usage.metrics import Metrics
from proxy_usage.outputs.base import Paused, Retry, Settled, Verdict
from proxy_usage.store import Fate, Queued
from proxy_usage.store.thread import StoreThread

PATIENCE_S = 60.0
CONNECT, UNAUTHORIZED = Retry("connect", "refused"), Paused("unauthorized", "401: who are you?")


class Endpoint(PlainSender):
    """Gives one verdict after the other, each at its time, and then accepts everything."""

    def __init__(self, *verdicts: tuple[int, Verdict]) -> None:
        self._verdicts: Iterator[tuple[int, Verdict]] = iter(verdicts)
        self.now_ms = T0

    async def send(self, events: Sequence[Queued]) -> Verdict:
        delivered = Settled({event.seq: Fate("delivered", 200) for event in events})
        now_ms, verdict = next(self._verdicts, (self.now_ms, delivered))
        self.now_ms = now_ms
        return verdict


async def said(directory: Path, *verdicts: tuple[int, Verdict]) -> list[tuple[str, str]]:
    """Levels and outcomes of the lines that one event is worth."""
    endpoint, thread = Endpoint(*verdicts), StoreThread()
    with Store(directory) as store, capture_logs() as lines:
        store.add("alpha")
        courier = Courier(
            CourierSettings("billing", store.output, linger_ms=0),
            StoredBacklog(store.queue, thread),
            endpoint,
            Policy(RetrySettings(1, 1), below=lambda _: 0),
            Metrics(),
            lambda: endpoint.now_ms,
        )
        running = asyncio.create_task(courier.run())
        async with asyncio.timeout(PATIENCE_S):
            while await thread.run(store.fates) != {"delivered": 1}:
                await asyncio.sleep(0.002)
        await courier.stop(PATIENCE_S)  # a batch is said after its fate is stored
        await running
        thread.close()
    return [(line["log_level"], line["outcome"]) for line in lines if line["event"] == "batch"]


@pytest.mark.parametrize("verdict", [CONNECT, UNAUTHORIZED])
async def test_a_failure_is_a_warning_and_its_end_is_not(tmp_path: Path, verdict: Any) -> None:
    assert await said(tmp_path, (T0, verdict)) == [("warning", verdict.reason), ("info", "delivered")]


async def test_a_failure_that_lasts_is_said_once_a_minute_also_among_others(tmp_path: Path) -> None:
    lines = await said(
        tmp_path,
        (T0, CONNECT),
        (T0 + 1, CONNECT),
        (T0 + 2, UNAUTHORIZED),
        (T0 + 3, CONNECT),
        (T0 + 4, UNAUTHORIZED),
        (T0 + MINUTE_MS - 1, CONNECT),
        (T0 + MINUTE_MS, CONNECT),
    )
    warnings = [outcome for level, outcome in lines if level == "warning"]
    assert warnings == ["connect", "unauthorized", "connect"]


async def test_a_clock_that_was_moved_back_silences_nothing(tmp_path: Path) -> None:
    lines = await said(tmp_path, (T0 + MINUTE_MS, CONNECT), (T0, CONNECT), (T0 + 1, CONNECT))
    assert lines == [("warning", "connect")] * 2 + [("info", "delivered")]
