"""Since when the oldest event of an output waits, also where a clock that was ahead says when it was made."""

from __future__ import annotations

AHEAD_MS = 60_000
"""An event minted so far ahead of the present is of another clock; less passes by itself."""


class Ages:
    """Times that are later than the present are replaced by when their event was first met.

    So the age of what is stuck grows, if from the start of the process on: said as it stands, a time ahead
    would make an output look well until the clock has caught up with it.
    """

    def __init__(self) -> None:
        self._now_ms: int | None = None
        self._met: dict[int, tuple[int, int]] = {}  # by output: the event, and when it was met

    def at(self, now_ms: int) -> None:
        """The clock was read."""
        self._now_ms = now_ms

    def since_ms(self, output: int, seq: int, minted_ms: int) -> int:
        """Since when the oldest event of an output waits: when it was minted, as far as that can be."""
        if self._now_ms is None or minted_ms <= self._now_ms + AHEAD_MS:
            self._met.pop(output, None)
            return minted_ms
        known, met_ms = self._met.get(output, (seq, self._now_ms))
        if known != seq or met_ms > self._now_ms:
            met_ms = self._now_ms
        self._met[output] = (seq, met_ms)
        return met_ms
