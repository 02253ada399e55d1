"""The turn: again and again, what was read becomes durable and due windows become events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

import structlog

from proxy_usage.errors import StoreError, StoreFull
from proxy_usage.events import Mint
from proxy_usage.intake import Source
from proxy_usage.metrics import Metrics
from proxy_usage.model import Cell, Event
from proxy_usage.pipeline import Pipeline, next_step
from proxy_usage.service.housekeeping import Housekeeping
from proxy_usage.service.observing import Observer
from proxy_usage.store import Checkpoints, Database
from proxy_usage.store.thread import StoreThread
from proxy_usage.turn import Turn

log = structlog.get_logger()

SLICE = 1_000
"""Keys closed in one turn; more that are due follow in the next, without waiting."""
SHARE = 9
"""After a turn nothing is saved for so many times as long as the processor worked on it."""
MAX_PAUSE_S = 5.0
RETRY_S = 1.0
MAX_RETRY_S = 30.0


def pause_s(interval_s: float, worked_s: float, lasted_s: float) -> float:
    """How long no turn is taken after one: they never take over a tenth of a core, or half of a disk's time.

    What lasts is mostly waiting, for the disk and for streams that are read in between. It uses no core, and
    must not keep the next turn from being saved for long.

    Args:
        worked_s: processor time of the turn.
        lasted_s: from its begin to its end.
    """
    return max(interval_s, min(MAX_PAUSE_S, max(SHARE * worked_s, lasted_s)))


class Turns:
    """Takes turns at the checkpoint interval.

    Args:
        housekeeping: the store's upkeep, which follows each turn.
        saved: what the store has of rows read.
        on_events: called after a turn that made events.
        on_reopened: called when the store was opened anew after its disk failed. May raise StoreUnavailable,
            and is called again then.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        database: Database,
        checkpoints: Checkpoints,
        mint: Mint,
        housekeeping: Housekeeping,
        thread: StoreThread,
        metrics: Metrics,
        *,
        interval_ms: int,
        clock_ms: Callable[[], int],
        on_events: Callable[[], None],
        on_reopened: Callable[[], Awaitable[None]],
        saved: Mapping[Source, int],
    ) -> None:
        self.beat_ms = clock_ms()
        """When a turn was last tried."""
        self.durable_ms = clock_ms()
        """Everything read before this moment is durable."""
        self.saved = saved
        """Rows read, as of the last turn that the store has."""
        self.failure: StoreError | None = None
        """Why the store refused the last turn; None when it did not."""
        self._pipeline = pipeline
        self._database = database
        self._checkpoints = checkpoints
        self._mint = mint
        self._housekeeping = housekeeping
        self._thread = thread
        self._metrics = metrics
        self.observer = Observer(metrics)
        self._interval_s = interval_ms / 1_000
        self._clock_ms = clock_ms
        self._on_events = on_events
        self._on_reopened = on_reopened
        self.on_closed: Callable[[Sequence[Cell], int], None] = lambda _cells, _now_ms: None
        """Called with the cells of windows that were closed and are durable, and the present."""
        self._stop = asyncio.Event()
        self._retry_s = RETRY_S
        self._slice = SLICE
        self._in_doubt: Turn | None = None
        self._reopened = False  # and not everybody knows
        self._worked_ns = 0

    async def run(self) -> None:
        """Takes turns until ``stop``; then none is under way."""
        while not self._stop.is_set():
            started_ns = time.perf_counter_ns()
            more = await self.turn()
            if not more:
                lasted_s = (time.perf_counter_ns() - started_ns) / 1e9
                pause = pause_s(self._interval_s, self._worked_ns / 1e9, lasted_s)
                self._worked_ns = 0
                await self._rest(self._retry_s if self.failure else pause)

    async def _rest(self, wait_s: float) -> None:
        """Waits, with housekeeping as long as there is more to do; ends early when that made room."""
        until_s = time.monotonic() + wait_s
        while not self._stop.is_set() and (left_s := until_s - time.monotonic()) > 0:
            pause_s = min(left_s, self._interval_s) if self._housekeeping.busy else left_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)
            if not self._housekeeping.busy or pause_s == left_s:
                continue
            await self._keep_house(self._clock_ms())
            if self.full and self._housekeeping.relieved:
                return

    async def _keep_house(self, now_ms: int) -> None:
        if self.failure is None or self.full:  # a broken store is opened anew by a turn first
            await self._housekeeping.run(now_ms, refused=self.full)

    @property
    def full(self) -> bool:
        """Whether the store refused the last turn since it has no room."""
        return isinstance(self.failure, StoreFull)

    def stop(self) -> None:
        """Lets ``run`` end after the turn under way."""
        self._stop.set()

    async def finish(self, make_room_s: float) -> None:
        """Turns until nothing is due; a full store is given some time to make room for the last ones."""
        until_s = time.monotonic() + make_room_s
        self._pipeline.origins.ending = True
        while (
            (await self.turn())
            or (
                self.full
                and (self._housekeeping.busy or self._housekeeping.relieved)
                and time.monotonic() < until_s
            )
            or (self.failure is None and self._pipeline.origins.due(self.beat_ms))
        ):
            continue

    async def turn(self) -> bool:
        """One turn, and what the store needs after it. Returns whether more windows are due now."""
        more = await self._turn()
        await self._keep_house(self.beat_ms)
        return more

    async def _turn(self) -> bool:
        """Makes durable what was read.

        A store that is full or broken keeps nothing from being counted: what the turn held goes into the next
        one, once it is certain that the broken one did not take effect.
        """
        now_ms = self.beat_ms = self._clock_ms()
        doubtful = self._in_doubt is not None or self._database.broken or self._reopened
        if doubtful and not await self._resolve():
            await _paused(self._pipeline.draining(now_ms))
            self.observer.look(self._pipeline, now_ms)
            return False
        turn = await self._begin(now_ms)
        self.observer.look(self._pipeline, now_ms)
        if turn.is_empty:
            self._pipeline.commit(turn)
            self._worked(now_ms)
            return False
        try:
            events = await self._thread.run(self._commit, turn, now_ms)
        except StoreError as error:
            self._in_doubt = turn
            self._failed(error)
            return False
        self._pipeline.commit(turn)
        self.saved = turn.intake
        self.on_closed(turn.windows.closing, now_ms)
        self._worked(now_ms)
        await _paused(turn.windows.release())
        self._metrics.checkpoints.inc()
        if events:
            self._metrics.minted.inc(len(events))
            log.info("windows closed", keys=len(turn.windows.closing), events=len(events))
            self._on_events()
        due_ms = self._pipeline.windows.next_due_ms()
        return due_ms is not None and due_ms <= now_ms

    async def _begin(self, now_ms: int) -> Turn:
        """Makes a turn step by step: streams are read in between."""
        steps = self._pipeline.beginning(now_ms, limit=self._slice)

        def take() -> Turn | None:
            begun_ns = time.thread_time_ns()
            taken = next_step(steps)
            self._worked_ns += time.thread_time_ns() - begun_ns
            return taken

        turn = take()
        try:
            while turn is None:
                await asyncio.sleep(0)
                turn = take()
        except asyncio.CancelledError:
            # Half a turn is in nobody's hands: it is made whole and given back.
            while turn is None:
                turn = next_step(steps)
            self._pipeline.rollback(turn)
            raise
        return turn

    def _commit(self, turn: Turn, now_ms: int) -> Sequence[Event]:
        """On the store's thread."""
        begun_ns = time.thread_time_ns()
        try:
            return self._checkpoints.commit(turn, self._mint, now_ms)
        finally:
            self._worked_ns += time.thread_time_ns() - begun_ns

    async def _resolve(self) -> bool:
        """Opens a broken store anew, and finds out whether a turn whose commit broke off took effect.

        Returns False while nobody can say.
        """
        turn = self._in_doubt
        try:
            if self._database.broken:
                await self._thread.run(self._database.reopen)
                self._reopened = True
            if self._reopened:
                await self._on_reopened()
                self._reopened = False
            last = await self._thread.run(self._checkpoints.last_turn)
        except StoreError as error:
            self._failed(error)
            return False
        if turn is None:  # somebody else met the error
            return True
        self._in_doubt = None
        if last >= turn.number:
            self._pipeline.commit(turn)
            self.saved = turn.intake
            self.on_closed(turn.windows.closing, self._clock_ms())
            self._worked(self._clock_ms())
            self._on_events()
        else:
            self._pipeline.rollback(turn)
        await _paused(turn.windows.release())
        return True

    def _failed(self, error: StoreError) -> None:
        if not error.retriable:
            raise error
        self._metrics.checkpoint_failures.inc()
        if isinstance(error, StoreFull):
            self._metrics.refused_turns.inc()
            self._slice = max(1, self._slice // 4)  # a smaller one may fit
        if self.failure is None or self.failure.message != error.message:
            log.error("checkpoint failed", error=error.message, hint=error.hint)
        self._retry_s = RETRY_S if self.failure is None else min(MAX_RETRY_S, 2 * self._retry_s)
        self.failure = error

    def _worked(self, now_ms: int) -> None:
        if self.failure is not None:
            log.info("checkpoint works again")
        self.durable_ms, self.failure = now_ms, None
        self._slice = min(SLICE, 2 * self._slice)


async def _paused(steps: Iterator[None]) -> None:
    """Work in steps, with everybody else's turn after each."""
    for _ in steps:
        await asyncio.sleep(0)
