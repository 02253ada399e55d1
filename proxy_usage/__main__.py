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
