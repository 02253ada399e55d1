"""What arrived at the billing stand-in: every event once by its id, and exact sums."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from proxy_usage.demo.checks import DIMENSIONS, METERS, billed, findings

MAX_VIOLATIONS = 1000


@dataclass(frozen=True, slots=True)
class Stored:
    """One event as first received."""

    tenant: str
    type: str
    value: int
    """What the consumer would book; 0 for a value that it quarantines."""
    time: str
    first_ms: int
    """When it was stored, milliseconds since the epoch."""
    raw: bytes
    """The event's bytes as they stood in the request."""

    @property
    def event(self) -> dict[str, Any]:
        decoded: dict[str, Any] = msgspec.json.decode(self.raw)
        return decoded


class Violation(NamedTuple):
    """Something the endpoint accepts and a strict reader does not."""

    id: str
    what: str
    detail: str


class Arrived:
    """The stand-in's log. Sums live on when, past ``max_events``, the oldest events are forgotten."""

    def __init__(
        self,
        *,
        types: Collection[str] = METERS,
        dimensions: Collection[str] = DIMENSIONS,
        dedup_window_ms: int = 600_000,
        max_events: int = 1_000_000,
    ) -> None:
        self.types = types
        self.dimensions = dimensions
        self.dedup_window_ms = dedup_window_ms
        self.max_events = max_events
        self.stored: dict[str, Stored] = {}
        self.violations: list[Violation] = []
        """The first ``MAX_VIOLATIONS``; ``violations_total`` counts on."""
        self.violations_total = 0
        self.duplicates = 0
        self.forgotten = 0
        self._sums: dict[tuple[str, str, tuple[tuple[str, str], ...]], int] = {}

    def add(self, raw: bytes, event: Mapping[str, Any], now_ms: int) -> bool:
        """Stores an accepted event. False when its id was known already (a duplicate: nothing is summed)."""
        known = self.stored.get(event["id"])
        if known is not None:
            self.duplicates += 1
            self._compare(known, raw, event, now_ms)
            return False
        for what, detail in findings(dict(event), self.types, self.dimensions):
            self._violation(event["id"], what, detail)
        tenant = event["subject"].removeprefix("projects/")
        entry = Stored(tenant, event["type"], billed(dict(event)), str(event.get("time", "")), now_ms, raw)
        sent = event["data"].get("dimensions")
        pairs = (
            tuple(sorted((name, str(text)) for name, text in sent.items())) if isinstance(sent, dict) else ()
        )
        key = (tenant, entry.type, pairs)
        self._sums[key] = self._sums.get(key, 0) + entry.value
        self.stored[event["id"]] = entry
        if len(self.stored) > self.max_events:
            del self.stored[next(iter(self.stored))]
            self.forgotten += 1
        return True

    def _compare(self, known: Stored, raw: bytes, event: Mapping[str, Any], now_ms: int) -> None:
        if str(event.get("time", "")) != known.time:
            self._violation(event["id"], "time changed", f"{known.time!r}, then {event.get('time')!r}")
        if raw != known.raw:
            self._violation(event["id"], "bytes changed", "the same id was sent with other bytes")
        if now_ms - known.first_ms > self.dedup_window_ms:
            # The log has forgotten the id by now, so the real endpoint would bill it again.
            self._violation(
                event["id"], "resent too late", f"{now_ms - known.first_ms} ms after it was stored"
            )

    def _violation(self, id_: str, what: str, detail: str) -> None:
        self.violations_total += 1
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(Violation(id_, what, detail))

    def sums(self) -> dict[tuple[str, str], int]:
        """(tenant, event type) → sum of values, each id once."""
        sums: dict[tuple[str, str], int] = {}
        for (tenant, type_, _), value in self._sums.items():
            sums[tenant, type_] = sums.get((tenant, type_), 0) + value
        return sums

    def by_dimensions(self) -> dict[tuple[str, str, tuple[tuple[str, str], ...]], int]:
        """(tenant, event type, sorted (dimension, value) pairs) → sum of values."""
        return dict(self._sums)

    def by_route(self) -> dict[tuple[str, str, str], int]:
        """(tenant, ``httproute_name``, event type) → sum of values."""
        sums: dict[tuple[str, str, str], int] = {}
        for (tenant, type_, pairs), value in self._sums.items():
            key = (tenant, dict(pairs).get("httproute_name", ""), type_)
            sums[key] = sums.get(key, 0) + value
        return sums
