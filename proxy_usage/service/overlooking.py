"""The operator's page of several workers: each is asked for its snapshot, and they are added up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from proxy_usage import __version__
from proxy_usage.config import Config
from proxy_usage.config.units import format_size
from proxy_usage.page.document import document
from proxy_usage.page.merging import whole
from proxy_usage.page.ring import Ring
from proxy_usage.page.snapshot import Snapshot, StoreFigures, WorkerFigures
from proxy_usage.service.children import Child
from proxy_usage.service.looking import FRESH_MS

STALE_MS = 10_000
"""Figures of a worker that are so old are of no use: it does not answer."""


class Overlook:
    """What the page knows of all workers. They are asked at most once a second, however many look.

    Args:
        config: that of the whole.
        config_file: its path, for commands that people copy.
        draining: whether all of it is being stopped.
    """

    def __init__(
        self,
        config: Config,
        config_file: Path,
        children: Sequence[Child],
        draining: Callable[[], bool],
        clock_ms: Callable[[], int],
    ) -> None:
        self._config, self._config_file = config, str(config_file.absolute())
        self._children = children
        self._draining = draining
        self._clock_ms = clock_ms
        self._started_ms = clock_ms()
        self._asking = asyncio.Lock()
        self._said: dict[int, Snapshot] = {}
        self._whole: Snapshot | None = None
        self._made: dict[bool, tuple[Snapshot, bytes]] = {}

    async def state(self, *, tenants: bool) -> bytes:
        """The document as JSON."""
        now = await self.snapshot()
        made_of, made = self._made.get(tenants, (None, b""))
        if made_of is not now:
            made = msgspec.json.encode(document(now, tenants=tenants))
            self._made[tenants] = (now, made)
        return made

    async def snapshot(self) -> Snapshot:
        """All workers added up; asked anew when the last answers are older than a second."""
        async with self._asking:
            if self._whole is None or not 0 <= self._clock_ms() - self._whole.now_ms < FRESH_MS:
                answers = await asyncio.gather(*(child.snapshot() for child in self._children))
                now_ms = self._clock_ms()
                pairs = zip(self._children, answers, strict=True)
                self._whole = whole(self._frame(now_ms), [self._worker(*pair, now_ms) for pair in pairs])
            return self._whole

    def _worker(self, child: Child, said: Snapshot | None, now_ms: int) -> WorkerFigures:
        number, silent = child.part.number, child.silent
        if said is not None:
            self._said[number], silent = said, ""
        last = self._said.get(number)
        if not silent and last is not None and now_ms - last.now_ms > STALE_MS:
            silent = f"its figures are {(now_ms - last.now_ms) // 1_000} s old"
        return WorkerFigures(number, last, silent, child.answered_ms)

    def _frame(self, now_ms: int) -> Snapshot:
        store = self._config.store
        reasons = {"draining": "the service is stopping"} if self._draining() else {}
        if not reasons and all(child.answered_ms is None for child in self._children):
            reasons = {"starting": "no worker has answered yet"}
        return Snapshot(
            now_ms=now_ms,
            started_ms=self._started_ms,
            version=__version__,
            host=socket.gethostname(),
            config_file=self._config_file,
            settings=(
                ("workers", str(len(self._children))),
                ("store", f"{store.path}, at most {format_size(store.max_bytes)} with those beside it"),
            ),
            reasons=reasons,
            store=StoreFigures(f"{store.path} and {len(self._children) - 1} beside it"),
            figures_ms=None,
            window_ms=self._config.windows.length,
            history=Ring().history(),
        )
