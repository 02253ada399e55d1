"""Log lines: whole beside those of other processes, short enough for that, and never in the service's way."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from proxy_usage.service import logs
from proxy_usage.service.logs import A_MINUTE, LINE_BYTES, LibraryLines, Lines, configure_log, lost_lines

LINES = 5
WRITER = f"""
import structlog
from proxy_usage.service.logs import configure_log, name_worker
name_worker(7)
configure_log("info", "json")
for number in range({LINES}):
    structlog.get_logger().info("draining", number=number)
"""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its two ends; what is written into it is read without waiting."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    yield read, write
    os.close(read)
    os.close(write)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]) -> Iterator[int]:
    """Where the program's log can be read."""
    monkeypatch.setattr(logs, "_lines", Lines(pipe[1]))
    configure_log("info", "json")
    yield pipe[0]
    structlog.reset_defaults()


def fill(fd: int) -> None:
    """Until a write would wait."""
    while logs._takes(fd):
        os.write(fd, b"x" * LINE_BYTES)


def empty(fd: int) -> bytes:
    """What was in it."""
    found = b""
    while True:
        try:
            part = os.read(fd, 1 << 20)
        except BlockingIOError:
            return found
        if not part:
            return found
        found += part


def test_a_line_and_its_end_are_one_write() -> None:
    """Workers share their supervisor's output: between two writes another's line would come.

    Unbuffered, as in the container image. Of a socket for datagrams one read gives what one write wrote.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-c", WRITER]
        assert subprocess.run(command, check=False, stdout=there.fileno(), env=environment).returncode == 0
        writes = [here.recv(1 << 16) for _ in range(LINES)]
    assert all(write.endswith(b"\n") for write in writes)
    lines = [json.loads(write) for write in writes]
    assert [(line["worker"], line["number"]) for line in lines] == [(7, number) for number in range(LINES)]


def fail() -> None:
    raise ValueError(1_000 * "line\n" + "the last line")


def test_a_line_fits_into_one_write_whatever_it_tells(said: int) -> None:
    log = structlog.get_logger()
    log.warning("refused", answer="a" + 5_000 * "\u00e9" + "z", more=list(range(3_000)), rows=7)
    try:
        fail()
    except ValueError:
        log.warning("failed", exc_info=True, other=10_000 * "y")
    first, second = (json.loads(line) for line in empty(said).splitlines())
    assert first["answer"].startswith("a\u00e9")
    assert first["answer"].endswith("\u00e9z")
    assert first["rows"] == 7
    assert first["more"].startswith("[0, 1, ")
    assert first["more"].endswith("2999]")
    assert second["exception"].startswith("Traceback")
    assert second["exception"].endswith("the last line")
    for line in (first, second):
        assert len(json.dumps(line)) < LINE_BYTES


def test_a_line_that_fits_is_not_cut(said: int) -> None:
    structlog.get_logger().info("serving", outputs=["a", "b"], text=3_000 * "x")
    line = json.loads(empty(said))
    assert (line["outputs"], line["text"]) == (["a", "b"], 3_000 * "x")


def test_a_reader_that_stopped_reading_holds_nothing_up(said: int, pipe: tuple[int, int]) -> None:
    fill(pipe[1])
    log = structlog.get_logger()
    for number in range(5):
        log.info("unread", number=number)
    assert lost_lines() == 5
    empty(said)
    log.info("read again")
    first, second = (json.loads(line) for line in empty(said).splitlines())
    assert first["event"] == "read again"
    assert (second["event"], second["lines"]) == ("log lines were lost", 5)
    log.info("and again")
    assert len(empty(said).splitlines()) == 1
    assert lost_lines() == 0


def test_a_reader_that_went_away(pipe: tuple[int, int]) -> None:
    read, write = os.pipe()
    os.close(read)
    lines = Lines(write)
    lines.info("nobody reads this")
    assert (lines.take_lost(), lines.take_lost()) == (1, 0)
    os.close(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    lines = Lines(fd)
    lines.info("no room")
    assert lines.take_lost() == 1
    os.close(fd)


def test_half_a_line_is_ended_before_the_next(tmp_path: Path) -> None:
    """A disk may take a part of a line and refuse the rest."""
    path = tmp_path / "log"
    program = f"""
import os, resource, signal
from proxy_usage.service.logs import Lines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
lines = Lines(os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
lines.info("first")
lines.info("second")
lines.info("third")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
lines.info("fourth")
raise SystemExit(lines.take_lost())
"""
    ran = subprocess.run([sys.executable, "-c", program], check=False, stdout=subprocess.DEVNULL)
    assert ran.returncode == 2
    assert path.read_text().splitlines() == ["first", "seco", "fourth"]


def test_what_libraries_say_is_bounded_and_the_rest_counted(said: int) -> None:
    handler = LibraryLines()
    for number in range(A_MINUTE + 7):
        record = logging.LogRecord("aiohttp.server", logging.ERROR, "", 0, "no. %d", (number,), None)
        record.created = 1_795_300_000.0
        handler.handle(record)
    lines = [json.loads(line) for line in empty(said).splitlines()]
    assert [line["message"] for line in lines] == [f"no. {number}" for number in range(A_MINUTE)]
    assert {(line["event"], line["library"], line["level"]) for line in lines} == {
        ("a library says", "aiohttp.server", "error")
    }
    try:
        fail()
    except ValueError:
        late = logging.LogRecord("x", logging.WARNING, "", 0, "late", (), sys.exc_info())
    late.created = record.created + 60
    handler.handle(late)
    more, last = (json.loads(line) for line in empty(said).splitlines())
    assert (more["event"], more["lines"]) == ("more lines of libraries", 7)
    assert (last["message"], last["level"]) == ("late", "warning")
    assert last["exception"].endswith("the last line")
    for _ in range(A_MINUTE):
        handler.handle(late)
    assert len(empty(said).splitlines()) == A_MINUTE - 1
    handler.close()
    assert json.loads(empty(said))["lines"] == 1
