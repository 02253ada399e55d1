"""Decode and fold alone, in one process: no network, no store. Beside it what else reads the same bytes.

    python -m bench.decoding FOLD KIND BYTES NAIVE   # PROXY_USAGE_FOLD chooses what runs

- ``fold``: ``decode.parts`` and ``Fold.entries``, drained every 250 ms' worth of messages, into a dict.
- ``upb``: protobuf's own classes of Envoy's full schema (xds-protos), the same sums in a dict.
- ``upb parse``: the same without reading anything of what was parsed.
- ``naive``: envoy-data-plane, the same sums in a dict.

Beside them: how long a piece of a message of 64 MiB, an outage's backlog, holds the event loop.

All are measured in turns within one process, so that their ratios hold on a busy machine. The sums of all
must be the same.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from envoy.service.accesslog.v3 import als_pb2

from bench.building import ROOT
from bench.messages import KIB, Amounts, hello, messages, numbered
from bench.peers.server import Folds, Naive, Windows, fold_name

ROUNDS = 9
TENANTS = 1_000
REPEATS = 8
WINDOW_MS = 60_000
NAIVE_MESSAGES = 2
BACKLOG = (64 << 20) - (1 << 16)
"""Bytes of the large message: about as many as the receiver takes by default."""


class Upb:
    """Protobuf's classes, and a dict."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def take(self, raw: bytes, stream: dict[str, Any]) -> None:
        message = als_pb2.StreamAccessLogsMessage.FromString(raw)
        if message.HasField("identifier"):
            stream["region"] = message.identifier.node.locality.region
        region = stream.get("region", "")
        for entry in message.http_logs.log_entry:
            common = entry.common_properties
            sizes = common.downstream_wire_bytes_received, common.downstream_wire_bytes_sent
            self._add(common, region, *sizes)
        for entry in message.tcp_logs.log_entry:
            connection = entry.connection_properties
            self._add(entry.common_properties, region, connection.received_bytes, connection.sent_bytes)

    def _add(self, common: Any, region: str, received: int, sent: int) -> None:
        ns = common.duration.seconds * 1_000_000_000 + common.duration.nanos
        ended_ms = (common.start_time.seconds * 1_000_000_000 + common.start_time.nanos + ns) // 1_000_000
        tags = common.custom_tags
        row = self._windows.row(ended_ms, (tags["project_name"], region, tags["gateway"], common.route_name))
        row[0] += 1
        row[1] += received
        row[2] += sent
        row[3] += ns

    def end(self) -> None:
        """Nothing is open."""


def measure(kind: str, size: int, *, naive: bool = True, rounds: int = ROUNDS) -> dict[str, Any]:
    """Microseconds of processor time an entry, by program, round by round."""
    templates = messages(kind, size, count=max(2, 24 * 16 * KIB // size))
    dice = random.Random(7)
    second = int(time.time()) - 1
    raws = [numbered(message, TENANTS, dice, second) for message in templates]
    entries = sum(message.entries for message in templates)
    expected = Amounts(*map(sum, zip(*(message.amounts for message in templates), strict=True)))
    programs: dict[str, Callable[[Windows], Any]] = {"fold": Folds, "upb": Upb}
    found: dict[str, list[float]] = {name: [] for name in (*programs, "upb parse")}
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for name, program in programs.items():
            used = _fed(program, raws, [entries * REPEATS, *(amount * REPEATS for amount in expected)])
            found[name].append(used / 1_000 / (entries * REPEATS))
        began = time.thread_time_ns()
        for raw in raws * REPEATS:
            als_pb2.StreamAccessLogsMessage.FromString(raw)
        found["upb parse"].append((time.thread_time_ns() - began) / 1_000 / (entries * REPEATS))
    if naive:
        few = templates[:NAIVE_MESSAGES]
        some = sum(message.entries for message in few)
        found["naive"] = [_naive(raws[: len(few)]) / 1_000 / some for _ in range(min(5, rounds))]
    figures = {name: [round(one, 4) for one in all_] for name, all_ in found.items()}
    return {"fold_name": fold_name(), "piece_ms": _pieces(raws), **figures}


def _fed(program: Callable[[Windows], Any], raws: Sequence[bytes], expected: Sequence[int]) -> int:
    windows = Windows(WINDOW_MS)
    peer = program(windows)
    stream: dict[str, Any] = {}
    peer.take(hello().raw, stream)
    began = time.thread_time_ns()
    for raw in list(raws) * REPEATS:
        peer.take(raw, stream)
    peer.end()
    used = time.thread_time_ns() - began
    windows.close(1 << 62)
    assert windows.closed == list(expected), f"{program.__name__}: {windows.closed} is not {expected}"
    return used


def _pieces(raws: Sequence[bytes]) -> dict[str, float]:
    """Milliseconds of processor time from one pause to the next, while a large message is folded."""
    # Serialised messages in a row are one message with the rows of all.
    backlog = b"".join(itertools.islice(itertools.cycle(raws), BACKLOG // len(raws[0])))
    held = sorted(Folds(Windows(WINDOW_MS)).pieces(hello().raw + backlog))
    return {
        "median": _ms(held[len(held) // 2]),
        "p999": _ms(held[len(held) * 999 // 1_000]),
        "most": _ms(held[-1]),
    }


def _ms(ns: int) -> float:
    return round(ns / 1e6, 3)


def _naive(raws: Sequence[bytes]) -> int:
    windows = Windows(WINDOW_MS)
    peer = Naive(windows)
    began = time.thread_time_ns()
    for raw in raws:
        peer.take(raw, {})
    return time.thread_time_ns() - began


def in_a_process(fold: str, kind: str, size: int, *, naive: bool) -> dict[str, Any]:
    """``measure`` in a process of its own, which runs the fold of that name."""
    words = [sys.executable, "-m", "bench.decoding", fold, kind, str(size), str(int(naive))]
    ran = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "PROXY_USAGE_FOLD": fold},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def available() -> list[str]:
    """The folds that can run here, the one that does by default first."""
    found = []
    for wanted in (None, "compiled", "protobuf"):
        environment = {name: value for name, value in os.environ.items() if name != "PROXY_USAGE_FOLD"}
        if wanted is not None:
            environment["PROXY_USAGE_FOLD"] = wanted
        ran = subprocess.run(
            [sys.executable, "-m", "proxy_usage", "version", "--json"],
            cwd=ROOT,
            env=environment,
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
        if ran.returncode == 0:
            name = str(json.loads(ran.stdout)["fold"]).partition(":")[0]
            if name not in found:
                found.append(name)
    return found


if __name__ == "__main__":
    _, fold, kind, size, naive = sys.argv
    print(json.dumps(measure(kind, int(size), naive=naive == "1")))
