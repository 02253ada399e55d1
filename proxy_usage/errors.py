"""One tree of errors. Each says what is wrong, where, and what to do about it.

``exit_code`` is what the process ends with when nobody handles the error: 0 ok, 1 failure, 2 usage,
78 configuration (sysexits ``EX_CONFIG``). ``retriable`` tells a loop whether trying again can help.
"""

from __future__ import annotations


class ProxyUsageError(Exception):
    """Base of all errors that are shown to a person.

    ``message`` says what and where in one line, ``hint`` what to do.
    """

    exit_code = 1
    retriable = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(ProxyUsageError):
    """The configuration cannot be used. Holds every mistake found, not only the first."""

    exit_code = 78

    def __init__(self, message: str, *, hint: str = "", mistakes: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint=hint)
        self.mistakes = mistakes

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {mistake}" for mistake in self.mistakes)]
        return "\n".join([*lines, f"  hint: {self.hint}"] if self.hint else lines)


class UsageError(ProxyUsageError):
    """A verb was called in a way it cannot serve."""

    exit_code = 2


class ListenError(ProxyUsageError):
    """A port could not be bound."""


class StoreError(ProxyUsageError):
    """The store cannot be used."""


class StoreLocked(StoreError):
    """Another process owns the store; the message names its pid and host."""


class StoreForeign(StoreError):
    """The file is not a store of ours, or it is damaged."""


class StoreVersion(StoreForeign):
    """The store has a schema version that this program does not work with. It is sound, and is left alone."""


class StoreFull(StoreError):
    """The disk or the store's own limit is reached (SQLITE_FULL)."""

    retriable = True


class StoreUnavailable(StoreError):
    """The disk failed: an I/O error or a file system that became read-only."""

    retriable = True


class StoreBusy(StoreUnavailable):
    """Another program holds the store, or a part of it, for longer than was waited."""


class StreamUnavailable(StoreError):
    """The stream that a forwarder reads cannot be reached; what it holds waits, or goes to another."""

    retriable = True


class DecodeError(ProxyUsageError):
    """Bytes that are not what they should be; names the offset. Costs the entry, never the stream."""


class StageDied(ProxyUsageError):
    """A task that must run for ever ended; the process must not go on pretending."""
