"""What the log costs Envoy, and what a sink that is away costs in rows. A real Envoy, one worker.

Cost: three Envoys side by side answer requests themselves (``direct_response``), one without a gRPC log, one
with Envoy's default buffer, one with the recommended one; each in its turn, at the same rate, since a request
costs more at a lower one, and as fast as they go. All send to ``proxy-usage run``.

Loss: the sink is stopped for some seconds under a steady load and started again; rows lost are requests less
rows that it read. Its cluster has the recommended health check, with which rows wait in Envoy's buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.building import BUILD, build_cpp
from bench.processes import OTHER_CORE, SERVER_CORE, BenchError, OurSink, cpu_us, spawn
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.bootstrap import EnvoyOptions, bootstrap
from proxy_usage.demo.envoy import EnvoyProcess
from proxy_usage.demo.truth import Tenant
from proxy_usage.store.reader import Reader

TENANT = Tenant("alpha", "alpha.example.com")
CONNECTIONS = 16
ROUNDS = 5
SECONDS = 3.0
STEADY = 4_000
"""Requests a second at which the costs are compared; Envoy takes some 15,000 here."""
FLUSH_MS = 1_000
DEFAULT_BUFFER, RECOMMENDED_BUFFER = 16 << 10, 16 << 20
LOSS_RATE, DOWN_S, LOSS_TRIALS = 1_000, 3, 3
LOSS_SECONDS = 15.0
"""Of load: the sink is long back at its end, on a busy machine, too."""


async def measure(fold: str) -> dict[str, Any]:
    """All figures of this part."""
    build_cpp("requests")
    with tempfile.TemporaryDirectory(dir=BUILD) as place:
        directory = Path(place)
        cost = await _cost(directory, fold)
        loss = [await _loss(directory, buffer, fold) for buffer in (DEFAULT_BUFFER, RECOMMENDED_BUFFER)]
    return {**cost, "loss": loss}


async def _cost(directory: Path, fold: str) -> dict[str, Any]:
    cost: dict[str, list[float]] = {}
    sink_us: list[float] = []
    async with BillingStandIn() as billing, contextlib.AsyncExitStack() as running:
        sink = OurSink(directory, billing.url, fold=fold)
        sink.core = OTHER_CORE  # Envoy has a core for itself
        await sink.start()
        running.push_async_callback(sink.kill)
        envoys = {
            "none": await running.enter_async_context(envoy_with(directory, "none", None, 0)),
            "16 KiB": await running.enter_async_context(
                envoy_with(directory, "small", sink.port, DEFAULT_BUFFER)
            ),
            "16 MiB": await running.enter_async_context(
                envoy_with(directory, "large", sink.port, RECOMMENDED_BUFFER)
            ),
        }
        for envoy in envoys.values():
            pin(envoy.pid)
            await send(envoy.port, 0.5, 0)
        for rate in (STEADY, 0):
            for _ in range(ROUNDS):
                for name, envoy in envoys.items():
                    before, sink_before = cpu_us(envoy.pid), cpu_us(sink.pid)
                    sent = await send(envoy.port, SECONDS, rate)
                    await asyncio.sleep(1.5 * FLUSH_MS / 1_000)  # the rest of the buffer goes out
                    label = f"{name}, {rate:,} requests a second" if rate else f"{name}, saturated"
                    used = (cpu_us(envoy.pid) - before) / sent["requests"]
                    cost.setdefault(label, []).append(round(used, 3))
                    if name == "16 MiB" and rate:
                        sink_us.append(round((cpu_us(sink.pid) - sink_before) / sent["requests"], 3))
    return {"us_request": cost, "sink_us_light": sink_us}


async def _loss(directory: Path, buffer: int, fold: str) -> dict[str, Any]:
    """Rows lost while the sink is stopped and started again, in several trials."""
    lost, meanwhile = [], []
    for trial in range(LOSS_TRIALS):
        place = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=directory))
        async with BillingStandIn() as billing:
            sink = OurSink(place, billing.url, fold=fold)
            sink.core = OTHER_CORE
            await sink.start()
            try:
                async with envoy_with(place, "envoy", sink.port, buffer) as envoy:
                    load = asyncio.create_task(send(envoy.port, LOSS_SECONDS, LOSS_RATE))
                    await asyncio.sleep(2 + trial * FLUSH_MS / 1_000 / LOSS_TRIALS)
                    began = time.monotonic()
                    await sink.stop()
                    await asyncio.sleep(DOWN_S)
                    await sink.start()
                    away_s = time.monotonic() - began
                    sent = await load
                    await asyncio.sleep(2 * FLUSH_MS / 1_000)
                    await envoy.drain()
                await sink.stop()
            finally:
                await sink.kill()
            lost.append(sent["requests"] - rows_read(sink))
            meanwhile.append(round(away_s * LOSS_RATE))
    return {"buffer": buffer, "meanwhile": meanwhile, "lost": lost}


def rows_read(sink: OurSink) -> int:
    """Rows of requests that have a fate in the sink's store, whether it runs or not."""
    with Reader(sink.directory / "usage.db") as reader:
        rows = reader.status().rows
    # The listener's rows, one a connection, are skipped under a reason of their own.
    return sum(sum(by.values()) for by in rows.values()) - rows.get("skipped", {}).get("listener", 0)


def envoy_with(
    directory: Path, name: str, sink_port: int | None, buffer: int, flush_ms: int = FLUSH_MS
) -> EnvoyProcess:
    """An Envoy that answers ``/static`` itself, with a gRPC log to the sink, if there is one."""
    options = EnvoyOptions(
        tenants=(TENANT,),
        upstream=("127.0.0.1", 9),  # nobody: every request is answered by Envoy itself
        als=[("127.0.0.1", sink_port)] if sink_port else [],
        node_id=f"bench-{name}",
        buffer_flush_ms=flush_ms,
        buffer_bytes=buffer,
    )
    return EnvoyProcess(bootstrap(options), directory, name=name, buffer_flush_ms=flush_ms)


async def send(port: int, seconds: float, rate: float, *, cut_off: bool = False) -> dict[str, Any]:
    """Sends requests over connections that stay open; ``rate`` a second, 0: as many as are answered.

    Returns what bench/peers/requests.cc counted. Raises BenchError for an answer other than 200 and, unless
    ``cut_off`` says that Envoy ends meanwhile, for a connection that broke.
    """
    words = [str(BUILD / "requests-cpp"), str(port), str(CONNECTIONS), TENANT.host, "/static"]
    words += [str(seconds), str(rate)]
    process = await spawn(words, OTHER_CORE, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    if process.returncode and not (cut_off and said):
        raise BenchError(f"requests failed: {said.decode()}")
    sent: dict[str, Any] = json.loads(said)
    if sent["others"]:
        raise BenchError(f"{sent['others']} requests were not answered with 200")
    return sent


def pin(pid: int) -> None:
    """Puts all threads of a process on the core of servers."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {SERVER_CORE})
