"""The store's upkeep, a few short steps after each turn: what keeps it from growing, and from filling up.

room is short                                        otherwise, once a minute
  1. ledger rows become hourly sums, young ones too    remainders unused for 35 days are written off
  2. pending events are merged within their hour       old ledger rows become hourly sums, old sums go
  3. new usage is refused and waits in memory          old held usage and unused keys go
                                                       free pages are given back to the disk
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import structlog

from proxy_usage.errors import StoreError, StoreFull
from proxy_usage.metrics import Metrics
from proxy_usage.store import Checkpoints, Database, Measure, Merger, Retention
from proxy_usage.store.thread import StoreThread

log = structlog.get_logger()

ROUND_MS = 60_000
SWEEP_MS = 86_400_000
REST_MS = 60_000
"""After a backlog had nothing to merge it is left alone for so long."""
BUDGET_NS = 25_000_000
"""No step is begun after so much time in one go."""
FEW = 200
"""Ledger rows that are too few to be a step of their own."""
MIB = 1 << 20


class Pressure(StrEnum):
    """What is done to make room."""

    NONE = "none"
    LEDGER = "ledger"  # ledger rows are rolled up before their time
    MERGE = "merge"  # pending events are merged
    EXHAUSTED = "exhausted"  # there was nothing left to merge: what comes beyond the room is refused


@dataclass(slots=True)
class _Done:
    """What one step came to."""

    more: bool = False
    rolled: int = 0
    merged: int = 0
    keys: int = 0
    written_off: int = 0
    expired: int = 0
    forgotten: int = 0


class Housekeeping:
    """Upkeep of one store.

    Args:
        share: of a hundred, how much of its room the store may use before more is made.
    """

    def __init__(
        self,
        database: Database,
        checkpoints: Checkpoints,
        retention: Retention,
        merger: Merger,
        thread: StoreThread,
        metrics: Metrics,
        *,
        share: int = 90,
    ) -> None:
        self.measure: Measure | None = None
        """As of the last step."""
        self.pressure = Pressure.NONE
        self.busy = False
        """Whether there is more to do at once."""
        self._database = database
        self._checkpoints = checkpoints
        self._retention = retention
        self._merger = merger
        self._thread = thread
        self._metrics = metrics
        self._share = share
        self._chores: list[Callable[[int], _Done]] = []
        self._round_ms: int | None = None
        self._swept_ms: int | None = None
        self._rest_until_ms = 0
        self._merged = 0
        self._failing = False

    async def run(self, now_ms: int, *, refused: bool = False) -> None:
        """Takes some steps. When the disk refuses them, they wait for another time.

        Args:
            refused: the store just refused new usage, since it is full.
        """
        started_ns = time.perf_counter_ns()
        self.busy = True
        try:
            while self.busy and time.perf_counter_ns() - started_ns < BUDGET_NS:
                done = await self._thread.run(self._step, now_ms, refused=refused)
                self._observe(done)
        except StoreError as error:
            if not error.retriable:
                raise
            self.busy = False
            if not self._failing:
                log.warning("housekeeping waits", error=error.message)
            self._failing = True
            return
        self._failing = False

    @property
    def relieved(self) -> bool:
        """Whether there is room for new usage, as far as one can tell."""
        return self.measure is not None and self.measure.used < self._part(self.measure)

    def describe(self) -> str:
        """Why new usage is refused, for readiness."""
        measure = self.measure
        if measure is None:
            return "store full"
        bound = "store.max_bytes" if measure.limit - measure.occupied < measure.limit // 4 else "the disk"
        return (
            f"store full: {measure.occupied // MIB} MiB of {measure.limit // MIB} MiB, bounded by {bound};"
            f" usage waits in memory, {_STEPS[self.pressure]}"
        )

    def gauges(self) -> None:
        """Brings the metrics up to date."""
        measure = self.measure
        if measure is None:
            return
        parts = {"used": measure.used, "free": measure.free, "log": measure.wal, "reserve": measure.reserve}
        for part, size in parts.items():
            self._metrics.store_bytes.labels(part=part).set(size)
        self._metrics.store_limit.set(measure.limit)
        self._metrics.store_room.set(measure.room)
        self._metrics.store_reserve.set(measure.reserve > 0)
        self._metrics.store_pressure.set(list(Pressure).index(self.pressure))

    def status(self) -> dict[str, object]:
        """For ``proxy-usage status``."""
        measure = self.measure
        if measure is None:
            return {"pressure": str(self.pressure)}
        return {
            "occupied": measure.occupied,
            "used": measure.used,
            "room": measure.room,
            "reserve": measure.reserve,
            "limit": measure.limit,
            "pressure": str(self.pressure),
        }

    # --- on the store's thread --------------------------------------------------------------------------

    def _step(self, now_ms: int, *, refused: bool) -> _Done:
        with self._database.reading() as db:
            measure = self.measure = self._database.space.keep(db)
        short = self._is_short(measure, refused=refused)
        if self._checkpoints.wants_fold:
            try:
                self._checkpoints.fold()
            except StoreFull:
                short = True  # what makes room comes first
        if short:
            return self._make_room(now_ms)
        if self.pressure is not Pressure.NONE:
            self.pressure = Pressure.NONE
            self._rest_until_ms = self._merged = 0
            log.info("store has room again", used=measure.used, room=measure.room)
        return self._next_chore(now_ms)

    def _is_short(self, measure: Measure, *, refused: bool) -> bool:
        """With a distance between beginning and end, so that one step is not followed by many small ones."""
        part = self._part(measure)
        return refused or measure.used >= (part if self.pressure is Pressure.NONE else part - part // 10)

    def _part(self, measure: Measure) -> int:
        return measure.room * self._share // 100

    def _make_room(self, now_ms: int) -> _Done:
        if self.pressure is Pressure.NONE:
            log.warning("store is short of room", **self.status())
        rolled = self._retention.roll(now_ms, short=True)
        if rolled >= FEW:
            self.pressure = Pressure.LEDGER
            return _Done(more=True, rolled=rolled)
        if now_ms < self._rest_until_ms:
            return _Done(rolled=rolled)
        if self.pressure is not Pressure.MERGE:
            self.pressure, self._merged = Pressure.MERGE, 0
        progress = self._merger.step(now_ms)
        self._merged += progress.merged
        if progress.done:
            if not self._merged:
                self.pressure, self._rest_until_ms = Pressure.EXHAUSTED, now_ms + REST_MS
            self._merged = 0
        return _Done(more=self.pressure is Pressure.MERGE, rolled=rolled, merged=progress.merged)

    def _next_chore(self, now_ms: int) -> _Done:
        if not self._chores:
            # Below: the clock was moved back.
            if self._round_ms is not None and 0 <= now_ms - self._round_ms < ROUND_MS:
                return _Done()
            self._round_ms = now_ms
            self._chores = [self._vacuum, self._expire, self._forget, self._roll, self._write_off]
            if self._swept_ms is None or not 0 <= now_ms - self._swept_ms < SWEEP_MS:
                self._swept_ms = now_ms
                self._chores.insert(0, self._sweep)
        chore = self._chores[-1]
        done = chore(now_ms)
        if not done.more:
            self._chores.pop()
        done.more = bool(self._chores)
        return done

    def _write_off(self, now_ms: int) -> _Done:
        count = self._checkpoints.write_off(now_ms)
        return _Done(more=count > 0, written_off=count)

    def _roll(self, now_ms: int) -> _Done:
        count = self._retention.roll(now_ms)
        return _Done(more=count > 0, rolled=count)

    def _forget(self, now_ms: int) -> _Done:
        count = self._retention.forget(now_ms)
        return _Done(more=count > 0, forgotten=count)

    def _expire(self, now_ms: int) -> _Done:
        count = self._retention.expire_held(now_ms)
        self._checkpoints.forget_held(count)
        return _Done(more=count > 0, expired=count)

    def _sweep(self, now_ms: int) -> _Done:
        count, done = self._retention.sweep_keys(now_ms)
        return _Done(more=not done, keys=count)

    def _vacuum(self, _now_ms: int) -> _Done:
        measure = self.measure
        assert measure is not None, "measured at the beginning of the step"
        return _Done(more=measure.wasteful and self._retention.vacuum() > 0)

    # --- on the event loop ------------------------------------------------------------------------------

    def _observe(self, done: _Done) -> None:
        self.busy = done.more
        self._metrics.merged.inc(done.merged)
        self._metrics.rolled.inc(done.rolled)
        self._metrics.expired.inc(done.expired)
        for text, count in (
            ("remainders written off", done.written_off),
            ("held usage expired", done.expired),
            ("hourly sums removed", done.forgotten),
            ("unused keys removed", done.keys),
        ):
            if count:
                log.info(text, count=count)


_STEPS = {
    Pressure.NONE: "room is made",
    Pressure.LEDGER: "the ledger is rolled up",
    Pressure.MERGE: "pending events are merged",
    Pressure.EXHAUSTED: "nothing is left to merge",
}
