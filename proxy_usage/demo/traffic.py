"""A mixed load whose every byte is known: what is sent is planned from a seed, what it cost is counted.

Nothing here is what Envoy is known to count wrongly: no pipelining, no abandoned downloads
(measured). Whoever wants those sends them with the clients directly.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from proxy_usage.demo.http1 import Http1Client
from proxy_usage.demo.http2 import Http2Client
from proxy_usage.demo.truth import NO_ROUTE, Tenant, Truth

STREAMS_PER_CONNECTION = 8


@dataclass(frozen=True, slots=True)
class Call:
    """One planned request."""

    key: tuple[str, str]
    """(tenant, full route name), or ``NO_ROUTE``."""
    authority: str
    method: str
    path: str
    body: int
    """Size of the request body in bytes."""
    chunk: int | None
    """HTTP/1.1 only: send the body chunked, in pieces of this size."""
    h2: bool


def plan(
    tenants: Sequence[Tenant], requests: int, *, seed: int, h2_per_mille: int = 400, strays: int = 0
) -> list[Call]:
    """``requests`` calls spread over ``tenants``, and ``strays`` to a host that nobody owns.

    Every tenant gets at least one call when there are enough of them. The same arguments give the same plan.
    """
    rng = random.Random(seed)  # noqa: S311 - a repeatable load is the point
    calls = []
    for number in range(requests):
        tenant = tenants[number] if number < len(tenants) else rng.choice(tenants)
        route, method, path, body = _kind(rng)
        h2 = rng.randrange(1000) < h2_per_mille
        chunk = rng.choice((None, 100, 4096)) if body and not h2 else None
        calls.append(Call((tenant.name, tenant.route(route)), tenant.host, method, path, body, chunk, h2))
    calls += [
        Call(NO_ROUTE, "unknown.example.net", "GET", f"/wp-login-{number}", 0, None, number % 2 == 1)
        for number in range(strays)
    ]
    rng.shuffle(calls)
    return calls


def _kind(rng: random.Random) -> tuple[str, str, str, int]:
    """(route, method, path, body size) of one request; the routes are those of ``demo.bootstrap``."""
    size = rng.choice((0, 1, 100, rng.randrange(1, 5_000), rng.randrange(1, 60_000)))
    kinds: tuple[tuple[int, tuple[str, str, str, int]], ...] = (
        (26, ("web", "GET", f"/size/{size}", 0)),
        (10, ("web", "GET", f"/chunked/{size}", 0)),
        (8, ("web", "HEAD", f"/size/{size}", 0)),
        (6, ("web", "GET", f"/slow/{rng.randrange(1, 250)}", 0)),
        (5, ("web", "GET", "/sse/3?every=1", 0)),
        (15, ("api", "POST", "/api/echo", size)),
        (10, ("api", "POST", "/api/sink", size)),
        (5, ("web", "GET", "/status/304", 0)),
        (6, ("web", "GET", f"/missing/{rng.randrange(1000)}", 0)),
        (3, ("api", "GET", "/api/status/503", 0)),
        (3, ("broken", "GET", "/broken", 0)),
        (3, ("static", "GET", "/static", 0)),
    )
    chosen = rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
    return chosen[0]


async def mixed(
    host: str,
    port: int,
    tenants: Sequence[Tenant],
    *,
    requests: int,
    seed: int = 1,
    connections: int = 4,
    h2_per_mille: int = 400,
    strays: int = 0,
    truth: Truth | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Truth:
    """Sends a plan and counts: HTTP/1.1 over ``connections`` keep-alive connections, HTTP/2 over two.

    Counts go into ``truth`` (returned). When ``stop()`` turns true no further call is begun; those under
    way are finished, so that the truth stays exact. Raises TrafficError when a connection breaks.
    """
    counted = truth if truth is not None else Truth()
    calls = plan(tenants, requests, seed=seed, h2_per_mille=h2_per_mille, strays=strays)
    h1 = iter([call for call in calls if not call.h2])
    h2 = iter([call for call in calls if call.h2])

    async def over_h1() -> None:
        async with Http1Client(host, port) as client:
            for call in h1:
                if stop():
                    return
                body = payload(call.body)
                exchange = await client.request(
                    call.method, call.authority, call.path, headers=_HEADERS, body=body, chunk=call.chunk
                )
                counted.add(*call.key, exchange)

    async def over_h2(client: Http2Client) -> None:
        for call in h2:
            if stop():
                return
            body = payload(call.body)
            exchange = await client.request(
                call.method, call.authority, call.path, headers=_HEADERS, body=body
            )
            counted.add(*call.key, exchange)

    async with Http2Client(host, port) as one, Http2Client(host, port) as two, asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(over_h1())
        for client in (one, two):
            for _ in range(STREAMS_PER_CONNECTION):
                group.create_task(over_h2(client))
    return counted


_HEADERS = (("user-agent", "proxy-usage-demo/1"), ("accept", "*/*"))
_PATTERN = bytes(range(256)) * 4


def payload(size: int) -> bytes:
    """``size`` bytes of a fixed pattern."""
    return (_PATTERN * (size // len(_PATTERN) + 1))[:size]
