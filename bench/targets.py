"""What the sink set out for, as ratios, and what the results say of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.rounds import ratios

STATED = "to be stated"
"""Where no figure was asked for."""


class Target(NamedTuple):
    """One goal."""

    what: str
    asked: str
    measured: str
    met: bool


_CHEAPER = (
    # peer, decode and fold behind a receiver, whole sink, whole sink with the protobuf fold
    ("naive", "naive Python sink", 500.0, 400.0, 150.0),
    ("cpp", "C++ sink, full schema", 2.0, 1.7, 1 / 1.6),
    ("go", "Go sink", 5.0, 4.0, None),
)
_DEARER = (("receive", "grpc.aio that receives and discards", 1.3, 1.7),)


def targets(results: dict[str, Any]) -> Iterator[Target]:
    """The goals that the results can speak to."""
    servers = results["cases"]["figures"]["headline"]["servers"]
    folds = [name.partition(":")[2] for name in servers if name.startswith("sink:")]
    for fold in folds:
        for peer, title, behind, whole, plain in _CHEAPER:
            if peer not in servers:
                continue
            if fold == "compiled":
                yield _cheaper(servers, f"fold:{fold}", peer, f"{title}: decode and fold", behind)
                yield _cheaper(servers, f"sink:{fold}", peer, f"{title}: whole sink", whole)
            elif plain is not None:
                yield _cheaper(servers, f"sink:{fold}", peer, f"{title}: whole sink, {fold} fold", plain)
        for peer, title, behind, whole in _DEARER:
            if fold == "compiled" and peer in servers:
                yield _dearer(servers, f"fold:{fold}", peer, f"{title}: decode and fold", behind)
                yield _dearer(servers, f"sink:{fold}", peer, f"{title}: whole sink", whole)
    yield from _tenants(results)
    yield from _stall(results)
    yield from _memory(results)
    yield from _envoy(results)


def _cheaper(servers: dict[str, Any], name: str, peer: str, what: str, asked: float) -> Target:
    found = statistics.median(ratios(servers, peer, name))
    said = f"at most {1 / asked:.1f} times its cost" if asked < 1 else f"{asked:g} times cheaper"
    measured = f"{1 / found:.1f} times its cost" if found < 1 else f"{found:.3g} times cheaper"
    return Target(what, said, measured, found >= asked)


def _dearer(servers: dict[str, Any], name: str, peer: str, what: str, asked: float) -> Target:
    found = statistics.median(ratios(servers, name, peer))
    return Target(what, f"at most {asked:g} times its cost", f"{found:.2f} times its cost", found <= asked)


def _tenants(results: dict[str, Any]) -> Iterator[Target]:
    for fold, rows in results.get("tenants", {}).get("figures", {}).items():
        by_number = {row["tenants"]: row for row in rows}
        few, many = by_number.get(1_000), by_number.get(max(by_number))
        if few is None or many is None or many is few:
            continue
        span = f"1,000 to {many['tenants']:,} tenants"
        alone = statistics.median(many["us_fold"]) / statistics.median(few["us_fold"])
        what = f"{span}: decode and fold, {fold} fold"
        yield Target(what, "at most 6 times the cost", f"{alone:.1f} times", alone <= 6)
        if many["bytes_row"] is not None:
            size = many["bytes_row"]
            yield Target(
                f"a row of {many['tenants']:,}, {fold} fold", "at most 150 B", f"{size} B", size <= 150
            )
        found = many["us_entry_at_60"] / few["us_entry_at_60"]
        what = f"{span}: whole sink, 60 entries a key and window, {fold} fold"
        yield Target(what, STATED, f"{found:.1f} times", met=True)


def _stall(results: dict[str, Any]) -> Iterator[Target]:
    for fold, shapes in results.get("decoding", {}).get("figures", {}).items():
        most = max(shape["piece_ms"]["most"] for shape in shapes.values())
        what = f"hold of the event loop by any piece of a 64 MiB message, {fold} fold"
        yield Target(what, "at most 2 ms", f"{most:.1f} ms", most <= 2)


def _memory(results: dict[str, Any]) -> Iterator[Target]:
    figures = results.get("residence", {}).get("figures")
    if figures and "64" in figures["most"]:
        each = (figures["most"]["64"] - statistics.median(figures["base"])) / 64 / (1 << 20)
        yield Target("64 saturated connections", "2 MiB a connection", f"{each:.2f} MiB", each <= 2)


def _envoy(results: dict[str, Any]) -> Iterator[Target]:
    figures = results.get("envoy", {}).get("figures")
    if figures:
        whole = statistics.median(figures["us_request"]["16 MiB, saturated"])
        servers = results["cases"]["figures"]["headline"]["servers"]
        for name in servers:
            if name.startswith("sink:"):
                share = statistics.median(servers[name]["us_entry"]) / whole
                what = f"Envoy's own processor time for a request, log on, {name.partition(':')[2]} fold"
                yield Target(what, "at most 6 % of it, saturated", f"{share:.1%}", share <= 0.06)
