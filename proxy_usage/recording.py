"""What arrives, written to a file for a while: for support cases, bounded in size and time.

The format is that of a capture: each message behind its length as a varint, ``NAME.streams.json`` with the
number of each message's gRPC stream, ``NAME.received.json`` with its time of receipt in milliseconds. A
stream that was under way is introduced by a short identifier, since Envoy names itself only once.

The event loop never waits for the recording's disk: a writer that cannot keep up ends the recording.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from proxy_usage.decode import write_identifier
from proxy_usage.errors import UsageError
from proxy_usage.model import Origin

BACKLOG_BYTES = 64 << 20
"""Messages waiting to be written; past it the recording ends."""
MAX_BYTES = 4 << 30
MAX_SECONDS = 3_600
WRITE_EVERY_S = 0.2


class Recorder:
    """At most one recording at a time.

    Args:
        node_paths: ``FoldPlan.node_paths``.
        clock_ms: the wall clock in milliseconds.
    """

    def __init__(self, node_paths: tuple[tuple[str, ...], ...], clock_ms: Callable[[], int]) -> None:
        self._node_paths = node_paths
        self._clock_ms = clock_ms
        self._task: asyncio.Task[None] | None = None
        self._path = Path()
        self._introduced: set[int] = set()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._streams: list[int] = []
        self._received_ms: list[int] = []
        self._bytes = 0
        self._max_bytes = 0
        self._until_ms = 0
        self._ended = "never started"

    def message(self, stream: int, origin: Origin, raw: bytes, now_ms: int) -> None:
        """A message was read. Costs nothing while nothing is recorded."""
        if self._ended:
            return
        if self._bytes + len(raw) > self._max_bytes or self._waiting_bytes > BACKLOG_BYTES:
            self._ended = "size" if self._bytes + len(raw) > self._max_bytes else "the disk was too slow"
            return
        if stream not in self._introduced:
            self._introduced.add(stream)
            raw = write_identifier(origin, self._node_paths) + raw  # messages that follow each other are one
        packed = varint(len(raw)) + raw
        self._waiting.append(packed)
        self._waiting_bytes += len(packed)
        self._bytes += len(packed)
        self._streams.append(stream)
        self._received_ms.append(now_ms)

    def start(self, path: Path, max_bytes: int, seconds: int) -> None:
        """Begins a recording.

        Raises:
            UsageError: one is under way, a bound is out of range, or the file cannot be made.
        """
        if self._task is not None and not self._task.done():
            raise UsageError(f"a recording to {self._path} is under way", hint="wait for it or stop it")
        if not (0 < max_bytes <= MAX_BYTES and 0 < seconds <= MAX_SECONDS):
            raise UsageError("a recording is bounded by 4 GiB and an hour", hint="ask for less")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise UsageError(
                f"cannot record to {path}: {error.strerror}",
                hint="name a file that does not exist yet, in a directory the service may write to",
            ) from None
        self._path = path
        self._introduced = set()
        self._waiting, self._waiting_bytes = [], 0
        self._streams, self._received_ms, self._bytes = [], [], 0
        self._max_bytes = max_bytes
        self._until_ms = self._clock_ms() + seconds * 1_000
        self._ended = ""
        self._task = asyncio.create_task(self._write(os.fdopen(descriptor, "wb")), name="recording")

    def stop(self) -> None:
        """Ends the recording; what was taken is still written."""
        self._ended = self._ended or "stopped"

    def status(self) -> Mapping[str, object]:
        """How far it is, for the verb that waits for it."""
        running = self._task is not None and not self._task.done()
        return {
            "running": running,
            "path": str(self._path),
            "messages": len(self._streams),
            "bytes": self._bytes,
            "ended": "" if running else self._ended,
        }

    async def close(self) -> None:
        """Ends the recording and waits until it is written."""
        self.stop()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _write(self, file: IO[bytes]) -> None:
        try:
            while True:
                if not self._ended and self._clock_ms() >= self._until_ms:
                    self._ended = "time"
                ended = bool(self._ended)
                batch, self._waiting, self._waiting_bytes = self._waiting, [], 0
                await asyncio.to_thread(file.write, b"".join(batch))
                if ended and not self._waiting:
                    break
                await asyncio.sleep(WRITE_EVERY_S)
            await asyncio.to_thread(file.close)
            for name, numbers in (("streams", self._streams), ("received", self._received_ms)):
                beside = self._path.with_name(
                    f"{self._path.name.removesuffix(self._path.suffix)}.{name}.json"
                )
                await asyncio.to_thread(beside.write_text, json.dumps(numbers))
        except OSError as error:
            self._ended = f"{error.strerror}"
        finally:
            file.close()


def varint(number: int) -> bytes:
    """A number as protobuf writes lengths."""
    packed = bytearray()
    while number > 127:
        packed.append(number & 127 | 128)
        number >>= 7
    packed.append(number)
    return bytes(packed)
