"""The store's thread: SQLite blocks, the event loop must not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StoreThread:
    """Runs every call into the store on one thread, in the order of the calls.

    A caller that is cancelled stops waiting; the call itself is never cut short, so a transaction is either
    done or was never begun.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Awaits ``call(*args, **kwargs)`` on the store's thread; raises what it raises."""
        future = self._executor.submit(call, *args, **kwargs)
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        """Waits for the calls under way and ends the thread."""
        self._executor.shutdown(wait=True)
