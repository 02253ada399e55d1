"""The archive: whole lines, durable before they are delivered, each once, and within its bounds."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy_usage.config.outputs import FileConfig
from proxy_usage.delivery.archive import ARCHIVE_FULL, DISK_FULL, IN_USE, TAIL, Archive
from proxy_usage.outputs.base import Paused, Retry, Settled
from proxy_usage.store import Fate, Queued

HOUR_MS = 3_600_000
NOON_MS = 1_795_348_800_000  # 2026-11-22T12:00:00Z


def events(*numbers: int, size: int = 0) -> list[Queued]:
    """Events as the store has them, each of at least ``size`` bytes."""
    found = []
    for number in numbers:
        body = json.dumps(
            {"specversion": "1.0", "id": f"E{number}", "pad": "x" * size}, separators=(",", ":")
        )
        found.append(Queued(number, f"E{number}", "alpha", "requests", 1, body.encode()))
    return found


def opened(directory: Path, **settings: Any) -> Archive:
    return Archive(FileConfig.model_validate({"path": directory / "usage.ndjson", **settings}))


def ids(directory: Path) -> list[str]:
    """What a reader of all files finds, in order; fails where a line is no event."""
    files = sorted(directory.glob("usage-*.ndjson"))
    current = directory / "usage.ndjson"
    lines = [line for path in (*files, current) if path.exists() for line in path.read_bytes().splitlines()]
    return [json.loads(line)["id"] for line in lines]


def settled(*numbers: int) -> Settled:
    return Settled({number: Fate("delivered") for number in numbers})


def stamped(path: Path, ms: int) -> None:
    os.utime(path, ns=(ms * 1_000_000, ms * 1_000_000))


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


# --- crashes and disks that fail --------------------------------------------------------------------

TORN = {
    "in the middle of a line": b'{"specversion":"1.0","id":"E3","pa',
    "before the line ended": b'{"specversion":"1.0","id":"E3","pad":""}',
    "in its first byte": b"{",
    "in zeros": bytes(300),
    "in the second line": b'{"specversion":"1.0","id":"E3","pad":""}\n{"specv',
}


@pytest.mark.parametrize("rest", TORN.values(), ids=TORN)
def test_a_torn_end_is_cut_off_and_what_is_resent_is_there_once(tmp_path: Path, rest: bytes) -> None:
    one = opened(tmp_path)
    one.append(events(1, 2), NOON_MS)
    one.close()
    with (tmp_path / "usage.ndjson").open("ab") as file:
        file.write(rest)
    one = opened(tmp_path)
    assert one.append(events(1, 2, 3, 4), NOON_MS) == settled(1, 2, 3, 4)
    assert ids(tmp_path) == ["E1", "E2", "E3", "E4"]
    one.close()


@pytest.mark.parametrize("there", [b"my notes\n", b"my notes", b"\xff\xfe", b"[1]\n[2]\n", b"x" * 2 * TAIL])
def test_a_file_that_is_no_archive_is_left_as_it_is(tmp_path: Path, there: bytes) -> None:
    path = tmp_path / "usage.ndjson"
    path.write_bytes(there)
    one = opened(tmp_path)
    verdict = one.append(events(1), NOON_MS)
    assert isinstance(verdict, Paused)
    assert verdict.reason == "misconfigured"
    assert path.read_bytes() == there


def test_the_batch_of_a_crash_is_found_in_a_long_file(tmp_path: Path) -> None:
    one = opened(tmp_path)
    for start in range(0, 60, 10):
        one.append(events(*range(start, start + 10), size=60_000), NOON_MS)
    assert (tmp_path / "usage.ndjson").stat().st_size > TAIL
    one.close()
    one = opened(tmp_path)
    assert one.append(events(*range(50, 60), size=60_000), NOON_MS) == settled(*range(50, 60))
    assert ids(tmp_path) == [f"E{number}" for number in range(60)]
    one.close()


def test_the_batch_of_a_crash_is_found_in_a_file_that_was_finished_since(tmp_path: Path) -> None:
    one = opened(tmp_path)
    one.append(events(1, 2), NOON_MS)
    one.rotate(NOON_MS + HOUR_MS)
    one.close()
    one = opened(tmp_path)
    assert one.append(events(1, 2), NOON_MS + HOUR_MS) == settled(1, 2)
    assert ids(tmp_path) == ["E1", "E2"]
    one.close()


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Makes a call of the system fail, as a disk does."""

    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fails)


@pytest.mark.parametrize("undo", [True, False])
def test_what_could_not_be_synced_is_not_delivered_and_not_believed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undo: bool
) -> None:
    """``undo`` False: the disk does not let it be cut off, either."""
    one = opened(tmp_path)
    assert one.append(events(1), NOON_MS) == settled(1)
    with monkeypatch.context() as broken:
        failing(broken, "fsync", errno.EIO)
        if not undo:
            failing(broken, "ftruncate", errno.EIO)
        assert isinstance(one.append(events(2), NOON_MS), Retry)
        assert isinstance(one.append(events(2), NOON_MS), Retry)
    written: list[bytes] = []
    true_write = os.pwrite

    def watched(fd: int, data: bytes, at: int) -> int:
        written.append(data)
        return true_write(fd, data, at)

    monkeypatch.setattr(os, "pwrite", watched)
    assert one.append(events(2), NOON_MS) == settled(2)
    assert ids(tmp_path) == ["E1", "E2"]
    # Whether it was cut off or not: it was written again before it was called durable.
    assert any(b'"E2"' in data for data in written)
    one.close()


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "misconfigured"),
        (errno.EROFS, "misconfigured"),
        (errno.ENOENT, "misconfigured"),
        (errno.EDQUOT, DISK_FULL),
        (errno.ENOSPC, DISK_FULL),
        (errno.EIO, "io_error"),
    ],
)
def test_each_failure_of_the_disk_has_a_verdict_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    one = opened(tmp_path)
    for name in ("open", "pwrite", "fsync"):
        with monkeypatch.context() as broken:
            failing(broken, name, number)
            one.close()
            verdict = one.append(events(1), NOON_MS)
        assert isinstance(verdict, Retry if number == errno.EIO else Paused)
        assert verdict.reason == reason
    assert one.append(events(1), NOON_MS) == settled(1)
    assert ids(tmp_path) == ["E1"]
    one.close()


def test_a_missing_directory_is_said_and_found_again(tmp_path: Path) -> None:
    one = opened(tmp_path / "a" / "b")
    verdict = one.append(events(1), NOON_MS)
    assert isinstance(verdict, Paused)
    assert verdict.reason == "misconfigured"
    assert str(tmp_path / "a") in verdict.answer
    (tmp_path / "a").mkdir()
    assert one.append(events(1), NOON_MS) == settled(1)
    one.close()


def test_a_file_that_was_moved_away_is_not_written_any_more(tmp_path: Path) -> None:
    one = opened(tmp_path)
    one.append(events(1), NOON_MS)
    (tmp_path / "usage.ndjson").rename(tmp_path / "taken")
    one.append(events(2), NOON_MS)
    assert ids(tmp_path) == ["E2"]
    assert json.loads((tmp_path / "taken").read_bytes())["id"] == "E1"
    one.close()


def test_a_name_is_durable_before_what_is_written_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    true_fsync = os.fsync

    def watched(fd: int) -> None:
        done.append(Path(f"/proc/self/fd/{fd}").resolve().name)
        true_fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    one = opened(tmp_path / "made", rotate_bytes=1)
    one.append(events(1), NOON_MS)
    assert done[:2] == [tmp_path.name, "made"]
    assert done[-1] == "usage.ndjson"
    done.clear()
    one.append(events(2), NOON_MS)
    assert done == ["made", "made", "usage.ndjson"]  # the final name, the new file, its lines
    one.close()


# --- another process --------------------------------------------------------------------------------

WRITER = """
import json, sys
from pathlib import Path
from proxy_usage.config.outputs import FileConfig
from proxy_usage.delivery.archive import Archive
from proxy_usage.store import Queued

one, number = Archive(FileConfig(path=Path(sys.argv[1]), rotate_bytes=200_000)), int(sys.argv[2])
while True:
    batch = []
    for id in range(number, number + 40):
        body = json.dumps({"specversion": "1.0", "id": f"E{id}", "pad": "x" * 1000}).encode()
        batch.append(Queued(id, f"E{id}", "a", "requests", 1, body))
    verdict = one.append(batch, 1_795_348_800_000)
    number += 40
    print(number, type(verdict).__name__, getattr(verdict, "reason", ""), getattr(verdict, "answer", ""))
    sys.stdout.flush()
"""


def writer(directory: Path, number: int) -> subprocess.Popen[str]:
    """A process that writes batches of 40 from ``number`` on, and says each time how far it is."""
    command = [sys.executable, "-c", WRITER, str(directory / "usage.ndjson"), str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_second_process_does_not_write_the_same_archive(tmp_path: Path) -> None:
    one = opened(tmp_path)
    one.append(events(1), NOON_MS)
    process = writer(tmp_path, 2)
    assert process.stdout is not None
    said = process.stdout.readline()
    process.kill()
    process.communicate()
    assert f"Paused {IN_USE} another process writes {tmp_path}" in said
    assert f"pid {os.getpid()} on host" in said
    assert ids(tmp_path) == ["E1"]
    one.close()


def test_killed_again_and_again_it_has_each_event_once(tmp_path: Path) -> None:
    """What a courier does: after a crash, the batch that was not settled is sent again."""
    number = 0
    for kill in range(6):
        process = writer(tmp_path, number)
        assert process.stdout is not None
        for _ in range(2 + kill):
            number, kind = int((said := process.stdout.readline().split())[0]), said[1]
            assert kind == "Settled"
        time.sleep(0.0007 * kill)  # no condition: anywhere within a batch is right
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        for line in rest.splitlines():
            if line.split()[1:2] == ["Settled"]:
                number = int(line.split()[0])
    one = opened(tmp_path)
    last = events(*range(number, number + 40), size=1_000)
    assert one.append(last, NOON_MS) == settled(*range(number, number + 40))
    assert ids(tmp_path) == [f"E{each}" for each in range(number + 40)]
    assert len(one.finished()) > 1
    one.close()
