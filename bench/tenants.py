"""What a tenant costs: the core in one process, from messages to events in a store on disk.

    python -m bench.tenants TENANTS      # PROXY_USAGE_FOLD chooses the fold

Prints JSON: microseconds of processor time for an entry of a known key, for the first entry of a key, for
closing a key (its checkpoint, its events), and bytes of memory a key, all of the process; and for decode
and fold alone, microseconds for an entry of a known key and, of the compiled fold, bytes a row. Windows are
an hour long, so that none closes by itself. Entries go to tenants drawn at random, the worst case for every
cache. Turns come as often as the service takes them: the dearer they are, the more seldom. The longest piece
of work that holds the event loop is the pipeline's part of a turn; the store's part is a thread's. What the
machine itself adds to a piece is read off as many pieces of plain counting, each as long as the median step.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.building import BUILD
from bench.messages import DIGITS, KIB, Message, hello, messages, numbered, places, varint
from bench.peers.server import fold_name
from bench.processes import memory
from proxy_usage.config import Config, load_text
from proxy_usage.decode import parts, read_identifier
from proxy_usage.decode.compiled import CompiledFold
from proxy_usage.pipeline import Pipeline, Port
from proxy_usage.service.build import (
    Storage,
    build_attributor,
    build_folds,
    build_mint,
    build_pipeline,
    open_storage,
)
from proxy_usage.service.collector import settle
from proxy_usage.service.turns import pause_s
from proxy_usage.turn import Turn

INTERVAL_S = 0.25
"""The checkpoint interval, as by default."""
STEADY_ENTRIES = 5_000_000
"""Many, or there would be no turn among them."""
FOLDED_ENTRIES = 200_000
CLOSED = 20_000
"""Keys that are closed to learn what one costs."""
LONG_NS = 2_000_000
"""What no step may take."""
HOUR_MS = 3_600_000
_SELF = os.getpid()


def configuration(directory: Path, tenants: int) -> Config:
    """Everything by default, but for bounds that let so many tenants in, and long windows."""
    text = f"""
store: {{path: {directory / "usage.db"}}}
windows: {{length: 1h, max_keys: {max(200_000, 2 * tenants)}}}
tenant: {{max_tenants: {max(100_000, tenants)}}}
listen: {{limits: {{identities: {max(100_000, 2 * tenants)}}}}}
outputs: [{{name: billing, format: billing, url: "http://127.0.0.1:9/v1/usage/events:batchIngest"}}]
"""
    return load_text(text, origin="bench", base=directory, env={})


class Bench:
    """One store and one pipeline."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.storage: Storage = open_storage(self.config)
        self.pipeline: Pipeline = build_pipeline(self.config, self.storage)
        self.mint = build_mint(self.config)
        origin = read_identifier(hello().raw, "", self.config.fold_plan().node_paths)
        assert origin is not None
        self.origin = origin
        self.templates = messages("http", 16 * KIB)
        self.now_ms = time.time_ns() // 1_000_000
        self.entries = 0
        self.steps_ns: list[int] = []

    def feed(self, raw: bytes) -> None:
        """A message, as the receiver hands it over."""
        for part in parts(raw):
            self.pipeline.take(Port.ALL, self.origin, part, self.now_ms)
            self.entries += len(part.entries)

    def turn(self, *, everything: bool = False, limit: int = 1_000) -> int:
        """Makes durable what was read. Returns how many keys it closed."""
        turn = self._begin(limit, everything)
        if not turn.is_empty:
            self.storage.checkpoints.commit(turn, self.mint, self.now_ms)
            if self.storage.checkpoints.wants_fold:
                self.storage.checkpoints.fold()
        self.pipeline.commit(turn)
        closed = len(turn.windows.closing)
        self._step_by_step(turn.windows.release())
        return closed

    def _begin(self, limit: int, everything: bool) -> Turn:
        """The pipeline's part of a turn."""
        steps = self.pipeline.beginning(self.now_ms, limit=limit, everything=everything)
        turn = self._step_by_step(steps)
        assert isinstance(turn, Turn)
        return turn

    def _step_by_step(self, steps: Iterator[None]) -> object:
        """Takes steps that the service pauses between, and notes the longest. Returns what they come to."""
        while True:
            began = time.thread_time_ns()
            try:
                next(steps)
            except StopIteration as ended:
                return ended.value
            finally:
                self.steps_ns.append(time.thread_time_ns() - began)


def measure(tenants: int) -> dict[str, Any]:
    """The figures for so many tenants."""
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        bench = Bench(configuration(Path(directory), tenants))
        dice = random.Random(3)
        second = bench.now_ms // 1_000 - 1
        settle()  # as the service does
        before = memory(_SELF)
        first = _fed(bench, firsts(bench.templates, tenants, second))
        size = memory(_SELF) - before
        steady_messages = max(1, STEADY_ENTRIES // bench.templates[0].entries)
        rounds = []
        for _ in range(5):
            chosen = (dice.choice(bench.templates) for _ in range(steady_messages // 5))
            rounds.append(_fed(bench, (numbered(one, tenants, dice, second) for one in chosen)))
        held = sorted(bench.steps_ns)
        plain = sorted(_counting(len(held), held[len(held) // 2]))
        closed, used = _close(bench)
        bench.storage.close()
    steady = sorted(rounds)[2]
    fold_rounds, bytes_row = alone(bench.config, bench.templates, tenants)
    return {
        "tenants": tenants,
        "fold": fold_name(),
        "us_entry": round(steady, 3),
        "us_entry_rounds": [round(one, 3) for one in rounds],
        "us_first": round(first, 3),
        "us_close": round(used / closed, 2),
        "us_entry_at_60": round(steady + (first - steady + used / closed) / 60, 3),
        "bytes_key": size // tenants,
        "us_fold": fold_rounds,
        "bytes_row": bytes_row,
        "turn_steps": len(held),
        "turn_steps_over_2_ms": sum(ns > LONG_NS for ns in held),
        "turn_stall_p999_ms": round(held[len(held) * 999 // 1_000] / 1e6, 2),
        "turn_stall_ms": round(held[-1] / 1e6, 2),
        "plain_steps_over_2_ms": sum(ns > LONG_NS for ns in plain),
        "plain_stall_ms": round(plain[-1] / 1e6, 2),
    }


def _counting(pieces: int, each_ns: int) -> Iterator[int]:
    """How long so many pieces of counting take, which would take ``each_ns`` on a machine of their own."""
    trial, began = 1_000_000, time.thread_time_ns()
    for _ in range(trial):
        pass
    turns = range(max(1, trial * each_ns // (time.thread_time_ns() - began)))
    for _ in range(pieces):
        began = time.thread_time_ns()
        for _ in turns:
            pass
        yield time.thread_time_ns() - began


def alone(config: Config, templates: Sequence[Message], tenants: int) -> tuple[list[float], int | None]:
    """Decode and fold without what is behind them: microseconds an entry where every key is known, by round;
    bytes a row of the compiled fold's table."""
    fold = build_folds(config, build_attributor(config))[Port.ALL]
    origin = read_identifier(hello().raw, "", config.fold_plan().node_paths)
    assert origin is not None
    now_ms = time.time_ns() // 1_000_000
    second = now_ms // 1_000 - 1
    for raw in firsts(templates, tenants, second):
        fold.message(origin, raw, now_ms)
    dice = random.Random(5)
    rounds = []
    for _ in range(5):
        chosen = [dice.choice(templates) for _ in range(FOLDED_ENTRIES // 5 // templates[0].entries)]
        raws = [numbered(one, tenants, dice, second) for one in chosen]
        began = time.thread_time_ns()
        entries = sum(fold.message(origin, raw, now_ms) for raw in raws)
        rounds.append(round((time.thread_time_ns() - began) / 1_000 / entries, 4))
    row = fold.allocated_bytes // fold.rows if isinstance(fold, CompiledFold) else None
    return rounds, row


def _fed(bench: Bench, raws: Iterable[bytes]) -> float:
    """Feeds messages with turns in between. Returns microseconds of this thread an entry."""
    used, since, began_with, pause = 0, 0, bench.entries, INTERVAL_S
    for raw in raws:
        began = time.thread_time_ns()
        bench.feed(raw)
        if since >= pause * 1e9:
            turned = time.thread_time_ns()
            bench.turn()
            worked_s = (time.thread_time_ns() - turned) / 1e9
            pause = pause_s(INTERVAL_S, worked_s, worked_s)
            since = 0
            began += time.thread_time_ns() - turned
            used += int(worked_s * 1e9)
        took = time.thread_time_ns() - began
        used, since = used + took, since + took
    began = time.thread_time_ns()
    bench.turn()
    return (used + time.thread_time_ns() - began) / 1_000 / (bench.entries - began_with)


def firsts(templates: Sequence[Message], tenants: int, second: int) -> Iterator[bytes]:
    """Messages in which every tenant comes at least once."""
    first = 0
    for template in itertools.cycle(templates):
        raw = bytearray(template.raw)
        for number, (digits, at) in enumerate(places(template), start=first):
            for place in digits:
                raw[place : place + DIGITS] = b"%07d" % (number % tenants)
            raw[at : at + 5] = varint(second)
        yield bytes(raw)
        first += template.entries
        if first >= tenants:
            return


def _close(bench: Bench) -> tuple[int, float]:
    """Closes keys in slices of a thousand, as the service does. Returns how many, and µs."""
    closed = 0
    bench.now_ms += 2 * HOUR_MS
    began = time.thread_time_ns()
    while closed < CLOSED and (more := bench.turn(everything=True)):
        closed += more
    return closed, (time.thread_time_ns() - began) / 1_000


def main() -> None:
    print(json.dumps(measure(int(sys.argv[1]))))


if __name__ == "__main__":
    main()
