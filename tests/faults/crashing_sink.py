"""The program, with a place where it kills itself: ``crashing_sink.py POINT N TRACE run --config FILE``.

At the N-th passing of POINT the process sends itself SIGKILL: nothing is flushed, no handler runs, as when
the kernel or an operator kills it. The program is the shipped one; only at the named point is something put
in its way. TRACE is a file that gets a line before and after a part of a message is counted as read (``taking
ROWS``, ``read ROWS``), one for each turn that was begun (``begin``), and one before and after it is made
durable (``committing``, ``saved``), so that the test knows what had to be durable when the process died. One
thread may come to the point while another is between two such lines: then either is right.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proxy_usage.cli import main
from proxy_usage.delivery.transport import Transport
from proxy_usage.pipeline import Pipeline
from proxy_usage.service.housekeeping import Housekeeping
from proxy_usage.service.service import Service
from proxy_usage.store.checkpoint import Checkpoints
from proxy_usage.store.letters import Letters
from proxy_usage.store.merging import Merger
from proxy_usage.store.queue import Batch, Queue

POINTS = (
    "mid_fold",
    "mid_checkpoint",
    "before_closing_commit",
    "after_closing_commit",
    "after_mark",
    "batch_under_way",
    "before_settling",
    "mid_replay",
    "mid_merging",
    "mid_shutdown",
)


class Crash:
    """Counts passings of the point."""

    def __init__(self, point: str, count: int) -> None:
        self.point = point
        self._left = count

    def at(self, point: str) -> None:
        if point == self.point:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


Trace = Callable[[str], None]


def watch_turns(crash: Crash, trace: Trace) -> None:
    """Traces what is read and saved; the points of folding and of checkpoints."""
    take, begin, commit = Pipeline.take, Pipeline.beginning, Checkpoints.commit
    count = Service._take

    def traced_count(self: Service, port: Any, origin: Any, part: Any, now_ms: int) -> None:
        trace(f"taking {len(part.entries)}")
        count(self, port, origin, part, now_ms)

    def traced_take(self: Pipeline, port: Any, origin: Any, part: Any, now_ms: int) -> None:
        trace(f"read {len(part.entries)}")
        half = len(part.entries) // 2
        if crash.point != "mid_fold" or not half:
            take(self, port, origin, part, now_ms)
            return
        # Half of the rows are in the fold when the process dies.
        first = part._replace(entries=part.entries[:half], http=min(part.http, half), damaged=None)
        take(self, port, origin, first, now_ms)
        crash.at("mid_fold")
        rest = part._replace(entries=part.entries[half:], http=max(0, part.http - half))
        take(self, port, origin, rest, now_ms)

    def traced_begin(self: Pipeline, now_ms: int, **more: Any) -> Any:
        trace("begin")  # its first step follows at once, and what was read before that is in the turn
        return begin(self, now_ms, **more)

    def traced_commit(self: Checkpoints, turn: Any, mint: Any, now_ms: int) -> Any:
        closing = bool(turn.windows.closing)
        seen = 0

        def statement(text: str) -> None:
            nonlocal seen
            seen += 1
            if seen == 3:
                crash.at("mid_checkpoint")
            if text == "COMMIT":
                if closing:
                    crash.at("before_closing_commit")
                trace("committing")

        database = self._database.db
        database.set_trace_callback(statement)
        try:
            events = commit(self, turn, mint, now_ms)
        finally:
            database.set_trace_callback(None)
        trace("saved")
        if closing:
            crash.at("after_closing_commit")
        return events

    Service._take = traced_count  # type: ignore[method-assign]
    Pipeline.take = traced_take  # type: ignore[method-assign]
    Pipeline.beginning = traced_begin  # type: ignore[method-assign]
    Checkpoints.commit = traced_commit  # type: ignore[method-assign]


def watch_delivery(crash: Crash) -> None:
    """The points of a batch's way, of replay and of the drain."""
    lease, settle, replay = Queue.lease, Queue.settle, Letters.replay
    post, drain = Transport.post, Service.drain

    def traced_lease(self: Queue, *arguments: Any, **more: Any) -> Any:
        leased = lease(self, *arguments, **more)
        if isinstance(leased, Batch):
            crash.at("after_mark")
        return leased

    async def traced_post(self: Transport, request: Any) -> Any:
        if crash.point != "batch_under_way":
            return await post(self, request)
        task = asyncio.ensure_future(post(self, request))
        for _ in range(6):  # the request is being written, or its answer awaited
            await asyncio.sleep(0)
        crash.at("batch_under_way")
        return await task

    def traced_settle(self: Queue, *arguments: Any, **more: Any) -> Any:
        crash.at("before_settling")
        return settle(self, *arguments, **more)

    def traced_replay(self: Letters, *arguments: Any, **more: Any) -> Any:
        seen = 0

        def statement(text: str) -> None:
            nonlocal seen
            seen += text.startswith("DELETE FROM dead")
            if seen >= 2:
                crash.at("mid_replay")

        self._database.db.set_trace_callback(statement)
        return replay(self, *arguments, **more)

    async def traced_drain(self: Service) -> None:
        draining = asyncio.ensure_future(drain(self))
        await asyncio.sleep(0.3)
        crash.at("mid_shutdown")
        await draining

    Queue.lease = traced_lease  # type: ignore[method-assign]
    Queue.settle = traced_settle  # type: ignore[method-assign]
    Letters.replay = traced_replay  # type: ignore[method-assign]
    Transport.post = traced_post  # type: ignore[method-assign]
    Service.drain = traced_drain  # type: ignore[method-assign]


def watch_merging(crash: Crash) -> None:
    """The point of merging: the store is taken for short, so that the backlog is merged as when it is."""
    if crash.point != "mid_merging":
        return
    step = Merger.step

    def traced_step(self: Merger, now_ms: int) -> Any:
        seen = 0

        def statement(text: str) -> None:
            nonlocal seen
            seen += text.startswith("DELETE FROM events")
            if seen >= 2:
                crash.at("mid_merging")

        self._database.db.set_trace_callback(statement)
        return step(self, now_ms)

    def always_short(self: Housekeeping, *_arguments: Any, **_more: Any) -> bool:
        self._rest_until_ms = 0  # nor does it rest when a first look found nothing to merge
        return True

    Merger.step = traced_step  # type: ignore[method-assign]
    Housekeeping._is_short = always_short  # type: ignore[method-assign]


def run() -> int:
    point, count, path, *arguments = sys.argv[1:]
    descriptor = os.open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def trace(text: str) -> None:
        os.write(descriptor, f"{time.monotonic_ns()} {text}\n".encode())

    crash = Crash(point, int(count))
    watch_turns(crash, trace)
    watch_delivery(crash)
    watch_merging(crash)
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run())
