"""The command line: one file a verb, each loading what it needs when it is called.

``main`` is the entry point. Errors meant for people end as a message and a hint on standard error and as an
exit code: 0 ok, 1 failure, 2 usage, 78 configuration.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from proxy_usage import __version__
from proxy_usage.cli.audit import audit
from proxy_usage.cli.compare import compare
from proxy_usage.cli.config_verbs import config_verbs
from proxy_usage.cli.deadletters import deadletters
from proxy_usage.cli.demo import demo
from proxy_usage.cli.explain import explain
from proxy_usage.cli.forward import forward
from proxy_usage.cli.outputs import outputs
from proxy_usage.cli.queue import queue
from proxy_usage.cli.record import record
from proxy_usage.cli.run import run
from proxy_usage.cli.status import status
from proxy_usage.cli.store import store
from proxy_usage.cli.unattributed import unattributed
from proxy_usage.cli.usage import usage
from proxy_usage.cli.validate import validate
from proxy_usage.cli.version import version
from proxy_usage.errors import ProxyUsageError

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""What writing to standard output fails with, where it is a file, or was closed."""

app = typer.Typer(
    name="proxy-usage",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"proxy-usage {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version.")
    ] = False,
) -> None:
    """Turns what Envoy proxies served into what a platform may bill."""


for verb in (run, forward, validate, explain, record, status, usage, audit, compare, demo, version):
    app.command()(verb)
for group, name in (
    (config_verbs, "config"),
    (queue, "queue"),
    (deadletters, "deadletters"),
    (outputs, "outputs"),
    (unattributed, "unattributed"),
    (store, "store"),
):
    app.add_typer(group, name=name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb, by default the one on the command line. Returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character gets its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _called(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away (`| head`)
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        _drop_output()
        print(f"error: cannot write the answer: {error.strerror}", file=sys.stderr)
        return 1
    return code


def _drop_output() -> None:
    """What is still buffered must not fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _called(arguments: Sequence[str] | None) -> int:
    try:
        app(args=arguments, prog_name="proxy-usage")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except ProxyUsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
