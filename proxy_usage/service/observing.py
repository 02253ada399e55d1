"""What happened to rows, for people: metrics, a few lines of log, and what `status` should say about it."""

from __future__ import annotations

from collections import Counter

import structlog

from proxy_usage.metrics import Metrics
from proxy_usage.pipeline import Pipeline
from proxy_usage.turn import Observed

log = structlog.get_logger()

MINUTE_MS = 60_000
LINES = 20
"""Lines about single entries in a minute; the rest is counted."""
REMARKS = {
    "no_duration": "entries without a duration: is the dur_ms tag set? Without it the time of open streams is"
    " counted when they end",
    "no_emit_time": "entries of open streams without the emit_us tag: their time is counted when they end",
    "no_start_time": "entries without a start time: they are counted in the present window",
    "future": "entries from the future: a clock is wrong; they are counted in the present window",
    "past_horizon": "entries older than windows.late_horizon: they are counted in the present window",
}


ALARMS = {
    "unknown_type": "a newer Envoy than this program knows; /metrics counts them as unknown_type",
    "misrouted": "rows of long streams came to listen.grpc: split Envoy's loggers as deploy/envoy does",
    "periodic": "rows of open streams come here, but envoy.flush_interval is off: set it, or split Envoy's"
    " loggers as deploy/envoy does",
    "early_periodic": "Envoy flushes more often than envoy.flush_interval says: make it the same as Envoy's"
    " access_log_flush_interval, also that of the TCP proxy",
}
"""Skipped rows that somebody must hear of, by reason: one line a minute, with what to do."""


class Observer:
    """Takes over what the pipeline observed since the last turn."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._noted: Counter[str] = Counter()
        self._minute = 0
        self._lines = 0
        self._unsaid = 0
        self._alarms: Counter[str] = Counter()

    def remarks(self) -> dict[str, str]:
        """What is odd about the entries of this process's life, by kind, in words."""
        return {
            kind: f"{rows} {REMARKS[kind]}" for kind, rows in sorted(self._noted.items()) if kind in REMARKS
        }

    def look(self, pipeline: Pipeline, now_ms: int) -> None:
        """Brings it all up to date. Call it once a turn."""
        observed = pipeline.observe()
        self._count(observed)
        self._count_parts(pipeline)
        for reason in ALARMS:
            self._alarms[reason] += observed.rows.get(("skipped", reason), 0)
        if now_ms // MINUTE_MS != self._minute:
            self._minute = now_ms // MINUTE_MS
            self._say_what_was_not()
        for complaint in observed.complaints:
            if self._lines < LINES:
                self._lines += 1
                log.warning("entry not understood", complaint=complaint)
            else:
                self._unsaid += 1

    def _say_what_was_not(self) -> None:
        """Once a minute: what is not worth a line each."""
        if self._unsaid:
            log.warning("more entries were not understood", entries=self._unsaid)
        for reason, hint in ALARMS.items():
            if self._alarms[reason]:
                log.warning("entries were skipped", reason=reason, entries=self._alarms[reason], hint=hint)
        self._alarms.clear()
        self._lines = self._unsaid = 0

    def _count(self, observed: Observed) -> None:
        metrics = self._metrics
        for (fate, reason), rows in observed.rows.items():
            metrics.read.inc(rows)
            if fate == "counted":
                metrics.counted.inc(rows)
            elif fate == "skipped":
                metrics.skipped.labels(reason=reason).inc(rows)
            else:
                metrics.invalid.labels(reason=reason).inc(rows)
        for kind, rows in observed.notes.items():
            if kind == "malformed_message":  # how many rows it held nobody knows: they are in no other count
                metrics.bad_messages.inc(rows)
            else:
                metrics.noted.labels(kind=kind).inc(rows)
        self._noted.update(observed.notes)
        for reason, rows in observed.unattributed.items():
            metrics.unattributed.labels(reason=reason).inc(rows)

    def _count_parts(self, pipeline: Pipeline) -> None:
        metrics = self._metrics
        streams = pipeline.streams
        if streams is not None:
            metrics.long_streams.set(len(streams))
            metrics.streams_estimated.inc(streams.estimated)
            metrics.streams_at_limit.inc(streams.at_limit)
            streams.estimated = streams.at_limit = 0
        windows = pipeline.windows
        metrics.late.inc(windows.late_rows)
        metrics.overflow.inc(windows.overflow_rows)
        windows.late_rows = windows.overflow_rows = 0
