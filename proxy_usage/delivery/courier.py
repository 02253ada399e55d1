"""The loop that empties the backlog of one output: lease, send, decide, settle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

import structlog

from proxy_usage.delivery.backlog import Backlog
from proxy_usage.delivery.policy import REFUSING_EVERYTHING, Policy, Step
from proxy_usage.delivery.sender import Sender
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust
from proxy_usage.errors import StoreError
from proxy_usage.metrics import Metrics
from proxy_usage.store import Batch, Idle
from proxy_usage.store.letters import TOO_LATE

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()

STORE_RETRY_S = 1.0
IDLE_S = 5.0
"""The loop looks at the queue at least so often: that beat is its heartbeat, too."""
REPORT_MS = 60_000
"""A failure that lasts is said so often."""


@dataclass(frozen=True, slots=True)
class CourierSettings:
    """How an output is fed. Times in milliseconds."""

    name: str
    output: int
    batch_events: int = 100
    linger_ms: int = 1_000
    concurrency: int = 2
    late_horizon_ms: int | None = None
    """Events of windows older than this become dead letters instead of being sent."""


class Courier:
    """Delivers for one output until told to stop.

    Args:
        clock_ms: the wall clock, in milliseconds since the epoch.
    """

    def __init__(
        self,
        settings: CourierSettings,
        backlog: Backlog,
        sender: Sender,
        policy: Policy,
        metrics: Metrics,
        clock_ms: Callable[[], int],
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.beat_ms = clock_ms()
        """When the loop was last alive."""
        self._backlog = backlog
        self._sender = sender
        self._metrics = metrics
        self._clock_ms = clock_ms
        self._wake = asyncio.Event()
        self._stopping = False
        self._ended = asyncio.Event()  # set when nothing more is begun
        self._patient = asyncio.Event()  # set when a stop waits no longer
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._failure: BaseException | None = None
        self._noted_pause: str | None = ""  # nothing noted yet: a former process may have left a pause
        self._said = ""  # what was last said of a disk in trouble
        self._reported: dict[str, int] = {}  # when a failure was last said, by its outcome
        self._probing = False

    def notify(self) -> None:
        """New events are in the queue."""
        self._wake.set()

    def trust(self, token: TokenFile | None, trust: Trust) -> None:
        """Sends with another token and another trust, from the next request on."""
        self._sender.trust(token, trust)
        self.notify()

    async def run(self) -> None:
        """Delivers until ``stop``. Raises only what nobody foresaw: the process must not live on with it."""
        async with self._sender:
            try:
                while not self._stopping:
                    self.beat_ms = self._clock_ms()
                    await self._turn()
                self._ended.set()
                if self._failure is None:
                    await self._patient.wait()  # what is under way may end by itself
            finally:
                self._ended.set()
                for task in self._under_way.values():
                    task.cancel()
                await asyncio.gather(*self._under_way.values(), return_exceptions=True)
        if self._failure is not None:
            raise self._failure

    async def stop(self, timeout_s: float) -> None:
        """Leases nothing more and waits so long for what is under way; the rest stays durable."""
        self._stopping = True
        self._wake.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._ended.wait()  # a lease may be under way, too, whose batch then is
                    if self._under_way:
                        await asyncio.wait(self._under_way.values())
        finally:
            self._patient.set()

    async def _turn(self) -> None:
        """Starts one batch if there is room for it, else waits for a reason to look again."""
        # Cleared before anything is looked at, also where there is no room: what happens from here on wakes
        # the wait below, and a wait that never waits would hold the event loop.
        self._wake.clear()
        room = 1 if self.policy.failures else self.settings.concurrency
        leased: Batch | Idle = Idle(None)
        if len(self._under_way) < room:
            try:
                leased = await self._lease()
            except StoreError as error:
                if not error.retriable:
                    raise
                self._say_once("queue unavailable", error)
                await asyncio.sleep(STORE_RETRY_S)
                return
            self._said = ""
        if isinstance(leased, Batch):
            task = asyncio.create_task(self._attempt(leased), name=f"batch {leased.id}")
            self._under_way[leased.id] = task
            task.add_done_callback(partial(self._finished, leased.id))
            return
        wait_s = IDLE_S
        if leased.until_ms is not None:
            wait_s = min(IDLE_S, max(0, leased.until_ms - self._clock_ms()) / 1_000)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), wait_s)

    def _finished(self, batch: int, task: asyncio.Task[None]) -> None:
        del self._under_way[batch]
        self._wake.set()
        if not task.cancelled() and task.exception() is not None:
            self._stopping = True
            self._failure = task.exception()

    async def _lease(self) -> Batch | Idle:
        now_ms = self._clock_ms()
        if (wait_ms := self.policy.wait_ms(now_ms)) > 0:
            return Idle(now_ms + wait_ms)
        if self.policy.paused == REFUSING_EVERYTHING:
            # Only an event the endpoint accepts can tell poisoned events from a refusing endpoint, and those
            # that were refused may all be poisoned: every other attempt is of an event never tried before.
            self._probing = not self._probing
            if self._probing:
                leased = await self._ask(again=False, fresh=True, events=1)
                if isinstance(leased, Batch):
                    return leased
        return await self._ask(again=True, fresh=not self.policy.failures, events=self.settings.batch_events)

    async def _ask(self, *, again: bool, fresh: bool, events: int) -> Batch | Idle:
        now_ms, horizon_ms = self._clock_ms(), self.settings.late_horizon_ms
        leased = await self._backlog.lease(
            self.settings.output,
            now_ms,
            events=events,
            max_bytes=self.policy.max_bytes,
            linger_ms=self.settings.linger_ms,
            again=again,
            fresh=fresh,
            busy=frozenset(self._under_way),
            apart=self.policy.apart,
            late_ms=None if horizon_ms is None else now_ms - horizon_ms,
            longest_ms=self.policy.longest_wait_ms,
        )
        if leased.too_late:
            for _ in range(leased.too_late):
                self._metrics.delivered(self.settings.name, "dead", TOO_LATE)
            log.error("too late to be sent", output=self.settings.name, events=leased.too_late)
        return leased

    async def _attempt(self, batch: Batch) -> None:
        """Sends one batch and makes its consequences durable."""
        step = self.policy.decide(batch, await self._sender.send(batch.events), self._clock_ms())
        if step.wait_ms is not None:
            if step.fates:
                await self._persist(self._backlog.settle, batch, step.fates, self._clock_ms())
            not_before_ms = self._clock_ms() + step.wait_ms
            await self._persist(
                self._backlog.postpone,
                batch.id,
                not_before_ms,
                step.answer,
                unanswered=step.unanswered,
                clean=step.refused and not batch.resent,
            )
        else:
            parts = await self._persist(
                self._backlog.settle,
                batch,
                step.fates,
                self._clock_ms(),
                rest=step.rest,
                confirm=step.confirm,
                clean=step.refused and not batch.resent,
            )
            self.policy.inherit(batch, parts)
        if self.policy.paused != self._noted_pause:
            self._noted_pause = self.policy.paused
            await self._persist(
                self._backlog.pause,
                self.settings.output,
                self.policy.paused,
                self.policy.paused_by,
                self._clock_ms(),
            )
        self._report(batch, step)

    async def _persist(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Repeats a call while the disk is in trouble: an answer that was read must not be lost."""
        said = ""
        while True:
            try:
                return await call(*args, **kwargs)
            except StoreError as error:
                if not error.retriable:
                    raise
                if said != error.message:
                    said = error.message
                    log.warning("answer waits to be noted", output=self.settings.name, error=said)
                await asyncio.sleep(STORE_RETRY_S)

    def _say_once(self, text: str, error: StoreError) -> None:
        """A disk in trouble is a line a trouble, not a line a second."""
        if self._said != error.message:
            self._said = error.message
            log.warning(text, output=self.settings.name, error=error.message)

    def _report(self, batch: Batch, step: Step) -> None:
        name = self.settings.name
        self._metrics.batches.labels(output=name, outcome=step.outcome).inc()
        if step.unanswered:
            self._metrics.unanswered.labels(output=name).inc()
        for fate in step.fates.values():
            self._metrics.delivered(name, fate.name, fate.reason)
        waits = step.wait_ms is not None
        if waits:
            # The same failure again and again is one line a minute, not one line an attempt.
            now_ms, before_ms = self._clock_ms(), self._reported.get(step.outcome)
            if before_ms is not None and 0 <= now_ms - before_ms < REPORT_MS:
                return
            self._reported[step.outcome] = now_ms
        log.log(
            logging.WARNING if waits else logging.INFO,
            "batch",
            output=name,
            outcome=step.outcome,
            events=len(batch.events),
            attempt=batch.attempts + 1,
            wait_ms=step.wait_ms,
            answer=step.answer[:200],
        )
