"""The store's thread: SQLite blocks, the event loop must not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

KEEP_S, GIVE_S = 0.002, 0.000_2
"""While a call lasts, the event loop keeps Python's lock for so long and then gives it away for so long."""
PATIENCE = 50
"""A call that has lasted 50 times as long is given way to less often: its disk hangs, not the lock."""

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
        """Awaits ``call(*args, **kwargs)`` on the store's thread; raises what it raises.

        SQLite lets go of Python's lock for each step and needs it again. An event loop under load lets go of
        it, too, for a few microseconds at a time, before a thread that waits for it can be there; and each
        such time the thread's claim to it (the switch interval) begins anew. With one processor, commits that
        need a millisecond took a second. So the loop stands aside now and then until the call is done.
        """
        result = asyncio.wrap_future(self._executor.submit(call, *args, **kwargs))
        result.add_done_callback(_seen)
        begun_s = time.monotonic()
        while not result.done():
            lasted_s = time.monotonic() - begun_s
            await asyncio.wait([result], timeout=max(KEEP_S, lasted_s / PATIENCE))
            if not result.done():
                time.sleep(GIVE_S)  # noqa: ASYNC251 (that is the point)
        return result.result()

    def close(self) -> None:
        """Waits for the calls under way and ends the thread."""
        self._executor.shutdown(wait=True)


def _seen(result: asyncio.Future[T]) -> None:
    """Whoever was cancelled does not care how the call ended; asyncio would complain of it."""
    if not result.cancelled():
        result.exception()
