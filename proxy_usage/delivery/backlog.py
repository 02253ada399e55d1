"""Where a courier's batches come from and where their fates go: the store's queue, or a JetStream stream.

The store's queue says what each call means (``store.queue``); a stream keeps the same promises by other means
(``delivery.stream``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from proxy_usage.store import Batch, Fate, Idle, Queue
from proxy_usage.store.thread import StoreThread


class Backlog(Protocol):
    """Events of one output that wait for it. Every call may raise StoreError."""

    async def lease(
        self,
        output: int,
        now_ms: int,
        *,
        events: int,
        max_bytes: int,
        linger_ms: int,
        again: bool,
        fresh: bool,
        busy: frozenset[int],
        apart: frozenset[str],
        late_ms: int | None,
        longest_ms: int | None,
    ) -> Batch | Idle:
        """The next batch, marked as attempted before the caller can send a byte of it."""

    async def postpone(
        self, batch: int, not_before_ms: int, answer: str, *, unanswered: bool, clean: bool
    ) -> None:
        """What is left of the batch goes again, not before then."""

    async def settle(
        self,
        batch: Batch,
        fates: Mapping[int, Fate],
        now_ms: int,
        *,
        rest: Iterable[Sequence[int]] = (),
        confirm: bool = False,
        clean: bool = False,
    ) -> Sequence[int]:
        """Ends events by their ``seq``; ``rest`` go on as batches of their own, whose ids are returned."""

    async def pause(self, output: int, reason: str | None, detail: str, now_ms: int) -> None:
        """Notes for people that the output is paused, or no longer."""


class StoredBacklog:
    """The store's queue, on the store's thread."""

    def __init__(self, queue: Queue, thread: StoreThread) -> None:
        self._queue = queue
        self._thread = thread

    async def lease(
        self,
        output: int,
        now_ms: int,
        *,
        events: int,
        max_bytes: int,
        linger_ms: int,
        again: bool,
        fresh: bool,
        busy: frozenset[int],
        apart: frozenset[str],
        late_ms: int | None,
        longest_ms: int | None,
    ) -> Batch | Idle:
        """As ``Queue.lease``."""
        return await self._thread.run(
            self._queue.lease,
            output,
            now_ms,
            events=events,
            max_bytes=max_bytes,
            linger_ms=linger_ms,
            again=again,
            fresh=fresh,
            busy=busy,
            apart=apart,
            late_ms=late_ms,
            longest_ms=longest_ms,
        )

    async def postpone(
        self, batch: int, not_before_ms: int, answer: str, *, unanswered: bool, clean: bool
    ) -> None:
        """As ``Queue.postpone``."""
        await self._thread.run(
            self._queue.postpone, batch, not_before_ms, answer, unanswered=unanswered, clean=clean
        )

    async def settle(
        self,
        batch: Batch,
        fates: Mapping[int, Fate],
        now_ms: int,
        *,
        rest: Iterable[Sequence[int]] = (),
        confirm: bool = False,
        clean: bool = False,
    ) -> Sequence[int]:
        """As ``Queue.settle``."""
        return await self._thread.run(
            self._queue.settle, batch, fates, now_ms, rest=rest, confirm=confirm, clean=clean
        )

    async def pause(self, output: int, reason: str | None, detail: str, now_ms: int) -> None:
        """As ``Queue.pause``."""
        await self._thread.run(self._queue.pause, output, reason, detail, now_ms)
