"""A forwarder's backlog without a server: what it would be handed is handed to it, and its clocks are set."""

from __future__ import annotations

import json
from typing import Any, cast

from money import T0
from nats.aio.msg import Msg

from proxy_usage.delivery.consumer import StreamSettings
from proxy_usage.delivery.jetstream import Link, Peer
from proxy_usage.delivery.stream import StreamBacklog
from proxy_usage.delivery.taking import Taking
from proxy_usage.delivery.trust import Trust
from proxy_usage.metrics import Metrics
from proxy_usage.store import Batch, Idle

ACK_WAIT_MS = 30_000


def message(seq: int = 5, deliveries: int = 1, published_ms: int = T0) -> Msg:
    """An event as JetStream hands it out."""
    body = {
        "id": f"E{seq}",
        "type": "t",
        "subject": "projects/alpha",
        "time": "2026-11-22T00:00:00Z",
        "data": {"value": "7"},
    }
    reply = f"$JS.ACK.U.d.{deliveries}.{seq}.9.{published_ms * 1_000_000}.0"
    # The client that received it is only needed to acknowledge by it.
    return Msg(_client=cast("Any", None), subject="s", reply=reply, data=json.dumps(body).encode())


class NoStream:
    """The two halves of a forwarder's backlog, never connected."""

    def __init__(self) -> None:
        self.now_ms = T0
        self.monotonic_s = 1_000.0
        settings = StreamSettings("U", "d", "s", "dead.{project}", ACK_WAIT_MS, 1_000)
        metrics = Metrics()
        self.taking = Taking(
            Link(Peer("nats://127.0.0.1:1", 1_000), None, Trust(None, None, None)),
            settings,
            output="billing",
            room=10,
            metrics=metrics,
            wake=lambda: None,
            clock_ms=lambda: self.now_ms,
            monotonic=lambda: self.monotonic_s,
        )
        self.backlog = StreamBacklog(self.taking, output="billing", metrics=metrics)

    async def lease(self, **settings: Any) -> Batch | Idle:
        wanted: dict[str, Any] = {
            "events": 10,
            "max_bytes": 1 << 20,
            "linger_ms": 0,
            "again": True,
            "fresh": True,
            "busy": frozenset(),
            "apart": frozenset(),
            "late_ms": None,
            "longest_ms": None,
        }
        return await self.backlog.lease(1, self.now_ms, **wanted | settings)

    async def batch(self, **settings: Any) -> Batch:
        leased = await self.lease(**settings)
        assert isinstance(leased, Batch), leased
        return leased
