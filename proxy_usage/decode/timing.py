"""When a row's stream began, how long it was open, which moment the row belongs to, and if it is finished."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from proxy_usage.decode.rows import EnvoySettings
from proxy_usage.decode.values import lookup
from proxy_usage.model import MAX_DURATION_NS, NS_PER_MS, NS_PER_SECOND, FoldPlan

MAX_START_SECONDS = (1 << 63) // NS_PER_SECOND - 1
"""The year 2262: whoever stores a time in nanoseconds has 64 bits for it."""
_MAX_TAG_DIGITS = 18


class Invalid(Exception):
    """Ends a row that cannot be counted; its only argument is the reason."""


Span = tuple[int, int, int, bool]
"""What time says about a row: when its stream began in ns (0 where Envoy did not say), how long it was or has
been open in ns, the moment in ms whose window the row is booked in, and whether the stream is *finished*."""


class Timing:
    """Reads spans. ``present`` must be called before the rows of a message.

    A row that ends is *finished* if it lasted less than 0.9 times Envoy's flush interval: no periodic row
    comes that early (measured, with Envoy's own filters splitting rows by the same rule), so its numbers are
    all there ever was. A longer one, or one that does not say exactly how long, may only be booked by who
    knows what was booked before.
    """

    def __init__(self, plan: FoldPlan, envoy: EnvoySettings) -> None:
        self._skew_ms = plan.max_skew_ms
        self._horizon_ms = plan.late_horizon_ms
        self._duration_tag = lookup(envoy.duration_ms.encode())
        self._emit_tag = lookup(envoy.emit_us.encode())
        interval_ms = envoy.flush_interval_ms
        self._finished_below_ns = finished_below_ns(envoy)
        # Where only short rows go, Envoy's own filter vouches for one that does not say how long it took.
        self._exact_matters = interval_ms is not None and not envoy.short_only
        self.notes: defaultdict[str, int] = defaultdict(int)
        self.present(0)

    def present(self, now_ms: int) -> None:
        """Sets what is now, in milliseconds, and with it what is credible."""
        self._now_ns = now_ms * NS_PER_MS
        self._latest_ns = (now_ms + self._skew_ms) * NS_PER_MS
        self._earliest_ns = (now_ms - self._horizon_ms) * NS_PER_MS

    @property
    def credible(self) -> tuple[int, int]:
        """The earliest and the latest moment in ns that a row of the present message may be of."""
        return self._earliest_ns, self._latest_ns

    def of_end(self, common: Any) -> Span:
        """The span of a row that ends its stream. Raises ``Invalid``."""
        start_ns = self._start_ns(common)
        duration = common.duration
        open_ns = _span_ns(duration)
        exact = open_ns > 0 or common.HasField("duration")
        if not exact:
            # When some last byte passed, counted from the start: the stream was open at least so long.
            open_ns = max(
                _span_ns(common.time_to_last_rx_byte),
                _span_ns(common.time_to_last_upstream_tx_byte),
                _span_ns(common.time_to_last_upstream_rx_byte),
                _span_ns(common.time_to_last_downstream_tx_byte),
            )
            if not open_ns:
                self.notes["no_duration"] += 1
        finished = open_ns < self._finished_below_ns and (exact or not self._exact_matters)
        at_ns = start_ns + open_ns if start_ns else self._now_ns
        return start_ns, open_ns, self._credible(at_ns) // NS_PER_MS, finished

    def of_periodic(self, common: Any) -> Span:
        """The span of a row written while its stream is open. Raises ``Invalid``."""
        start_ns = self._start_ns(common)
        open_ms = _integer(self._duration_tag(common.custom_tags))
        emit_us = _integer(self._emit_tag(common.custom_tags))
        open_ns = (open_ms or 0) * NS_PER_MS
        if open_ns > MAX_DURATION_NS:
            raise Invalid("duration")
        if open_ms is None or emit_us is None:
            self.notes["no_duration" if open_ms is None else "no_emit_time"] += 1
            open_ns = 0  # its bytes alone are booked; the time is when the stream ends
        at_ns = self._now_ns if emit_us is None else self._credible(emit_us * 1_000)
        return start_ns, open_ns, at_ns // NS_PER_MS, False

    def is_early(self, open_ns: int) -> bool:
        """Whether a periodic row comes sooner than the flush interval allows.

        Then Envoy flushes more often than we were told, and the end rows of streams shorter than the told
        interval book all of it: a difference booked now would be booked twice.
        """
        return 0 < open_ns < self._finished_below_ns

    def _start_ns(self, common: Any) -> int:
        start = common.start_time
        seconds, nanos = start.seconds, start.nanos
        if not (0 <= seconds <= MAX_START_SECONDS and 0 <= nanos < NS_PER_SECOND):
            raise Invalid("start_time")
        start_ns: int = seconds * NS_PER_SECOND + nanos
        if not start_ns:
            self.notes["no_start_time"] += 1
        return start_ns

    def _credible(self, at_ns: int) -> int:
        if at_ns > self._latest_ns:
            self.notes["future"] += 1
        elif at_ns < self._earliest_ns:
            self.notes["past_horizon"] += 1
        else:
            return at_ns
        return self._now_ns


def finished_below_ns(envoy: EnvoySettings) -> int:
    """A stream that was open for less, and has ended, never had a periodic row."""
    interval_ms = envoy.flush_interval_ms
    return MAX_DURATION_NS + 1 if interval_ms is None else interval_ms * 9 * NS_PER_MS // 10


def _span_ns(duration: Any) -> int:
    seconds, nanos = duration.seconds, duration.nanos
    span_ns: int = seconds * NS_PER_SECOND + nanos
    if not (0 <= nanos < NS_PER_SECOND and 0 <= span_ns <= MAX_DURATION_NS):
        raise Invalid("duration")
    return span_ns


def _integer(text: bytes) -> int | None:
    """The number in a tag; None if it holds anything but a few digits (Envoy writes ``-`` for no value)."""
    return int(text) if text.isdigit() and len(text) <= _MAX_TAG_DIGITS else None
