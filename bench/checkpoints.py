"""What a turn costs with many dirty keys: CPU of the event loop's part and of the store's thread.

    python bench/checkpoints.py [KEYS ...]

Prints milliseconds per turn (median of 20) and the share of one core at one turn each 250 ms. The design's
bound is 5 % at 10,000 dirty keys; above, turns are taken less often, so that they never pass a tenth.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from proxy_usage.config import load_text
from proxy_usage.model import Key
from proxy_usage.service.build import build_mint, build_windows
from proxy_usage.store import Checkpoints, Database
from proxy_usage.turn import Turn

INTERVAL_MS = 250
TURNS = 20
CONFIG = "outputs: [{name: none, format: none}]\nwindows: {max_keys: 2000000}\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = load_text(CONFIG, origin="bench", base=Path(directory), env={})
        mint = build_mint(config)
        print(f"{'keys':>8} {'loop ms':>8} {'store ms':>9} {'store cpu ms':>12} {'share of a core':>16}")
        for count in [int(text) for text in sys.argv[1:]] or [1_000, 10_000, 100_000]:
            database = Database(Path(directory) / f"{count}.db")
            checkpoints = Checkpoints(database, max_held=10_000)
            windows = build_windows(config)
            keys = [Key(f"tenant-{number}", ("",) * len(config.dimensions)) for number in range(count)]
            loop, wall, cpu = [], [], []
            now_ms = time.time_ns() // 1_000_000 // 60_000 * 60_000
            for number in range(1, TURNS + 2):
                for key in keys:
                    windows.add(key, now_ms, 1, (1, 500, 1_500, 1_000_000), now_ms)
                started = time.thread_time_ns()
                turn = Turn(windows.begin(now_ms), (count, 0, 0, 0), number)
                loop.append(time.thread_time_ns() - started)
                started, clock = time.thread_time_ns(), time.perf_counter_ns()
                checkpoints.commit(turn, mint, now_ms)
                if checkpoints.wants_fold:
                    checkpoints.fold()
                cpu.append(time.thread_time_ns() - started)
                wall.append(time.perf_counter_ns() - clock)
                windows.commit(turn.windows)
            database.close()
            figures = [statistics.median(times[1:]) / 1e6 for times in (loop, wall, cpu)]
            mean = (sum(loop[1:]) + sum(cpu[1:])) / TURNS / 1e6
            columns = f"{figures[0]:>8.2f} {figures[1]:>9.2f} {figures[2]:>12.2f}"
            print(f"{count:>8} {columns} {mean / INTERVAL_MS:>15.1%}")


if __name__ == "__main__":
    main()
