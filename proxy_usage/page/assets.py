"""The page's files, as they are served: read once from the package, each with its type and a tag."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = {
    "/": "index.html",
    "/page/page.css": "page.css",
    "/page/page.js": "page.js",
    "/page/parts.js": "parts.js",
    "/page/plots.js": "plots.js",
    "/page/words.js": "words.js",
    "/page/icon.svg": "icon.svg",
    "/page/uPlot.iife.min.js": "uplot/uPlot.iife.min.js",
    "/page/uPlot.min.css": "uplot/uPlot.min.css",
}
"""By the path at which each is served."""


@dataclass(frozen=True, slots=True)
class Asset:
    """One file."""

    body: bytes
    type: str
    tag: str
    """Changes with its contents."""


@cache
def assets() -> Mapping[str, Asset]:
    """All files by path."""
    root = files("proxy_usage.page") / "static"
    found = {}
    for path, name in FILES.items():
        body = root.joinpath(*name.split("/")).read_bytes()
        kind = _TYPES[name.rpartition(".")[2]]
        found[path] = Asset(body, kind, hashlib.sha256(body).hexdigest()[:32])
    return found
