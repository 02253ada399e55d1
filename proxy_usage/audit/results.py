"""What audits came to, by node: figures of the last day, and what is not decided yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from proxy_usage.completeness import Pending, state
from proxy_usage.figures import Figures
from proxy_usage.intake import OTHERS
from proxy_usage.metrics import MAX_NODES_NAMED, Metrics
from proxy_usage.store.audits import Hour
from proxy_usage.store.history import HOUR_MS

DAY_MS = 24 * HOUR_MS
NOT_LISTED = "it logs to a sink, and no URL of audit.envoys is this Envoy"


class Finding(NamedTuple):
    """What a round came to for one Envoy, beside figures."""

    node: str
    envoy: str
    pending: Pending | None


class NodeResult(NamedTuple):
    """One node: what it is shown as."""

    node: str
    envoy: str
    state: str
    """``complete``, ``missing`` or ``unknown``."""
    since_ms: int
    """Since when it is in this state, as far as this process knows."""
    reason: str
    figures: Figures
    pending: Pending | None

    def shown(self) -> dict[str, Any]:
        """As JSON holds it: integers, and null for what nobody knows."""
        pending = self.pending
        figures: dict[str, Any] = msgspec.structs.asdict(self.figures)
        open_most = 0 if pending is None else pending.at_most
        settled = figures["missing"] + figures["at_least"]
        no_bound = figures["unknown"] or open_most is None
        return {
            "node": self.node,
            "envoy": self.envoy,
            "state": self.state,
            "since_ms": self.since_ms,
            "reason": self.reason,
            **figures,
            "at_least": settled + (0 if pending is None else pending.at_least),
            "at_most": None if no_bound else settled + (open_most or 0),
            "under_way": open_most,
        }


class Ledger:
    """The last day, in memory. Bounded by the nodes of a day.

    Args:
        stale_ms: rows that are on their way for longer make a node's state unknown.
    """

    def __init__(self, *, stale_ms: int) -> None:
        self.unheard: tuple[str, ...] = ()
        """Nodes that log to a sink and are no configured Envoy."""
        self._stale_ms = stale_ms
        self._hours: dict[tuple[int, str], Figures] = {}
        self._findings: dict[str, Finding] = {}
        self._states: dict[str, tuple[str, int]] = {}

    @staticmethod
    def oldest_ms(now_ms: int) -> int:
        """The first hour that is shown."""
        return now_ms - now_ms % HOUR_MS - DAY_MS + HOUR_MS

    def load(self, hours: Iterable[Hour]) -> None:
        """Takes over what the store has of the last day."""
        self._hours = {(hour.hour_ms, hour.node): hour.figures for hour in hours}

    def add(self, found: Iterable[tuple[str, Figures]], findings: Iterable[Finding], now_ms: int) -> None:
        """Takes over what a round came to."""
        for node, figures in found:
            hour_ms = figures.to_ms - figures.to_ms % HOUR_MS
            self._hours.setdefault((hour_ms, node), Figures()).add(figures)
        oldest_ms = self.oldest_ms(now_ms)
        self._hours = {key: figures for key, figures in self._hours.items() if key[0] >= oldest_ms}
        self._findings = {finding.node: finding for finding in findings}
        states = {one.node: one.state for one in self.nodes(now_ms)}
        self._states = {
            node: have if (have := self._states.get(node, ("", 0)))[0] == told else (told, now_ms)
            for node, told in states.items()
        }

    def nodes(self, now_ms: int) -> list[NodeResult]:
        """All nodes, by name."""
        sums: dict[str, Figures] = {node: Figures() for node in self._findings}
        for (_, node), figures in self._hours.items():
            sums.setdefault(node, Figures()).add(figures)
        results = [self._result(node, figures, now_ms) for node, figures in sorted(sums.items())]
        for node in self.unheard:
            if node not in sums:
                pending = Pending(now_ms, 0, None, NOT_LISTED)
                since_ms = self._states.get(node, ("", now_ms))[1]
                results.append(NodeResult(node, "", "unknown", since_ms, NOT_LISTED, Figures(), pending))
        return results

    def _result(self, node: str, figures: Figures, now_ms: int) -> NodeResult:
        finding = self._findings.get(node)
        pending = None if finding is None else finding.pending
        stale = pending is not None and now_ms - pending.since_ms > self._stale_ms
        told, reason = state(figures, pending, stale=stale)
        since = self._states.get(node, ("", 0))
        since_ms = since[1] if since[0] == told else now_ms
        return NodeResult(node, finding.envoy if finding else "", told, since_ms, reason, figures, pending)

    def gauges(self, metrics: Metrics, now_ms: int) -> None:
        """Brings the metrics up to date; past a number of nodes they share a label."""
        nodes = self.nodes(now_ms)
        told = summary(nodes)
        for name in ("complete", "missing", "unknown"):
            metrics.audit_nodes.labels(state=name).set(told[name])
        sums: dict[str, list[int]] = {}
        for number, one in enumerate(nodes):
            label = one.node if number < MAX_NODES_NAMED else OTHERS
            figures = one.figures
            have = sums.setdefault(label, [0, 0])
            have[0] += figures.missing + figures.at_least
            have[1] += figures.dropped
        metrics.audit_missing.clear()
        metrics.audit_dropped.clear()
        for label, (missing, dropped) in sums.items():
            metrics.audit_missing.labels(node=label).set(missing)
            metrics.audit_dropped.labels(node=label).set(dropped)


def summary(nodes: Iterable[NodeResult]) -> Mapping[str, int]:
    """Nodes by state, and what is missing of all."""
    told = {"complete": 0, "missing": 0, "unknown": 0, "missing_entries": 0}
    for one in nodes:
        told[one.state] += 1
        told["missing_entries"] += one.figures.missing + one.figures.at_least + one.figures.dropped
    return told
