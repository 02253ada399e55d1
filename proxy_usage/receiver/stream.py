"""An open stream: who sends it, and when it may be ended without losing what is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy_usage.admission import Refusal
from proxy_usage.model import Origin
from proxy_usage.receiver.arrivals import Connection

QUIET_MS, MAX_QUIET_MS = 250, 4_500
"""A stream that is to end and says nothing for so long is ended; for longer where messages come less often.

Envoy flushes at intervals. What it sends while the end of the stream is on its way is lost, so the end must
not come when the next message is due: ended so, 4 of 32 stops lost a flush of some hundred rows each.
"""
USUAL_GAP_MS = 1_000
"""Envoy's buffer_flush_interval where nobody sets it."""


@dataclass(slots=True, eq=False)
class Stream:
    """An open stream: who sends it, and how it is to end."""

    task: asyncio.Task[Any]
    connection: Connection
    auth: Mapping[str, tuple[bytes, ...]]
    metadata: Mapping[str, str]
    read_ms: int
    """When it was last read."""
    gap_ms: int = USUAL_GAP_MS
    """Between its last two messages."""
    messages: int = 0
    asks: bool = False
    """Whether it is a health check."""
    peer: str = ""
    origin: Origin | None = None
    ending_ms: int | None = None
    """Since when it is to be ended, with OK, after its next message or when it is quiet."""
    refusal: Refusal | None = None
    """Why it was ended otherwise."""

    def end_soon(self, now_ms: int) -> None:
        """It is to be ended; when is its own affair."""
        if self.ending_ms is None:
            self.ending_ms = now_ms

    def is_quiet(self, now_ms: int) -> bool:
        """Whether it is to be ended and nothing seems to be on its way."""
        patience_ms = min(max(QUIET_MS, self.gap_ms * 3 // 2), MAX_QUIET_MS)
        return (
            self.ending_ms is not None
            and now_ms - self.ending_ms >= QUIET_MS
            and now_ms - self.read_ms >= patience_ms
        )
