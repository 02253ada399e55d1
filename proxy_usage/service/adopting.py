"""Stores that no worker opens any more, since there are fewer of them now: worker 0 takes them over whole.

It does so before it serves, and the others are started after it. So nobody else has such a store open, and
what was half done at a crash is ended before anybody counts anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from proxy_usage.config import Config
from proxy_usage.config.workers import worker_stores
from proxy_usage.errors import ProxyUsageError, StoreUnavailable
from proxy_usage.intake import Intake, Loss
from proxy_usage.store import Database
from proxy_usage.store.adopt import begun, bring, discard, forget, mark, same
from proxy_usage.store.checkpoint import stored_intake
from proxy_usage.turn import Layout

if TYPE_CHECKING:
    from proxy_usage.service.build import Storage

log = structlog.get_logger()

OpenStorage = Callable[[Config], "Storage"]
"""Opens a store as the worker did that left it."""


def go_on(database: Database, intake: Intake) -> None:
    """Ends what a crash cut short: what was brought over is removed from where it came.

    Call it before ``intake`` is compared with the store.

    Raises:
        StoreError: a file can neither be looked into nor removed.
    """
    unfinished = begun(database)
    if not unfinished:
        return
    with database.reading() as db:
        intake.raise_to(stored_intake(db))
    for file, number in unfinished.items():
        path = database.path.with_name(file)
        if not path.exists() or _is(path, number):
            discard(path)
        forget(database, file)


def adopt_all(
    config: Config,
    database: Database,
    intake: Intake,
    layout: Layout,
    now_ms: int,
    open_storage: OpenStorage,
    passed: Callable[[str], None] | None = None,
) -> tuple[Loss, ...]:
    """Takes over the stores of workers that are not configured. Returns what crashes had lost of each.

    Args:
        config: of worker 0.
        passed: called after each step, by its name in ``store.adopt``; by default it is logged.

    Raises:
        ConfigError: an output that is not configured any more has events in one of them.
        StoreError: one cannot be used, or there is no room for it here. What was not taken over stays.
    """
    adopted = []
    passed = passed or log.debug  # bound here: an import comes before the log is configured
    for path in _left_behind(config):
        with _named(path):
            adopted.append(_adopt(config, path, database, intake, layout, now_ms, open_storage, passed))
    return tuple(adopted)


def _adopt(
    config: Config,
    path: Path,
    database: Database,
    intake: Intake,
    layout: Layout,
    now_ms: int,
    open_storage: OpenStorage,
    passed: Callable[[str], None],
) -> Loss:
    store = config.store.model_copy(update={"path": path})
    storage = open_storage(config.model_copy(update={"store": store}))
    try:
        storage.past.tell(storage.loss)
        if storage.database.unchecked:
            storage.database.check_beside()
        mark(storage.database)
        passed("mark")
        adopted = bring(database, storage.database, layout, now_ms, intake.known_as)
        passed("bring")
        with database.reading() as db:
            intake.raise_to(stored_intake(db))
    finally:
        storage.close()
    discard(storage.database.path)
    passed("discard")
    forget(database, adopted.file)
    passed("forget")
    log.warning(
        "store adopted",
        file=adopted.file,
        events=adopted.events,
        open_windows=adopted.windows,
        rows=sum(adopted.rows.values()),
        hint="there are fewer workers now: what this one had is worker 0's",
    )
    return storage.loss


def _is(path: Path, number: str) -> bool:
    """Whether the file is the one that was brought over."""
    orphan = Database(path)
    try:
        return same(orphan, number)
    finally:
        orphan.close()


def _left_behind(config: Config) -> list[Path]:
    try:
        stores = worker_stores(config.store.path)
    except OSError as error:
        raise StoreUnavailable(
            f"directory {config.store.path.parent} cannot be read: {error.strerror}",
            hint="the stores of workers lie in it beside store.path",
        ) from None
    return [path for worker, path in stores.items() if worker >= config.workers]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says of which store an error is that keeps it from being taken over."""
    try:
        yield
    except ProxyUsageError as error:
        error.message = f"store {path}, left by a worker, cannot be taken over: {error.message}"
        error.args = (error.message,)
        raise
