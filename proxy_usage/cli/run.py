"""``proxy-usage run``: the service itself."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from proxy_usage.cli.options import ConfigOption, config_file


def run(
    config: ConfigOption = None,
    restored: Annotated[
        bool,
        typer.Option(
            "--restored",
            help="The store comes from a backup: what waits in it becomes dead letters, to be decided on.",
        ),
    ] = False,
    worker: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Run the sink until it is stopped.

    SIGTERM and SIGINT drain it, a second one ends it at once; SIGHUP reloads rules, tokens and certificates.
    """
    from proxy_usage.service import run as serve

    raise typer.Exit(serve(config_file(config), os.environ, restored=restored, worker=worker))
