"""Which of the two folds runs, and why: decided once, when the process starts.

extension is there ─ built from the source at hand ─▶ compiled
    └── no ──────────────────── no ─────────────────▶ protobuf, and the reason
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

from proxy_usage.decode.source_digest import source_digest

SWITCH = "PROXY_USAGE_FOLD"
"""Environment variable: ``protobuf`` switches the compiled fold off."""


class Choice(NamedTuple):
    """What runs."""

    native: ModuleType | None
    """The extension; None: protobuf."""
    reason: str
    """``compiled``, or ``protobuf:`` and why. One of a few texts, short enough for a label."""


def load() -> ModuleType:
    """The extension. Raises ImportError where it was not built, or for another Python."""
    return importlib.import_module("proxy_usage.decode._fold")


def choose(
    environ: Mapping[str, str],
    *,
    load: Callable[[], ModuleType] = load,
    digest: Callable[[], str] = source_digest,
) -> Choice:
    """Which fold runs under this environment."""
    wanted = environ.get(SWITCH, "")
    if wanted == "protobuf":
        return Choice(None, f"protobuf: {SWITCH}=protobuf")
    try:
        native = load()
    except ImportError:
        return Choice(None, "protobuf: not built")
    source = digest()
    if source and source != native.DIGEST:
        return Choice(None, "protobuf: stale build")
    return Choice(native, "compiled")


CHOICE = choose(os.environ)
