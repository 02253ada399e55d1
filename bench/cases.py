"""The matrix: which load is sent to which servers, in the quick profile and in the full one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.messages import KIB

PEERS = ("receive", "receive-giving-way", "receive-defaults", "naive", "cpp", "go")
FEW = ("receive", "cpp")
HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Case:
    """One load, and who takes it beside our sink and our fold."""

    name: str
    kind: str = "http"
    size: int = 16 * KIB
    connections: int = 4
    tenants: int = 1_000
    rate: float = 0
    """Messages a second and connection; 0: saturated."""
    peers: tuple[str, ...] = FEW
    fold: bool = False
    """Whether our fold is measured behind a bare receiver, too."""
    both: bool = False
    """Whether each fold that is there is measured, or only the one that runs by default."""
    seconds: float = 1.5
    window_ms: int = 60_000
    """As by default. What closing a key costs is measured apart, too (tenants.py)."""
    quick: bool = True

    def __str__(self) -> str:
        load = f"{self.rate * self.connections:,.0f} messages a second" if self.rate else "saturated"
        size = f"{self.size // KIB} KiB"
        return f"{self.kind} {size}, {self.connections} connections, {self.tenants:,} tenants, {load}"


HEADLINE = Case("headline", peers=PEERS, fold=True, both=True, seconds=3.0)
LIGHT = Case("light", rate=250, peers=("receive", "cpp", "go"), fold=True, seconds=2.0)
_LOADS = [Case(f"load-{rate * 4}", rate=rate, peers=FEW, quick=rate == 25) for rate in (25, 100, 500)]
_SIZES = [Case("64 KiB", size=64 * KIB), Case("256 KiB", size=256 * KIB), Case("tcp", kind="tcp")]
# Windows that do not close while they are filled, or closing so many keys would be all that is seen.
_TENANTS = [
    Case(f"tenants-{tenants}", tenants=tenants, window_ms=HOUR_MS, peers=("cpp",), quick=tenants <= 100_000)
    for tenants in (10, 100_000, 1_000_000)
]
_CONNECTIONS = [Case("64 connections", connections=64)]
_LIGHT_SIZES = [
    replace(
        LIGHT, name=f"light {size // KIB} KiB", size=size, rate=250 * 16 * KIB / size, fold=False, quick=False
    )
    for size in (64 * KIB, 256 * KIB)
]
_REST = [
    Case(f"{kind} {size // KIB} KiB {connections} {tenants}", kind, size, connections, tenants, quick=False)
    for kind, size, connections, tenants in (
        ("tcp", 64 * KIB, 4, 1_000),
        ("tcp", 256 * KIB, 4, 1_000),
        ("tcp", 16 * KIB, 64, 1_000),
        ("http", 64 * KIB, 64, 1_000),
        ("http", 256 * KIB, 64, 1_000),
    )
]
CASES = (HEADLINE, LIGHT, *_LOADS, *_SIZES, *_CONNECTIONS, *_TENANTS, *_LIGHT_SIZES, *_REST)
