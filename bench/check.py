"""Compares ratios of a short run with the committed ones: ``python -m bench.check [decoding | cases]``.

Ratios and no times: what is compared was measured in turns, so that a slow or busy machine slows down both
sides. ``SLACK`` is what may still come between. Exit code 1 when a ratio is worse than that.

``decoding`` takes seconds and one process. ``cases`` needs the C++ generator and two cores that others leave
alone.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from bench import decoding, results
from bench.cases import HEADLINE
from bench.messages import KIB
from bench.processes import OTHER_CORE
from bench.rounds import ratios, run_case

SLACK = 1.5
SHAPE = ("http", 16)
PARTS = ("decoding", "cases")


class Compared(NamedTuple):
    """A ratio then and now; larger is worse."""

    what: str
    committed: float
    now: float

    @property
    def worse(self) -> bool:
        return self.now > self.committed * SLACK

    def __str__(self) -> str:
        verdict = "WORSE" if self.worse else "ok"
        return f"{self.what:<60} {self.committed:>8.3f} {self.now:>8.3f}  {verdict}"


def check_decoding(committed: dict[str, Any], folds: list[str]) -> Iterator[Compared]:
    """Each fold's cost over that of protobuf's classes of the full schema, in one process."""
    name = f"{SHAPE[0]} {SHAPE[1]} KiB"
    for fold in folds:
        then = committed["decoding"]["figures"].get(fold, {}).get(name)
        if then is not None:
            now = decoding.in_a_process(fold, SHAPE[0], SHAPE[1] * KIB, naive=False)
            yield Compared(f"{fold} fold, times protobuf's full schema", _over_upb(then), _over_upb(now))


def check_cases(committed: dict[str, Any], folds: list[str]) -> Iterator[Compared]:
    """The sink's and the fold's cost over those of the peers that are cheap to run."""
    then = committed["cases"]["figures"]["headline"]["servers"]
    case = replace(HEADLINE, peers=("receive", "cpp"), seconds=2.0)
    now = asyncio.run(run_case(case, folds))
    for name in now:
        for peer in case.peers:
            if name != peer and {name, peer} <= then.keys() and peer in now and name not in case.peers:
                yield Compared(
                    f"{name}, times {peer}",
                    statistics.median(ratios(then, name, peer)),
                    statistics.median(ratios(now, name, peer)),
                )


def _over_upb(figures: dict[str, Any]) -> float:
    over: list[float] = [a / b for a, b in zip(figures["fold"], figures["upb"], strict=True)]
    return statistics.median(over)


def main() -> int:
    """Runs it. Returns the exit code."""
    wanted = sys.argv[1:] or list(PARTS)
    if set(wanted) - set(PARTS):
        print(f"bench.check: parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    committed = results.read(results.COMMITTED)
    folds = decoding.available()
    found: list[Compared] = []
    if "decoding" in wanted:
        found += check_decoding(committed, folds)
    if "cases" in wanted:
        os.sched_setaffinity(0, {OTHER_CORE})
        found += check_cases(committed, folds)
    print(f"{'ratio':<60} {'then':>8} {'now':>8}")
    print(*found, sep="\n")
    return 0 if found and not any(one.worse for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
