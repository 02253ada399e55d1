"""``python -m bench [--full] [--save] [PART ...]``: measures, prints, and keeps the results.

Parts: cases (servers under load), decoding, tenants, delivering, residence, envoy, flush. Unless some are
named, all but the last two, which need a real Envoy; with ``--full`` these, too, and the whole matrix. The
quick profile is ten minutes. ``--case NAME`` takes one case. Results go to build/bench/results.json; with
``--save`` to bench/results.json, and the tables and plots of docs/performance.md are written from it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import decoding, delivering, residence, results, tables
from bench.building import ROOT, NotBuilt, build_cpp
from bench.cases import CASES
from bench.messages import KIB
from bench.processes import OTHER_CORE, BenchError
from bench.rounds import run_case

ENVOY_PARTS = ("envoy", "flush")
PARTS = ("decoding", "cases", "tenants", "delivering", "residence", *ENVOY_PARTS)
QUICK_TENANTS = (1_000, 100_000)
FULL_TENANTS = (10, 1_000, 100_000, 1_000_000)
QUICK_SHAPES = (("http", 16), ("http", 256), ("tcp", 16))
FULL_SHAPES = (*QUICK_SHAPES, ("http", 64))


def main() -> int:
    """Runs it. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--full", action="store_true", help="the whole matrix: about an hour")
    parser.add_argument("--save", action="store_true", help="into bench/results.json and docs/performance.md")
    parser.add_argument("--case", default="", help="one case by its name, or names separated by commas")
    given = parser.parse_args()
    if wrong := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(wrong))}; parts are {', '.join(PARTS)}")
    os.sched_setaffinity(0, {OTHER_CORE})
    path = results.COMMITTED if given.save else results.LATEST
    folds = decoding.available()
    print(f"folds that run here: {', '.join(folds)} (the first one by default)")
    try:
        build_cpp("generator")
    except NotBuilt as error:
        print(f"{error}\nPython sends in its place, which holds the fastest servers up")
    began = time.monotonic()
    try:
        for part in given.parts or (PARTS if given.full else PARTS[: -len(ENVOY_PARTS)]):
            _run(part, folds, path, full=given.full, only=tuple(filter(None, given.case.split(","))))
    except (BenchError, NotBuilt) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; results are in {path.relative_to(ROOT)}")
    if given.save:
        tables.write()
    return 0


def _run(part: str, folds: list[str], path: Path, *, full: bool, only: tuple[str, ...]) -> None:
    print(f"== {part}", flush=True)
    if part == "cases":
        known = results.read(path).get("cases", {}).get("figures", {})
        for case in CASES:
            if case.name not in only if only else not (full or case.quick):
                continue
            print(f"-- {case.name}: {case}", flush=True)
            servers = asyncio.run(run_case(case, folds))
            known[case.name] = {
                "case": asdict(case),
                "says": str(case),
                "order": list(servers),
                "servers": servers,
            }
            print(tables.case_text(known[case.name]), flush=True)
            results.add(path, "cases", known)
        return
    figures: dict[str, Any] = {}
    if part == "decoding":
        for fold in folds:
            for kind, kib in FULL_SHAPES if full else QUICK_SHAPES:
                naive = (kind, kib) == ("http", 16)
                name = f"{kind} {kib} KiB"
                figures.setdefault(fold, {})[name] = decoding.in_a_process(fold, kind, kib * KIB, naive=naive)
    elif part == "tenants":
        for fold in folds:
            figures[fold] = [_tenants(fold, number) for number in (FULL_TENANTS if full else QUICK_TENANTS)]
    elif part == "delivering":
        figures = asyncio.run(delivering.measure(folds[0]))
    elif part == "residence":
        figures = asyncio.run(residence.measure(folds[0]))
    elif part == "envoy":
        from bench import envoys

        figures = asyncio.run(envoys.measure(folds[0]))
    else:
        from bench import flushing

        figures = asyncio.run(flushing.measure(folds[0]))
    results.add(path, part, figures)
    print(tables.part_text(part, results.read(path)), flush=True)


def _tenants(fold: str, tenants: int) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", "bench.tenants", str(tenants)],
        cwd=ROOT,
        env={**os.environ, "PROXY_USAGE_FOLD": fold},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
