"""Several outputs of one store: each with its own pending state, its own failures and its own pause."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from endpoint import Endpoint, Exchange
from money import Store

from proxy_usage.delivery import (
    Courier,
    CourierSettings,
    HttpSender,
    Policy,
    RetrySettings,
    StoredBacklog,
    Transport,
)
from proxy_usage.metrics import Metrics
from proxy_usage.outputs.billing import Billing
from proxy_usage.service.build import clock_ms
from proxy_usage.store import OutputSlot
from proxy_usage.store.thread import StoreThread

EVENTS = 1_000
PATIENCE_S = 60.0
NAMES = ("north", "south")


class Sink:
    """A store that two couriers empty."""

    def __init__(self, path: Path, urls: dict[str, str], late_horizon_ms: int | None = None) -> None:
        self.store = Store(path, outputs=[OutputSlot(0, name) for name in NAMES])
        self.thread, self.metrics = StoreThread(), Metrics()
        self.couriers = {
            slot.name: Courier(
                CourierSettings(slot.name, slot.output, 100, 0, 1 + (slot.name == "south"), late_horizon_ms),
                StoredBacklog(self.store.queue, self.thread),
                HttpSender(Billing(), Transport(urls[slot.name], timeout_ms=5_000, concurrency=2)),
                Policy(RetrySettings(1, 8, 600_000), below=random.Random(5).randrange),
                self.metrics,
                clock_ms,
            )
            for slot in self.store.slots
        }

    async def fates(self, name: str) -> dict[str, int]:
        """Events of one output by fate."""
        (output,) = (slot.output for slot in self.store.slots if slot.name == name)
        tallies = await self.thread.run(self.store.queue.tallies)
        return {fate: events for (of, fate), events in tallies.items() if of == output and events}

    async def until(self, name: str, **fates: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self.fates(name) != fates:
                await asyncio.sleep(0.005)

    def counted(self, metric: str, output: str) -> float:
        """The sum of a metric's samples of an output."""
        families = self.metrics.registry.collect()
        samples = (sample for family in families for sample in family.samples)
        return sum(one.value for one in samples if one.name == metric and one.labels.get("output") == output)


@asynccontextmanager
async def running(sink: Sink) -> AsyncIterator[Sink]:
    tasks = [asyncio.create_task(courier.run()) for courier in sink.couriers.values()]
    try:
        yield sink
    finally:
        for courier in sink.couriers.values():
            await courier.stop(0.1)
        await asyncio.gather(*tasks)
        sink.thread.close()
        sink.store.database.close()


async def test_one_output_is_down_while_the_other_delivers_and_each_event_reaches_both_once(
    tmp_path: Path,
) -> None:
    down = asyncio.Event()

    async def fails(exchange: Exchange) -> None:
        if down.is_set():
            await exchange.accept()
        else:
            await exchange.answer({"code": "UNAUTHENTICATED"}, "401 Unauthorized")

    async with Endpoint(fails, times=None) as north, Endpoint() as south:
        sink = Sink(tmp_path, {"north": north.url, "south": south.url})
        minted = sink.store.add(*(f"t{n % 7}" for n in range(EVENTS)), now_ms=clock_ms())
        async with running(sink):
            await sink.until("south", delivered=EVENTS)
            async with asyncio.timeout(PATIENCE_S):  # its first answer may come after all of the other's
                while sink.couriers["north"].policy.paused is None:
                    await asyncio.sleep(0.005)
            assert await sink.fates("north") == {"pending": EVENTS}
            assert sink.couriers["north"].policy.paused == "unauthorized"
            assert sink.couriers["south"].policy.paused is None
            touched = "SELECT count(*) FROM deliveries WHERE first_attempt_ms IS NOT NULL"
            assert (await sink.thread.run(sink.store.rows, touched))[0][0] <= 100  # its one request in flight
            assert (await sink.thread.run(sink.store.rows, "SELECT count(*) FROM events"))[0][0] == EVENTS
            down.set()
            await sink.until("north", delivered=EVENTS)
            await sink.thread.run(sink.store.check_tallies)
            assert await sink.thread.run(sink.store.rows, "SELECT count(*) FROM events") == [(0,)]
        assert set(north.stored) == set(south.stored) == set(minted)
        assert north.stored == south.stored  # the same bytes
        assert north.conflicts == south.conflicts == []
        assert south.requests == EVENTS // 100  # once each


async def test_attempts_without_a_usable_answer_are_counted_for_their_output_and_go_first(
    tmp_path: Path,
) -> None:
    order: list[list[str]] = []

    async def loses(exchange: Exchange) -> None:
        order.append(exchange.ids)
        exchange.store()
        if len(order) <= 3:
            exchange.keep = False  # stored, and no answer
        else:
            await exchange.accept()

    async with Endpoint(loses, times=None) as north, Endpoint() as south:
        sink = Sink(tmp_path, {"north": north.url, "south": south.url})
        sink.store.add(*(f"t{n}" for n in range(300)), now_ms=clock_ms())
        async with running(sink):
            await sink.until("north", delivered=300)
            await sink.until("south", delivered=300)
        assert order[0] == order[1] == order[2] == order[3]  # the same, before anything new
        assert len({id_ for ids in order for id_ in ids}) == 300
        assert sink.counted("proxy_usage_attempts_unanswered_total", "north") == 3
        assert sink.counted("proxy_usage_attempts_unanswered_total", "south") == 0
        with Store(tmp_path) as store:
            assert store.counters("unanswered") == {str(sink.store.slots[0].output): 3}


async def test_what_is_too_late_is_counted_never_sent_and_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    async with Endpoint() as north, Endpoint() as south:
        sink = Sink(tmp_path, {"north": north.url, "south": south.url}, late_horizon_ms=0)
        sink.store.add("old", now_ms=clock_ms())
        sink.store.db.execute("UPDATE events SET window_ms=?", (clock_ms() - 86_400_000,))
        fresh = sink.store.add("new", now_ms=clock_ms())
        sink.store.db.execute("UPDATE events SET window_ms=? WHERE seq=2", (clock_ms() + 86_400_000,))
        async with running(sink):
            for name in NAMES:
                await sink.until(name, delivered=1, dead=1)
                assert sink.counted("proxy_usage_events_dead_lettered_total", name) == 1
        assert set(north.stored) == set(south.stored) == set(fresh)
        with Store(tmp_path) as store:
            assert store.rows("SELECT DISTINCT reason, first_attempt_ms FROM dead") == [("too_late", None)]
