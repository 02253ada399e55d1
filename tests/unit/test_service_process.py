"""What the sink's process runs on."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

HEAPS = """
import ctypes, sys, threading
from proxy_usage.service.process import share_heap
if sys.argv[1] == "shared":
    share_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
held = threading.Barrier(5)
def allocate():
    libc.malloc(100_000)
    held.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
held.wait()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""

LOOP = """
import asyncio
from proxy_usage.service.process import run_sink
async def main():
    print(type(asyncio.get_running_loop()).__module__)
    return 3
raise SystemExit(run_sink(main()))
"""


def _heaps(how: str) -> int:
    ran = subprocess.run([sys.executable, "-c", HEAPS, how], check=True, capture_output=True, text=True)
    return ran.stdout.count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives threads heaps of their own")
def test_threads_take_memory_from_one_heap() -> None:
    assert _heaps("own") > 1
    assert _heaps("shared") == 1


def test_the_sink_runs_in_a_compiled_event_loop() -> None:
    ran = subprocess.run([sys.executable, "-c", LOOP], check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (3, "uvloop\n"), ran.stderr


@pytest.mark.parametrize(
    ("closed", "answer"),
    [
        ("<&-", (0, "")),
        (">&-", (1, "error: cannot write the answer: Bad file descriptor\n")),
        ("2>&-", (0, "")),
        ("<&- >&- 2>&-", (1, "")),
    ],
)
def test_no_file_gets_the_number_of_a_closed_standard_stream(closed: str, answer: tuple[int, str]) -> None:
    """A store with the number 1 would get what somebody prints."""
    command = ["sh", "-c", f'"$0" -m proxy_usage version {closed}', sys.executable]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == answer
