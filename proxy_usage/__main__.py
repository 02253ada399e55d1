"""The entry point, of ``proxy-usage`` and of ``python -m proxy_usage``.

The command line's libraries stay with the verbs that need them: a plain ``run`` goes straight to the service,
which is then smaller by some 10 MiB for as long as it lives, and starts sooner.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main() -> int:
    """Runs the verb on the command line. Returns the exit code."""
    have_standard_streams()
    # By default gRPC writes a line of its own about every handshake that fails: as many as strangers like. It
    # reads this when it is loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    plain = plain_run(sys.argv[1:], os.environ.get("PROXY_USAGE_CONFIG"))
    if plain is None:
        from proxy_usage.cli import main as command_line

        return command_line()
    config, restored = plain
    # structlog loads it where it is installed, for tracebacks in colour that a service never shows.
    sys.modules["rich"] = None  # type: ignore[assignment]
    from proxy_usage.errors import ProxyUsageError
    from proxy_usage.service import run

    try:
        return run(config, os.environ, restored=restored)
    except ProxyUsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def have_standard_streams() -> None:
    """Opens those of the standard streams that whoever started the program had closed.

    Else the next file would come to have their number, be it the store, and what somebody prints end up in
    it. Writing to a standard output that was closed goes on failing, so that a verb whose answer nobody got
    does not end with 0; errors have nowhere to go, and go nowhere.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number that is free: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def plain_run(words: Sequence[str], named: str | None) -> tuple[Path, bool] | None:
    """Configuration and ``--restored`` of a ``run`` that says nothing else; None: the command line decides.

    Args:
        named: the configuration where ``words`` name none.
    """
    if not words or words[0] != "run":
        return None
    restored = False
    rest = iter(words[1:])
    for word in rest:
        if word == "--restored":
            restored = True
        elif word in ("--config", "-c"):
            named = next(rest, None)
        elif word.startswith("--config="):
            named = word.removeprefix("--config=")
        else:
            return None
    return (Path(named), restored) if named else None


if __name__ == "__main__":
    sys.exit(main())
