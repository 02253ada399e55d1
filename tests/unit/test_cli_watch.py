"""``status --watch``: lines where nobody looks, one screen drawn over and over on a terminal."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cli_call import Caller, until_it_serves
from made_store import MadeStore
from test_page_document import CASES, NAMING, WELL, monstrous

from proxy_usage.cli.watch import ENTER, LEAVE, line, screen, spark
from proxy_usage.control import ControlServer, socket_path, supervisor_socket
from proxy_usage.page.document import document
from proxy_usage.page.ring import History


def test_a_moment_as_a_line() -> None:
    assert line(document(WELL, tenants=True), "") == (
        "2027-01-15T08:00:00Z ok: All is well; -/s in, 0 windows open, 3 events waiting, 0 dead letters,"
        " 0 entries held"
    )
    assert line(None, "nobody\nlistens") == "no answer: nobody\\nlistens"


def test_the_screen_says_what_is_wrong_first_since_when_and_what_to_do() -> None:
    lines = screen(document(CASES["paused"][0], tenants=True), "", 0)
    assert lines[2].startswith("✗ Output billing is paused: unauthorized  (since ")
    text = "\n".join(lines)
    assert "lost: Nothing: 3 events wait" in text
    assert "do:   The endpoint does not take our token." in text
    assert "output billing: paused: unauthorized; 3 waiting, delivered 9" in text


def test_no_answer_is_said_with_the_age_of_the_figures() -> None:
    lines = screen(document(WELL, tenants=True), "no service runs", 12)
    assert lines[1] == "✗ No answer for 12 s: no service runs. Figures are of 2027-01-15T08:00:00Z."
    assert screen(None, "no service runs", 0)[2] == "✗ No answer: no service runs"


def test_rates_are_whole_tenths_and_tenants_are_named_only_if_they_may_be() -> None:
    busy = replace(NAMING, minute_ms=60_000)
    text = "\n".join(screen(document(busy, tenants=True), "", 0))
    assert "node envoy-1: 1.0/s, 100 read" in text
    assert "most requests: acme-7 5" in text
    assert "acme-7" not in "\n".join(screen(document(busy, tenants=False), "", 0))


def test_nothing_that_a_terminal_obeys_gets_through() -> None:
    for text in screen(document(monstrous(), tenants=True), "\x1b[2J", 0):
        assert text.isprintable()


def test_a_line_of_bars() -> None:
    assert spark([0, 1, None, 4, 8]) == "▁▁ ▄█"
    assert spark([0, 0]) == "▁▁"
    assert spark([]) == ""
    assert len(spark(list(range(720)))) == 40
    history = replace(WELL, history=History(0, {"entries": (1, 2)}))
    assert any("▄█" in text for text in screen(document(history, tenants=True), "", 0))


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Caller:
    caller = Caller(tmp_path, capsys)
    MadeStore(caller.store).database.close()
    return caller


@pytest.fixture
def service(call: Caller, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(program("run", call), stdout=log, stderr=log)
    try:
        until_it_serves(process, call.store, tmp_path / "log")
        yield process
    finally:
        process.kill()
        process.wait()


def program(*words: object) -> list[str]:
    arguments = [str(word.config) if isinstance(word, Caller) else str(word) for word in words]
    at = next(number for number, word in enumerate(words) if isinstance(word, Caller))
    arguments.insert(at, "--config")
    return [sys.executable, "-m", "proxy_usage", *arguments]


def test_where_nobody_looks_there_are_lines_until_it_is_told_to_stop(
    call: Caller, service: subprocess.Popen[bytes]
) -> None:
    for more, begins in ((), "20"), (("--json",), "{"):
        words = program("status", call, "--watch", "--interval", "1", *more)
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            said = [watching.stdout.readline() for _ in range(2)]
            watching.send_signal(signal.SIGINT)
            rest = watching.stdout.read()
            assert (watching.wait(60), rest.count("Traceback")) == (0, 0)
        assert all(text.startswith(begins) for text in said)
        assert "\x1b" not in "".join(said)
        if more:
            assert json.loads(said[1])["state"]["word"] == "waiting"
        else:
            assert "waiting: Nothing has arrived yet;" in said[1]


def test_without_a_service_each_line_says_how_to_start_it(call: Caller) -> None:
    with subprocess.Popen(program("status", call, "--watch"), stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        said = watching.stdout.readline()
        watching.kill()
    begin = f"no answer: no service listens on {socket_path(call.store)}"
    assert said == f"{begin}; start it: proxy-usage run --config FILE\n"


def test_on_a_terminal_one_screen_is_drawn_over_and_put_away(
    call: Caller, service: subprocess.Popen[bytes]
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    words = program("status", call, "--watch", "--interval", "1")
    watching = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    while said.count(b"Nothing has arrived yet") < 2:
        said += os.read(ours, 4_096)
    watching.send_signal(signal.SIGINT)
    while True:
        try:
            more = os.read(ours, 4_096)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        said += more
    os.close(ours)
    assert watching.wait(60) == 0
    text = said.decode()
    assert text.count(ENTER) == text.count(LEAVE) == 1
    drawn, _, left = text.partition(LEAVE)
    assert "Nothing has arrived yet" in left, "the last state stays"
    assert "Traceback" not in text
    frames = drawn.split("\x1b[H")[1:]
    assert len(frames) >= 2
    for frame in frames[:-1]:
        shown = frame.replace("\x1b[K", "").replace("\x1b[J", "").splitlines()
        assert len(shown) <= 12
        assert all(len(one) < 60 for one in shown)


async def test_of_several_workers_their_supervisor_is_asked(call: Caller) -> None:
    """Also where the file says one worker by now: worker 0 would speak for itself alone."""

    async def page(_arguments: dict[str, object]) -> object:
        return document(NAMING, tenants=True)

    async def worker_0(_arguments: dict[str, object]) -> object:
        return document(WELL, tenants=True)

    servers = [
        ControlServer(supervisor_socket(call.store), {"page": page}),
        ControlServer(socket_path(call.store), {"page": worker_0}),
    ]
    for server in servers:
        await server.start()
    words = program("status", call, "--watch", "--json")
    watching = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE, limit=1 << 20)
    try:
        assert watching.stdout is not None
        said = json.loads(await watching.stdout.readline())
        assert said["unattributed"]["groups"][0]["rows"] == 5
    finally:
        watching.kill()
        await watching.wait()
        for server in servers:
            await server.close()


def test_without_a_service_it_says_so(call: Caller) -> None:
    words = program("status", call, "--watch")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("no answer: ")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 0
