"""Log lines go to standard output, each in one piece, and none holds up or ends the service.

A line that standard output does not take (its disk is full, its reader is gone or has stopped reading) is
dropped and counted; once lines are taken again, one of them says how many are missing.
"""

from __future__ import annotations

import logging
import os
import select
import threading

import structlog

LINE_BYTES = 4_096
"""So long a line may be: PIPE_BUF of Linux, up to which a write to a pipe is never mixed with those of other
processes (pipe(7), POSIX write()), and finds room when poll() says that there is any."""
A_MINUTE = 20
"""Lines of libraries; the rest is counted."""
_VALUE = 1_024  # characters left of a value where the line is too long, at first

_fields: dict[str, object] = {}


class Lines:
    """Writes lines to a file descriptor: the last part of structlog's chain.

    Workers share their supervisor's standard output. A line and its end therefore go out in one write: in
    two, another's line comes between them.

    Args:
        fd: where to.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._torn = False  # the last thing written lacks its end
        self._unsaid = 0
        self._lost = 0

    def take_lost(self) -> int:
        """Lines dropped since this was last asked."""
        with self._lock:
            lost, self._lost = self._lost, 0
        return lost

    def write(self, line: str) -> None:
        """Writes a line, or counts it as lost. Raises nothing."""
        with self._lock:
            if not self._write(line):
                self._lost += 1
                self._unsaid += 1
                return
            missing, self._unsaid = self._unsaid, 0
        if missing:
            structlog.get_logger().warning(
                "log lines were lost", lines=missing, hint="standard output did not take them"
            )

    # structlog calls a method by the level of the line
    debug = info = warning = error = critical = write

    def _write(self, line: str) -> bool:
        data = (("\n" if self._torn else "") + line + "\n").encode(errors="backslashreplace")
        try:
            if not _takes(self._fd):
                return False
            written = os.write(self._fd, data)
        except OSError:
            return False
        self._torn = written < len(data) and (written > 0 or self._torn)
        return written == len(data)


def _takes(fd: int) -> bool:
    """Whether a write would not wait; one that must fail does not."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


class _Short:
    """A renderer whose lines are at most ``LINE_BYTES`` long: values give way, names of fields stay."""

    def __init__(self, renderer: structlog.typing.Processor) -> None:
        self._renderer = renderer

    def __call__(self, logger: object, method: str, line: structlog.typing.EventDict) -> str:
        left = _VALUE
        text = self._render(logger, method, dict(line))
        while len(text.encode(errors="backslashreplace")) >= LINE_BYTES - 1 and left:
            text = self._render(logger, method, {name: _cut(value, left) for name, value in line.items()})
            left //= 2
        return text

    def _render(self, logger: object, method: str, line: structlog.typing.EventDict) -> str:
        return str(self._renderer(logger, method, line))


def _cut(value: object, left: int) -> object:
    """Start and end: of a traceback both say what happened."""
    text = value if isinstance(value, str) else repr(value)
    return value if len(text) <= left else f"{text[: left // 2]} … {text[-(left // 2) or len(text) :]}"


class LibraryLines(logging.Handler):
    """What libraries say by Python's logging, as lines of ours, at most ``A_MINUTE``.

    By default they write to standard error, which nothing bounds and where a reader that stopped reading
    holds up whoever writes; and a stranger who sends what is no HTTP brings aiohttp to a traceback each time.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._minute = 0
        self._said = 0
        self._unsaid = 0

    def emit(self, record: logging.LogRecord) -> None:
        """One line; called with the handler's lock."""
        log = structlog.get_logger()
        if record.created // 60 != self._minute:
            self._say_how_many_more()
            self._minute, self._said = int(record.created // 60), 0
        if self._said == A_MINUTE:
            self._unsaid += 1
            return
        self._said += 1
        say = log.error if record.levelno >= logging.ERROR else log.warning
        say("a library says", library=record.name, message=record.getMessage(), exc_info=record.exc_info)

    def close(self) -> None:
        """Called as the process ends."""
        self._say_how_many_more()
        super().close()

    def _say_how_many_more(self) -> None:
        more, self._unsaid = self._unsaid, 0
        if more:
            structlog.get_logger().warning("more lines of libraries", lines=more)


_lines = Lines(1)


def lost_lines() -> int:
    """Lines of this process that standard output did not take, since this was last asked."""
    return _lines.take_lost()


def take_library_lines() -> None:
    """From now on libraries log as the program does."""
    logging.getLogger().addHandler(LibraryLines())


def name_worker(number: int) -> None:
    """Each line says from now on which worker it is from."""
    _fields["worker"] = number


def _named(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return line if not _fields else {**line, **_fields}


def configure_log(level: str, style: str) -> None:
    """Sets what is logged, from now on: JSON unless a person is looking."""
    console = style == "console" or (style == "auto" and os.isatty(1))
    renderer: structlog.typing.Processor
    renderer = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            _named,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _Short(renderer),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_names: _lines,
        cache_logger_on_first_use=False,
    )
