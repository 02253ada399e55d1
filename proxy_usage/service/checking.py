"""The stage that reads a large store whole, beside everything else, for what a disk may have lost of it."""

from __future__ import annotations

import asyncio
import time

import structlog

from proxy_usage.errors import StoreError
from proxy_usage.store import Database
from proxy_usage.store.thread import StoreThread

log = structlog.get_logger()

RETRY_S = 60.0
STOP_S = 0.01


async def check_beside(database: Database) -> None:
    """Checks the file, then waits until it is cancelled: a stage that ends is a stage that died.

    On a thread of its own, so that no turn waits for it.

    Raises:
        StoreForeign: the file is damaged. The next start sets it aside.
    """
    reading = StoreThread()
    started_ns = time.monotonic_ns()
    try:
        await _checked(database, reading)
        log.info("store checked", seconds=(time.monotonic_ns() - started_ns) // 1_000_000_000)
        await asyncio.Event().wait()
    finally:
        database.stop_checking()
        reading.close()


async def _checked(database: Database, reading: StoreThread) -> None:
    while True:
        check = asyncio.create_task(reading.run(database.check_beside))
        try:
            return await asyncio.shield(check)
        except asyncio.CancelledError:
            while not check.done():  # or a stop would wait until all is read
                database.stop_checking()
                await asyncio.wait([check], timeout=STOP_S)
            raise
        except StoreError as error:
            if not error.retriable:
                raise
            log.warning("the check of the store waits for the disk", error=error.message)
            await asyncio.sleep(RETRY_S)
