"""Log lines go to standard output."""

from __future__ import annotations

import logging
import sys

import structlog

_fields: dict[str, object] = {}


def name_worker(number: int) -> None:
    """Each line says from now on which worker it is from."""
    _fields["worker"] = number


def _named(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return line if not _fields else {**line, **_fields}


def configure_log(level: str, style: str) -> None:
    """Sets what is logged, from now on: JSON unless a person is looking."""
    console = style == "console" or (style == "auto" and sys.stdout.isatty())
    renderer = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            _named,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(),
        cache_logger_on_first_use=False,
    )
