"""The sender of ``format: file``: an archive on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from proxy_usage.config.outputs import FileConfig
from proxy_usage.delivery.archive import Archive
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust
from proxy_usage.outputs.base import Verdict
from proxy_usage.store import Queued
from proxy_usage.store.thread import StoreThread

BEAT_S = 10.0
"""A file whose time has passed is finished so soon, or within a tenth of ``rotate_every``."""


class FileSender:
    """One batch after the other, written and synced.

    Args:
        clock_ms: the wall clock, in milliseconds since the epoch.
    """

    def __init__(self, config: FileConfig, clock_ms: Callable[[], int]) -> None:
        self._archive = Archive(config)
        self._beat_s = min(BEAT_S, config.rotate_every / 10_000)
        self._clock_ms = clock_ms
        self._thread: StoreThread | None = None
        self._rotating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._thread = StoreThread()
        self._rotating = asyncio.create_task(self._rotate(self._thread), name="archive")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        assert self._rotating is not None
        self._rotating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._rotating
        await self._thread.run(self._archive.close)
        self._thread.close()

    async def send(self, events: Sequence[Queued]) -> Verdict:
        """Writes the batch; what it says is delivered is on the disk."""
        assert self._thread is not None
        return await self._thread.run(self._archive.append, events, self._clock_ms())

    def trust(self, token: TokenFile | None, trust: Trust) -> None:
        """A file asks for no credentials."""

    async def _rotate(self, thread: StoreThread) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            await thread.run(self._archive.rotate, self._clock_ms())
