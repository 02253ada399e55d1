"""What verbs have in common: the configuration they work with, and how they are told to answer."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy_usage.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from proxy_usage.config import Config

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="PROXY_USAGE_CONFIG", metavar="FILE", help="The configuration."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer with JSON.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, help="Show so many at most.")]
OutputOption = Annotated[
    str | None, typer.Option("--output", "-o", metavar="NAME", help="Of this output only.")
]
EventArgument = Annotated[str, typer.Argument(metavar="ID", help="The event's id.")]


def config_file(path: Path | None) -> Path:
    """The file that was named.

    Raises:
        UsageError: none was.
    """
    if path is None:
        raise UsageError(
            "no configuration is named",
            hint="name it by --config FILE or PROXY_USAGE_CONFIG; config/proxy-usage.yaml shows every key",
        )
    return path


def load_config(path: Path | None) -> Config:
    """The configuration that was named.

    Raises:
        UsageError: none was. ConfigError: it has mistakes.
    """
    from proxy_usage.config import load

    return load(config_file(path), os.environ)


def reading_config(path: Path | None) -> Config:
    """The configuration that was named, for a verb that reads stores and asks services, and no more: the
    files that it names may be missing, and others' to read.

    Raises:
        UsageError: none was. ConfigError: it has mistakes.
    """
    from proxy_usage.config import load

    try:
        return load(config_file(path), os.environ, files=False)
    except ConfigError as error:
        if error.mistakes:
            error.hint += "; a service that runs goes on with the configuration it has"
        raise


def instant(option: str, text: str) -> int:
    """The moment that an option names, as a date (its midnight) or a time, in UTC milliseconds.

    Raises:
        UsageError: it is none.
    """
    from proxy_usage.config.units import parse_instant

    try:
        return parse_instant(f"{text}T00:00:00Z" if _DATE.fullmatch(text) else text)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"{option}: {error}",
            hint="write a date, e.g. 2026-09-01, or an RFC 3339 time with a zone, e.g. 2026-09-01T12:00:00Z",
        ) from None


def window_start(option: str, text: str, config: Config) -> int:
    """The moment that an option names, as a date (its midnight) or a time, in UTC milliseconds.

    Raises:
        UsageError: it is none, or no window begins then.
    """
    from proxy_usage.events import rfc3339

    at_ms = instant(option, text)
    length_ms = config.windows.length
    if at_ms % length_ms:
        before_ms = at_ms - at_ms % length_ms
        raise UsageError(
            f"{option}: no window begins at {rfc3339(at_ms)}",
            hint=f"the next ones begin at {rfc3339(before_ms)} and {rfc3339(before_ms + length_ms)}",
        )
    return at_ms
