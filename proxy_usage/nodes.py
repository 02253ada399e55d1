"""Who claims to be which Envoy."""

from __future__ import annotations

from collections import Counter

import structlog

from proxy_usage.metrics import Metrics

log = structlog.get_logger()

MAX_WARNED_NODES = 1_000
"""Node ids that are warned about; a peer that invents more must not fill the log."""


class Nodes:
    """From where each node id is spoken for now.

    Two Envoys that share an id cannot be told apart when a bill is to be proven, and one Envoy speaks from
    one address: several at once are worth a warning.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._streams: dict[str, Counter[str]] = {}
        self._warned: set[str] = set()
        self._metrics = metrics

    def joined(self, node_id: str, host: str) -> None:
        """A stream of a node began."""
        hosts = self._streams.setdefault(node_id, Counter())
        hosts[host] += 1
        if len(hosts) > 1 and node_id not in self._warned and len(self._warned) < MAX_WARNED_NODES:
            self._warned.add(node_id)
            log.warning(
                "several Envoys share a node id",
                node=node_id[:200],
                addresses=sorted(hosts)[:5],
                hint="give each Envoy a node.id of its own, or the audit cannot tell whose rows are missing",
            )
        self._count()

    def left(self, node_id: str, host: str) -> None:
        """A stream of a node ended."""
        hosts = self._streams[node_id]
        hosts[host] -= 1
        if not hosts[host]:
            del hosts[host]
        if not hosts:
            del self._streams[node_id]
        self._count()

    def _count(self) -> None:
        self._metrics.shared_nodes.set(sum(len(hosts) > 1 for hosts in self._streams.values()))
