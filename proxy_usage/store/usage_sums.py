"""What lines of usage add up to: per output and meter by fate, per group, and by where the rows came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from proxy_usage.store.usage import RowSource, UsageHour, UsageLine
from proxy_usage.store.views import Tally

DELIVERED = ("delivered", "delivered_ambiguous")
WAITING = ("pending", "attempted")
MAX_SOURCES = 1_000
"""Sources that are told apart; rows of further ones are of one without a name."""


@dataclass(frozen=True, slots=True)
class UsageSum:
    """One meter at one output, of one group or of all."""

    output: str
    meter: str
    group: Mapping[str, str | int]
    """``hour_ms``, or the dimensions that name a route; empty: of all."""
    fates: Mapping[str, Tally]

    @property
    def used(self) -> int:
        """All values but those that are another event's, too."""
        return sum(sum_.value for fate, sum_ in self.fates.items() if fate not in ("redated", "elsewhere"))

    @property
    def delivered(self) -> int:
        """What the output accepted."""
        return self.of(*DELIVERED)

    def of(self, *fates: str) -> int:
        """The value of some fates."""
        return sum(self.fates[fate].value for fate in fates if fate in self.fates)


class UsageSums:
    """Adds lines up.

    Args:
        by: what makes a group: ``hour``, or ``route``, which is what the dimensions ``route`` say.
    """

    def __init__(self, by: str | None = None, route: Sequence[str] = ()) -> None:
        self._by = by
        self._route = tuple(route)
        self._sums: dict[tuple[tuple[tuple[str, str | int], ...], str, str], dict[str, Tally]] = {}
        self._rows: Counter[tuple[str, str]] = Counter()

    def add(self, hour: UsageHour) -> None:
        """Adds some keys of an hour."""
        for line in hour.lines:
            fates = self._sums.setdefault((self._group(line, hour.hour_ms), line.meter, line.output), {})
            have = fates.get(line.fate, Tally(0, 0))
            fates[line.fate] = Tally(have.events + line.events, have.value + line.value)
        for one in hour.sources:
            known = (one.node, one.rule) in self._rows or len(self._rows) < MAX_SOURCES
            self._rows[(one.node, one.rule) if known else ("", "")] += one.rows

    def _group(self, line: UsageLine, hour_ms: int) -> tuple[tuple[str, str | int], ...]:
        if self._by == "hour":
            return (("hour_ms", hour_ms),)
        if self._by == "route":
            return tuple((name, line.dimensions.get(name, "")) for name in self._route)
        return ()

    def sums(self) -> tuple[UsageSum, ...]:
        """By group, meter and output."""
        return tuple(
            UsageSum(output, meter, dict(group), fates)
            for (group, meter, output), fates in sorted(self._sums.items())
        )

    def sources(self) -> tuple[RowSource, ...]:
        """Where the rows came from, most first: of the whole hours that the lines are of."""
        return tuple(RowSource(node, rule, rows) for (node, rule), rows in self._rows.most_common())
