"""Who claims to be which Envoy."""

from __future__ import annotations

from collections import Counter

import structlog

from proxy_usage.metrics import Metrics

log = structlog.get_logger()

MAX_SEEN_NODES = 4_096
MAX_SEEN_HOSTS = 4
"""Nodes, and addresses of each, that are remembered after their streams ended."""
MAX_WARNED_NODES = 1_000
"""Node ids that are warned about; a peer that invents more must not fill the log."""


class Nodes:
    """From where each node id is spoken for now.

    Two Envoys that share an id cannot be told apart when a bill is to be proven, and one Envoy speaks from
    one address: several at once are worth a warning.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._streams: dict[str, Counter[str]] = {}
        self._seen: dict[str, dict[str, None]] = {}
        self._warned: set[str] = set()
        self._metrics = metrics

    def joined(self, node_id: str, host: str) -> None:
        """A stream of a node began."""
        hosts = self._streams.setdefault(node_id, Counter())
        hosts[host] += 1
        self._see(node_id, host)
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

    def live(self) -> dict[str, tuple[str, ...]]:
        """The addresses that each node speaks from now."""
        return {node: tuple(hosts) for node, hosts in self._streams.items()}

    def seen(self) -> dict[str, tuple[str, ...]]:
        """The addresses that each node spoke from lately, the latest last: those of its Envoy."""
        return {node: tuple(hosts) for node, hosts in self._seen.items()}

    def _see(self, node_id: str, host: str) -> None:
        hosts = self._seen.pop(node_id, {})  # put in again at the end: the first to go is the oldest
        hosts.pop(host, None)
        hosts[host] = None
        while len(hosts) > MAX_SEEN_HOSTS:
            del hosts[next(iter(hosts))]
        while len(self._seen) >= MAX_SEEN_NODES:
            del self._seen[next(iter(self._seen))]
        self._seen[node_id] = hosts

    def _count(self) -> None:
        self._metrics.shared_nodes.set(sum(len(hosts) > 1 for hosts in self._streams.values()))
