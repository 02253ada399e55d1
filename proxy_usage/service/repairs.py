"""What people decide about usage that is stuck, carried out on a store in small transactions.

A running service steps through a repair between its other calls into the store; without one, a verb of the
command line that holds the store's lock does the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from proxy_usage.attribution import Attributor
from proxy_usage.config import Config
from proxy_usage.errors import UsageError
from proxy_usage.events import Mint
from proxy_usage.reattribution import attribute_again
from proxy_usage.store import Checkpoints, Database, Letters, Wanted, WantedHeld
from proxy_usage.store.letters import Slice

IDS_AT_ONCE = 500

Steps = Iterator[Mapping[str, int]]
"""Each step is a transaction that is done; what it says adds up."""


class Repairs:
    """The repairs of one store.

    Args:
        attributor: gives the present tenant rules.
        clock_ms: the wall clock, in milliseconds since the epoch.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        checkpoints: Checkpoints,
        mint: Mint,
        attributor: Callable[[], Attributor],
        clock_ms: Callable[[], int],
    ) -> None:
        self._letters = Letters(database)
        self._checkpoints = checkpoints
        self._mint = mint
        self._attributor = attributor
        self._clock_ms = clock_ms
        self._configured = frozenset(output.name for output in config.outputs)
        self._together = min(output.batch.events for output in config.outputs)
        self._horizon_ms = config.windows.late_horizon

    def replay(self, output: str | None, ids: Sequence[str], reason: str | None) -> Steps:
        """Dead letters back into the queue. Counts ``replayed`` and ``too_late``, which stay.

        Raises:
            UsageError: an id is no dead letter, or too old; those of the steps before were put back.
        """
        late_ms = self._clock_ms() - self._horizon_ms
        wanted = Wanted(output, (), reason, until=self._letters.last())
        late = 0 if ids else self._letters.count(wanted, late_ms=late_ms)
        yield {"replayed": 0, "too_late": late}
        take = partial(self._letters.replay, late_ms=late_ms, together=self._together)
        for count in _taken(wanted, ids, take):
            yield {"replayed": count}

    def redate(
        self, output: str | None, ids: Sequence[str], reason: str | None, *, accept_duplicates: bool
    ) -> Steps:
        """New events in the place of dead letters. Counts ``redated`` and ``doubtful``, which stay.

        Raises:
            UsageError: an id is no dead letter, or may be stored; those of the steps before are made anew.
        """
        wanted = Wanted(output, (), reason, until=self._letters.last())
        yield {"redated": 0, "doubtful": 0 if ids or accept_duplicates else self._letters.count(wanted)}

        def take(part: Wanted) -> Slice:
            return self._letters.redate(
                part, self._mint, self._clock_ms(), accept_duplicates=accept_duplicates
            )

        for count in _taken(wanted, ids, take):
            yield {"redated": count, "minted": count}

    def retire(self, name: str) -> Steps:
        """Gives up what an output that is no longer configured has not settled. Counts ``retired``.

        Raises:
            UsageError: the output is configured, or there is none of this name.
        """
        while count := self._letters.retire(name, self._configured, self._clock_ms()):
            yield {"retired": count}
        yield {"retired": 0}

    def release(self, ids: Sequence[str], reason: str | None, *, redate: bool) -> Steps:
        """Held usage through the present rules. Counts rows of held usage by what became of them.

        Raises:
            UsageError: nothing is held under an id.
        """
        attributor = self._attributor()
        wanted = WantedHeld(reason, tuple(ids), self._clock_ms() - self._horizon_ms, redate)
        position: tuple[int, bytes] | None = (-1, b"")
        while position is not None:
            done = self._checkpoints.release(
                wanted,
                lambda known, origin, routed: attribute_again(attributor, known, origin, routed=routed),
                self._mint,
                self._clock_ms(),
                position,
            )
            position = done.position
            yield {
                "released": done.released,
                "minted": done.events,
                "unattributed": done.unattributed,
                "too_late": done.too_late,
                "lost": done.lost,
            }


def carry_out(steps: Steps) -> dict[str, int]:
    """Takes all steps of a repair. Returns what they add up to."""
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step)
    return dict(total)


def texts(value: object, name: str) -> list[str]:
    """A list of texts among a verb's arguments. Raises UsageError."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{name} must be a list of texts")
    return value


def _taken(wanted: Wanted, ids: Sequence[str], take: Callable[[Wanted], Slice]) -> Iterator[int]:
    """Takes all that is meant, or one group of ids after the other. Gives how many each time."""
    for at in range(0, len(ids), IDS_AT_ONCE):
        yield take(replace(wanted, ids=ids[at : at + IDS_AT_ONCE], until=None)).taken
    position = None if ids else wanted.after
    while position is not None:
        part = take(replace(wanted, after=position))
        position = part.position
        yield part.taken
