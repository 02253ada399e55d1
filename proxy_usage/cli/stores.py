"""The stores of all workers, looked into as if they were one.

Those that are configured and there, and those that more workers left and that nobody took over yet. Where
there are several, what is listed says of which worker it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from proxy_usage.errors import StoreUnavailable, UsageError

if TYPE_CHECKING:
    from proxy_usage.config import Config
    from proxy_usage.store.reader import Reader

T = TypeVar("T")


class Readers:
    """Opened stores by worker; at least that of worker 0."""

    def __init__(self, readers: Mapping[int, Reader]) -> None:
        self.readers = readers

    @property
    def several(self) -> bool:
        """Whether there is more than the one store."""
        return len(self.readers) > 1

    def each(self, read: Callable[[Reader], T]) -> dict[int, T]:
        """What each store says. One that does not know what is asked for is left out.

        Raises:
            UsageError: none of them knows it.
        """
        found: dict[int, T] = {}
        unknown: UsageError | None = None
        for worker, reader in self.readers.items():
            try:
                found[worker] = read(reader)
            except UsageError as error:
                unknown = unknown or error
        if unknown is not None and not found:
            raise unknown
        return found

    def listed(self, read: Callable[[Reader], Iterable[T]], limit: int) -> list[tuple[int, T]]:
        """Up to so many of all that the stores list, worker by worker."""
        every = ((worker, one) for worker, some in self.each(read).items() for one in some)
        return list(islice(every, limit))

    def other_reasons(self, count: Callable[[Reader], Mapping[str, int]], reason: str | None) -> str:
        """Which reasons there are, and how often, where the named one is none of them; else nothing."""
        found: Counter[str] = Counter()
        for one in self.each(count).values() if reason is not None else ():
            found.update(one)
        return "" if reason in found else ", ".join(f"{name} {found[name]}" for name in sorted(found))

    def mark(self, worker: int) -> dict[str, int]:
        """What is added to something listed: its worker, where there are several."""
        return {"worker": worker} if self.several else {}


def store_paths(config: Config) -> dict[int, Path]:
    """The stores by worker: that of worker 0, and those of others that there are.

    Raises:
        StoreUnavailable: their directory cannot be read.
    """
    from proxy_usage.config.workers import worker_stores

    try:
        return {0: config.store.path} | worker_stores(config.store.path)
    except OSError as error:
        raise StoreUnavailable(
            f"directory {config.store.path.parent} cannot be read: {error.strerror}",
            hint="run this as the user that the service runs as",
        ) from None


@contextmanager
def opened(config: Config) -> Iterator[Readers]:
    """All stores, opened for reading.

    Raises:
        StoreUnavailable, StoreForeign: there is none, or one of them cannot be read.
    """
    from proxy_usage.store.reader import Reader

    with ExitStack() as stack:
        yield Readers(
            {worker: stack.enter_context(Reader(path)) for worker, path in store_paths(config).items()}
        )
