"""What tests of archives share: events, an archive in a directory, and what a reader of its files finds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from proxy_usage.config.outputs import FileConfig
from proxy_usage.delivery.archive import Archive
from proxy_usage.outputs.base import Settled
from proxy_usage.store import Fate, Queued

HOUR_MS = 3_600_000
NOON_MS = 1_795_348_800_000  # 2026-11-22T12:00:00Z


def events(*numbers: int, size: int = 0) -> list[Queued]:
    """Events as the store has them, each of at least ``size`` bytes."""
    found = []
    for number in numbers:
        body = json.dumps(
            {"specversion": "1.0", "id": f"E{number}", "pad": "x" * size}, separators=(",", ":")
        )
        found.append(Queued(number, f"E{number}", "alpha", "requests", 1, body.encode()))
    return found


def opened(directory: Path, **settings: Any) -> Archive:
    return Archive(FileConfig.model_validate({"path": directory / "usage.ndjson", **settings}))


def ids(directory: Path) -> list[str]:
    """What a reader of all files finds, in order; fails where a line is no event."""
    files = sorted(directory.glob("usage-*.ndjson"))
    current = directory / "usage.ndjson"
    lines = [line for path in (*files, current) if path.exists() for line in path.read_bytes().splitlines()]
    return [json.loads(line)["id"] for line in lines]


def settled(*numbers: int) -> Settled:
    return Settled({number: Fate("delivered") for number in numbers})


def stamped(path: Path, ms: int) -> None:
    os.utime(path, ns=(ms * 1_000_000, ms * 1_000_000))
