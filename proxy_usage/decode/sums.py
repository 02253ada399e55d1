"""Sums by origin, identity and window, as a fold holds them until it is drained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from proxy_usage.decode.identities import Fields, Whose
from proxy_usage.decode.rows import Handling, SkipTest
from proxy_usage.model import Origin, Quantity

SUMS = (
    Quantity.REQUESTS,
    Quantity.WIRE_IN,
    Quantity.WIRE_OUT,
    Quantity.BODY_IN,
    Quantity.BODY_OUT,
    Quantity.OPEN_NS,
    Quantity.UPGRADED_NS,
    Quantity.CONNECTION_NS,
)
"""What rows are read into; a further source of a meter is read where they are booked: in ``fold`` and, if
plain rows have it, in ``straight``."""

Cell = list[int]
"""Rows, then ``SUMS``."""
Texts = tuple[bytes, ...]
"""All that a row's identity follows from, as it is in the row, see ``Straight``."""


@dataclass(slots=True)
class Source:
    """What all rows of one origin have in common, worked out once, and their sums."""

    origin: Origin
    plain: Origin
    """Without the host, which tells connections apart and not whom usage belongs to."""
    http: Mapping[int, Handling]
    tcp: Mapping[int, Handling]
    skip: tuple[SkipTest, ...]
    fields: Fields
    """As read from opened rows."""
    straight: Fields
    """As read from the texts of a row."""
    ended: int = 0
    """End rows of HTTP streams, of any fate."""
    cells: dict[tuple[int, Whose], Cell] = field(default_factory=dict)
    """By the start of the window in ms and the identity."""
    seen: dict[int, dict[Texts, Cell]] = field(default_factory=dict)
    """The same sums, found without asking the rules again. No more than ``Straight`` allows."""

    def skipped(self, common: Any, request: Any, response: Any) -> str:
        """The reason of the first skip test that the row meets; ``""`` if it meets none."""
        for test in self.skip:
            if test.meets_row(common, request, response):
                return test.reason
        return ""


class Sums:
    """The sums of all origins, and how much that is. A drain begins them anew."""

    def __init__(self) -> None:
        self.sources: dict[Origin, Source] = {}
        self.seen = 0
        """Entries of all ``Source.seen``."""
        self.held = 0
        """Sums, and what else is held until the drain."""
        self.held_bytes = 0
        """Of their texts."""

    def cell(self, source: Source, window_ms: int, whose: Whose) -> Cell:
        """The sums of an identity in a window."""
        fresh: Cell = [0] * (1 + len(SUMS))
        cell = source.cells.setdefault((window_ms, whose), fresh)
        if cell is fresh:
            self.hold(whose[1], *whose[2])
        return cell

    def hold(self, *texts: bytes) -> None:
        """Counts something that has these texts."""
        self.held += 1
        self.held_bytes += len(b"".join(texts))
