"""Schema versions: a store of an older one is brought forward, step by step, when it is opened for writing.

    version 1 ──STEPS[1]──▶ version 2 ──STEPS[2]──▶ … ──▶ schema.VERSION

Each step is one transaction that ends by setting the new version, so that after a crash the store is of one
version or of the next, and the next opening goes on from there. There is no way back but a copy of the file.

A change of ``schema.TABLES`` that stores in the field must follow raises ``schema.VERSION`` by one, and adds
the step from the former version here. A released step is never changed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import structlog

from proxy_usage.errors import StoreVersion
from proxy_usage.store.schema import AUDIT_TABLES, USAGE_TABLES, VERSION, translated

log = structlog.get_logger()

Step = Callable[[sqlite3.Connection], None]
"""Changes a store from its version to the next, inside the caller's transaction."""


def _usage_tables(db: sqlite3.Connection) -> None:
    """Version 2: what a bill is explained by. What is there already has no origins; its times are found."""
    # A store at its bound must not be kept from starting: indexes take some hundredths of what it holds.
    (bound,) = db.execute("PRAGMA max_page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={bound + bound // 8}")
    for statement in USAGE_TABLES:
        db.execute(statement)
    db.execute(
        "INSERT INTO spans SELECT entry >> 8, min(window_ms), max(window_ms) FROM ledger GROUP BY entry >> 8"
    )
    db.execute(f"PRAGMA max_page_count={bound}")


def _logs_and_audits(db: sqlite3.Connection) -> None:
    """Version 3: rows read are counted by log name too; and there are audits."""
    db.execute("ALTER TABLE intake RENAME TO former_intake")
    for statement in AUDIT_TABLES:
        db.execute(statement)
    db.execute("INSERT INTO intake SELECT node, '', '', rows FROM former_intake")
    db.execute("DROP TABLE former_intake")


STEPS: Mapping[int, Step] = {1: _usage_tables, 2: _logs_and_audits}
"""By the version that a step begins with."""


class History(NamedTuple):
    """The versions a program knows."""

    newest: int = VERSION
    steps: Mapping[int, Step] = STEPS


HISTORY = History()


def migrate(db: sqlite3.Connection, path: Path, history: History = HISTORY) -> None:
    """Brings an opened store to the newest version; one that is of it is left as it is.

    Raises:
        StoreVersion: there is no step from its version. Nothing was changed.
        StoreError: a step failed; the store is of the version that the step before it left.
    """
    with translated(path):
        found: int = db.execute("PRAGMA user_version").fetchone()[0]
        missing = [version for version in range(found, history.newest) if version not in history.steps]
        if missing:
            raise StoreVersion(
                f"store {path} has schema version {found}, which this program cannot bring to"
                f" {history.newest}",
                hint="start versions of proxy-usage in between first, each once",
            )
        if found < history.newest:
            log.warning(
                "store is migrated",
                store=str(path),
                version=found,
                to=history.newest,
                hint="the way back is a copy of the file from before: older versions refuse it from now on",
            )
        for version in range(found, history.newest):
            db.execute("BEGIN IMMEDIATE")
            try:
                history.steps[version](db)
                db.execute(f"PRAGMA user_version={version + 1}")  # part of the transaction
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            log.info("store migrated", store=str(path), version=version + 1)


def check_readable(path: Path, version: int) -> None:
    """Readers know one version alone: they change nothing, and so cannot bring a store forward.

    Raises:
        StoreVersion: it is another one.
    """
    if version > VERSION:
        raise StoreVersion(
            f"store {path} has schema version {version}, this program knows up to {VERSION}",
            hint="use the version of proxy-usage that the service runs",
        )
    if version < VERSION:
        raise StoreVersion(
            f"store {path} has schema version {version}, this program reads {VERSION}",
            hint="start the service once, it migrates the store; or use the version that made it",
        )
