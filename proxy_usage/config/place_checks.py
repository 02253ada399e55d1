"""Directories that are written to and cannot be: found without touching anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from proxy_usage.config.fields import UNREACHABLE
from proxy_usage.config.mistakes import Finding
from proxy_usage.config.models import Config


def store_place(config: Config) -> Iterator[Finding]:
    """A store that cannot be opened where it is."""
    if config.forward is None:
        yield from store_findings(config.store.path)


def store_findings(path: Path, *, access: Callable[[Path, int], bool] = os.access) -> Iterator[Finding]:
    """What keeps a store from being opened at ``path``, without trying: directories and permissions."""
    found = file_finding(path, "usage.db", access)
    if found is not None:
        yield Finding(("store", "path"), *found)


def archive_places(config: Config) -> Iterator[Finding]:
    """Archives that cannot be written where they are."""
    for index, output in enumerate(config.outputs):
        if output.format == "file" and output.file is not None:
            found = file_finding(output.file.path, "usage.ndjson")
            if found is not None:
                yield Finding(("outputs", index, "file", "path"), *found)


def file_finding(
    path: Path, example: str, access: Callable[[Path, int], bool] = os.access
) -> tuple[str, str] | None:
    """What keeps a file from being written at ``path``, and what to do: found without trying."""
    try:
        return _file_finding(path, example, access)
    except OSError as error:  # a directory above it may not be entered
        return f"{path} cannot be reached: {error.strerror}", UNREACHABLE


def _file_finding(path: Path, example: str, access: Callable[[Path, int], bool]) -> tuple[str, str] | None:
    directory = path.parent
    if path.is_dir():
        return f"{path} is a directory", f"name a file, e.g. {example} in it"
    if not directory.exists() and not directory.parent.is_dir():
        return f"directory {directory} does not exist", f"create it: mkdir -p {directory}"
    if directory.exists() and not directory.is_dir():
        return f"{directory} is not a directory", "name a file in a directory"
    writable = directory if directory.exists() else directory.parent
    if not access(writable, os.W_OK | os.X_OK):
        return (
            f"directory {writable} cannot be written by this user",
            "grant write permission (chown, fsGroup), or name another directory",
        )
    return None
