"""``proxy-usage outputs``: where events are sent to."""

from __future__ import annotations

from typing import Annotated

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, load_config
from proxy_usage.cli.repair import repaired
from proxy_usage.cli.show import emit

outputs = typer.Typer(help="Where events are sent to.", no_args_is_help=True)


@outputs.callback()
def _group() -> None:
    """Keeps ``retire`` a verb of its own while it is the only one."""


@outputs.command("retire")
def retire(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An output that is no longer configured.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give up what an output that is no longer configured has not delivered, its dead letters too.

    The ledger keeps what it was, as retired. There is no way back: `deadletters export` first.
    """
    done = repaired(
        load_config(config), "outputs.retire", {"name": name}, lambda repairs, _: repairs.retire(name)
    )
    count = done.counts.get("retired", 0)
    if as_json:
        emit({"retired": count, "service": done.service})
        return
    print(f"{count} events of {name} are given up" if count else f"{name} had nothing left to give up")
