"""What Envoy's ``buffer_flush_interval`` costs by the row, and how many rows it puts at risk. Real Envoys.

An Envoy of one worker for each interval, each with a sink of its own, all with the recommended buffer and all
under the same steady load at once, so that what disturbs the machine meets all alike.

Cost: processor time of sinks and Envoys in rounds that are whole numbers of every interval, and that of a
sink whose Envoy has nothing to do.

Loss: Envoys are killed at phases spread over the interval; sinks are killed as a message comes, which is the
worst moment, and stopped and started again. Rows lost are requests answered less rows that the sink has read.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.building import BUILD, build_cpp
from bench.envoys import RECOMMENDED_BUFFER, envoy_with, pin, rows_read, send
from bench.processes import DEADLINE_S, OTHER_CORE, BenchError, OurSink, cpu_ns
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.envoy import EnvoyProcess

INTERVALS_MS = (100, 1_000, 5_000)
RATE = 1_000
"""Requests a second, of each Envoy."""
ROUNDS = 3
SECONDS = 10
"""Of a round: a whole number of every interval."""
DOWN_S = 1
"""How long a sink is away, besides the time it takes to start."""
QUIET_S = 1.5
"""For a message to be read and stored."""
POLL_S = 0.02
WRITTEN = "access_logs.grpc_access_log.logs_written"
"""Rows of requests that Envoy has put into its buffer."""
FLUSHED = "access_logs.grpc_access_log.grpc_entries_flushed"
"""Rows that it has handed over, those of connections among them."""
CLOSED = "http.ingress.downstream_cx_destroy"
"""Connections that have ended: each has a row."""
SENT = "cluster.usage.upstream_cx_tx_bytes_total"
AT_LEAST_BYTES = 4 << 10
"""Of a message: what Envoy sends a sink besides, answers to pings, is far less."""


class Pair(NamedTuple):
    """An Envoy and the sink that its rows go to."""

    interval_ms: int
    envoy: EnvoyProcess
    sink: OurSink

    @property
    def interval(self) -> float:
        """In seconds."""
        return self.interval_ms / 1_000

    async def stat(self, name: str) -> int:
        """One of Envoy's counters."""
        return (await self.envoy.stats(f"^{re.escape(name)}$"))[name]


async def measure(fold: str) -> dict[str, Any]:
    """All figures of this part."""
    build_cpp("requests")
    with tempfile.TemporaryDirectory(dir=BUILD) as place:
        async with BillingStandIn() as billing, contextlib.AsyncExitStack() as running:

            async def pair(name: str, interval_ms: int) -> Pair:
                sink = OurSink(Path(place), billing.url, name=f"sink-{name}", fold=fold)
                sink.core = OTHER_CORE  # Envoys have a core for themselves
                await sink.start()
                running.push_async_callback(sink.kill)
                envoy = envoy_with(Path(place), name, sink.port, RECOMMENDED_BUFFER, interval_ms)
                await running.enter_async_context(envoy)
                pin(envoy.pid)
                return Pair(interval_ms, envoy, sink)

            pairs = [await pair(f"{interval_ms}ms", interval_ms) for interval_ms in INTERVALS_MS]
            idle = await pair("idle", INTERVALS_MS[0])
            figures = await _cost(pairs, idle)
            await idle.envoy.stop()
            await idle.sink.kill()
            for name, trial in (
                ("envoy_killed", _envoy_killed),
                ("sink_killed", _sink_killed),
                ("sink_restarted", _sink_restarted),
            ):
                lost = await trials(pairs, trial)
                for one, rows in zip(figures["intervals"], lost, strict=True):
                    one[name] = rows
    return figures


# --- cost ---------------------------------------------------------------------------------------------------


async def _cost(pairs: Sequence[Pair], idle: Pair) -> dict[str, Any]:
    warming = max(pair.interval for pair in pairs) + 1
    lasts = warming + ROUNDS * (SECONDS + 1)
    loads = [asyncio.create_task(send(pair.envoy.port, lasts, RATE)) for pair in pairs]
    await asyncio.sleep(warming)
    idle_us_s: list[float] = []
    intervals: list[dict[str, Any]] = [{"interval_ms": pair.interval_ms} for pair in pairs]
    pids = [pid for pair in (*pairs, idle) for pid in (pair.sink.pid, pair.envoy.pid)]
    for _ in range(ROUNDS):
        # To be asked costs a sink something, which is not the rows': it is asked outside of the round.
        counts = await asyncio.gather(*map(_counts, pairs))
        began_ns = {pid: cpu_ns(pid) for pid in pids}
        await asyncio.sleep(SECONDS)
        us = {pid: (cpu_ns(pid) - began_ns[pid]) / 1_000 for pid in pids}
        idle_us_s.append(round(us[idle.sink.pid] / SECONDS))
        after = await asyncio.gather(*map(_counts, pairs))
        for pair, one, now, then in zip(pairs, intervals, after, counts, strict=True):
            found = {name: now[name] - then[name] for name in then}
            found["us_row"] = round(us[pair.sink.pid] / found["requests"], 3)
            found["us_request"] = round(us[pair.envoy.pid] / found["requests"], 3)
            for name, value in found.items():
                one.setdefault(name, []).append(value)
    for load, pair in zip(loads, pairs, strict=True):
        if lost := await _missing(pair, 0, (await load)["requests"], closed=0):
            raise BenchError(f"{lost} rows were lost although nobody was away")
    return {"rate": RATE, "idle_us_s": idle_us_s, "intervals": intervals}


async def _counts(pair: Pair) -> dict[str, float]:
    """Requests, as Envoy counts them, and messages and their bytes, as the sink does."""
    _, told = await pair.sink.get("/metrics")
    pattern = r"^proxy_usage_receiver_(messages|bytes)_total (\S+)$"
    requests = await pair.stat("http.ingress.downstream_rq_completed")
    read = {name: int(float(value)) for name, value in re.findall(pattern, told, re.MULTILINE)}
    return {"requests": requests, **read}


# --- loss ---------------------------------------------------------------------------------------------------

Trial = Callable[[Pair, float], Awaitable[int]]
"""Rows lost by a pair. The other argument says where in its interval it happens, from 0 to 1."""


async def trials(pairs: Sequence[Pair], trial: Trial) -> list[list[int]]:
    """By pair what each round lost, at phases that are spread evenly."""
    rounds = [
        await asyncio.gather(*(trial(pair, (number + 0.5) / ROUNDS) for pair in pairs))
        for number in range(ROUNDS)
    ]
    return [list(of_pair) for of_pair in zip(*rounds, strict=True)]


async def _envoy_killed(pair: Pair, phase: float) -> int:
    before = await _read(pair)
    await _restart(pair.envoy)  # its intervals count from here
    load = asyncio.create_task(send(pair.envoy.port, 3 * pair.interval + 3, RATE, cut_off=True))
    await asyncio.sleep(max(1, pair.interval) + phase * pair.interval)
    pair.envoy.kill()
    missing = await _missing(pair, before, (await load)["requests"], closed=None)
    await _restart(pair.envoy)
    return missing


async def _sink_killed(pair: Pair, _: float) -> int:
    """Killed when a message with the rows of a whole interval comes, whatever the phase."""
    steady = max(1, pair.interval)

    async def end() -> None:
        await asyncio.sleep(steady)
        sent = before = await pair.stat(SENT)
        while sent < before + AT_LEAST_BYTES:
            await asyncio.sleep(POLL_S)
            sent = await pair.stat(SENT)
        await pair.sink.kill()

    return await _sink_away(pair, steady + pair.interval, end)


async def _sink_restarted(pair: Pair, phase: float) -> int:
    async def end() -> None:
        await asyncio.sleep(1 + phase * pair.interval)
        await pair.sink.stop()

    return await _sink_away(pair, 1 + pair.interval, end)


async def _sink_away(pair: Pair, within_s: float, end: Callable[[], Awaitable[None]]) -> int:
    """Rows lost while a sink is ended under load and started again."""
    before, closed = await _read(pair), await pair.stat(CLOSED)
    load = asyncio.create_task(send(pair.envoy.port, within_s + DOWN_S + 2, RATE))
    await end()
    await asyncio.sleep(DOWN_S)
    await pair.sink.start()
    return await _missing(pair, before, (await load)["requests"], closed=closed)


async def _restart(envoy: EnvoyProcess) -> None:
    await envoy.stop()
    await envoy.start()
    pin(envoy.pid)


async def _read(pair: Pair) -> int:
    return await asyncio.to_thread(rows_read, pair.sink)


async def _missing(pair: Pair, before: int, requests: int, *, closed: int | None) -> int:
    """Requests less the rows that were read since ``before``, once nothing more comes.

    ``closed``: connections that had ended before the requests were sent, whose rows are among those flushed;
    None: Envoy is gone, and what it had not flushed with it. A flush that finds the connection full is made
    up for an interval later, so that waiting for an interval is not enough.
    """
    async with asyncio.timeout(DEADLINE_S):
        buffered = closed is not None
        while buffered:
            await asyncio.sleep(POLL_S)
            buffered = await pair.stat(WRITTEN) + (closed or 0) > await pair.stat(FLUSHED)
    read, since = await _read(pair), time.monotonic()
    while read - before < requests and time.monotonic() < since + QUIET_S:
        await asyncio.sleep(POLL_S)
        now = await _read(pair)
        if now != read:
            read, since = now, time.monotonic()
    return requests - (read - before)
