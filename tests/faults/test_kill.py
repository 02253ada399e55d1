"""Killed at every named point, under a real Envoy's traffic.

Nothing is lost after accept, nothing is counted twice, and what a crash lost is reported, to the row.

FAULT_KILLS says how many kills are spread over the points (30 by default; ``make test-faults`` takes 200).
The table that is printed is the one in docs/reliability.md.
"""

import asyncio
import contextlib
import os
import random
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from crashing_sink import POINTS
from harness import World
from program import DEADLINE_S, Sink, eventually

from proxy_usage.config.models import METER_TYPES
from proxy_usage.demo.faults import Fault, Faults

KILLS = int(os.environ.get("FAULT_KILLS", "30"))
FAULTS = {
    "mid_replay": Faults(reject_tenants=["alpha"]),  # there must be dead letters
    "mid_merging": Faults(always=Fault.UNAVAILABLE),  # there must be a backlog that was never attempted
}
"""What the endpoint does wrong, so that a point is passed."""
PROGRAM = Path(__file__).with_name("crashing_sink.py")
SETTINGS: Mapping[str, Any] = {"windows": {"checkpoint": "250ms"}}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60 + 20 * KILLS)]


class Trace(NamedTuple):
    """What the process did before it died, read from the file it wrote."""

    unsaved: frozenset[int]
    """Rows read since the last turn that was made durable was begun: one number, unless the process died on
    one thread while another was counting what it read or waiting for the disk to commit."""
    age_ms: int
    """How long before its end the first of them was read; 0 when there is none."""

    @classmethod
    def read(cls, path: Path) -> "Trace":
        parts: list[tuple[int, int]] = []  # (ns, rows) read since the last durable turn's begin
        begun: list[tuple[int, int]] = []  # those read before the present turn was begun
        taking, committing = 0, False
        last = 0
        for line in path.read_text().splitlines():
            at, what, *rows = line.split()
            last = int(at)
            match what:
                case "taking":
                    taking = int(rows[0])
                case "read":
                    parts.append((last, int(rows[0])))
                    taking = 0
                case "begin":
                    begun, parts = [*begun, *parts], []
                case "committing":
                    committing = True
                case "saved":
                    begun, committing = [], False
        after, before = (sum(rows for _, rows in some) for some in (parts, begun))
        left = {after + before, after} if committing else {after + before}
        unsaved = [*begun, *parts]
        age_ms = (last - unsaved[0][0]) // 1_000_000 if unsaved else 0
        return cls(frozenset(rows + more for rows in left for more in (0, taking)), age_ms)


class CrashingSink:
    """Starts a sink so that it dies at a point, and waits for that."""

    def __init__(self, sink: Sink, directory: Path) -> None:
        self.sink = sink
        self._directory = directory
        self._starts = 0

    async def crash(self, point: str, count: int) -> Trace:
        """One life of the sink: from its start to its death at the ``count``-th passing of ``point``."""
        self._starts += 1
        trace = self._directory / f"trace-{self._starts}"
        with self.sink.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, str(PROGRAM), point, str(count), str(trace)),
                *("run", "--config", str(self.sink.config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        acting = asyncio.create_task(self._act(point, process, self.sink.read()))
        try:
            async with asyncio.timeout(DEADLINE_S):
                status = await process.wait()
        except TimeoutError:
            process.kill()
            pytest.fail(f"{point} was not passed {count} times in {DEADLINE_S} s\n{self.sink.said()}")
        finally:
            acting.cancel()
            await asyncio.gather(acting, return_exceptions=True)
        said = self.sink.said()
        assert status == -9, f"{point}: ended with {status} before it was passed {count} times\n{said}"
        return Trace.read(trace)

    async def _serves(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            return (await self.sink.get("/healthz"))[0] == 200
        return False

    async def _act(self, point: str, process: asyncio.subprocess.Process, read: int) -> None:
        """Does what the point needs to be passed."""
        if point == "mid_replay":
            # Asked earlier, the verb would take the store's lock itself.
            await eventually(self._serves, "the sink serves", why=self.sink.said)
            while True:
                await self.sink.cli("deadletters", "replay")
        if point == "mid_shutdown":
            await eventually(lambda: self.sink.read() > read, "rows are read")
            process.terminate()


async def test_killed_at_every_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(KILLS)
    table: dict[str, list[tuple[int, int]]] = {point: [] for point in POINTS}
    async with World(tmp_path, tenants=3, settings=SETTINGS) as world:
        sink = world.sink
        await world.send(200)
        await sink.stop()
        crashing = CrashingSink(sink, tmp_path)
        lost = 0
        async with world.load():
            for number in range(KILLS):
                point = POINTS[number % len(POINTS)]

                world.billing.faults = FAULTS.get(point, Faults())
                count = 1 if point.startswith("mid_") else dice.randint(1, 4)
                trace = await crashing.crash(point, count)
                # What the crash lost is what the file of rows read has more than the store: exactly the rows
                # that no durable turn could hold.
                gone = sink.read() - sink.saved()
                assert gone in trace.unsaved, point
                table[point].append((gone, trace.age_ms))
                lost += gone
                assert sink.with_a_fate() + sink.lost() == sink.saved(), point
        _print(capsys, table, lost)
        await world.envoy.drain()
        world.billing.faults = Faults()
        await sink.start()
        await eventually(lambda: sink.read() == sink.saved(), "all that was read is durable", why=sink.said)
        await sink.cli("deadletters", "replay")
        await eventually(sink.idle, "all is settled", why=sink.said)

        assert sink.lost() == lost
        assert sink.with_a_fate() + lost == sink.read() == sink.saved()
        with sink.reader() as reader:
            conservation = reader.conservation(deep=True)
        assert conservation.balanced, conservation
        # The endpoint knows by id: an id that came with two contents is a violation it names. With 200 kills
        # some events come again after more than its ten minutes: it refused what it had stored, meanwhile.
        worst = [one for one in world.billing.arrived.violations if one.what != "resent too late"]
        assert worst == []
        assert _delivered(sink) == _arrived(world)
        assert await sink.stop() == 0


def _arrived(world: World) -> dict[str, int]:
    """Values by meter, each event once by its id, as the endpoint has them."""
    sums: dict[str, int] = {}
    for (_, meter), value in world.billing.sums().items():
        sums[meter] = sums.get(meter, 0) + value
    return sums


def _delivered(sink: Sink) -> dict[str, int]:
    """Values by meter type that the store says were delivered."""
    with contextlib.closing(sqlite3.connect(f"file:{sink.store}?mode=ro", uri=True)) as db:
        rows = db.execute(
            "SELECT meter, value FROM tallies WHERE fate IN ('delivered', 'delivered_ambiguous')"
        ).fetchall()
    sums: dict[str, int] = {}
    for meter, value in rows:
        sums[METER_TYPES[meter]] = sums.get(METER_TYPES[meter], 0) + int(value)
    return {meter: value for meter, value in sums.items() if value}


def _print(capsys: pytest.CaptureFixture[str], table: Mapping[str, list[tuple[int, int]]], lost: int) -> None:
    with capsys.disabled():
        print(f"\n{'killed at':24} {'kills':>6} {'rows lost':>10} {'oldest, ms':>11}")
        for point, kills in table.items():
            rows, age_ms = sum(gone for gone, _ in kills), max((age_ms for _, age_ms in kills), default=0)
            print(f"{point:24} {len(kills):>6} {rows:>10} {age_ms:>11}")
        print(f"{'all':24} {KILLS:>6} {lost:>10}", flush=True)
