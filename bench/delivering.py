"""The queue and delivery alone: events in a real store, to the billing stand-in.

Events of closed windows are leased in batches of 100 and settled, each in a transaction with a synchronous
write; then ``proxy-usage run`` is started on the rest and delivers it. The stand-in checks and keeps every
event; it is Python too, and has the other core.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.building import BUILD
from bench.processes import DEADLINE_S, BenchError, OurSink, cpu_us
from bench.tenants import HOUR_MS, Bench, firsts
from proxy_usage.config import load
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.store import Batch, Fate

KEYS = 6_000
LEASED = 60
"""Batches that are leased and settled without being sent."""
EVENTS = 100
ROUNDS = 5
POLL_S = 0.02


async def measure(fold: str) -> dict[str, Any]:
    """The figures, each with its rounds."""
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        async with BillingStandIn() as billing:
            sink = OurSink(Path(directory), billing.url, window_ms=HOUR_MS, fold=fold)
            queue = await asyncio.to_thread(_fill, sink)
            await sink.start()
            try:
                sent = await _delivered(sink, billing, queue.pop("waiting"))
            finally:
                await sink.kill()
    return {**queue, **sent}


def _fill(sink: OurSink) -> dict[str, Any]:
    """Makes events, and leases and settles some of them. Returns what a batch of a hundred cost."""
    bench = Bench(load(sink.configure(), {}))
    # Of the window before: what is open under the clock of now would not be closed.
    bench.now_ms -= 2 * HOUR_MS
    for raw in firsts(bench.templates, KEYS, bench.now_ms // 1_000 - 1):
        bench.feed(raw)
        if bench.entries % 2_000 < bench.templates[0].entries:
            bench.turn()
    bench.now_ms += 2 * HOUR_MS
    while bench.turn(everything=True):
        continue
    cpu, wall = [], []
    for _ in range(LEASED):
        began_cpu, began = time.thread_time_ns(), time.perf_counter_ns()
        batch = bench.storage.queue.lease(
            bench.storage.slots[0].output, bench.now_ms, events=EVENTS, max_bytes=1 << 20, linger_ms=0
        )
        assert isinstance(batch, Batch)
        fates = {event.seq: Fate("delivered", 200) for event in batch.events}
        bench.storage.queue.settle(batch, fates, bench.now_ms)
        cpu.append((time.thread_time_ns() - began_cpu) / 1_000)
        wall.append((time.perf_counter_ns() - began) / 1_000)
    waiting = bench.storage.queue.tallies()[bench.storage.slots[0].output, "pending"]
    bench.storage.close()
    return {
        "waiting": waiting,
        "batch_cpu_us": round(statistics.median(cpu)),
        "batch_wall_us": round(statistics.median(wall)),
        "batch_wall_us_p90": round(sorted(wall)[LEASED * 9 // 10]),
        "batch_events": EVENTS,
    }


async def _delivered(sink: OurSink, billing: BillingStandIn, total: int) -> dict[str, Any]:
    """Waits for all of it. Returns events a second and the sink's processor time an event, by part."""
    marks = [(0, 0.0, 0)]
    until = time.monotonic() + 4 * DEADLINE_S
    step = total // (ROUNDS + 1)
    while len(marks) <= ROUNDS + 1:
        if time.monotonic() > until:
            raise BenchError(f"{len(billing.arrived.stored)} of {total} events were delivered")
        there = len(billing.arrived.stored)
        if there >= min(total, step * len(marks)):
            marks.append((there, time.perf_counter(), cpu_us(sink.pid)))
        await asyncio.sleep(POLL_S)
    parts = list(itertools.pairwise(marks[1:]))  # the first part has the start in it
    return {
        "events_s": [round((b[0] - a[0]) / (b[1] - a[1])) for a, b in parts],
        "us_event": [round((b[2] - a[2]) / (b[0] - a[0]), 1) for a, b in parts],
    }
