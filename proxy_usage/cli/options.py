"""What verbs have in common: the configuration they work with, and how they are told to answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy_usage.errors import UsageError

if TYPE_CHECKING:
    from proxy_usage.config import Config

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
