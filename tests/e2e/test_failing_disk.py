"""A disk that fails under the running program: an image on a file system without room, which root can make.

The image is thinly made, so that ext4 believes in space that is not there: writing it back is a real I/O
error (SQLITE_IOERR), and then the file system turns itself read-only. Only a repair and a mount anew help.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import World
from program import Sink, eventually
from test_full_disk import fill

from proxy_usage.control import call, socket_path
from proxy_usage.demo.faults import Fault, Faults

pytestmark = pytest.mark.e2e


class FailingDisk:
    """An ext4 file system whose every new block fails while ``room`` is taken."""

    def __init__(self, directory: Path) -> None:
        self.place = directory / "disk"
        self._under = directory / "under"
        self._image = self._under / "image"
        self._filler: Path | None = None

    def make(self) -> None:
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("mkfs.ext4 is not installed")
        self.place.mkdir()
        self._under.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128m", "none", str(self._under)],
            capture_output=True,
            check=False,
        )
        if made.returncode != 0:
            pytest.skip(f"cannot mount a file system: {made.stderr.decode().strip()}")
        with self._image.open("wb") as file:
            file.truncate(192 << 20)
        self._call("mkfs.ext4", "-q", "-F", "-E", "nodiscard", str(self._image))
        mounted = subprocess.run(
            ["mount", "-o", "loop,commit=1", str(self._image), str(self.place)],
            capture_output=True,
            check=False,
        )
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount an image: {mounted.stderr.decode().strip()}")

    def fail(self) -> None:
        self._filler = fill(self._under)

    def unmount(self) -> None:
        """An empty directory is left in its place."""
        self._call("umount", "--lazy", str(self.place))

    def repair(self) -> None:
        """What an operator does with what is unmounted: room, a check, and it is mounted in its place."""
        assert self._filler is not None
        self._filler.unlink()
        # A copy: what the program holds open keeps the broken file system alive behind the same image.
        copy = self._image.with_name("copy")
        self._call("cp", "--sparse=always", str(self._image), str(copy))
        subprocess.run(["e2fsck", "-fy", str(copy)], capture_output=True, check=False)
        self._call("mount", "-o", "loop", str(copy), str(self.place))

    def remove(self) -> None:
        for place in (self.place, self._under):
            subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)

    @staticmethod
    def _call(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FailingDisk]:
    made = FailingDisk(tmp_path)
    try:
        made.make()
        yield made
    finally:
        made.remove()


async def test_counting_goes_on_while_the_disk_fails_and_nothing_is_lost(
    tmp_path: Path, disk: FailingDisk
) -> None:
    async with World(tmp_path, settings={"store": {"path": str(disk.place / "usage.db")}}) as world:
        sink = world.sink
        await world.send(100)
        await world.equal()
        disk.fail()

        async def says_so() -> bool:
            await world.send(50)
            return "store" in await sink.reasons()

        await eventually(says_so, "readiness names the store", why=sink.said)
        await world.send(200)

        async def counted() -> bool:
            return (await sink.metrics())["entries_counted_total"] == world.truth.requests

        await eventually(counted, "rows are read on", why=sink.said)

        async def says_how_old() -> bool:  # what is not durable
            metrics = await sink.metrics()
            return metrics["store_failed"] == 1 and metrics["checkpoint_age_seconds"] >= 1

        await eventually(says_how_old, "metrics say that the store fails, and since when", why=sink.said)
        assert (await sink.get("/healthz"))[0] == 200
        subprocess.run(["sync", "--file-system", str(disk.place)], check=False)  # as the kernel does in time
        await world.send(200)
        disk.unmount()
        disk.repair()
        await world.equal()
        await eventually(sink.is_ready, "it is ready again", why=sink.said)
        with sink.reader() as reader:
            assert reader.conservation(deep=True).balanced
        assert await sink.stop() == 0
        await sink.start()
        assert sink.lost() == 0
        await sink.stop()


async def test_a_disk_that_fails_while_no_row_comes_is_opened_anew_too(
    tmp_path: Path, disk: FailingDisk
) -> None:
    """Then only deliveries meet the error, and they cannot open the store."""
    async with World(tmp_path, settings={"store": {"path": str(disk.place / "usage.db")}}) as world:
        sink = world.sink
        world.billing.faults = Faults(always=Fault.UNAVAILABLE)
        await world.send(100)
        await eventually(lambda: sink.counted() == 100, "all requests are durable", why=sink.said)
        await eventually(lambda: sink.saved() == sink.read(), "all is durable", why=sink.said)
        await eventually(lambda: closed(sink), "every window is closed", why=sink.said)
        disk.fail()
        await eventually(lambda: "cannot be used" in sink.log.read_text(), "the error is met", why=sink.said)
        disk.unmount()
        # The empty directory is not taken for the store.
        await eventually(lambda: "not there any more" in sink.log.read_text(), "it is gone", why=sink.said)

        async def says_so() -> bool:
            return "store" in await sink.reasons()

        await eventually(says_so, "readiness names the store", why=sink.said)
        assert list(disk.place.iterdir()) == []
        assert (await sink.get("/healthz"))[0] == 200
        disk.repair()
        world.billing.faults = Faults()
        await world.equal()
        await eventually(sink.is_ready, "it is ready again", why=sink.said)
        # Verbs reach it on the disk that it is on now.
        assert await asyncio.to_thread(call, socket_path(disk.place / "usage.db"), "status")
        assert await sink.stop() == 0


async def test_a_store_that_is_moved_away_under_the_running_service_is_said_and_taken_up_again(
    tmp_path: Path,
) -> None:
    """So is one that a disk was mounted over: what is written to it, no later start would find."""
    place, away = tmp_path / "disk", tmp_path / "away"
    async with World(tmp_path, settings={"store": {"path": str(place / "usage.db")}}) as world:
        sink = world.sink
        await world.send(100)
        await world.equal()
        place.rename(away)
        place.mkdir()

        async def said() -> bool:
            return "not there any more" in (await sink.reasons()).get("store", "")

        await eventually(said, "readiness names the store", why=sink.said)
        await world.send(100)
        assert list(place.iterdir()) == []
        place.rmdir()
        away.rename(place)
        await world.equal()
        await eventually(sink.is_ready, "it is ready again", why=sink.said)
        assert await sink.stop() == 0


def closed(sink: Sink) -> bool:
    with sink.reader() as reader:
        return reader.status().open_windows == 0
