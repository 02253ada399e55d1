"""``proxy-usage forward``: from a JetStream stream that sinks publish to, to the endpoint."""

from __future__ import annotations

import os

import typer

from proxy_usage.cli.options import ConfigOption, config_file


def forward(config: ConfigOption = None) -> None:
    """Deliver what sinks published to a JetStream stream, until it is stopped.

    Any number of forwarders share the work. SIGTERM and SIGINT drain it, a second one ends it at once.
    """
    from proxy_usage.service import forward as serve

    raise typer.Exit(serve(config_file(config), os.environ))
