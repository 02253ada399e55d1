"""What delivery asks of a wire format, and the verdicts a format can give on an answer.

An answer is classified here and nowhere else. The verdicts are the whole vocabulary:

    Settled    every event of the batch has an outcome
    Shortfall  fewer were accepted than sent and the answer does not say which
    Refused    the batch as a whole was refused for its content: split it
    Retry      nothing is known to be wrong with it: the same bytes again, later
    Paused     the output is misconfigured or shut out: keep everything, tell somebody
    Ambiguous  a success that does not say what was accepted
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from proxy_usage.store import Fate, Queued


class Answer(NamedTuple):
    """What came back over HTTP."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    """Cut off at the transport's bound; a body that was cut off is not whole JSON."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is known of earlier attempts by looking at what they left, instead of by a duplicate window."""

    unseen: frozenset[int]
    """Delivered now, and not found among what was looked at, by ``Queued.seq``."""
    last_ms: int
    """An attempt since then stored nothing that was not looked at (milliseconds since the epoch)."""


@dataclass(frozen=True, slots=True)
class Settled:
    """Every event of the batch has an outcome."""

    fates: Mapping[int, Fate]
    """By ``Queued.seq``."""
    memory: Memory | None = field(default=None, compare=False)
    """None: the receiver knows an event again for the duplicate window."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Some are accepted, and the answer does not say which."""

    fates: Mapping[int, Fate]
    """Outcomes that are known, by ``Queued.seq``."""
    answer: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The endpoint refused the batch's content."""

    status: int
    answer: str
    event_code: str = ""
    """A code that the endpoint gives to single events: then one event alone may be judged by it."""
    too_large: bool = False
    """It was the size: later batches must be smaller."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Try the same bytes again."""

    reason: str
    answer: str = ""
    after_ms: int = 0
    """The endpoint asked to wait at least so long."""
    fates: Mapping[int, Fate] = field(default_factory=dict)
    """Outcomes that are known all the same, by ``Queued.seq``: only the rest goes again."""


@dataclass(frozen=True, slots=True)
class Paused:
    """Nothing will be accepted until somebody mends the configuration or the endpoint."""

    reason: str
    answer: str
    after_ms: int = 0
    fates: Mapping[int, Fate] = field(default_factory=dict)
    """As of ``Retry``."""


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """A success status without the proof of what was accepted."""

    answer: str


Verdict = Settled | Shortfall | Refused | Retry | Paused | Ambiguous


@dataclass(frozen=True, slots=True)
class Request:
    """A batch on the wire."""

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Output(Protocol):
    """A wire format."""

    def encode(self, events: Sequence[Queued]) -> Request:
        """The request that carries these events: a pure function of their stored bytes."""

    def read(self, answer: Answer, events: Sequence[Queued]) -> Verdict:
        """What an answer says about the events that were sent."""
