"""``proxy-usage config``: its schema, and what a file comes to."""

from __future__ import annotations

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, load_config
from proxy_usage.cli.show import emit

config_verbs = typer.Typer(
    help="The configuration: its schema, and what a file comes to.", no_args_is_help=True
)


@config_verbs.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from proxy_usage.config import json_schema

    emit(json_schema())


@config_verbs.command()
def show(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Print the configuration with every default filled in; secrets are named by their files."""
    import yaml

    from proxy_usage.config import show as shown

    text = shown(load_config(config))
    if as_json:
        emit(yaml.safe_load(text))
    else:
        print(text, end="")
