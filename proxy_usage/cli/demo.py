"""``proxy-usage demo``: a real Envoy, traffic of several tenants, the sink and a billing endpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from proxy_usage.config.units import DURATION_HELP, parse_duration
from proxy_usage.errors import UsageError

_PLAIN_WIDTH = 120


def demo(
    tenants: Annotated[int, typer.Option(min=1, max=1000, help="How many tenants send.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Requests per wave, over all tenants.")] = 300,
    duration: Annotated[
        str | None, typer.Option(metavar="30s", help="End after this time, e.g. 30s or 5m.")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="One wave; exit 0 if what was delivered equals it, else 1.")
    ] = False,
    fail: Annotated[bool, typer.Option("--fail", help="Let the billing endpoint fail for a while.")] = False,
    story: Annotated[
        bool, typer.Option("--story", help="A minute: the endpoint fails and heals, the sink is killed.")
    ] = False,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Keep configuration, logs and store here.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another number is another load.")] = 1,
) -> None:
    """Meter a real Envoy on this machine and compare the bill with what was sent, until Ctrl-C."""
    # Imported here: no other verb pays for the demo's imports, and `run` must not load them.
    from rich.console import Console

    from proxy_usage.demo.story import Story, StoryOptions

    options = StoryOptions(
        tenants=tenants,
        requests=requests,
        duration_ms=None if duration is None else _milliseconds(duration),
        once=once,
        fail=fail,
        acts=story,
        directory=directory,
        seed=seed,
    )

    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)  # a pipe has no width of its own

    async def tell() -> int:
        return await Story(options, console).run()

    try:
        status = asyncio.run(tell())
    except asyncio.CancelledError:  # a second Ctrl-C
        status = 130
    raise typer.Exit(status)


def _milliseconds(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--duration: {error}", hint=DURATION_HELP) from error
