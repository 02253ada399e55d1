"""Python's two pauses, kept short: its collector of reference cycles, and its lock.

A full collection walks all that is held: 45 ms at 100,000 keys, half a second and more at a million; Python
starts one whenever a quarter more was made. Nothing of ours is a cycle, so young objects alone are collected,
few at a time, and everything only so often that it takes a thousandth of the time.

A thread that wants Python's lock waits for the switch interval. The event loop is such a thread while the
store packs a turn; a fifth of the usual interval is still long against what switching costs.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time

SWITCH_S = 0.001
SHARE = 1_000
"""After a full collection none follows for so many times as long as it took."""
YOUNG, MIDDLE = 350, 1
"""So many objects are made before the youngest are walked, and so often that is done before what is left of
them is walked once more and is old: 700 objects, half a millisecond where they refer to much that lies far
apart. (Python's 700 and 10 are ten times as many at once, and the same work in all.)"""
MIN_PAUSE_S, MAX_PAUSE_S = 60.0, 3_600.0
_NEVER = 1 << 30


def settle() -> None:
    """What was built until here stays: collections need not walk it again and again."""
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, _NEVER)


def pause_s(spent_s: float) -> float:
    """How long no full collection is made after one that took ``spent_s``."""
    return min(MAX_PAUSE_S, max(MIN_PAUSE_S, SHARE * spent_s))


async def collect_seldom() -> None:
    """Full collections, for as long as it runs."""
    spent_s = 0.0
    while True:
        await asyncio.sleep(pause_s(spent_s))
        begun_ns = time.perf_counter_ns()
        gc.collect()
        spent_s = (time.perf_counter_ns() - begun_ns) / 1e9
