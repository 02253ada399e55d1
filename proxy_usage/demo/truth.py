"""What a client sent and got, counted at its own socket: what the bill is compared with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class Tenant(NamedTuple):
    """A tenant of the demo: a project that owns one virtual host."""

    name: str
    host: str

    @property
    def namespace(self) -> str:
        return f"ns-{self.name}"

    def route(self, name: str) -> str:
        """The name Envoy Gateway would give this tenant's HTTPRoute ``name``."""
        return f"httproute/{self.namespace}/{name}/rule/0/match/0/{self.host}"


_NAMES = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel")


def tenants(count: int) -> tuple[Tenant, ...]:
    """``count`` tenants: alpha at alpha.example.com and so on."""
    names = [*_NAMES, *(f"tenant-{number}" for number in range(len(_NAMES), count))][:count]
    return tuple(Tenant(name, f"{name}.example.com") for name in names)


class Exchange(NamedTuple):
    """One request and its answer, in bytes as they passed the client's socket."""

    status: int
    wire_in: int
    """Bytes the client sent for it. HTTP/2: its HEADERS, DATA and RST_STREAM frames with their headers."""
    wire_out: int
    """Bytes the client got for it. HTTP/2: its HEADERS, DATA and WINDOW_UPDATE frames with their headers."""
    body_in: int
    """Bytes of the request body alone, without chunk framing."""
    body_out: int


@dataclass(slots=True)
class Count:
    """Sums of exchanges."""

    requests: int = 0
    wire_in: int = 0
    wire_out: int = 0
    body_in: int = 0
    body_out: int = 0
    statuses: Counter[int] = field(default_factory=Counter)

    def add(self, exchange: Exchange) -> None:
        self.requests += 1
        self.wire_in += exchange.wire_in
        self.wire_out += exchange.wire_out
        self.body_in += exchange.body_in
        self.body_out += exchange.body_out
        self.statuses[exchange.status] += 1

    def __add__(self, other: Count) -> Count:
        return Count(
            self.requests + other.requests,
            self.wire_in + other.wire_in,
            self.wire_out + other.wire_out,
            self.body_in + other.body_in,
            self.body_out + other.body_out,
            self.statuses + other.statuses,
        )


NO_ROUTE = ("", "")
"""Key of requests that no route takes: they belong to nobody."""


class Truth:
    """Counts per (tenant, full route name)."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Count] = {}

    def add(self, tenant: str, route: str, exchange: Exchange) -> None:
        self.counts.setdefault((tenant, route), Count()).add(exchange)

    def tenants(self) -> dict[str, Count]:
        """Counts per tenant; requests without a route are left out."""
        summed: dict[str, Count] = {}
        for (tenant, _), count in self.counts.items():
            if tenant:
                summed[tenant] = summed.get(tenant, Count()) + count
        return dict(sorted(summed.items()))

    def by_route(self) -> dict[tuple[str, str], Count]:
        """Counts per (tenant, name of the HTTPRoute): ``httproute/<ns>/<name>/…`` gives ``name``."""
        summed: dict[tuple[str, str], Count] = {}
        for (tenant, route), count in self.counts.items():
            if tenant:
                key = (tenant, route.split("/")[2])
                summed[key] = summed.get(key, Count()) + count
        return summed

    @property
    def requests(self) -> int:
        """All requests, those without a route too."""
        return sum(count.requests for count in self.counts.values())
