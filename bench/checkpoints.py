"""What a turn costs with many dirty keys: CPU of the event loop's part and of the store's thread.

    python bench/checkpoints.py [KEYS ...]

Prints milliseconds per turn (median of 20, of 5 for a million keys), the longest that one step of a turn
holds the event loop (each step by the thread's own clock, so that neighbours on the machine do not count; the
median over turns of a turn's longest, and the longest of all), and the share of one core at one turn each
250 ms. Turns are taken less often where they are long, so that they never pass a tenth.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from proxy_usage.config import load_text
from proxy_usage.model import Key
from proxy_usage.pipeline import Pipeline, next_step
from proxy_usage.service.build import build_attributor, build_mint, build_windows
from proxy_usage.service.collector import settle
from proxy_usage.store import Checkpoints, Database
from proxy_usage.turn import Turn

INTERVAL_MS = 250
TURNS = 20
CONFIG = """
outputs: [{name: none, format: none}]
windows: {max_keys: 4000000}
tenant: {max_tenants: 2000000}
"""


class Steps:
    """Times steps on the event loop's side."""

    def __init__(self) -> None:
        self.total_ns = 0
        self.longest_ns = 0

    def step(self, work: Callable[[], Any]) -> Any:
        begun = time.thread_time_ns()
        result = work()
        spent = time.thread_time_ns() - begun
        self.total_ns += spent
        self.longest_ns = max(self.longest_ns, spent)
        return result


def begin(pipeline: Pipeline, steps: Steps, now_ms: int) -> Turn:
    making = pipeline.beginning(now_ms)
    turn: Turn | None = None
    while turn is None:
        turn = steps.step(partial(next_step, making))
    return turn


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = load_text(CONFIG, origin="bench", base=Path(directory), env={})
        mint = build_mint(config)
        heads = (
            "keys",
            "loop ms",
            "longest step ms",
            "of all",
            "store ms",
            "store cpu ms",
            "share of a core",
        )
        print(" | ".join(heads))
        for count in [int(text) for text in sys.argv[1:]] or [1_000, 10_000, 100_000, 1_000_000]:
            database = Database(Path(directory) / f"{count}.db")
            checkpoints = Checkpoints(database, max_held=10_000)
            windows = build_windows(config)
            plan = config.fold_plan()
            pipeline = Pipeline(
                {},
                build_attributor(config),
                windows,
                quantities=plan.quantities,
                counts=dict,
                max_held=10_000,
            )
            keys = [Key(f"tenant-{number}", ("",) * len(config.dimensions)) for number in range(count)]
            settle()  # as the service does: full collections are apart
            loop, longest, wall, cpu = [], [], [], []
            now_ms = time.time_ns() // 1_000_000 // 60_000 * 60_000
            turns = TURNS if count < 1_000_000 else 5
            for _ in range(turns + 1):
                for key in keys:
                    windows.add(key, now_ms, 1, (1, 500, 1_500, 1_000_000), now_ms)
                steps = Steps()
                turn = begin(pipeline, steps, now_ms)
                begun, clock = time.thread_time_ns(), time.perf_counter_ns()
                checkpoints.commit(turn, mint, now_ms)
                if checkpoints.wants_fold:
                    checkpoints.fold()
                cpu.append(time.thread_time_ns() - begun)
                wall.append(time.perf_counter_ns() - clock)
                pipeline.commit(turn)
                release = turn.windows.release()
                while not steps.step(partial(next, release, True)):
                    pass
                loop.append(steps.total_ns)
                longest.append(steps.longest_ns)
            database.close()
            figures = [statistics.median(times[1:]) / 1e6 for times in (loop, longest, wall, cpu)]
            figures.insert(2, max(longest) / 1e6)
            mean = (sum(loop[1:]) + sum(cpu[1:])) / turns / 1e6
            columns = " | ".join(f"{figure:.2f}" for figure in figures)
            print(f"{count} | {columns} | {mean / INTERVAL_MS:.1%}", flush=True)


if __name__ == "__main__":
    main()
