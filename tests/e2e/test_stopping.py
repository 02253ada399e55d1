"""Stopped politely, rudely and by force under load: what was read is durable, or reported as lost.

With one sink Envoy drops rows of its own accord while nobody listens, so nothing is compared with the client
here, only with what the sink read: the file that counts rows before they are folded outlives any crash.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import World
from program import Sink, eventually, intake_rows

from proxy_usage.demo.checks import METERS
from proxy_usage.demo.faults import Fault, Faults

pytestmark = pytest.mark.e2e

KILLS = 5


async def read_past(sink: Sink, rows: int, *, unsaved: bool = False) -> None:
    """Waits until more than ``rows`` were read; with ``unsaved``, until some of them are not durable yet."""

    def condition() -> bool:
        read = sink.read()
        return read > rows and (not unsaved or read > sink.saved())

    await eventually(condition, f"more than {rows} rows are read", why=sink.said, poll_s=0.003)


async def settled(world: World) -> None:
    """Ends the load's Envoy, waits until all that was read is delivered, and checks that it all adds up."""
    await world.stop_envoy()
    sink = world.sink

    async def heard_out() -> bool:
        return (await sink.metrics())["receiver_streams"] == 0

    await eventually(heard_out, "what Envoy sent is read to its end", why=sink.said)
    await eventually(lambda: sink.saved() == sink.read(), "all that was read is durable", why=sink.said)
    await eventually(sink.idle, "everything is settled", why=sink.said)
    with sink.reader() as reader:
        status, sums = reader.status(), reader.conservation(deep=True)
    counted = status.rows["counted"][""]
    by_meter = {terms.meter: terms for terms in status.meters}
    assert sums.balanced, sums
    assert sink.read() == sink.with_a_fate() + sink.lost()
    # What the endpoint stored, once by id, is what was counted: no row twice, none left out.
    arrived = world.billing.arrived
    delivered = {
        meter: sum(value for (_, type_), value in arrived.sums().items() if type_ == meter)
        for meter in METERS
    }
    assert list(delivered.values()) == [terms.minted.value for terms in status.meters]
    assert delivered[METERS[0]] == by_meter["requests"].counted == counted
    assert delivered[METERS[1]] == by_meter["ingress_bytes"].counted
    assert delivered[METERS[2]] == by_meter["egress_bytes"].counted
    assert status.outputs[0].delivered == len(arrived.stored)
    assert arrived.violations == []
    # And never more than was sent.
    truth = world.truth.by_route()
    for (tenant, route, meter), value in arrived.by_route().items():
        if meter == METERS[0]:
            assert value <= truth[tenant, route].requests


async def test_sigterm_under_load_loses_nothing_that_was_read(tmp_path: Path) -> None:
    async with World(tmp_path, record=True) as world:
        sink = world.sink
        async with world.load():
            for stop in range(1, 4):
                mark = sink.read() + 300
                await read_past(sink, mark)
                assert await sink.stop() == 0
                assert len(sink.events("drained")) == stop
                # Stopped, not yet settled: windows may be open, but each row has its fate.
                assert sink.read() == sink.saved() == sink.with_a_fate() > mark
                assert sink.lost() == 0
                with sink.reader() as reader:
                    assert reader.conservation(deep=True).balanced
                await sink.start()
        await settled(world)
        assert sink.lost() == 0
        assert sink.events("a crash lost entries") == []
        assert not any("crash_lost" in name for name in await sink.metrics())
        assert world.recorder is not None
        assert sink.read() <= sum(1 for _ in world.recorder.rows())


class Look(NamedTuple):
    """Rows saved, and then rows read."""

    saved: int
    read: int


@asynccontextmanager
async def watched(sink: Sink) -> AsyncIterator[list[Look]]:
    """Looks at the sink again and again while the block runs."""
    looks: list[Look] = []

    async def watch() -> None:
        with sink.reader() as reader:
            while True:
                durable = sum(reader.status().intake.values())
                looks.append(Look(durable, sink.read()))
                await asyncio.sleep(0.01)

    task = asyncio.create_task(watch())
    try:
        yield looks
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task.exception()


def read_before_the_last(looks: list[Look], saved: int) -> int:
    """Rows that were read before the last checkpoint began, at the least. It is the one that has ``saved``.

    It began when the one before it was made. That was between two looks, the second of which saw it, so
    that what the look before both found read had been read.
    """
    former = [at for at, look in enumerate(looks) if at and looks[at - 1].saved < look.saved < saved]
    return looks[former[-1] - 2].read if former and former[-1] >= 2 else 0


async def test_kill_under_load_loses_what_it_reports_and_no_more(tmp_path: Path) -> None:
    dice = random.Random(7)
    async with World(tmp_path, record=True) as world:
        sink = world.sink
        losses: list[int] = []
        async with world.load():
            for _ in range(KILLS):
                reported = sink.lost()
                async with watched(sink) as looks:
                    await eventually(
                        lambda: len({look.saved for look in looks}) > 6, "checkpoints are made", why=sink.said
                    )
                    # Any moment, but one at which there is something to lose.
                    await read_past(sink, sink.read() + dice.randrange(300), unsaved=True)
                    await sink.kill()
                gone = sink.read() - sink.saved()
                # A checkpoint saves all that was read when it began, however long this machine takes for it.
                before = read_before_the_last(looks, sink.saved())
                assert 0 < before <= sink.saved(), looks
                await sink.start()
                assert sink.lost() - reported == gone
                losses.append(gone)
        assert any(losses), "no kill hit between two checkpoints"
        (node,) = {node for line in sink.events("a crash lost entries") for node in line["rows"]}
        said = [sum(line["rows"].values()) for line in sink.events("a crash lost entries")]
        assert said == [gone for gone in losses if gone]
        assert all(not line["unknown_nodes"] for line in sink.events("a crash lost entries"))
        metrics = await sink.metrics()
        lost = {name: rows for name, rows in metrics.items() if name.startswith("crash_lost_entries_total")}
        assert sum(lost.values()) == losses[-1]
        assert all(name == f'crash_lost_entries_total{{node="{node}"}}' for name in lost)
        assert metrics["crash_loss_unknown_nodes"] == 0
        await settled(world)
        assert sink.lost() == sum(losses)
        assert world.recorder is not None
        assert sink.read() <= sum(1 for _ in world.recorder.rows())
        # A last start finds nothing more to report.
        assert await sink.stop() == 0
        await sink.start()
        assert sink.lost() == sum(losses)


async def test_kill_while_answers_are_outstanding_bills_nothing_twice(tmp_path: Path) -> None:
    output = {"batch": {"events": 5}}
    async with World(tmp_path, output=output) as world:
        # Stored, but the answer takes longer than the sink lives: it is killed not knowing.
        world.billing.faults = Faults(always=Fault.LATE, delay_ms=600_000)
        await world.send(100)
        stored = world.billing.arrived.stored
        with world.sink.reader() as reader:
            await eventually(
                lambda: len(reader.batches()) == 2 and reader.status().outputs[0].attempted == len(stored),
                "two batches are under way",
                why=world.sink.said,
            )
        known = len(stored)
        await world.sink.kill()
        world.billing.faults = Faults()
        await world.sink.start()
        await world.equal()
        assert world.billing.arrived.duplicates >= known
        assert world.billing.arrived.violations == []


async def test_a_second_sigterm_forces(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        sink = world.sink
        world.billing.faults = Faults(always=Fault.HANG)  # the drain waits for the endpoint
        await world.send(200)
        with sink.reader() as reader:
            await eventually(lambda: reader.status().outputs[0].attempted > 0, "a batch hangs", why=sink.said)
        sink.send_signal(signal.SIGTERM)
        await eventually(lambda: sink.events("draining"), "it drains", why=sink.said)
        sink.send_signal(signal.SIGTERM)
        assert await sink.wait() == 1
        assert sink.events("drained") == []
        assert "stopped before the drain was done" in sink.said()
        assert sum(intake_rows(sink.store).values()) >= sink.saved()

        world.billing.faults = Faults()
        await sink.start()
        await settled(world)


async def test_sigint_drains_too(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.send(50)
        await world.equal()
        world.sink.send_signal(signal.SIGINT)
        assert await world.sink.wait() == 0
        assert len(world.sink.events("drained")) == 1
