"""A recording of all workers: each writes what comes to it, and the parts are joined by time of receipt.

    traffic.binpb  ◀── joined ──┬─ traffic.worker-0.binpb    gone when they are joined
                                └─ traffic.worker-1.binpb …

A worker that is down when it begins is left out, and named. One that dies meanwhile ends all of it.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from proxy_usage.control import NotRunning, call
from proxy_usage.errors import ProxyUsageError, UsageError
from proxy_usage.recording import varint


class Recording:
    """Recordings of some workers that begin and end together.

    Args:
        sockets: where each worker is asked, by worker.
        path: the file that there is in the end.
    """

    def __init__(self, sockets: Mapping[int, Path], path: Path) -> None:
        self._sockets = dict(sockets)
        self._path = path
        self._parts = {0: path}
        if len(sockets) > 1:
            self._parts = {worker: _beside(path, f"worker-{worker}", path.suffix) for worker in sockets}
        self.down: list[int] = []
        """Workers that were down when it began."""
        self.left: list[Path] = []
        """Parts of workers that died meanwhile: not joined, and not whole."""

    def start(self, *, max_bytes: int, seconds: int) -> None:
        """Begins it. The bound is for all workers together.

        Raises:
            NotRunning: no worker runs. UsageError: a worker cannot record.
        """
        several = len(self._parts) > 1
        if several:
            _create(self._path)
        asked, self._parts = self._parts, {}
        share = max(1, max_bytes // len(asked))
        try:
            for worker, part in asked.items():
                if self._begin(worker, path=str(part), max_bytes=share, seconds=seconds):
                    self._parts[worker] = part
                else:
                    self.down.append(worker)
        except ProxyUsageError:
            self._give_up(several=several)
            raise
        if not self._parts:
            self._give_up(several=several)
            raise NotRunning("no worker runs")

    def _give_up(self, *, several: bool) -> None:
        self.stop()
        if several:
            for made in (*self._parts.values(), self._path):
                _remove(made)

    def _begin(self, worker: int, **asked: object) -> bool:
        try:
            call(self._sockets[worker], "record.start", **asked)
        except NotRunning:
            return False
        return True

    def running(self) -> bool:
        """Whether all of it goes on: where one part ends, the others say no more of the same time."""
        return all(one["running"] for one in self._statuses())

    def stop(self) -> None:
        """Ends it; what was taken is still written."""
        for worker in self._parts:
            with suppress(ProxyUsageError):  # it died, and its recording with it
                call(self._sockets[worker], "record.stop")

    def end(self) -> dict[str, Any]:
        """Ends what still runs, joins the parts, and says how much it is and why it ended."""
        reasons = [one["ended"] for one in self._statuses() if not one["running"]]
        self.stop()
        found = self._statuses()
        if len(self._sockets) > 1:
            self.left = join(list(self._parts.values()), self._path)
        return {
            "running": False,
            "path": str(self._path),
            "messages": sum(one["messages"] for one in found),
            "bytes": sum(one["bytes"] for one in found),
            "ended": next(iter(reasons), "stopped"),
            **({"down": self.down} if self.down else {}),
            **({"left": [str(part) for part in self.left]} if self.left else {}),
        }

    def _statuses(self) -> list[dict[str, Any]]:
        found = []
        for worker in self._parts:
            status: Any = None
            with suppress(ProxyUsageError):
                status = call(self._sockets[worker], "record.status")
            if status is None or status["path"] != str(self._parts[worker]):  # it is down, or another one
                status = {"running": False, "messages": 0, "bytes": 0, "ended": f"worker {worker} died"}
            found.append(status)
        return found


class _Message(NamedTuple):
    order_ms: int
    """When it came; no less than that of the one before, even if the clock was set back."""
    part: int
    number: int
    stream: int
    received_ms: int
    raw: bytes


def join(parts: list[Path], path: Path) -> list[Path]:
    """Joins recordings into the file at ``path``, in the order of receipt, and removes them.

    Streams are numbered anew, since each worker counts its own from 1. A part whose process died has no
    numbers beside it and stays where it is. Returns those.
    """
    whole = [part for part in parts if _beside(part, "received").exists()]
    numbers: dict[tuple[int, int], int] = {}
    streams, received = [], []
    with path.open("wb") as file:
        for one in heapq.merge(*(_messages(part, index) for index, part in enumerate(whole))):
            file.write(varint(len(one.raw)) + one.raw)
            streams.append(numbers.setdefault((one.part, one.stream), len(numbers) + 1))
            received.append(one.received_ms)
    _beside(path, "streams").write_text(json.dumps(streams))
    _beside(path, "received").write_text(json.dumps(received))
    for part in whole:
        _remove(part)
    return [part for part in parts if part not in whole]


def _messages(part: Path, index: int) -> Iterator[_Message]:
    """The messages of a part, in the order in which they came."""
    streams = json.loads(_beside(part, "streams").read_text())
    received = json.loads(_beside(part, "received").read_text())
    with part.open("rb") as file:
        latest_ms = 0
        for number, (stream, received_ms) in enumerate(zip(streams, received, strict=True)):
            latest_ms = max(latest_ms, received_ms)
            yield _Message(latest_ms, index, number, stream, received_ms, file.read(_length(file)))


def _length(file: IO[bytes]) -> int:
    length = shift = 0
    while True:
        byte = file.read(1)[0]
        length |= (byte & 127) << shift
        if byte < 128:
            return length
        shift += 7


def _beside(path: Path, name: str, suffix: str = ".json") -> Path:
    return path.with_name(f"{path.name.removesuffix(path.suffix)}.{name}{suffix}")


def _remove(path: Path) -> None:
    for name in (path, _beside(path, "streams"), _beside(path, "received")):
        name.unlink(missing_ok=True)


def _create(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise UsageError(
            f"cannot record to {path}: {error.strerror}",
            hint="name a file that does not exist yet, in a directory the service may write to",
        ) from None
