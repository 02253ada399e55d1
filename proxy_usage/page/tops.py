"""Who brought most lately: exact sums per tenant of this hour and the one before, bounded."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

from proxy_usage.model import Cell

HOUR_MS = 3_600_000
MOST_TENANTS = 20_000
"""Tenants told apart in an hour; the usage of further ones is one sum."""


class Top(NamedTuple):
    """The first of one meter, in base units, and what all others have together."""

    first: tuple[tuple[str, int], ...]
    rest: int
    tenants: int
    """How many tenants have any of it."""


class Tops:
    """Usage per tenant as windows close. A look costs little: what is asked for is kept added up.

    Args:
        meters: how many there are, in the order of the amounts.
    """

    def __init__(self, meters: int, most: int = MOST_TENANTS) -> None:
        self._most = most
        self._hour = -1
        self._known: set[str] = set()  # tenants told apart in this hour
        self._now = _Sums(meters)
        self._both = _Sums(meters)  # of this hour and the one before

    def add(self, cells: Iterable[Cell], now_ms: int) -> None:
        """Adds what windows held that were closed now."""
        self._turn(now_ms)
        for cell in cells:
            tenant: str | None = cell.key.tenant
            if tenant not in self._known:
                if len(self._known) < self._most:
                    self._known.add(cell.key.tenant)
                else:
                    tenant = None
            self._now.add(tenant, cell.amounts)
            self._both.add(tenant, cell.amounts)

    def _turn(self, now_ms: int) -> None:
        """Begins a new hour when it is time; a clock that was moved back stays in the hour it was in."""
        hour = now_ms // HOUR_MS
        if hour <= self._hour:
            return
        self._both = self._now if hour == self._hour + 1 else _Sums(len(self._now.named))
        self._both = self._both.copy()
        self._now = _Sums(len(self._now.named))
        self._known = set()
        self._hour = hour

    def since_ms(self, now_ms: int) -> int:
        """From when on usage is in the sums: the beginning of the hour before this one."""
        return (now_ms // HOUR_MS - 1) * HOUR_MS

    def top(self, meter: int, now_ms: int, count: int = 20) -> Top:
        """Who has most of a meter, by its position."""
        self._turn(now_ms)
        sums = self._both.named[meter]
        first = tuple(heapq.nlargest(count, sums.items(), key=itemgetter(1)))
        whole = sum(sums.values()) + self._both.beyond[meter]
        return Top(first, whole - sum(amount for _, amount in first), len(sums))


class _Sums:
    """Amounts by meter: of each tenant that has any, and of those past the bound together."""

    def __init__(self, meters: int) -> None:
        self.named: list[dict[str, int]] = [{} for _ in range(meters)]
        self.beyond = [0] * meters

    def add(self, tenant: str | None, amounts: Sequence[int]) -> None:
        """Adds one cell; None: of a tenant past the bound."""
        for index, amount in enumerate(amounts):
            if tenant is None:
                self.beyond[index] += amount
            elif amount:
                sums = self.named[index]
                sums[tenant] = sums.get(tenant, 0) + amount

    def copy(self) -> _Sums:
        """The same sums, to be added to apart."""
        other = _Sums(0)
        other.named = [dict(sums) for sums in self.named]
        other.beyond = list(self.beyond)
        return other
