"""Usage that has no tenant, added up until a turn takes it: by hour, reason and what the identity says.

Bounded like everything else: past ``limit`` identities the usage of further ones goes to one that stands for
all of them, so that sums stay exact while who they were is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from proxy_usage.attribution import Attributor, Reason
from proxy_usage.model import Identity, Origin
from proxy_usage.quota import overflow, trimmed
from proxy_usage.reattribution import Fact, facts
from proxy_usage.turn import Held

HOUR_MS = 3_600_000
OVERFLOW = Identity(Origin("", "", ""), -1, b"", (), routed=False)
"""Stands for the identities of unattributed usage past their bound."""

HeldKey = tuple[int, str, Identity, tuple[Fact, ...]]
"""Hour, reason, identity, and what it says."""
Sums = Mapping[HeldKey, Sequence[int]]
"""Rows, then base units per meter."""


class Holding:
    """What no committed turn holds yet of unattributed usage.

    Args:
        limit: see the attribute.
        meters: how many amounts there are.
    """

    def __init__(self, limit: int, meters: int) -> None:
        self.limit = limit
        """Bound on identities between two turns."""
        self._meters = meters
        self._known: dict[Identity, tuple[Fact, ...]] = {}  # of identities held, by the present rules
        self._sums: dict[HeldKey, list[int]] = {}

    def hold(
        self,
        attributor: Attributor,
        window_ms: int,
        reason: str,
        identity: Identity,
        rows: int,
        amounts: Sequence[int],
    ) -> bool:
        """Holds rows and their amounts. False where only a part of the identity can be kept."""
        whole = identity
        identity = overflow(identity) if reason == Reason.IDENTITY_LIMIT else trimmed(identity)
        known = self._known.get(identity)
        if known is None:
            if len(self._known) >= self.limit:
                self._known.clear()
            known = self._known[identity] = facts(attributor, identity)
        self._add((window_ms - window_ms % HOUR_MS, reason, identity, known), rows, amounts)
        return identity == whole or reason == Reason.IDENTITY_LIMIT

    def forget_rules(self) -> None:
        """What identities say is asked anew: the rules are others."""
        self._known.clear()

    def take(self) -> Sums:
        """All of it, for a turn."""
        taken, self._sums = self._sums, {}
        return taken

    def give_back(self, turn: Iterable[Held]) -> None:
        """The turn was refused."""
        for held in turn:
            self._add((held.hour_ms, held.reason, held.identity, held.facts), held.rows, held.amounts)

    def _add(self, key: HeldKey, rows: int, amounts: Sequence[int]) -> None:
        if key not in self._sums and len(self._sums) >= self.limit:
            key = (key[0], key[1], OVERFLOW, ())
        have = self._sums.setdefault(key, [0] * (self._meters + 1))
        for index, amount in enumerate((rows, *amounts)):
            have[index] += amount


def packed(sums: Sums) -> Iterator[Held]:
    """As a turn carries it."""
    for (hour_ms, reason, identity, known), (rows, *amounts) in sums.items():
        yield Held(hour_ms, reason, identity, rows, tuple(amounts), known)
