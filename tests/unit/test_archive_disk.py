"""The archive whose disk is unmounted while the service runs: it waits, and writes nothing where it was."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from archives import HOUR_MS, NOON_MS, events, ids, opened, settled

from proxy_usage.delivery.archive import NOT_MOUNTED, Archive
from proxy_usage.delivery.disk import Disk
from proxy_usage.outputs.base import Paused


class Place:
    """A mount point, and a disk that can be mounted there and taken away."""

    def __init__(self, directory: Path) -> None:
        self.point, self._device = directory / "point", directory / "device"
        self.point.mkdir()
        self._device.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "none", str(self._device)], capture_output=True, check=False
        )
        if made.returncode != 0:
            pytest.skip(f"cannot mount a file system: {made.stderr.decode().strip()}")
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "--bind", str(self._device), str(self.point)], check=True)

    def mount_another(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "none", str(self.point)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.point)], check=True)

    def end(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.point)], capture_output=True, check=False)
        subprocess.run(["umount", "--lazy", str(self._device)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    try:
        yield place
    finally:
        place.end()


def paused(one: Archive, *numbers: int) -> str:
    verdict = one.append(events(*numbers), NOON_MS)
    assert isinstance(verdict, Paused), verdict
    assert verdict.reason == NOT_MOUNTED
    return verdict.answer


@pytest.mark.parametrize("inner", ["", "archive"])
@pytest.mark.parametrize("left_there", [False, True])
def test_a_disk_that_is_away_is_waited_for(disk: Place, inner: str, left_there: bool) -> None:
    """``left_there``: what the mount point itself holds looks as the disk does."""
    directory = disk.point / inner
    one = opened(directory)
    assert one.append(events(1), NOON_MS) == settled(1)
    disk.unmount()
    if left_there:
        directory.mkdir(exist_ok=True)
        (directory / "usage.ndjson").touch()
    before = sorted(disk.point.rglob("*"))
    for _ in range(2):  # with the file open, and without
        assert str(disk.point) in paused(one, 2)
        one.rotate(NOON_MS + HOUR_MS)
    assert sorted(disk.point.rglob("*")) == before
    disk.mount()
    assert one.append(events(2), NOON_MS) == settled(2)
    assert ids(directory) == ["E1", "E2"]
    one.close()


def test_what_was_in_doubt_when_the_disk_went_is_not_written_twice(disk: Place) -> None:
    one = opened(disk.point)
    assert one.append(events(1, 2), NOON_MS) == settled(1, 2)
    disk.unmount()
    paused(one, 1, 2)
    disk.mount()
    assert one.append(events(1, 2, 3), NOON_MS) == settled(1, 2, 3)
    assert ids(disk.point) == ["E1", "E2", "E3"]
    one.close()


def test_another_disk_in_the_same_place_is_gone_on_with(disk: Place) -> None:
    """A disk may come back under another number, and nobody else can have mounted one there."""
    one = opened(disk.point)
    assert one.append(events(1), NOON_MS) == settled(1)
    device = disk.point.stat().st_dev
    disk.unmount()
    paused(one, 2)
    disk.mount_another()
    assert disk.point.stat().st_dev != device
    assert one.append(events(2), NOON_MS) == settled(2)
    assert ids(disk.point) == ["E2"]
    disk.unmount()
    paused(one, 3)  # it is this one that is missed now
    one.close()


def test_a_disk_that_is_mounted_while_the_service_runs_is_moved_to(disk: Place) -> None:
    disk.unmount()
    one = opened(disk.point)
    assert one.append(events(1), NOON_MS) == settled(1)
    disk.mount()
    assert one.append(events(2), NOON_MS) == settled(2)
    assert ids(disk.point) == ["E2"]
    one.close()
    disk.unmount()
    assert ids(disk.point) == ["E1"]


def test_a_directory_is_made_at_the_start_and_not_again(tmp_path: Path) -> None:
    place = tmp_path / "archive"
    one = opened(place)
    assert one.append(events(1), NOON_MS) == settled(1)
    place.rename(tmp_path / "taken")
    assert str(place) in paused(one, 2)
    one.rotate(NOON_MS + HOUR_MS)
    assert not place.exists()
    place.mkdir()  # somebody decided so
    assert one.append(events(2), NOON_MS) == settled(2)
    assert ids(place) == ["E2"]
    one.close()


def test_the_place_of_a_directory_is_found_through_links(disk: Place, tmp_path: Path) -> None:
    (disk.point / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(disk.point / "a")
    found = Disk.of(tmp_path / "link" / "b")
    assert found == Disk(disk.point.stat().st_dev, disk.point.resolve())
    assert Disk.of(tmp_path).device != found.device
