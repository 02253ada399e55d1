"""A million open streams, each advanced once a minute, with turns that a real store takes.

    python bench/memory_streams.py [--streams N] [--minutes N] [--directory DIR]

Prints the memory of the process and how long each piece of work holds the event loop: a drain of rows, a look
for silent streams, the beginning of a turn. Time is simulated, work and disk are real: each turn is saved by
a thread of its own, as in the service, while rows go on. Exits with 1 above a limit.

What counts is processor time of the loop's own thread: what other processes take from it is theirs. Beside it
stand the wall clock and, as a measure of the machine, the longest of as many pieces of work that do nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from proxy_usage.decode import StreamRow
from proxy_usage.model import Identity, Key, Origin, Quantity
from proxy_usage.store.database import Database
from proxy_usage.store.streams import load_streams, save_streams
from proxy_usage.streams import Streams, StreamTurn

LIMIT_BYTES = 1 << 30
LIMIT_NS = 5_000_000
TURN_MS = 250
MINUTE_MS = 60_000
DRAIN = 113
"""Rows advanced without a pause: what decode holds before it is drained, and a piece of a message."""
TENANTS = 1_000
NOW_MS = 1_795_300_000_000
QUANTITIES = (Quantity.REQUESTS, Quantity.WIRE_IN, Quantity.WIRE_OUT, Quantity.OPEN_NS)
ORIGIN = Origin("spiffe://mesh/gateway", "gateway-7d4b9c6f5-x2x1z", "http")
IDENTITY = Identity(ORIGIN, 0, b"project", (), routed=True)
KEYS = [Key(f"project-{number}", ("eu", "web")) for number in range(TENANTS)]


class Stopwatch:
    """Times pieces of work of one kind, in nanoseconds: the thread's processor time, and the wall clock's."""

    def __init__(self) -> None:
        self.cpu: list[int] = []
        self.wall: list[int] = []

    def __enter__(self) -> None:
        self._wall_ns, self._cpu_ns = time.perf_counter_ns(), time.thread_time_ns()

    def __exit__(self, *_: object) -> None:
        self.cpu.append(time.thread_time_ns() - self._cpu_ns)
        self.wall.append(time.perf_counter_ns() - self._wall_ns)

    def __str__(self) -> str:
        self.cpu.sort()
        median, p999 = (self.cpu[int(len(self.cpu) * part)] // 1_000 for part in (0.5, 0.999))
        longest, wall = self.cpu[-1] // 1_000, max(self.wall) // 1_000
        return f"{median:>12,} µs median, {p999:,} p99.9, {longest:,} longest ({wall:,} by the clock)"


class Loop:
    """The event loop's side: every piece of work that it does without a pause is timed."""

    def __init__(self, streams: Streams, path: Path) -> None:
        self.streams = streams
        self.drains, self.looks, self.begins = Stopwatch(), Stopwatch(), Stopwatch()
        self.commits, self.machine = Stopwatch(), Stopwatch()
        self._database = Database(path)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._commit: Future[None] | None = None

    def drain(self, rows: list[tuple[StreamRow, Key]]) -> int:
        """Advances streams and returns the bytes booked."""
        advance = self.streams.advance
        booked = 0
        with self.drains:
            for row, key in rows:
                amounts = advance(row, key).amounts
                if amounts is not None:
                    booked += amounts[1]
        with self.machine:
            for _ in range(20_000):
                pass
        return booked

    def turn(self, now_ms: int) -> None:
        """A turn, once the one before it is saved."""
        if self._commit is not None:
            self._commit.result()
        with self.looks:
            self.streams.expire(now_ms)
        with self.begins:
            turn = self.streams.begin()
        self._commit = self._thread.submit(self._save, turn)

    def _save(self, turn: StreamTurn) -> None:
        with self.commits, self._database.transaction() as db:
            save_streams(db, turn)

    def close(self) -> tuple[int, int, int]:
        """Waits for the store. Returns turns in its log, bytes of its file, streams it holds."""
        self._thread.shutdown()
        (log,) = self._database.db.execute("SELECT count(*) FROM stream_log").fetchone()
        held = len(load_streams(self._database.db).records)
        size = self._database.path.stat().st_size
        self._database.close()
        return log, size, held


def rows(numbers: range, now_ms: int, minute: int) -> Iterator[list[tuple[StreamRow, Key]]]:
    """Periodic rows of these streams, in drains."""
    for first in range(numbers.start, numbers.stop, DRAIN):
        yield [
            (
                StreamRow(
                    origin=ORIGIN,
                    conn_id=b"%d" % (number >> 3),
                    start_ns=(NOW_MS - MINUTE_MS) * 1_000_000 + number,
                    stream_id=b"6c1f3c52-8d5a-4d6e-9d3e-%012x" % number,
                    identity=IDENTITY,
                    window_ms=now_ms - now_ms % MINUTE_MS,
                    amounts=(0, 1_000 * minute, 2_000 * minute, MINUTE_MS * 1_000_000 * minute),
                    end=False,
                    http=True,
                    emit_ms=now_ms,
                    now_ms=now_ms,
                ),
                KEYS[number % TENANTS],
            )
            for number in range(first, min(first + DRAIN, numbers.stop))
        ]


def memory(field: str) -> int:
    """Bytes, by the kernel's name for them: ``VmRSS`` now, ``VmHWM`` at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise SystemExit("this bench reads /proc, which only Linux has")


def main() -> int:
    """Runs the bench. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=int, default=3, help="how often each stream is advanced")
    parser.add_argument("--directory", type=Path, default=None, help="where the store is made, and removed")
    given = parser.parse_args()
    streams = Streams(
        QUANTITIES, interval_ms=MINUTE_MS, limit=given.streams, expire=3, remember_ms=30 * 86_400_000
    )
    before = memory("VmRSS")
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        loop = Loop(streams, Path(directory) / "bench.db")
        gc.collect()
        gc.freeze()  # what was imported is looked through by no collection any more
        booked = 0
        turns = MINUTE_MS // TURN_MS
        for minute in range(1, given.minutes + 1):
            for turn in range(turns):
                now_ms = NOW_MS + (minute - 1) * MINUTE_MS + turn * TURN_MS
                numbers = range(given.streams * turn // turns, given.streams * (turn + 1) // turns)
                for drain in rows(numbers, now_ms, minute):
                    booked += loop.drain(drain)
                loop.turn(now_ms)
        resident = memory("VmRSS")
        peak = memory("VmHWM")
        log, size, held = loop.close()
    print(f"streams                 {len(streams):>12,}")
    print(f"memory                  {peak >> 20:>12,} MiB at the most, {resident >> 20:,} MiB at the end")
    print(f"  a stream              {(resident - before) // given.streams:>12,} bytes")
    print(f"drain of {DRAIN} rows       {loop.drains}")
    print(f"look for silent streams {loop.looks}")
    print(f"beginning of a turn     {loop.begins}")
    print(f"doing nothing           {loop.machine}")
    print(f"commit, in its thread   {loop.commits}")
    print(f"store                   {size >> 20:>12,} MiB, {log} turns in the log")
    held_loop_ns = max(loop.drains.cpu[-1], loop.looks.cpu[-1], loop.begins.cpu[-1])
    print(f"longest tick            {held_loop_ns // 1_000:>12,} µs")
    exact = booked == given.streams * 1_000 * given.minutes and held == len(streams) == given.streams
    print(f"bytes booked            {booked:>12,} {'exact' if exact else 'WRONG'}")
    return 0 if exact and peak <= LIMIT_BYTES and held_loop_ns <= LIMIT_NS else 1


if __name__ == "__main__":
    sys.exit(main())
