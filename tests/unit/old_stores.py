"""Stores as former versions of this program left them, made of ones of the present version."""

from __future__ import annotations

import sqlite3
from pathlib import Path


def made_old(path: Path, version: int) -> None:
    """Takes from a store what versions after this one added; rows read are of ``edge-1`` and ``edge-2``."""
    db = sqlite3.connect(path)
    db.executescript(
        "DROP TABLE intake; DROP TABLE audits; DROP TABLE audit_hours;"
        "CREATE TABLE intake(node TEXT PRIMARY KEY, rows INTEGER NOT NULL) WITHOUT ROWID;"
        "INSERT INTO intake VALUES('edge-1', 7), ('edge-2', 9);"
    )
    if version == 1:
        db.executescript(
            "DROP TRIGGER ledger_span; DROP INDEX events_window; DROP INDEX keys_tenant;"
            "DROP TABLE spans; DROP TABLE merges; DROP TABLE sources; DROP TABLE origins;"
        )
    db.execute(f"PRAGMA user_version={version}")
    db.close()
