"""The archive after a crash, on a disk that fails, and beside another process: each event is there once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from archives import HOUR_MS, NOON_MS, events, ids, opened, settled

from proxy_usage.delivery.archive import DISK_FULL, IN_USE, TAIL
from proxy_usage.outputs.base import Paused, Retry

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
    for path in one.finished():
        path.chmod(0o444)  # it is its owner's now
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
import structlog
from proxy_usage.config.outputs import FileConfig
from proxy_usage.delivery.archive import Archive
from proxy_usage.store import Queued

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # standard output is the test's
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
        if kill % 2:  # where the kill itself did not fall into a line
            with (tmp_path / "usage.ndjson").open("ab") as file:
                file.write(b'{"specversion":"1.0","id":"E')
    one = opened(tmp_path)
    last = events(*range(number, number + 40), size=1_000)
    assert one.append(last, NOON_MS) == settled(*range(number, number + 40))
    assert ids(tmp_path) == [f"E{each}" for each in range(number + 40)]
    assert len(one.finished()) > 1
    one.close()
