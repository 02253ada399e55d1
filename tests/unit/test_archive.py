"""The archive: a line an event, files that are finished in time, and nothing beyond its bounds."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from archives import HOUR_MS, NOON_MS, events, ids, opened, settled, stamped

from proxy_usage.delivery.archive import ARCHIVE_FULL, DISK_FULL
from proxy_usage.outputs.base import Paused

# --- lines and files --------------------------------------------------------------------------------


def test_a_line_is_the_stored_bytes_of_an_event(tmp_path: Path) -> None:
    one = opened(tmp_path / "made")
    batch = events(1, 2)
    assert one.append(batch, NOON_MS) == settled(1, 2)
    assert (tmp_path / "made" / "usage.ndjson").read_bytes() == b"".join(e.body + b"\n" for e in batch)
    assert (tmp_path / "made" / "usage.ndjson").stat().st_mode & 0o777 == 0o640
    one.close()


def test_an_event_that_was_laid_out_for_people_is_one_line_all_the_same(tmp_path: Path) -> None:
    one = opened(tmp_path)
    pretty = events(1)[0]._replace(body=b'{"specversion":\n  "1.0",\n  "id": "E1"}')
    one.append([pretty], NOON_MS)
    assert ids(tmp_path) == ["E1"]
    one.close()


def test_a_file_that_would_become_too_large_is_finished_first(tmp_path: Path) -> None:
    one = opened(tmp_path, rotate_bytes=300, max_bytes=10_000)
    for number in range(4):
        assert one.append(events(number, size=100), NOON_MS) == settled(number)
    assert [path.name for path in one.finished()] == ["usage-20261122T120000.000Z.ndjson"]
    assert one.finished()[0].stat().st_size <= 300
    assert one.append(events(9, size=1_000), NOON_MS) == settled(9)  # larger than any file: alone in its own
    assert one.append(events(10), NOON_MS) == settled(10)
    names = [path.name for path in one.finished()]
    assert len(names) == len(set(names)) == 3  # in one moment, and no name was given twice
    assert ids(tmp_path) == ["E0", "E1", "E2", "E3", "E9", "E10"]
    one.close()


def test_a_file_of_another_hour_is_finished_also_while_nothing_comes(tmp_path: Path) -> None:
    one = opened(tmp_path)
    one.append(events(1), NOON_MS + HOUR_MS - 1)
    one.rotate(NOON_MS + HOUR_MS - 1)
    assert one.finished() == []
    one.append(events(2), NOON_MS + HOUR_MS)
    assert [path.name for path in one.finished()] == ["usage-20261122T130000.000Z.ndjson"]
    one.rotate(NOON_MS + 2 * HOUR_MS + 5)
    assert [path.name for path in one.finished()][1:] == ["usage-20261122T140000.005Z.ndjson"]
    one.rotate(NOON_MS + 9 * HOUR_MS)  # an empty file is not worth a name
    assert len(one.finished()) == 2
    assert ids(tmp_path) == ["E1", "E2"]
    one.close()


def test_the_hour_of_a_file_outlives_the_process(tmp_path: Path) -> None:
    one = opened(tmp_path)
    one.append(events(1), NOON_MS)
    one.close()
    stamped(tmp_path / "usage.ndjson", NOON_MS)
    one = opened(tmp_path)
    one.append(events(2), NOON_MS + HOUR_MS)
    assert len(one.finished()) == 1
    one.close()


def test_names_keep_their_order_when_the_clock_goes_back(tmp_path: Path) -> None:
    for number, now_ms in enumerate((NOON_MS, NOON_MS - HOUR_MS, NOON_MS - 2 * HOUR_MS, NOON_MS)):
        one = opened(tmp_path)  # another process each time
        one.append(events(number), now_ms)
        one.close()
        stamped(tmp_path / "usage.ndjson", now_ms)
    assert ids(tmp_path) == ["E0", "E1", "E2", "E3"]


def test_files_of_others_are_not_counted_and_not_touched(tmp_path: Path) -> None:
    for name in ("usage-notes.ndjson", "usage-20261122.ndjson", "usage-20261122T120000.000Z.ndjson.gz"):
        (tmp_path / name).write_text("mine")
    one = opened(tmp_path, max_bytes=100, rotate_bytes=100)
    assert one.append(events(1), NOON_MS) == settled(1)
    assert one.finished() == []
    one.close()


# --- bounds -----------------------------------------------------------------------------------------


def test_a_full_archive_pauses_and_goes_on_when_files_were_taken_away(tmp_path: Path) -> None:
    one = opened(tmp_path, rotate_bytes=200, max_bytes=500)
    number = 0
    while (verdict := one.append(events(number, size=100), NOON_MS)) == settled(number):
        number += 1
    assert isinstance(verdict, Paused)
    assert verdict.reason == ARCHIVE_FULL
    assert number == len(ids(tmp_path)) > 1  # nothing was removed, and nothing of the refused batch is there
    assert sum(path.stat().st_size for path in tmp_path.glob("*.ndjson")) <= 500
    assert one.append(events(number, size=100), NOON_MS) == verdict
    one.finished()[0].unlink()
    assert one.append(events(number, size=100), NOON_MS) == settled(number)
    one.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_pauses_with_nothing_half_written_and_goes_on_when_there_is_room(disk: Path) -> None:
    one = opened(disk)
    (disk / "other").write_bytes(bytes(150_000))
    assert one.append(events(1), NOON_MS) == settled(1)
    large = events(*range(2, 12), size=20_000)
    for _ in range(3):
        verdict = one.append(large, NOON_MS)
        assert isinstance(verdict, Paused)
        assert verdict.reason == DISK_FULL
        assert ids(disk) == ["E1"]
        assert one.append(events(1), NOON_MS) == settled(1)  # there already
    (disk / "other").unlink()
    assert one.append(large, NOON_MS) == settled(*range(2, 12))
    assert ids(disk) == [f"E{number}" for number in range(1, 12)]
    one.close()
