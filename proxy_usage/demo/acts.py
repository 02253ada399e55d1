"""A minute of trouble, in acts: the endpoint fails and heals, the sink is killed and comes back.

Each act begins at its part of the performance, after the wave of traffic that is under way then.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Act(NamedTuple):
    """Something that happens while traffic flows."""

    at_per_mille: int
    """Of the whole time."""
    says: str
    does: Callable[[], Coroutine[Any, Any, None]]
    """Done before the next wave is sent."""
    then: Callable[[], Coroutine[Any, Any, None]] | None = None
    """Goes on while it is sent."""


@dataclass(slots=True)
class Acts:
    """What is still to come, in its order."""

    duration_ms: int
    coming: Sequence[Act] = ()
    _next: int = field(default=0, init=False)

    @property
    def over(self) -> bool:
        """Whether all of them have begun."""
        return self._next == len(self.coming)

    def due(self, elapsed_ms: int) -> Act | None:
        """The next act, once it is its turn; one at a time."""
        if self.over:
            return None
        act = self.coming[self._next]
        if elapsed_ms * 1_000 < act.at_per_mille * self.duration_ms:
            return None
        self._next += 1
        return act
