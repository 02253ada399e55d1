"""Figures of queues that only the store knows, kept at hand for metrics and readiness."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from proxy_usage.delivery import CourierSettings
from proxy_usage.errors import StoreError
from proxy_usage.metrics import Metrics
from proxy_usage.store import Queue
from proxy_usage.store.aside import files as set_aside_files
from proxy_usage.store.thread import StoreThread

log = structlog.get_logger()

LOOK_S = 1.0


class QueueWatch:
    """Looks at the queue of each output, again and again.

    Args:
        store: the store's path: stores that were set aside lie beside it.
    """

    def __init__(
        self,
        outputs: Sequence[CourierSettings],
        queue: Queue,
        store: Path,
        thread: StoreThread,
        metrics: Metrics,
    ) -> None:
        self.oldest_ms: dict[int, int | None] = {}
        """When the oldest event was made that an output still has to deliver, by the output's number."""
        self._outputs = tuple(outputs)
        self._queue = queue
        self._store = store
        self._thread = thread
        self._metrics = metrics

    async def run(self) -> None:
        """Looks until it is cancelled. Raises StoreError: the store is damaged."""
        said = ""
        while True:
            try:
                await self._look()
                said = ""
            except StoreError as error:
                if not error.retriable:
                    raise
                if said != error.message:
                    log.warning("store cannot be read", error=error.message)
                said = error.message
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        tallies = await self._thread.run(self._queue.tallies)
        for one in self._outputs:
            self.oldest_ms[one.output] = await self._thread.run(self._queue.oldest_ms, one.output)
            self._metrics.pending.labels(output=one.name).set(tallies.get((one.output, "pending"), 0))
            self._metrics.dead.labels(output=one.name).set(tallies.get((one.output, "dead"), 0))
        self._metrics.set_aside.set(await self._thread.run(set_aside_files, self._store))
