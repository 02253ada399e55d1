"""What to do about an answer: pure decisions of one output, with the clock and the dice passed in.

verdict      events        what happens
Settled      any           each to its fate; `delivered_ambiguous` where an earlier attempt is so old that
                           the endpoint may have forgotten it, or an archive cannot find it any more
Shortfall    one           within half the duplicate window: dead letter `not_accepted`; later: unconfirmed
             several       within: asked about one by one, their tenants batched apart; later: unconfirmed
Refused      several       split in half
             one           dead letter, but only on evidence that the endpoint accepts others: a code it
                           gives to single events, or another event accepted since the first refusal;
                           otherwise the output is paused and nothing moves
Retry        any           same bytes, full-jitter backoff, never before Retry-After; what it says of single
                           events is settled, and the rest goes again
Paused       any           the same, and readiness says why
Ambiguous    any           the same; paused after the third in a row

A wait is the whole output's: however many batches wait for another attempt, a failing endpoint sees one
request at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from proxy_usage.outputs.answers import MAX_RETRY_AFTER_MS
from proxy_usage.outputs.base import Ambiguous, Memory, Paused, Refused, Retry, Settled, Shortfall, Verdict
from proxy_usage.store import Batch, Fate

MAX_APART = 1_000
"""Tenants batched apart at the most; the set is a help, not a promise."""
MAX_AMBIGUOUS = 3
REFUSING_EVERYTHING = "refusing_everything"
UNANSWERED = frozenset({"timeout", "broken_answer", "ambiguous", "too_early", "throttled", "server_error"})
"""Outcomes that do not say what was stored: an endpoint that fails in mid-batch keeps what came before."""


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """Backoff and the endpoint's memory, in milliseconds."""

    initial_ms: int = 500
    max_ms: int = 60_000
    dedup_window_ms: int = 600_000


@dataclass(frozen=True, slots=True)
class Step:
    """What the courier does with a batch after an answer."""

    outcome: str
    """``delivered``, ``partial``, ``split``, ``asked_one_by_one`` or the reason of a retry or pause."""
    fates: Mapping[int, Fate] = field(default_factory=dict)
    rest: tuple[tuple[int, ...], ...] = ()
    confirm: bool = False
    wait_ms: int | None = None
    """Set: what ``fates`` does not settle of the batch is postponed by so long."""
    answer: str = ""

    @property
    def unanswered(self) -> bool:
        """Whether the attempt ended without saying what was stored."""
        return self.wait_ms is not None and self.outcome in UNANSWERED

    @property
    def refused(self) -> bool:
        """Whether the attempt can have stored nothing of what it did not settle."""
        return self.outcome == "split" or (self.wait_ms is not None and not self.unanswered)


GROW_AFTER = 100
"""Batches taken whole after which one of twice the size is tried."""


class Policy:
    """The state of one output: whether it fails or is paused, and what it has learned.

    Args:
        below: ``below(n)`` gives a random integer in 0 … n-1.
        max_bytes: bound on a batch's body; lowered when the endpoint finds one too large, and raised
            again when it has taken many.
    """

    def __init__(
        self, settings: RetrySettings, *, below: Callable[[int], int], max_bytes: int = 1 << 20
    ) -> None:
        self._settings = settings
        self._below = below
        self.max_bytes = self._most_bytes = max_bytes
        self._taken = 0
        self.failures = 0
        self.outcome = ""
        """Why the last attempt was not accepted; empty when it was."""
        self.paused: str | None = None
        self.paused_by = ""
        """The answer that says why."""
        self.detail = ""
        """The answer of the last attempt that was not accepted, which may be another's."""
        self.apart: frozenset[str] = frozenset()
        self.accepted = 0
        """Events accepted so far; an event refused twice with this unchanged proves nothing about it."""
        self._ambiguous = 0
        self._refused_at: dict[int, int] = {}
        self._waits = (0, 0)  # from when, for how long

    def __repr__(self) -> str:
        return f"<Policy failures={self.failures} paused={self.paused} apart={len(self.apart)}>"

    def decide(self, batch: Batch, verdict: Verdict, now_ms: int) -> Step:
        """The next step for a batch, given what its answer says."""
        match verdict:
            case Settled():
                return self._settled(batch, verdict, now_ms)
            case Shortfall():
                return self._shortfall(batch, verdict, now_ms)
            case Refused():
                return self._refused(batch, verdict, now_ms)
            case Retry(reason, answer, after_ms, fates) | Paused(reason, answer, after_ms, fates):
                pause = isinstance(verdict, Paused)
                step = self._wait(reason, answer, now_ms, after_ms, pause=pause)
                self.accepted += sum(fate.name == "delivered" for fate in fates.values())
                return replace(step, fates=self._doubted(batch, fates, now_ms))
            case Ambiguous(answer):
                self._ambiguous += 1
                return self._wait("ambiguous", answer, now_ms, pause=self._ambiguous >= MAX_AMBIGUOUS)

    def remembers(self, window_ms: int) -> None:
        """The endpoint says itself for how long it recognises what it has stored: at most as configured."""
        window_ms = min(window_ms, self._settings.dedup_window_ms)
        self._settings = replace(self._settings, dedup_window_ms=window_ms)

    @property
    def longest_wait_ms(self) -> int:
        """No attempt is followed by a longer wait, whatever an endpoint asks for."""
        return max(self._settings.max_ms, MAX_RETRY_AFTER_MS)

    def wait_ms(self, now_ms: int) -> int:
        """For how long nothing is sent, since the last attempt failed."""
        since_ms, wait_ms = self._waits
        passed_ms = now_ms - since_ms
        return max(0, wait_ms - passed_ms) if passed_ms >= 0 else 0  # below 0: the clock was moved back

    def inherit(self, batch: Batch, parts: Sequence[int]) -> None:
        """A batch was replaced by ``parts``: they were first refused when it was."""
        mark = self._refused_at.pop(batch.id, None)
        if mark is not None:
            self._refused_at.update((part, mark) for part in parts)

    def _settled(self, batch: Batch, verdict: Settled, now_ms: int) -> Step:
        fates = verdict.fates
        delivered = sum(fate.name == "delivered" for fate in fates.values())
        self._recovered()
        self.accepted += delivered
        self._refused_at.pop(batch.id, None)
        if delivered == len(batch.events):
            self._grow()
            if not batch.confirm:
                self.apart -= {event.tenant for event in batch.events}
            return Step("delivered", self._doubted(batch, fates, now_ms, verdict.memory))
        return Step("partial", self._doubted(batch, fates, now_ms, verdict.memory))

    def _grow(self) -> None:
        """Dares larger batches again after many that were taken: the limit may have been a mistake."""
        self._taken += self.max_bytes < self._most_bytes
        if self._taken >= GROW_AFTER:
            self._taken = 0
            self.max_bytes = min(self._most_bytes, 2 * self.max_bytes)

    def _doubted(
        self, batch: Batch, fates: Mapping[int, Fate], now_ms: int, memory: Memory | None = None
    ) -> Mapping[int, Fate]:
        """Marks what was accepted when the endpoint may have forgotten that it had stored it before."""
        if memory is not None:
            sure = memory.last_ms <= batch.first_attempt_ms <= now_ms
            doubtful: Collection[int] = memory.unseen
        else:
            sure = _passed_ms(batch, now_ms) <= self._settings.dedup_window_ms
            doubtful = fates.keys()
        if sure or not batch.resent:
            return fates
        return {
            seq: fate._replace(name="delivered_ambiguous")
            if fate.name == "delivered" and seq in doubtful
            else fate
            for seq, fate in fates.items()
        }

    def _shortfall(self, batch: Batch, verdict: Shortfall, now_ms: int) -> Step:
        self._recovered()
        unknown = [event for event in batch.events if event.seq not in verdict.fates]
        remembered = 2 * _passed_ms(batch, now_ms) < self._settings.dedup_window_ms
        if not remembered:
            lost = Fate("unconfirmed", answer=verdict.answer)
            return Step("unconfirmed", {**verdict.fates, **{event.seq: lost for event in unknown}})
        if len(batch.events) == 1:
            refused = Fate("dead", 200, "not_accepted", verdict.answer)
            return Step("not_accepted", {batch.events[0].seq: refused})
        self.apart |= set(sorted({event.tenant for event in unknown})[: MAX_APART - len(self.apart)])
        return Step(
            "asked_one_by_one",
            verdict.fates,
            rest=tuple((event.seq,) for event in unknown),
            confirm=True,
            answer=verdict.answer,
        )

    def _refused(self, batch: Batch, verdict: Refused, now_ms: int) -> Step:
        mark = self._refused_at.setdefault(batch.id, self.accepted)
        seqs = tuple(event.seq for event in batch.events)
        if verdict.too_large and len(seqs) > 1:
            size = sum(len(event.body) + 1 for event in batch.events)
            self.max_bytes = max(1, min(self.max_bytes, size // 2))
            self._taken = 0
        if len(seqs) > 1:
            half = len(seqs) // 2
            return Step(
                "split", rest=(seqs[:half], seqs[half:]), confirm=batch.confirm, answer=verdict.answer
            )
        if verdict.too_large:
            reason = "too_large"
        elif verdict.event_code:
            reason = verdict.event_code
        elif self.accepted > mark:
            reason = "refused"
        else:
            return self._wait(REFUSING_EVERYTHING, verdict.answer, now_ms, pause=True)
        self._refused_at.pop(batch.id, None)
        self._recovered()  # it judges single events, so it is well
        return Step("refused", {seqs[0]: Fate("dead", verdict.status, reason, verdict.answer)})

    def _wait(self, reason: str, answer: str, now_ms: int, after_ms: int = 0, *, pause: bool = False) -> Step:
        self.failures += 1
        self.outcome = reason
        self.detail = answer
        if pause:
            self.paused, self.paused_by = reason, answer
        ceiling = min(self._settings.max_ms, self._settings.initial_ms << min(self.failures - 1, 20))
        wait_ms = max(min(after_ms, self.longest_wait_ms), self._below(ceiling + 1))
        self._waits = (now_ms, wait_ms)
        return Step(reason, wait_ms=wait_ms, answer=answer)

    def _recovered(self) -> None:
        self.failures = 0
        self.outcome = ""
        self._ambiguous = 0
        self._waits = (0, 0)
        self.paused, self.paused_by = None, ""
        self.detail = ""


def _passed_ms(batch: Batch, now_ms: int) -> int:
    """Time since a batch was first attempted. Where that lies ahead, the clock was moved back, and it may be
    long ago: as far as it lies ahead, so that a small correction of the clock raises no doubt."""
    return abs(now_ms - batch.first_attempt_ms)
