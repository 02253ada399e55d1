"""A worker as its supervisor sees it: started again, given up, killed when it hangs.

The process is a stand-in that does what a file tells it to, since a worker that hangs cannot be ordered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from proxy_usage.control import socket_path
from proxy_usage.service.children import Child, Patience
from proxy_usage.service.merging import Merged
from proxy_usage.service.supervisor import take_metrics
from proxy_usage.service.worker import Part

STAND_IN = """
import asyncio, json, signal, sys
from pathlib import Path
from proxy_usage.control import ControlServer, socket_path

place = Path(sys.argv[sys.argv.index("--config") + 1])
with (place / "starts").open("a") as starts:
    starts.write(" ".join(sys.argv[1:]) + "\\n")
what = (place / "mode").read_text()
if what.startswith("exit"):
    sys.exit(int(what.split()[1]))

async def health(arguments):
    if (place / "mode").read_text() == "hang":
        await asyncio.sleep(3600)
    return {"alive": (place / "mode").read_text() != "dead", "reasons": {}}

async def snapshot(arguments):
    with (place / "asked").open("a") as asked:
        asked.write("x")
    if (place / "mode").read_text() == "hang":
        await asyncio.sleep(3600)
    return json.loads((place / "said").read_text())

async def metrics(arguments):
    while (place / "mode").read_text() == "wait":
        await asyncio.sleep(0.01)
    (place / "told").touch()
    return (place / "figures").read_text()

VERBS = {"health": health, "page.snapshot": snapshot, "metrics": metrics}

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = ControlServer(socket_path(place / "usage.db"), VERBS)
    await server.start()
    await stop.wait()
    await server.close()

asyncio.run(main())
"""
PATIENCE = Patience(first_wait=0.01, last_wait=0.04, steady=3600, answer=30, hung=0, lifeless=0)
"""With time to answer: what counts as hanging here is a slow machine's everyday life."""


class Kept:
    """A child that is kept and looked at, and the file that tells its processes what to do."""

    def __init__(self, place: Path, mode: str, patience: Patience = PATIENCE, *, number: int = 1) -> None:
        self.place = place
        self.tell(mode)
        self.ended: list[int] = []
        self.child = Child(
            Part(number, 2, "127.0.0.1:1"),
            place,
            os.environ,
            place / "usage.db",
            self.ended.append,
            program=(sys.executable, "-c", STAND_IN),
            patience=patience,
        )

    def tell(self, mode: str) -> None:
        (self.place / "mode").write_text(mode)

    def starts(self) -> list[str]:
        path = self.place / "starts"
        return path.read_text().splitlines() if path.exists() else []

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await self.child.look()
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def keeping(kept: Kept, *, restored: bool = False) -> AsyncIterator[asyncio.Task[int]]:
    task = asyncio.create_task(kept.child.keep(restored=restored))
    try:
        yield task
    finally:
        kept.child.kill()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("code", [1, 2, 78])
async def test_one_that_cannot_start_at_first_is_given_up_with_its_code(tmp_path: Path, code: int) -> None:
    kept = Kept(tmp_path, f"exit {code}")
    assert await kept.child.keep() == code
    assert len(kept.starts()) == 1
    assert (kept.ended, kept.child.restarts) == ([1], 0)


async def test_one_that_served_is_started_again_whatever_becomes_of_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "serve")
    async with keeping(kept, restored=True) as task:
        await kept.until(kept.child.serving.is_set)
        assert kept.child.reasons == {}
        kept.tell("exit 1")
        kept.child.signal(signal.SIGKILL)
        await kept.until(lambda: len(kept.starts()) >= 5)
        assert kept.child.ended == 1
        assert kept.child.restarts >= 4
        kept.tell("serve")
        await kept.until(lambda: not kept.child.reasons)
        # What a backup's first start does to events is not done again.
        assert ["--restored" in line for line in kept.starts()[:3]] == [True, False, False]
        assert not task.done()
        kept.tell("exit 78")
        kept.child.signal(signal.SIGKILL)
        assert await task == 78


async def test_one_that_was_killed_while_it_started_is_started_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "serve")
    async with keeping(kept) as task:
        async with asyncio.timeout(60):
            while not kept.starts():
                await asyncio.sleep(0.01)
        kept.child.signal(signal.SIGKILL)
        await kept.until(kept.child.serving.is_set)
        assert not task.done()
        kept.child.stop()
        assert await task == 0


@pytest.mark.parametrize("mode", ["hang", "dead"])
async def test_one_that_hangs_is_killed(tmp_path: Path, mode: str) -> None:
    kept = Kept(tmp_path, "serve", replace(PATIENCE, answer=0.5))
    async with keeping(kept):
        await kept.until(kept.child.serving.is_set)
        kept.tell(mode)
        await kept.until(lambda: bool(kept.ended))
        assert kept.child.ended == -9
        kept.tell("serve")
        await kept.until(lambda: not kept.child.reasons)


async def test_one_whose_stage_shows_no_life_for_a_moment_is_left(tmp_path: Path) -> None:
    """All look so when the clock is set."""
    kept = Kept(tmp_path, "serve", replace(PATIENCE, lifeless=3600))
    async with keeping(kept):
        await kept.until(kept.child.serving.is_set)
        kept.tell("dead")
        for _ in range(3):
            await kept.child.look()
        assert kept.ended == []


async def test_one_whose_socket_is_away_is_named_and_left(tmp_path: Path) -> None:
    """Its store's disk is not mounted: it counts on, and another start would begin an empty store."""
    kept = Kept(tmp_path, "serve")
    async with keeping(kept):
        await kept.until(kept.child.serving.is_set)
        socket = socket_path(tmp_path / "usage.db")
        socket.rename(tmp_path / "away")
        await kept.until(lambda: "no service listens" in kept.child.reasons.get("silent", ""))
        await kept.child.look()
        assert kept.ended == []
        (tmp_path / "away").rename(socket)
        await kept.until(lambda: not kept.child.reasons)
        # Where the store is there, it ought to listen.
        (tmp_path / "usage.db").touch()
        socket.rename(tmp_path / "away")
        await kept.until(lambda: bool(kept.ended))


async def test_one_in_the_place_of_another_is_told_that_there_is_a_store(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "serve")
    async with keeping(kept):
        await kept.until(kept.child.serving.is_set)
        kept.child.signal(signal.SIGKILL)
        await kept.until(lambda: len(kept.starts()) == 2)
    parts = [line.split()[line.split().index("--worker") + 1] for line in kept.starts()]
    assert [Part.decode(part).again for part in parts] == [False, True]


async def test_one_that_says_nothing_for_a_while_is_named_and_left(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "serve", Patience(answer=0.2, hung=3600))
    async with keeping(kept):
        await kept.until(kept.child.serving.is_set)
        kept.tell("hang")
        await kept.until(lambda: "silent" in kept.child.reasons)
        assert kept.ended == []
        kept.tell("serve")
        await kept.until(lambda: not kept.child.reasons)
        assert kept.child.restarts == 0


async def test_a_stop_while_it_waits_for_its_next_start_ends_the_wait(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "serve", Patience(first_wait=3600, last_wait=3600))
    async with keeping(kept) as task:
        await kept.until(kept.child.serving.is_set)
        kept.child.signal(signal.SIGKILL)
        await kept.until(lambda: "down" in kept.child.reasons)
        assert "signal 9" in kept.child.reasons["down"]
        kept.child.stop()
        async with asyncio.timeout(60):
            assert await task == 0
        assert len(kept.starts()) == 1


async def test_a_worker_that_dies_while_another_is_waited_for_is_counted_once(tmp_path: Path) -> None:
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "figures").write_text("# TYPE rows_total counter\nrows_total 5\n")
    first = Kept(tmp_path / "first", "serve", Patience(answer=60), number=1)
    other = Kept(tmp_path / "other", "serve", Patience(answer=60), number=2)
    merged = Merged(lambda: ())

    def rows() -> float:
        return sum(sample.value for metric in merged.collect() for sample in metric.samples)

    async with keeping(first), keeping(other):
        for kept in (first, other):
            await kept.until(kept.child.serving.is_set)
        await take_metrics((first.child, other.child), merged)
        assert rows() == 10

        other.tell("wait")
        (first.place / "told").unlink()
        (first.place / "figures").write_text("# TYPE rows_total counter\nrows_total 7\n")
        asked = asyncio.create_task(take_metrics((first.child, other.child), merged))
        await first.until((first.place / "told").exists)
        first.child.signal(signal.SIGKILL)
        await other.until(lambda: first.ended == [1])
        merged.died(1)
        other.tell("serve")
        await asked
        assert rows() in (10, 12)  # whether the last it said was heard or not
