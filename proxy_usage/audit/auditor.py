"""Takes rounds: asks both sides a few times, has it judged, keeps what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import structlog

from proxy_usage.audit.asking import Asker, Envoy, Place
from proxy_usage.audit.intake import Received
from proxy_usage.audit.results import Finding, Ledger, NodeResult, summary
from proxy_usage.completeness import Pending, Track, give_up, judge
from proxy_usage.errors import StoreError
from proxy_usage.figures import Figures, Got, Sight
from proxy_usage.intake import OTHERS, label
from proxy_usage.metrics import Metrics
from proxy_usage.store.audits import Audits
from proxy_usage.store.thread import StoreThread

log = structlog.get_logger()

READINGS = 4
"""Readings of a round, spread over the time in which things must settle, and a quarter more."""
GONE_MS = 600_000
"""An Envoy that has not answered for so long is given up, and what is open of it is unknown."""
LINES = 10
"""Nodes that a round names in the log; the lines say how many there are."""
DRAINING_S = 1.0
"""So soon the next round follows one that saw an Envoy on its way out."""
MAX_UNHEARD = 1_000
"""Nodes shown that no configured Envoy is."""


Siblings = Callable[[], Awaitable[Mapping[str, Received | None]]]


async def _alone() -> Mapping[str, Received | None]:
    return {}


@dataclass(slots=True)
class _Look:
    """An Envoy in one round."""

    place: Place
    envoy: Envoy
    node: str | None = None
    doubt: str = ""
    sights: list[Sight] = field(default_factory=list)


class Auditor:
    """The comparison with all configured Envoys.

    Args:
        envoys, members: as configured; ``members`` may name this sink too.
        own: what this sink received.
        siblings: asks the other workers of this sink, by name; None: one does not answer.
        settle_ms, interval_ms: ``audit.settle`` and ``audit.interval``.
    """

    def __init__(
        self,
        envoys: Iterable[Envoy],
        members: Iterable[str],
        *,
        own: Callable[[], Received],
        siblings: Siblings = _alone,
        asker: Asker,
        store: Audits,
        thread: StoreThread,
        metrics: Metrics,
        settle_ms: int,
        interval_ms: int,
        clock_ms: Callable[[], int],
    ) -> None:
        self._envoys = {envoy.url: envoy for envoy in envoys}
        self._members = tuple(members)
        self._own = own
        self._siblings = siblings
        self._asker = asker
        self._store = store
        self._thread = thread
        self._metrics = metrics
        self._settle_ms = settle_ms
        self._interval_ms = interval_ms
        self._clock_ms = clock_ms
        self._tracks: dict[str, Track] = {}
        self._ledger = Ledger(stale_ms=max(300_000, 5 * interval_ms))
        self._away: tuple[str, ...] = ()
        self._sinks: tuple[str, ...] = ()
        self._at_ms = 0
        self._started_ms = clock_ms()
        self._hurry = False

    async def run(self) -> None:
        """Takes rounds for ever."""
        async with self._asker:
            await self._begin()
            while True:
                started_ms = self._clock_ms()
                try:
                    await self.round()
                except StoreError as error:
                    if not error.retriable:
                        raise
                    log.warning("audit waits for the store", error=error.message)
                pause_s = (self._interval_ms - (self._clock_ms() - started_ms)) / 1_000
                await asyncio.sleep(max(0.05, min(pause_s, DRAINING_S) if self._hurry else pause_s))

    async def _begin(self) -> None:
        while True:
            try:
                self._tracks = await self._thread.run(self._store.tracks)
                past = await self._thread.run(self._store.hours, self._ledger.oldest_ms(self._clock_ms()))
            except StoreError as error:
                if not error.retriable:
                    raise
                await asyncio.sleep(1)
            else:
                self._ledger.load(past)
                return

    async def round(self) -> None:
        """One round. Raises StoreError, and then it is as if it had not been."""
        looks = await self._look()
        before = {key: _copy(track) for key, track in self._tracks.items()}
        found: list[tuple[str, Figures]] = []
        findings: list[Finding] = []
        try:
            findings.extend([self._judge(look, found) for look in looks])
            findings.extend(self._forget({look.place.key for look in looks}, found))
            changed = {key: self._tracks.get(key) for key in before.keys() | self._tracks.keys()}
            await self._thread.run(self._store.save, changed, found, self._clock_ms())
            await self._thread.run(self._store.bound)
        except BaseException:  # cancelled, too: what is not stored is not known
            self._tracks = before
            raise
        self._at_ms = self._clock_ms()
        self._ledger.add(found, findings, self._at_ms)
        self._observe(found)

    @property
    def age_ms(self) -> int:
        """Time since the last round ended; since the start before the first."""
        return self._clock_ms() - (self._at_ms or self._started_ms)

    def latest(self) -> dict[str, object]:
        """What the rounds until now came to: for ``/api/audit``, ``status`` and ``audit``."""
        return {
            "at_ms": self._at_ms,
            "interval_ms": self._interval_ms,
            "sinks": list(self._sinks),
            "away": list(self._away),
            "summary": summary(self._ledger.nodes(self._at_ms)) if self._at_ms else {},
            "nodes": [node.shown() for node in self._ledger.nodes(self._at_ms)],
        }

    def nodes(self) -> list[NodeResult]:
        """The same by node, as it stands."""
        return self._ledger.nodes(self._at_ms)

    # --- asking -----------------------------------------------------------------------------------------

    async def _look(self) -> list[_Look]:
        places = await self._asker.places(self._envoys)
        looks = [
            _Look(place, self._envoys[url])
            for url, found in places.items()
            for place in found or (Place(url, ""),)
        ]
        sinks: dict[str, Received] = {}
        for number in range(READINGS):
            if number:
                await asyncio.sleep(self._settle_ms * 5 / 4 / (READINGS - 1) / 1_000)
            sinks = await self._ask_sinks()
            answers = await asyncio.gather(*(self._asker.stats(one.place, one.envoy) for one in looks))
            now_ms = self._clock_ms()
            for look, sent in zip(looks, answers, strict=True):
                if look.node is None:
                    await self._identify(look, sinks, answers=sent is not None)
                got = _got(sinks, look)
                look.sights.append(Sight(now_ms, sent, got, len(self._away)))
        self._sinks = tuple(sorted(sinks))
        self._hurry = any(
            sight.sent is not None and sight.sent.draining for look in looks for sight in look.sights
        )
        claimed: dict[str, list[_Look]] = {}
        for look in looks:
            if look.node is not None:
                claimed.setdefault(look.node, []).append(look)
        for node, several in claimed.items():
            if len(several) > 1:
                for look in several:
                    look.doubt = f"several addresses of audit.envoys are node {node[:100]!r}"
        unheard = sorted(node for node, live in _live(sinks).items() if live and node not in claimed)
        self._ledger.unheard = tuple(unheard[:MAX_UNHEARD])
        return looks

    async def _ask_sinks(self) -> dict[str, Received]:
        places = await self._asker.places(self._members)
        asked = [place for found in places.values() for place in found]
        siblings, answers = await asyncio.gather(
            self._siblings(), asyncio.gather(*(self._asker.intake(place) for place in asked))
        )
        away = [place.key for place, answer in zip(asked, answers, strict=True) if answer is None]
        away.extend(name for name, answer in siblings.items() if answer is None)
        self._away = (*away, *(url for url, found in places.items() if not found))
        members = [one for answer in answers for one in answer or ()]
        return {one.sink: one for one in (*members, *siblings.values(), self._own()) if one is not None}

    async def _identify(self, look: _Look, sinks: Mapping[str, Received], *, answers: bool) -> None:
        """Which node an Envoy is: as configured, as it says, or by the address that it logs from."""
        track = self._tracks.get(look.place.key)
        look.node, look.doubt = look.envoy.node, ""
        if look.node is None and answers:
            look.node = await self._asker.node(look.place)
        if look.node is None and answers:
            heard = {
                kind: sorted(
                    {
                        name
                        for received in sinks.values()
                        for name, node in received.nodes.items()
                        if look.place.address in getattr(node, kind)
                    }
                )
                for kind in ("live", "seen")
            }
            nodes = heard["live"] or ([track.node] if track is not None else heard["seen"])
            if len(nodes) == 1:
                look.node = nodes[0]
            else:
                look.doubt = (
                    "no log stream comes from its address: say which node it is"
                    if not nodes
                    else f"{len(nodes)} nodes log from its address: say which it is"
                )
        if look.node is None and track is not None:
            look.node = track.node
        if look.node is not None:
            look.node = label(look.node)
            if all(look.node not in one.nodes for one in sinks.values()) and any(
                OTHERS in one.nodes for one in sinks.values()
            ):
                look.doubt = "it may be among the nodes that a sink does not count apart"

    # --- judging ----------------------------------------------------------------------------------------

    def _judge(self, look: _Look, found: list[tuple[str, Figures]]) -> Finding:
        key, now_ms = look.place.key, look.sights[-1].at_ms
        track = self._tracks.get(key)
        if look.node is None or look.doubt or not look.place.address:
            reason = look.doubt or "it does not answer, and never did"
            reason = reason if look.place.address else "the name is not known"
            return Finding(look.node or key, key, Pending(now_ms, 0, None, reason))
        if track is not None and track.node != look.node:  # another Envoy has its address now
            self._close(key, found)
            track = None
        if track is None:
            track = self._tracks[key] = Track(look.node)
        last_ms = track.last.at_ms if track.last is not None else now_ms
        floor = look.envoy.count == "requests"
        verdict = judge(track, look.sights, settle_ms=self._settle_ms, floor=floor)
        if verdict.figures is not None:
            found.append((track.node, verdict.figures))
        silent = all(sight.sent is None for sight in look.sights)
        if silent and now_ms - last_ms > GONE_MS:
            self._close(key, found)
        return Finding(track.node, key, verdict.pending)

    def _forget(self, present: set[str], found: list[tuple[str, Figures]]) -> list[Finding]:
        """Closes comparisons with Envoys that are in no list any more, after a while."""
        findings: list[Finding] = []
        for key in self._tracks.keys() - present:
            track, now_ms = self._tracks[key], self._clock_ms()
            if track.last is None or track.final or now_ms - track.last.at_ms > GONE_MS:
                self._close(key, found)
            else:
                pending = Pending(track.last.at_ms, 0, None, "the Envoy is not listed any more")
                findings.append(Finding(track.node, key, pending))
        return findings

    def _close(self, key: str, found: list[tuple[str, Figures]]) -> None:
        track = self._tracks.pop(key)
        figures = give_up(track)
        if figures is not None:
            found.append((track.node, figures))

    def _observe(self, found: Iterable[tuple[str, Figures]]) -> None:
        lacking = [
            (node, figures)
            for node, figures in found
            if figures.missing + figures.dropped + figures.crash_lost > 0 or figures.unknown
        ]
        for node, figures in lacking[:LINES]:
            log.warning(
                "usage is missing",
                node=node[:200],
                missing=figures.missing,
                dropped=figures.dropped,
                crash_lost=figures.crash_lost,
                unknown=figures.unknown,
                at_least=figures.at_least,
                nodes=len(lacking),
                hint="proxy-usage audit shows it with an estimate",
            )
        self._ledger.gauges(self._metrics, self._at_ms)


def _live(sinks: Mapping[str, Received]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for received in sinks.values():
        for name, node in received.nodes.items():
            found[name] = found.get(name, False) or bool(node.live)
    return found


def _got(sinks: Mapping[str, Received], look: _Look) -> dict[str, Got]:
    """The sinks' side: those that know nothing of the node have received nothing of it."""
    if look.node is None:
        return {}
    return {sink: received.got(look.node, look.envoy.count) for sink, received in sinks.items()}


def _copy(track: Track) -> Track:
    return msgspec.json.decode(msgspec.json.encode(track), type=Track)
