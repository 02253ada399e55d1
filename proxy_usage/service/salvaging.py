"""The stage that brings over what can be read of stores set aside, beside everything else."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import structlog

from proxy_usage.errors import StoreError
from proxy_usage.metrics import Metrics
from proxy_usage.store.report import Report
from proxy_usage.store.salvage import SALVAGED, Piece, Salvage
from proxy_usage.store.thread import StoreThread

log = structlog.get_logger()

RETRY_S = 5.0


async def salvage_all(
    salvages: Sequence[Salvage], thread: StoreThread, metrics: Metrics, clock_ms: Callable[[], int]
) -> None:
    """Brings everything over, then waits until it is cancelled: a stage that ends is a stage that died.

    Damaged files are read on a thread of their own, so that no turn waits for a disk that hardly answers.

    Raises:
        StoreError: the store that takes it is damaged, too.
    """
    reading = StoreThread()
    try:
        for salvage in salvages:
            log.info("salvage begins", file=salvage.aside.file)
            while not salvage.aside.report.ended:
                piece = await reading.run(salvage.read)
                _observe(metrics, await _written(salvage, piece, thread, clock_ms))
            tell(salvage.aside.file, salvage.aside.report)
        await asyncio.Event().wait()
    finally:
        reading.close()
        for salvage in salvages:
            salvage.close()


async def _written(
    salvage: Salvage, piece: Piece, thread: StoreThread, clock_ms: Callable[[], int]
) -> Counter[str]:
    while True:
        try:
            return await thread.run(salvage.write, piece, clock_ms())
        except StoreError as error:
            if not error.retriable:
                raise
            log.warning("salvage waits for the disk", file=salvage.aside.file, error=error.message)
            await asyncio.sleep(RETRY_S)


def _observe(metrics: Metrics, letters: Counter[str]) -> None:
    for output, events in letters.items():
        metrics.events.labels(output=output, fate="dead").inc(events)
        metrics.dead_letters.labels(output=output, reason=SALVAGED).inc(events)


def tell(file: str, report: Report) -> None:
    """Says in the log what came of a file."""
    if report.state != "done":
        log.error("nothing could be salvaged", file=file, state=report.state, trouble=report.trouble)
        return
    log.warning(
        "store salvaged",
        file=file,
        events=report.events,
        windows=report.windows,
        missing=report.missing,
        gaps=report.gaps,
        hint="to be decided on: proxy-usage deadletters ls --reason salvaged; proxy-usage status says more",
    )
