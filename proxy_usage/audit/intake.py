"""What a sink says it received, for the audit of another one: ``/api/intake``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import msgspec

from proxy_usage.figures import Got
from proxy_usage.intake import HTTP, TCP, Source, label

Count = Literal["logs", "requests"]


class Log(msgspec.Struct, frozen=True):
    """Rows of one log name and kind."""

    log: str
    kind: str
    rows: int


class Node(msgspec.Struct, frozen=True):
    """What a sink received of one node, over the life of its store."""

    http: int = 0
    tcp: int = 0
    ended: int = 0
    """End rows of HTTP streams."""
    crash_lost: int = 0
    crash_lost_http: int = 0
    doubts: int = 0
    live: tuple[str, ...] = ()
    """Addresses that it speaks from now."""
    seen: tuple[str, ...] = ()
    """Addresses that it spoke from lately."""
    logs: tuple[Log, ...] = ()


class Received(msgspec.Struct, frozen=True):
    """What one sink received."""

    sink: str
    """Names its store."""
    born_ms: int
    """When that was made."""
    nodes: dict[str, Node]
    adopted: dict[str, int] = {}
    """Sinks whose stores it took over, and when those were made: what they received is in its own counts."""

    def got(self, node: str, count: Count) -> Got:
        """The sink's side of a comparison. Of a node that it does not know it has received nothing."""
        one = self.nodes.get(node, Node())
        rows, http = (one.http + one.tcp, one.http) if count == "logs" else (one.ended, one.ended)
        return Got(
            rows, http, one.crash_lost, one.crash_lost_http, one.doubts, self.born_ms, dict(self.adopted)
        )


def report(
    sink: str,
    born_ms: int,
    counts: Mapping[Source, int],
    *,
    ended: Mapping[str, int],
    losses: Mapping[str, Mapping[str, int]],
    live: Mapping[str, tuple[str, ...]],
    seen: Mapping[str, tuple[str, ...]],
    adopted: Mapping[str, int] = MappingProxyType({}),
) -> Received:
    """Puts together what a sink says.

    Args:
        counts, ended: rows, and end rows by node.
        losses: by ``crash_lost``, ``crash_lost_http`` and ``crash_unknown``, a number by node.
        live, seen: addresses by node id.
        adopted: see ``Received``.
    """
    logs: dict[str, list[Log]] = {}
    for source, rows in counts.items():
        logs.setdefault(source.node, []).append(Log(source.log, source.kind, rows))
    addresses = [{label(node): hosts for node, hosts in each.items()} for each in (live, seen)]
    nodes = {
        node: Node(
            http=sum(one.rows for one in found if one.kind == HTTP),
            tcp=sum(one.rows for one in found if one.kind == TCP),
            ended=ended.get(node, 0),
            crash_lost=losses["crash_lost"].get(node, 0),
            crash_lost_http=losses["crash_lost_http"].get(node, 0),
            doubts=losses["crash_unknown"].get(node, 0),
            live=addresses[0].get(node, ()),
            seen=addresses[1].get(node, ()),
            logs=tuple(sorted(found, key=lambda one: (one.log, one.kind))),
        )
        for node, found in logs.items()
    }
    return Received(sink, born_ms, nodes, dict(adopted))
