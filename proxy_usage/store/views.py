"""What a look into the store shows: plain values, no behaviour but sums that are always derived.

Amounts are base units (bytes, requests, nanoseconds), values are in a meter's billed unit; times are
milliseconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from proxy_usage.model import Identity
from proxy_usage.store.report import Aside
from proxy_usage.store.restore import Restored


class Tally(NamedTuple):
    """Events and the sum of their values."""

    events: int
    value: int


@dataclass(frozen=True, slots=True)
class MeterTerms:
    """Where everything that was counted for one meter is now: the conservation sum, in base units."""

    meter: str
    divisor: int | None
    """Base units in one value; None for a meter that is no longer configured."""
    counted: int
    open: int
    """In windows that are open, as of the last checkpoint."""
    held: int
    """Of nobody: unattributed."""
    remainders: int
    written_off: int
    """Remainders that were not used for long."""
    expired: int
    """Unattributed usage that was held for as long as ``tenant.unattributed.keep`` says."""
    minted: Tally
    """Made into events, over the life of the store; in values."""
    redated: Tally
    """Of these, made in the place of a dead letter: the same usage once more."""

    @property
    def difference(self) -> int | None:
        """What was counted and is nowhere (negative: is somewhere and was not counted); None: not known."""
        if self.divisor is None:
            return None
        known = self.open + self.held + self.remainders + self.written_off + self.expired
        return self.counted - known - (self.minted.value - self.redated.value) * self.divisor


@dataclass(frozen=True, slots=True)
class OutputTerms:
    """What became of one meter's events at one output."""

    output: str
    meter: str
    minted: Tally
    """All events of the meter, whether the output was there or not."""
    fates: Mapping[str, Tally]
    partial: bool
    """The output was not always configured: it was given only what was minted meanwhile."""

    @property
    def missing(self) -> Tally:
        """What was minted and has no fate here; negative when it has one too many."""
        return Tally(
            self.minted.events - sum(fate.events for fate in self.fates.values()),
            self.minted.value - sum(fate.value for fate in self.fates.values()),
        )

    @property
    def balanced(self) -> bool | None:
        """Whether every event has exactly one fate; None where the output was not there for all of them."""
        missing = self.missing
        if missing == (0, 0):
            return True
        return None if self.partial and min(missing) >= 0 else False


class Difference(NamedTuple):
    """A sum that the store keeps and that its tables do not confirm."""

    what: str
    kept: Tally
    found: Tally


@dataclass(frozen=True, slots=True)
class Conservation:
    """Whether everything adds up."""

    meters: tuple[MeterTerms, ...]
    outputs: tuple[OutputTerms, ...]
    deep: bool
    """Whether the sums were compared with the tables, row by row."""
    differences: tuple[Difference, ...] = ()

    @property
    def balanced(self) -> bool:
        """False when anything is known not to add up."""
        return (
            not self.differences
            and all(not terms.difference for terms in self.meters)
            and all(terms.balanced is not False for terms in self.outputs)
        )


@dataclass(frozen=True, slots=True)
class OutputStatus:
    """One output: how its events fare."""

    name: str
    added_ms: int
    pending: int
    """Events not settled, attempted ones included."""
    attempted: int
    batches: int
    """Batches that were attempted and are not settled."""
    delivered: int
    """Ambiguous ones included."""
    ambiguous: int
    """Accepted when the endpoint may have forgotten an earlier attempt: perhaps stored twice."""
    unanswered: int
    """Attempts that ended without an answer that says what was stored."""
    unconfirmed: int
    dead: int
    recorded: int
    """Kept in the ledger alone (``format: none``)."""
    outside: int
    """Never to be sent here: outside ``from`` and ``until``, or made anew for another output."""
    given_up: int
    """Dead letters that another event replaces, and what was retired with its output."""
    merged: int
    """Became part of another event, since room was short."""
    oldest_ms: int | None
    """When the oldest event that is not settled was minted."""
    paused: str | None
    paused_ms: int | None
    detail: str
    retrying_ms: int | None
    """When the oldest batch was first sent whose last attempt failed, as far as is known; None: none."""
    answer: str
    """What came of that attempt."""


@dataclass(frozen=True, slots=True)
class Status:
    """The store at one moment."""

    path: str
    schema_version: int
    sizes: Mapping[str, int]
    """Bytes of the database, of its write-ahead log and of the file of row counts."""
    outputs: tuple[OutputStatus, ...]
    meters: tuple[MeterTerms, ...]
    rows: Mapping[str, Mapping[str, int]]
    """Rows by fate and reason."""
    intake: Mapping[str, int]
    """Rows read per node, as of the last checkpoint."""
    crash_lost: Mapping[str, int]
    """Rows per node that were read and lost by crashes."""
    open_windows: int
    """Windows of single keys."""
    keys: int
    unattributed: int
    """Rows of held usage: one per hour, reason and identity."""
    crash_unknown: Mapping[str, int] = field(default_factory=dict)
    """By node: how often it could not be said what a crash, or the loss of a store, cost."""
    asides: tuple[Aside, ...] = ()
    """Stores that were set aside before this one."""
    restored: Restored | None = None
    """When the store came back from a backup, last."""


@dataclass(frozen=True, slots=True)
class QueuedEvent:
    """An event that an output has not settled."""

    output: str
    id: str
    tenant: str
    meter: str
    value: int
    window_ms: int
    minted_ms: int
    bytes: int
    state: str
    """``pending`` or ``attempted``."""
    batch: int | None
    attempts: int
    not_before_ms: int | None
    first_attempt_ms: int | None
    """When it was first sent, perhaps before it became a dead letter that was replayed."""


@dataclass(frozen=True, slots=True)
class WaitingBatch:
    """Events that were sent together and go again together."""

    output: str
    batch: int
    events: int
    attempts: int
    not_before_ms: int
    first_attempt_ms: int
    confirm: bool
    """Of a batch of which fewer were accepted than sent."""
    answer: str


@dataclass(frozen=True, slots=True)
class Place:
    """What became of an event at one output."""

    output: str
    state: str
    """``pending``, ``attempted``, ``dead``, or the fate in the ledger."""
    at_ms: int | None = None
    """When it became so; None while it is not settled."""
    first_attempt_ms: int | None = None
    attempts: int = 0
    not_before_ms: int | None = None
    status: int | None = None
    """HTTP status that settled it."""
    reason: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class EventView:
    """One event and its places."""

    id: str
    tenant: str
    dimensions: Mapping[str, str]
    meter: str
    window_ms: int
    value: int
    minted_ms: int | None
    """None once every output has settled it: its time is in its id."""
    body: bytes | None
    """The CloudEvent as it is sent; None once every output has settled it."""
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that an output refused alone."""

    output: str
    id: str
    tenant: str
    meter: str
    value: int
    window_ms: int
    reason: str
    answer: str
    at_ms: int
    first_attempt_ms: int | None


@dataclass(frozen=True, slots=True)
class Doubtful:
    """An event that the endpoint may have stored twice: its last attempt came after the duplicate window."""

    output: str
    id: str
    tenant: str
    meter: str
    value: int
    window_ms: int
    at_ms: int
    """When it was accepted."""


@dataclass(frozen=True, slots=True)
class HeldUsage:
    """Usage of nobody, in one UTC hour."""

    id: str
    """Of what is held, at any hour: its reason and what its rows said."""
    hour_ms: int
    reason: str
    identity: Identity | None
    """None: of identities past their bound, together."""
    rows: int
    amounts: Mapping[str, int]
    first_ms: int
    last_ms: int
