"""What one turn of the pipeline moves into the store, in one transaction, and what a start reads back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from proxy_usage.connections import ConnectionTurn, SavedConnections
from proxy_usage.intake import Source
from proxy_usage.model import Amounts, Cell, Identity, Meter
from proxy_usage.origins import RowOrigin
from proxy_usage.reattribution import Fact
from proxy_usage.streams import SavedStreams, StreamTurn
from proxy_usage.windows import WindowTurn


class Held(NamedTuple):
    """Unattributed usage of one identity in one UTC hour, since the last turn."""

    hour_ms: int
    reason: str
    identity: Identity
    rows: int
    amounts: Amounts
    facts: tuple[Fact, ...] = ()
    """What the identity says, by field, so that it can be attributed by later rules."""


@dataclass(frozen=True, slots=True)
class Turn:
    """All that changed since the last turn. Differences, except where marked absolute."""

    windows: WindowTurn
    counted: Amounts
    """Base units that counted rows added, per meter, attributed or not."""
    number: int = 0
    """Rises by one over the life of the store: tells whether a turn whose commit broke off took effect."""
    fates: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Rows by ``(fate, reason)``."""
    held: tuple[Held, ...] = ()
    intake: Mapping[Source, int] = field(default_factory=dict)
    """Rows read, absolute over the life of the store."""
    ended: Mapping[str, int] = field(default_factory=dict)
    """End rows of HTTP streams per node, of any fate."""
    streams: StreamTurn | None = None
    """None where Envoy sends no periodic rows."""
    connections: ConnectionTurn | None = None
    """None where listener rows are not metered."""
    origins: tuple[RowOrigin, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing worth a transaction."""
        moved = self.windows.closing or self.windows.changed or self.fates or self.held or self.origins
        parts = (self.streams, self.connections)
        return not moved and all(part is None or part.is_empty for part in parts)


@dataclass(slots=True)
class Pending:
    """What no committed turn holds yet."""

    counted: list[int]
    """Base units per meter."""
    fates: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows by ``(fate, reason)``."""
    ended: Counter[str] = field(default_factory=Counter)
    """End rows of HTTP streams per node, of any fate."""


@dataclass(slots=True)
class Observed:
    """What happened since the last look, for metrics and the log. Differences."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows by ``(fate, reason)``."""
    notes: Counter[str] = field(default_factory=Counter)
    unattributed: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


class Layout(msgspec.Struct, frozen=True):
    """The meaning of the positions in amounts and dimensions, and of a window's start, stored with them.

    When the configuration's layout differs from the stored one, what was open under the old layout is
    closed under it before anything new is added.
    """

    meters: tuple[tuple[str, str, str, str, int], ...]
    """``(name, type, unit, quantity, divisor)``."""
    dimensions: tuple[str, ...]
    window_ms: int = 60_000
    """Length of a window: an event's time is the last moment of its window, which may end another month."""

    @classmethod
    def of(cls, meters: tuple[Meter, ...], dimensions: tuple[str, ...], window_ms: int = 60_000) -> Layout:
        """The layout that a configuration makes."""
        named = tuple((m.name, m.type, m.unit, m.quantity.value, m.divisor) for m in meters)
        return cls(named, dimensions, window_ms)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a former process left in the store."""

    turn: int
    """Number of the last turn that took effect; 0 in a new store."""
    layout: Layout | None
    cells: tuple[tuple[Cell, int], ...]
    """Open cells with their due time in milliseconds."""
    intake: Mapping[Source, int]
    streams: SavedStreams
    connections: SavedConnections
    ended: Mapping[str, int] = field(default_factory=dict)
    """End rows of HTTP streams per node, over the life of the store."""


class OutputSlot(NamedTuple):
    """A configured output as the store knows it."""

    output: int
    name: str
    keeps_only: bool = False
    """``format: none``: events go to the ledger and nowhere else."""
    from_ms: int | None = None
    until_ms: int | None = None

    def fate(self, window_ms: int) -> str:
        """What becomes of a new event: ``pending``, or the reason why this output never sends it."""
        if self.from_ms is not None and window_ms < self.from_ms:
            return "before_start"
        if self.until_ms is not None and window_ms >= self.until_ms:
            return "after_end"
        return "recorded" if self.keeps_only else "pending"
