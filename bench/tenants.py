"""What a tenant costs: the core in one process, from messages to events in a store on disk.

    python -m bench.tenants TENANTS      # PROXY_USAGE_FOLD chooses the fold

Prints JSON: microseconds of processor time for an entry of a known key, for the first entry of a key, for
closing a key (its checkpoint, its events), and bytes of memory a key. Windows are an hour long, so that none
closes by itself. Entries go to tenants drawn at random, the worst case for every cache. The longest piece of
work that holds the event loop is the pipeline's part of a turn; the store's part is a thread's.
"""

from __future__ import annotations

import gc
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
from proxy_usage.pipeline import Pipeline, Port
from proxy_usage.service.build import Storage, build_mint, build_pipeline, open_storage
from proxy_usage.turn import Turn

TURN_NS = 250_000_000
"""Work between two turns: what a saturated sink does in a checkpoint interval."""
STEADY_ENTRIES = 200_000
CLOSED = 20_000
"""Keys that are closed to learn what one costs."""
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
        self.longest_ns = 0

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
        return len(turn.windows.closing)

    def _begin(self, limit: int, everything: bool) -> Turn:
        """The pipeline's part of a turn, timed: in one piece, or in steps where the pipeline offers them."""
        in_steps: Any = getattr(self.pipeline, "beginning", None)
        steps = in_steps and in_steps(self.now_ms, limit=limit, everything=everything)
        while True:
            began = time.thread_time_ns()
            try:
                if steps is None:
                    return self.pipeline.begin(self.now_ms, limit=limit, everything=everything)
                next(steps)
            except StopIteration as ended:
                turn: Turn = ended.value
                return turn
            finally:
                self.longest_ns = max(self.longest_ns, time.thread_time_ns() - began)


def measure(tenants: int) -> dict[str, Any]:
    """The figures for so many tenants."""
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        bench = Bench(configuration(Path(directory), tenants))
        dice = random.Random(3)
        second = bench.now_ms // 1_000 - 1
        gc.collect()
        gc.freeze()
        before = memory(_SELF)
        first = _fed(bench, firsts(bench.templates, tenants, second))
        size = memory(_SELF) - before
        steady_messages = max(1, STEADY_ENTRIES // bench.templates[0].entries)
        rounds = []
        for _ in range(5):
            chosen = (dice.choice(bench.templates) for _ in range(steady_messages // 5))
            rounds.append(_fed(bench, (numbered(one, tenants, dice, second) for one in chosen)))
        stall_ns, bench.longest_ns = bench.longest_ns, 0
        closed, used = _close(bench)
        bench.storage.close()
    steady = sorted(rounds)[2]
    return {
        "tenants": tenants,
        "fold": fold_name(),
        "us_entry": round(steady, 3),
        "us_entry_rounds": [round(one, 3) for one in rounds],
        "us_first": round(first, 3),
        "us_close": round(used / closed, 2),
        "us_entry_at_60": round(steady + (first - steady + used / closed) / 60, 3),
        "bytes_key": size // tenants,
        "turn_stall_ms": round(stall_ns / 1e6, 2),
    }


def _fed(bench: Bench, raws: Iterable[bytes]) -> float:
    """Feeds messages with turns in between. Returns microseconds of this thread an entry."""
    used, since, began_with = 0, 0, bench.entries
    for raw in raws:
        began = time.thread_time_ns()
        bench.feed(raw)
        if since >= TURN_NS:
            bench.turn()
            since = 0
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
