"""Two sinks behind a real Envoy, stopped politely again and again under load: no row is lost.

Envoy flushes once a second, so each stop comes at another eighth of that second. FAULT_STOPS says how many
stops there are (8 by default, one at each phase; ``make test-faults`` takes 32).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from program import Sink, eventually

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.bootstrap import EnvoyOptions, bootstrap
from proxy_usage.demo.envoy import EnvoyProcess
from proxy_usage.demo.traffic import mixed
from proxy_usage.demo.truth import Truth, tenants
from proxy_usage.demo.upstream import Upstream

STOPS = int(os.environ.get("FAULT_STOPS", "8"))
PHASES = 8
FLUSH_MS = 1_000
LOCAL = "127.0.0.1"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120 + 30 * STOPS)]


class Load:
    """Requests without a pause, until it is told to end."""

    def __init__(self, port: int, seed: int) -> None:
        self.truth = Truth()
        self._ended = asyncio.Event()
        self._task = asyncio.create_task(self._send(port, seed))

    async def _send(self, port: int, seed: int) -> None:
        while not self._ended.is_set():
            seed += 1_000
            await mixed(
                LOCAL, port, tenants(3), requests=500, seed=seed, truth=self.truth, stop=self._ended.is_set
            )

    async def end(self) -> int:
        """Requests that were answered."""
        self._ended.set()
        await self._task
        return sum(sent.requests for sent in self.truth.by_route().values())


def counted(*sinks: Sink) -> int:
    """Rows that were counted, over the lives of the stores."""
    total = 0
    for sink in sinks:
        with sink.reader() as reader:
            total += reader.status().rows.get("counted", {}).get("", 0)
    return total


async def arrived(expected: int, *sinks: Sink) -> int:
    """Rows that were counted, once they are all there or nothing has come for twenty flushes."""
    have, quiet = -1, 0
    while have < expected and quiet < 200:
        await asyncio.sleep(0.1)
        now = counted(*sinks)
        quiet = quiet + 1 if now == have else 0
        have = now
    return have


async def test_graceful_stops_lose_nothing(tmp_path: Path) -> None:
    async with BillingStandIn() as billing, Upstream() as upstream:
        one, two = (Sink(tmp_path / name, url=billing.url) for name in ("one", "two"))
        async with one, two:
            options = EnvoyOptions(
                tenants=tenants(3),
                upstream=(LOCAL, upstream.port),
                als=[(LOCAL, sink.grpc_port) for sink in (one, two)],
                buffer_flush_ms=FLUSH_MS,
            )
            envoy = EnvoyProcess(bootstrap(options), tmp_path, concurrency=2, buffer_flush_ms=FLUSH_MS)
            async with envoy:
                lost = [await trial(number, envoy, (one, two)) for number in range(STOPS)]
    table = "\n".join(
        f"  {phase * FLUSH_MS // PHASES:4} ms: {' '.join(map(str, lost[phase::PHASES]))}"
        for phase in range(PHASES)
    )
    print(f"rows lost by {STOPS} graceful stops, by phase of the flush interval:\n{table}")
    assert lost == [0] * STOPS, table


async def trial(number: int, envoy: EnvoyProcess, sinks: tuple[Sink, Sink]) -> int:
    """Stops a sink that rows come to, under load. Returns how many rows are missing.

    Envoy's workers stay with the sink they have, so that after a stop the other one has them all.
    """
    before = counted(*sinks)
    read = [sink.read() for sink in sinks]
    load = Load(envoy.port, number)

    def busy() -> list[Sink]:
        return [sink for sink, start in zip(sinks, read, strict=True) if sink.read() > start]

    await eventually(busy, "rows come")
    sink = busy()[0]
    await asyncio.sleep(number % PHASES * FLUSH_MS / PHASES / 1_000)
    assert await sink.stop() == 0
    await sink.start()
    await asyncio.sleep(2 * FLUSH_MS / 1_000)  # and on, with both
    sent = await load.end()
    return before + sent - await arrived(before + sent, *sinks)
