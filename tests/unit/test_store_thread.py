"""The store's thread and the event loop: each has Python's lock often enough."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from proxy_usage.store import thread as module
from proxy_usage.store.thread import GIVE_S, KEEP_S, PATIENCE, StoreThread


class Naps:
    """Counts how often the event loop stood aside, and does not."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.enough = threading.Event()
        self.wanted = 3

    def sleep(self, seconds: float) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.taken.append(seconds)
        if len(self.taken) >= self.wanted:
            self.enough.set()

    monotonic = staticmethod(time.monotonic)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> Naps:
    naps = Naps()
    monkeypatch.setattr(module, "time", naps)
    return naps


def test_the_event_loop_stands_aside_while_a_call_lasts_and_serves_others_in_between(naps: Naps) -> None:
    async def main() -> int:
        thread = StoreThread()
        served = 0

        async def others() -> None:
            nonlocal served
            while True:
                await asyncio.sleep(0)
                served += 1

        beside = asyncio.create_task(others())
        # It ends when the loop has stood aside three times, so it ends only if the loop does.
        assert await thread.run(naps.enough.wait, 60)
        beside.cancel()
        thread.close()
        return served

    served = asyncio.run(main())
    assert naps.taken[:3] == [GIVE_S] * 3
    assert served > 3


def test_a_call_that_hangs_is_given_way_to_less_and_less(naps: Naps, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs for a minute must not cost a tenth of the event loop."""
    waits: list[float] = []
    true_wait = asyncio.wait
    now_s = 0.0

    async def wait(futures: list[asyncio.Future[object]], timeout: float) -> object:
        nonlocal now_s
        waits.append(timeout)
        now_s += timeout
        return await true_wait(futures, timeout=0.001)

    monkeypatch.setattr(asyncio, "wait", wait)
    naps.monotonic = lambda: now_s
    naps.wanted = 300

    async def main() -> None:
        thread = StoreThread()
        assert await thread.run(naps.enough.wait, 60)
        thread.close()

    asyncio.run(main())
    assert waits[0] == KEEP_S
    assert waits == sorted(waits)
    assert waits[-1] > 10 * KEEP_S
    assert waits[-1] <= now_s / PATIENCE


def test_a_call_that_is_quick_costs_no_pause(naps: Naps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_S", 60.0)  # quicker than that is any call on any machine

    async def main() -> None:
        thread = StoreThread()
        assert await thread.run(max, 1, 2) == 2
        thread.close()

    asyncio.run(main())
    assert naps.taken == []


def test_who_is_cancelled_stops_waiting_and_the_call_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        thread = StoreThread()
        going, ended = threading.Event(), threading.Event()

        def call() -> None:
            assert going.wait(60)
            ended.set()
            raise OSError("nobody hears it")

        waiting = asyncio.create_task(thread.run(call))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not ended.is_set()
        going.set()
        assert await thread.run(ended.is_set)  # behind it, in its turn
        thread.close()

    asyncio.run(main())
    assert "never retrieved" not in caplog.text
