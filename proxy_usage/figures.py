"""What an audit reads on both sides, an Envoy's and the sinks', and the figures that come of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec


class Sent(msgspec.Struct, frozen=True):
    """An Envoy's counters, since it started."""

    sent: int = 0
    """What arrivals are compared with: rows of both kinds that were flushed; or requests that ended."""
    written: int = 0
    """HTTP rows that were taken into its buffers."""
    dropped: int = 0
    """HTTP rows for which there was no room."""
    failed: int = 0
    """Rows times attempts to flush them that failed: while it grows, rows wait."""
    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    uptime_s: int = 0
    connections: int = 0
    """Of clients, open now."""
    draining: bool = False
    """Whether it is about to end."""


class Got(msgspec.Struct, frozen=True):
    """What one sink received of one node, over the life of its store."""

    rows: int = 0
    """What is compared with ``Sent.sent``."""
    http: int = 0
    """HTTP rows among them."""
    crash_lost: int = 0
    """Rows that it read and lost when it was killed."""
    crash_lost_http: int = 0
    doubts: int = 0
    """How often it could not say what a crash, or the loss of its store, cost."""
    born_ms: int = 0
    """When its store was made."""
    adopted: dict[str, int] = msgspec.field(default_factory=dict)
    """Sinks whose stores it took over, and when those were made: its counts hold theirs."""


class Sight(NamedTuple):
    """One reading of both sides: first the sinks, then the Envoy."""

    at_ms: int
    sent: Sent | None
    """None: the Envoy does not answer."""
    got: Mapping[str, Got]
    """By sink."""
    away: int = 0
    """Members that do not answer."""


class Figures(msgspec.Struct):
    """What is known of one node and a stretch of time. Sums of them are figures of longer stretches."""

    from_ms: int = 0
    to_ms: int = 0
    written: int = 0
    dropped: int = 0
    flushed: int = 0
    received: int = 0
    missing: int = 0
    """Flushed and received by nobody. Below 0 where rows came that an earlier stretch had given up."""
    missing_http: int = 0
    missing_tcp: int = 0
    """TCP rows are in ``flushed`` and not in ``written``: so they can be told apart when nothing moves."""
    crash_lost: int = 0
    """Received, and lost by a sink that was killed."""
    unknown: int = 0
    """Intervals of which it is not known what is missing: ``missing`` is without them."""
    at_least: int = 0
    """What is missing in those at least. There is no upper bound."""
    requests: int = 0
    """Estimate of the usage that was not billed, from Envoy's own counters over the same intervals."""
    bytes_in: int = 0
    bytes_out: int = 0

    def add(self, other: Figures) -> None:
        """Adds another stretch."""
        for name in self.__struct_fields__[2:]:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.from_ms = min(self.from_ms or other.from_ms, other.from_ms or self.from_ms)
        self.to_ms = max(self.to_ms, other.to_ms)
