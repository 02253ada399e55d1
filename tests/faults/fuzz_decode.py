"""Fuzzing of everything that reads a sender's bytes, up to the pipeline's turn; guided by coverage.

    python tests/faults/fuzz_decode.py --messages 100000 [--corpus DIR]

Starts from what real Envoys sent and keeps what reaches new code. Whatever the bytes are: nothing raises,
each row that was read has one fate, each amount one place, and memory does not grow. Exit code 0 when all of
that held; else the input that broke it is written into the corpus directory. Where atheris is not to be had,
the same changes are made blindly.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import resource
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

GUIDED = importlib.util.find_spec("atheris") is not None
if GUIDED:
    import atheris
with atheris.instrument_imports(include=["proxy_usage"]) if GUIDED else contextlib.nullcontext():
    from decode_target import MAX_LEN, Target, mutate_row, scramble, seeds

GROWTH = 64 << 20
"""Bytes that memory may grow by after the first quarter: the corpus itself, and what allocators keep."""


class Run:
    """So many messages into one target."""

    def __init__(self, messages: int) -> None:
        self.target = Target()
        self.messages = messages
        self._warm = 0

    def once(self, raw: bytes) -> None:
        """One more. AssertionError when something does not add up."""
        self.target.message(raw)
        done = self.target.messages
        if done == self.messages // 4:
            self._warm = resident()
        if done == self.messages:
            grown = resident() - self._warm
            print(f"{done} messages, {self.target.rows} rows, grown by {grown >> 20} MiB", flush=True)
            assert grown < GROWTH


def resident() -> int:
    """Resident bytes; where nobody says, the most there ever were."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def guided(run: Run, corpus: Path, seed: int) -> None:
    """libFuzzer decides what is changed; half of the changes are within a row. Ends the process."""
    dice = random.Random(seed)

    def mutator(raw: bytes, max_size: int, _seed: int) -> bytes:
        if dice.random() < 0.5:
            return bytes(atheris.Mutate(raw, max_size))
        return mutate_row(raw, lambda row: bytes(atheris.Mutate(row, MAX_LEN)), dice)[:max_size]

    for name, raw in seeds().items():
        (corpus / name).write_bytes(raw)
    limits = [f"-runs={run.messages}", f"-max_len={MAX_LEN}", "-timeout=20", f"-seed={seed}"]
    arguments = [sys.argv[0], *limits, "-rss_limit_mb=2048", f"-artifact_prefix={corpus}/broke-", str(corpus)]
    atheris.Setup(arguments, run.once, custom_mutator=mutator)
    atheris.Fuzz()


def blind(run: Run, corpus: Path, seed: int) -> None:
    """Real messages, changed at random."""
    dice = random.Random(seed)
    known = list(seeds().values())
    for _ in range(run.messages):
        raw = dice.choice(known)
        raw = (
            scramble(raw, dice) if dice.random() < 0.3 else mutate_row(raw, lambda r: scramble(r, dice), dice)
        )
        try:
            run.once(raw)
        except Exception:
            (corpus / "broke-blind").write_bytes(raw)
            raise


def main() -> None:
    """Runs as many messages as asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--corpus", type=Path, default=None)
    parser.add_argument("--blind", action="store_true", help="without coverage")
    options = parser.parse_args()
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="fuzz-decode-"))
    fuzz = guided if GUIDED and not options.blind else blind
    fuzz(Run(options.messages), corpus, options.seed)


if __name__ == "__main__":
    main()
