"""The extension built with sanitizers, against the reference: captures, odd rows, random changes.

    LD_PRELOAD=libasan.so python tests/faults/sanitized_fold.py DIRECTORY SEED MESSAGES

``DIRECTORY`` holds the extension. Ends at the first byte read or written where it must not be.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
NAME = "proxy_usage.decode._fold"


def use(directory: Path) -> None:
    """Makes the extension in that directory the one that is imported."""
    (path,) = directory.rglob("_fold*.so")
    spec = importlib.util.spec_from_file_location(NAME, path, loader=ExtensionFileLoader(NAME, str(path)))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def main() -> None:
    """Feeds both folds until so many messages were folded."""
    directory, seed, messages = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    use(directory)
    from decode_target import mutate_row, scramble, seeds
    from odd_rows import Writer
    from plans import KINDS, ORIGINS, fold_of

    from proxy_usage.decode import Split
    from proxy_usage.decode.framing import protobuf_parts

    dice, known = random.Random(seed), list(seeds().values())
    folds = [fold_of(kind) for kind in KINDS]
    rows = 0
    for number in range(messages):
        raw = dice.choice(known)
        if number % 3 == 0:
            raw = Writer(seed + number, dice.choice((0.0, 0.01, 0.1))).message(6)
        elif number % 3 == 1:
            raw = (
                scramble(raw, dice)
                if dice.random() < 0.3
                else mutate_row(raw, lambda r: scramble(r, dice), dice)
            )
        fold = dice.choice(folds)
        origin = dice.choice(ORIGINS)
        rows += fold.message(origin, raw, 1_795_300_000_000 + number)
        for part in protobuf_parts(raw):  # each row in memory of its own, too
            rows += fold.entries(origin, Split(list(part.entries), part.http), 1_795_300_000_000)
        if dice.random() < 0.05:
            fold.drain()
    for fold in folds:
        fold.drain()
    print(f"{messages} messages, {rows} rows, no complaint")


if __name__ == "__main__":
    main()
