"""A JetStream stream as the backlog of an output: what a forwarder delivers.

    stream ──pull──▶ ready ──lease──▶ batch ──accepted──▶ acknowledged, and the stream has done with it
      ▲                │                ├── refused alone ──▶ dead letter published, then acknowledged
      │                │                └── no answer ──▶ the same batch again; signs of life meanwhile
      └── given back, or the forwarder died: another one is handed it after `ack_wait` ──┘

Why it has no store of its own: the stream is durable already, and two durable places would need a protocol of
ours for what was taken into one and not yet crossed off in the other. So a forwarder has no state: any number
of them share a durable consumer, and come and go. The price is known and is the usual one. An event whose
forwarder died between the endpoint's answer and the acknowledgement is sent again, by another one, after
``ack_wait``: seconds, where the endpoint remembers ids for ten minutes (``outputs.dedup_window``). When it
first went out nobody knows then, but not before it was published: if that is longer ago than the endpoint
remembers, its fate is `delivered_ambiguous`, as for any other output.

An event is acknowledged only once its fate is sure, and the acknowledgement is itself confirmed by the
server; until then it is held here (``taking``). ``read = settled + returned + held``, always.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from proxy_usage.delivery.taking import Held, Taking
from proxy_usage.metrics import Metrics
from proxy_usage.store import Batch, Fate, Idle

log = structlog.get_logger()


@dataclass(slots=True)
class _Batch:
    """Events that were sent together."""

    seqs: list[int]
    first_attempt_ms: int
    not_before_ms: int
    attempts: int = 0
    confirm: bool = False
    clean: bool = False
    before: bool = False


class StreamBacklog:
    """What one forwarder has taken, in batches.

    Args:
        output: the output's name, for metrics.
    """

    def __init__(self, taking: Taking, *, output: str, metrics: Metrics) -> None:
        self._taking = taking
        self._output = output
        self._metrics = metrics
        self._batches: dict[int, _Batch] = {}
        self._number = 0
        self._too_late = 0

    def __repr__(self) -> str:
        return f"<StreamBacklog held={len(self._taking.held)} batches={len(self._batches)}>"

    async def lease(
        self,
        output: int,
        now_ms: int,
        *,
        events: int,
        max_bytes: int,
        linger_ms: int,
        again: bool,
        fresh: bool,
        busy: frozenset[int],
        apart: frozenset[str],
        late_ms: int | None,
        longest_ms: int | None,
    ) -> Batch | Idle:
        """As ``store.Queue.lease``. Events that were handed to somebody before are batched apart.

        Raises:
            StreamUnavailable: a dead letter cannot be published now.
        """
        self._taking.check()
        if self._taking.lapsed:
            self._let_go(busy)
        await self._bury_malformed()
        waiting: int | None = None
        attempted = False
        for number, batch in sorted(self._batches.items(), key=lambda item: (item[1].not_before_ms, item[0])):
            if not again:
                break
            attempted = True
            if number in busy:
                continue
            wait_ms = batch.not_before_ms - now_ms
            if wait_ms <= 0 or (longest_ms is not None and wait_ms > longest_ms):
                batch.seqs = [seq for seq in batch.seqs if seq in self._taking.held]
                late = await self._expire(batch.seqs, late_ms)
                batch.seqs = [seq for seq in batch.seqs if seq in self._taking.held]
                if not batch.seqs:
                    del self._batches[number]
                    return Idle(now_ms, late)
                return self._begin(number, batch, output, late, now_ms)
            waiting = batch.not_before_ms
            break
        if attempted and not fresh:
            return Idle(waiting)
        found = self._fresh(events, max_bytes, apart)
        if not found:
            return Idle(waiting)
        if late := await self._expire([held.event.seq for held in found], late_ms):
            return Idle(now_ms, late)
        due_ms = found[0].since_ms + linger_ms
        if len(found) < events and now_ms < due_ms <= now_ms + linger_ms:
            return Idle(due_ms if waiting is None else min(due_ms, waiting))
        return self._new(found, output, now_ms)

    async def postpone(
        self, batch: int, not_before_ms: int, answer: str, *, unanswered: bool, clean: bool
    ) -> None:
        """As ``store.Queue.postpone``; nothing outlives the process."""
        del answer, unanswered
        if (kept := self._batches.get(batch)) is not None:
            kept.attempts += 1
            kept.not_before_ms = not_before_ms
            kept.clean = clean

    async def settle(
        self,
        batch: Batch,
        fates: Mapping[int, Fate],
        now_ms: int,
        *,
        rest: Iterable[Sequence[int]] = (),
        confirm: bool = False,
        clean: bool = False,
    ) -> Sequence[int]:
        """As ``store.Queue.settle``. Can be repeated until it succeeds.

        Raises:
            StreamUnavailable: not every acknowledgement was confirmed.
        """
        kept = self._batches.get(batch.id)
        if kept is None:
            return []
        await self._taking.end({seq: fate for seq, fate in fates.items() if seq in self._taking.held})
        twice = [event.id for event in batch.events if _doubtful(fates.get(event.seq))]
        if twice:
            log.warning("perhaps stored twice", output=self._output, ids=twice)
        parts = []
        for group in rest:
            self._number += 1
            parts.append(self._number)
            self._batches[self._number] = _Batch(
                list(group), kept.first_attempt_ms, now_ms, kept.attempts + 1, confirm, clean, kept.before
            )
        gone = set(fates).union(*rest)
        kept.seqs = [seq for seq in kept.seqs if seq not in gone]
        if not kept.seqs:
            del self._batches[batch.id]
        return parts

    async def pause(self, output: int, reason: str | None, detail: str, now_ms: int) -> None:
        """Readiness and the log say so; there is nothing to note it in."""

    # --- batches ----------------------------------------------------------------------------------------

    def _fresh(self, events: int, max_bytes: int, apart: frozenset[str]) -> list[Held]:
        """What belongs into the next batch: the head decides, as in the store's queue."""
        found: list[Held] = []
        total = 0
        for held in self._taking.ready.values():
            size = len(held.event.body) + 1
            if found:
                head, tenant = found[0], held.event.tenant
                if held.before != head.before:
                    continue
                if (tenant in apart or head.event.tenant in apart) and tenant != head.event.tenant:
                    continue
                if len(found) == events or total + size > max_bytes:
                    break
            found.append(held)
            total += size
        return found

    def _let_go(self, busy: frozenset[int]) -> None:
        """Keeps what is being sent at this moment: its answer settles it, whoever has it as well."""
        under_way = {number: batch for number, batch in self._batches.items() if number in busy}
        self._taking.let_go({seq for batch in under_way.values() for seq in batch.seqs})
        for batch in self._batches.values():
            batch.seqs = [seq for seq in batch.seqs if seq in self._taking.held]
        self._batches = {n: batch for n, batch in self._batches.items() if batch.seqs or n in under_way}

    def _new(self, found: Sequence[Held], output: int, now_ms: int) -> Batch:
        before = found[0].before
        first_ms = min(held.published_ms for held in found) if before else now_ms
        self._number += 1
        seqs = [held.event.seq for held in found]
        self._batches[self._number] = _Batch(seqs, first_ms, now_ms, before=before)
        for seq in seqs:
            del self._taking.ready[seq]
        self._taking.room_again()
        return self._loaded(self._number, output, resent=before)

    def _begin(self, number: int, batch: _Batch, output: int, late: int, now_ms: int) -> Batch:
        """Another attempt. Where none before it can have stored anything, it counts as the first.

        What was in another's hands while it was held here may have been sent by that one, whatever the
        attempts from here came to.
        """
        shared = [held for seq in batch.seqs if (held := self._taking.held[seq]).before]
        if shared:
            batch.before = True
            batch.first_attempt_ms = min(batch.first_attempt_ms, *(held.published_ms for held in shared))
        resent = not batch.clean or batch.before
        if not resent:
            batch.first_attempt_ms = now_ms
        batch.clean = False
        return self._loaded(number, output, resent=resent, too_late=late)

    def _loaded(self, number: int, output: int, *, resent: bool, too_late: int = 0) -> Batch:
        batch = self._batches[number]
        return Batch(
            id=number,
            output=output,
            events=tuple(self._taking.held[seq].event for seq in batch.seqs),
            attempts=batch.attempts,
            first_attempt_ms=batch.first_attempt_ms,
            confirm=batch.confirm,
            resent=resent,
            too_late=too_late,
        )

    async def _expire(self, seqs: Sequence[int], late_ms: int | None) -> int:
        """Makes dead letters of events that are too old to be sent. Returns how many, those counted that an
        earlier try buried before it failed."""
        for seq in seqs:
            if late_ms is not None and (self._taking.held[seq].time_ms or 0) < late_ms:
                await self._taking.end({seq: Fate("dead", 0, "too_late")})
                self._too_late += 1
        late, self._too_late = self._too_late, 0
        return late

    async def _bury_malformed(self) -> None:
        wrong = [seq for seq, held in self._taking.ready.items() if held.time_ms is None]
        for seq in wrong:
            await self._taking.end({seq: Fate("dead", 0, "malformed", "it is not a CloudEvent of usage")})
            self._metrics.delivered(self._output, "dead", "malformed")
        if wrong:
            log.error("not events of usage: dead letters", output=self._output, events=len(wrong))


def _doubtful(fate: Fate | None) -> bool:
    return fate is not None and fate.name == "delivered_ambiguous"
