"""A quick look into a store for the operator's page: what is bounded, or found by an index.

Nothing here reads a table whose size depends on how much was billed. Dead letters and held usage are grouped
over a bounded slice, and it is said when there is more.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from proxy_usage.errors import StoreForeign
from proxy_usage.model import Identity
from proxy_usage.store.database import counters
from proxy_usage.store.held import unpack
from proxy_usage.store.migrate import check_readable
from proxy_usage.store.schema import connect_readonly, translated
from proxy_usage.store.week import Week, week

MOST_DEAD = 2_000
"""Dead letters of one output that are looked at, oldest first."""
MOST_HELD = 2_000
"""Lines of held usage that are looked at, latest hour first."""
MOST_TOP = 10


@dataclass(frozen=True, slots=True)
class DeadGroup:
    """Dead letters of one output and reason."""

    output: str
    reason: str
    events: int
    first_ms: int
    last_ms: int


@dataclass(frozen=True, slots=True)
class HeldGroup:
    """Held usage of one reason."""

    reason: str
    rows: int
    first_ms: int
    last_ms: int


@dataclass(frozen=True, slots=True)
class HeldTop:
    """What rows said whose usage is held."""

    reason: str
    node: str
    rule: int | None
    """Index of the tenant rule that read the value; None: no rule found one."""
    value: bytes
    rows: int


@dataclass(frozen=True, slots=True)
class OutputGlance:
    """One output as the store knows it."""

    name: str
    fates: Mapping[str, int]
    oldest_ms: int | None
    paused: str | None
    paused_ms: int | None


@dataclass(frozen=True, slots=True)
class Glance:
    """The store at one moment."""

    outputs: tuple[OutputGlance, ...]
    minted: int
    dead: tuple[DeadGroup, ...]
    dead_partial: bool
    held: tuple[HeldGroup, ...]
    held_partial: bool
    held_top: tuple[HeldTop, ...]
    crash_lost: Mapping[str, int]
    crash_unknown: Mapping[str, int]
    week: Week


def glance(path: Path, now_ms: int) -> Glance:
    """Looks, in one short read transaction on a connection of its own.

    Raises:
        StoreUnavailable, StoreForeign, StoreVersion: as ``Reader`` does.
    """
    db = connect_readonly(path)
    try:
        with translated(path):
            check_readable(path, db.execute("PRAGMA user_version").fetchone()[0])
            db.execute("BEGIN")
            return look(db, now_ms)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StoreForeign(
            f"store {path} is damaged: it holds what nobody wrote: {error}",
            hint="start the service again: it sets the file aside and keeps what can be read of it",
        ) from error
    finally:
        db.close()


def look(db: sqlite3.Connection, now_ms: int) -> Glance:
    """What ``glance`` shows, on an open connection."""
    fates: dict[int, Counter[str]] = {}
    for output, fate, events in db.execute("SELECT output, fate, events FROM tallies"):
        fates.setdefault(output, Counter())[fate] += events
    outputs = db.execute("SELECT output, name, paused, paused_ms FROM outputs ORDER BY output").fetchall()
    dead = [group for output, name, *_ in outputs for group in _dead(db, output, name)]
    looked_at = sum(group.events for group in dead)
    held, held_partial, held_top = _held(db)
    return Glance(
        outputs=tuple(
            OutputGlance(name, fates.get(output, {}), _oldest(db, output), paused, paused_ms)
            for output, name, paused, paused_ms in outputs
        ),
        minted=fates.get(0, Counter())["minted"],
        dead=tuple(dead),
        dead_partial=looked_at < sum(of["dead"] for number, of in fates.items() if number),
        held=held,
        held_partial=held_partial,
        held_top=held_top,
        crash_lost=counters(db, "crash_lost"),
        crash_unknown=counters(db, "crash_unknown"),
        week=week(db, now_ms),
    )


OLDEST = (
    "SELECT e.minted_ms FROM deliveries d CROSS JOIN events e ON e.seq=d.seq"
    " WHERE d.output=? ORDER BY d.seq LIMIT 1"
)
DEAD = (
    "SELECT reason, count(*), min(at_ms), max(at_ms)"
    " FROM (SELECT reason, at_ms FROM dead WHERE output=? ORDER BY seq LIMIT ?) GROUP BY reason"
    " ORDER BY count(*) DESC, reason"
)
HELD = "SELECT reason, identity, rows, first_ms, last_ms FROM held ORDER BY hour_ms DESC, digest DESC LIMIT ?"


def _oldest(db: sqlite3.Connection, output: int) -> int | None:
    row = db.execute(OLDEST, (output,)).fetchone()
    return row[0] if row else None


def _dead(db: sqlite3.Connection, output: int, name: str) -> list[DeadGroup]:
    return [DeadGroup(name, *row) for row in db.execute(DEAD, (output, MOST_DEAD))]


def _held(db: sqlite3.Connection) -> tuple[tuple[HeldGroup, ...], bool, tuple[HeldTop, ...]]:
    """By reason, most rows first; whether there is more; and what most of the rows said."""
    groups: dict[str, HeldGroup] = {}
    said: Counter[tuple[str, bytes]] = Counter()
    lines = db.execute(HELD, (MOST_HELD + 1,)).fetchall()
    for reason, packed, rows, first_ms, last_ms in lines[:MOST_HELD]:
        have = groups.get(reason, HeldGroup(reason, 0, first_ms, last_ms))
        groups[reason] = HeldGroup(
            reason, have.rows + rows, min(have.first_ms, first_ms), max(have.last_ms, last_ms)
        )
        said[reason, packed] += rows
    top = tuple(
        HeldTop(
            reason,
            identity.origin.node_id,
            identity.rule if identity.rule >= 0 else None,
            identity.value,
            rows,
        )
        for (reason, packed), rows in said.most_common(MOST_TOP)
        if isinstance(identity := unpack(packed), Identity)
    )
    by_rows = tuple(sorted(groups.values(), key=lambda group: (-group.rows, group.reason)))
    return by_rows, len(lines) > MOST_HELD, top
