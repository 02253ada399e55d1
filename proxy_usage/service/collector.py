"""Python's two pauses, kept short: its collector of reference cycles, and its lock.

A full collection walks all that is held: 45 ms at 100,000 keys, a second at a million; Python starts one
whenever a quarter more was made. Nothing of ours is a cycle: gRPC makes one for each call, aiohttp for each
request that it refuses, and nearly all of these die young. So young objects alone are collected, few at a
time, and everything only when the process has grown, or once a day, and so seldom that it takes a thousandth
of the time.

A thread that wants Python's lock waits for the switch interval. The event loop is such a thread while the
store packs a turn; a fifth of the usual interval is still long against what switching costs.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import time

SWITCH_S = 0.001
SHARE = 1_000
"""After a full collection none follows for so many times as long as it took."""
YOUNG, MIDDLE = 350, 1
"""So many objects are made before the youngest are walked, and so often that is done before what is left of
them is walked once more and is old: 700 objects, half a millisecond where they refer to much that lies far
apart. (Python's 700 and 10 are ten times as many at once, and the same work in all.)"""
GROWN_BYTES = 64 << 20
"""So much more memory than at the last full collection, or ever before, may be cycles that grew old."""
LOOK_S, DAY_S = 60.0, 86_400.0
_NEVER = 1 << 30


def settle() -> None:
    """What was built until here stays: collections need not walk it again and again."""
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, _NEVER)


def collect_young() -> None:
    """Walks the young objects: to be called after each step of work that makes and lets go of many.

    Python counts those made less those let go of. Where the one makes up for the other it would collect
    nothing, step after step, and then walk what has gathered at once: 30,000 objects, 15 ms and more.
    """
    gc.collect(1)


def due(passed_s: float, spent_s: float, grown: int) -> bool:
    """Whether it is time for a full collection.

    Args:
        passed_s: since the last one, which took ``spent_s``.
        grown: bytes that the most the process ever had has risen by since then.
    """
    return passed_s >= SHARE * spent_s and (grown >= GROWN_BYTES or passed_s >= DAY_S)


async def collect_seldom() -> None:
    """Full collections, for as long as it runs."""
    ended_s, spent_s, most = time.monotonic(), 0.0, _most_bytes()
    while True:
        await asyncio.sleep(LOOK_S)
        if not due(time.monotonic() - ended_s, spent_s, _most_bytes() - most):
            continue
        begun_s = time.monotonic()
        gc.collect()
        ended_s = time.monotonic()
        spent_s, most = ended_s - begun_s, _most_bytes()


def _most_bytes() -> int:
    """The most memory that the process ever had."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10  # getrusage(2): in KiB on Linux
