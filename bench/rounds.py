"""Servers under the same load in interleaved rounds: a disturbance of the machine meets all of them alike.

A round is one server's turn: connections are made, messages sent, each stream is ended and has been read to
its end, what was read is stored; the processor time of all that, divided by the entries. Every server runs
through the whole case, so that windows close and garbage is collected as in a long life. At its end each must
have counted exactly what the generator sent.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.building import BUILD, NotBuilt
from bench.cases import Case
from bench.messages import KIB, write
from bench.processes import (
    BenchError,
    OurSink,
    Server,
    cpp_peer,
    cpu_us,
    generate,
    go_peer,
    memory,
    python_peer,
)
from proxy_usage.demo.billing import BillingStandIn

NAIVE_RATE = 5
"""Messages a second and connection that the naive sink can take: its backlog would never drain."""
ROUNDS = 5


async def run_case(case: Case, folds: Sequence[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """A case's figures by server. Raises BenchError when a server counted something else than was sent."""
    messages = write(BUILD / f"{case.kind}-{case.size // KIB}.bin", case.kind, case.size)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        async with BillingStandIn() as billing, contextlib.AsyncExitStack() as running:
            servers = []
            for server in _servers(case, folds, Path(directory), billing.url):
                await server.start()
                running.push_async_callback(server.kill)
                servers.append(server)
                # Not counted: what is loaded late, and the first touch of memory.
                await _round(server, case, messages, seconds=0.5, seed=0)
            ours = [server for server in servers if isinstance(server, OurSink)]
            began = {server.name: (cpu_us(server.pid), len(server.sent)) for server in ours}
            for number in range(1, rounds + 1):
                for server in servers[number % len(servers) :] + servers[: number % len(servers)]:
                    figures = await _round(server, case, messages, seconds=case.seconds, seed=number)
                    found.setdefault(server.name, []).append(figures)
            whole = {server.name: _whole(server, *began[server.name]) for server in ours}
            for server in servers:
                _check(server, await server.stop())
    summaries = {name: _summary(figures) for name, figures in found.items()}
    for name, us_entry in whole.items():
        summaries[name]["us_entry_whole"] = [round(us_entry, 4)]
    return summaries


def _whole(server: Server, began_us: int, rounds: int) -> float:
    """Microseconds an entry with all that a sink did since, between its rounds, too: turns that find nothing,
    windows that close, deliveries."""
    entries: int = sum(sent["entries"] for sent in server.sent[rounds:])
    return (cpu_us(server.pid) - began_us) / entries


def _servers(case: Case, folds: Sequence[str], directory: Path, url: str) -> Iterator[Server]:
    used = folds if case.both else folds[:1]
    for fold in used:
        yield OurSink(
            directory, url, name=f"sink:{fold}", window_ms=case.window_ms, tenants=case.tenants, fold=fold
        )
        if case.fold:
            server = python_peer("fold", case.window_ms, fold=fold)
            server.name = f"fold:{fold}"
            yield server
    for name in case.peers:
        try:
            if name == "cpp":
                yield cpp_peer(case.window_ms)
            elif name == "go":
                yield go_peer(case.window_ms)
            else:
                yield python_peer(name, case.window_ms)
        except NotBuilt as error:
            print(f"  left out: {error}")


async def _round(
    server: Server, case: Case, messages: Path, *, seconds: float, seed: int
) -> dict[str, float]:
    naive = server.name == "naive"
    before = cpu_us(server.pid)
    sent = await generate(
        server.port,
        messages,
        connections=case.connections,
        tenants=case.tenants,
        seconds=seconds,
        rate=NAIVE_RATE * 16 * KIB / case.size if naive else case.rate,
        seed=seed + 1,
    )
    await server.settle()
    used = cpu_us(server.pid) - before
    server.sent.append(sent)
    return {
        "us_entry": used / sent["entries"],
        "us_message": used / max(1, sent["messages"]),
        "entries_s": sent["entries"] / sent["seconds"],
        "busy": used / 1e6 / sent["seconds"],
        "rss": memory(server.pid),
    }


def _check(server: Server, counted: dict[str, Any]) -> None:
    if server.name.startswith("receive"):
        return
    # betterproto's timedelta has no nanoseconds: the naive sink cannot count them.
    names = ["entries", "bytes_in", "bytes_out", *([] if server.name == "naive" else ["ns"])]
    for name in names:
        total = sum(sent[name] for sent in server.sent)
        if counted[name] != total:
            raise BenchError(f"{server.name} counted {counted[name]:,} {name}, sent were {total:,}")


def _summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Each figure's rounds: the reader may take what it wants of them."""
    return {name: [round(one[name], 4) for one in rounds] for name in rounds[0]}


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest."""
    return statistics.median(values), min(values), max(values)


def ratios(case: dict[str, Any], name: str, other: str, figure: str = "us_entry") -> list[float]:
    """``name``'s cost over ``other``'s, round by round."""
    return [a / b for a, b in zip(case[name][figure], case[other][figure], strict=True)]
