"""Held usage in the store: how its identity is kept, and how it is given to whom later rules name."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from proxy_usage.attribution import Unattributed
from proxy_usage.errors import UsageError
from proxy_usage.events import Mint
from proxy_usage.model import Cell, Identity, Key, Origin
from proxy_usage.origins import REPLAYED, RowOrigin
from proxy_usage.reattribution import Fact
from proxy_usage.store.schema import dumps
from proxy_usage.turn import Held

HOUR_MS = 3_600_000
SLICE = 500

_OVERFLOW = Identity(Origin("", "", ""), -1, b"", (), routed=False)
_Position = tuple[int, bytes]  # hour, digest

Attribute = Callable[[Sequence[Fact], Origin, bool], Key | Unattributed]
"""What the present rules say of facts, where they came from, and whether their rows named a route."""


class _Packed(msgspec.Struct, array_like=True, frozen=True):
    origin: Origin
    rule: int
    value: bytes
    dimensions: tuple[bytes, ...]
    routed: bool
    facts: tuple[Fact, ...] = ()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Packed).decode


@dataclass(frozen=True, slots=True)
class WantedHeld:
    """Which held usage is meant."""

    reason: str | None = None
    ids: Sequence[str] = ()
    """Only these, as ``unattributed ls`` shows them; empty: all that the reason leaves."""
    late_ms: int | None = None
    """Usage of windows before this would be too late."""
    redate: bool = False
    """What is too late goes into the present window; else it stays held."""


class Released(NamedTuple):
    """What one look at held usage came to, in rows of ``held``."""

    released: int
    """They belong to a tenant now."""
    events: int
    """Events they became; what is below a whole value is carried to the key's next window."""
    unattributed: int
    """The present rules name nobody either."""
    too_late: int
    lost: int
    """Usage of identities past their bound: nobody knows any more whose it is."""
    position: _Position | None
    """Where to go on; None: it was looked at all of it."""


@dataclass(frozen=True, slots=True)
class _Look:
    cells: tuple[Cell, ...]
    origins: tuple[RowOrigin, ...]
    leftover: tuple[tuple[str, int, bytes], ...]
    """``(amounts, hour, digest)``: what meters that are no longer configured leave behind; mostly nothing."""
    result: Released


def pack(held: Held) -> bytes:
    """An identity as the store keeps it."""
    return _encode(_Packed(*held.identity, facts=held.facts))


def unpack(packed: bytes) -> Identity | None:
    """The identity; None for those past their bound, together."""
    kept = _unpack(packed)
    if kept is None:
        return None
    return Identity(kept.origin, kept.rule, kept.value, kept.dimensions, routed=kept.routed)


def _unpack(packed: bytes) -> _Packed | None:
    if not packed:
        return None
    kept = _decode(packed)
    return None if (kept.origin, kept.value, kept.dimensions) == (_OVERFLOW.origin, b"", ()) else kept


def look(
    db: sqlite3.Connection,
    wanted: WantedHeld,
    after: _Position,
    attribute: Attribute,
    mint: Mint,
    now_ms: int,
) -> _Look:
    """Runs some held usage through the present rules: up to a slice of it, by hour.

    Raises:
        UsageError: nothing is held under an id.
    """
    _check_ids(db, wanted.ids)
    rows = db.execute(
        "SELECT hour_ms, digest, identity, rows, amounts FROM held WHERE (hour_ms, digest) > (?1, ?2)"
        " AND (?3 IS NULL OR reason=?3)"
        " AND (?4='[]' OR lower(hex(digest)) IN (SELECT value FROM json_each(?4)))"
        " ORDER BY hour_ms, digest LIMIT ?5",
        (*after, wanted.reason, dumps([name.lower() for name in wanted.ids]), SLICE),
    ).fetchall()
    names = [meter.name for meter in mint.meters]
    present_ms = now_ms - now_ms % mint.length_ms
    cells: list[Cell] = []
    origins: list[RowOrigin] = []
    leftover: list[tuple[str, int, bytes]] = []
    unattributed = too_late = lost = 0
    for hour_ms, digest, packed, count, text in rows:
        kept = _unpack(packed)
        if kept is None:
            lost += 1
            continue
        key = attribute(kept.facts, kept.origin, kept.routed)
        if isinstance(key, Unattributed):
            unattributed += 1
            continue
        # The last window of its hour, or the present one where that is yet to come: its day stays its day.
        window_ms = min(hour_ms + HOUR_MS - mint.length_ms, present_ms)
        if wanted.late_ms is not None and window_ms < wanted.late_ms:
            if not wanted.redate:
                too_late += 1
                continue
            window_ms = present_ms
        amounts: dict[str, int] = json.loads(text)
        cells.append(Cell(0, window_ms, key, count, tuple(amounts.pop(name, 0) for name in names)))
        window_hour_ms = window_ms - window_ms % HOUR_MS
        origins.append(RowOrigin(window_hour_ms, key, REPLAYED, kept.origin.node_id, count))
        rest = {name: amount for name, amount in amounts.items() if amount}
        leftover.append((dumps(rest) if rest else "", hour_ms, digest))
    position = (rows[-1][0], rows[-1][1]) if len(rows) == SLICE else None
    result = Released(len(cells), 0, unattributed, too_late, lost, position)
    return _Look(tuple(cells), tuple(origins), tuple(leftover), result)


def let_go(db: sqlite3.Connection, seen: _Look) -> int:
    """Removes what became somebody's. Returns how many rows are gone."""
    removed = 0
    for amounts, hour_ms, digest in seen.leftover:
        if amounts:
            db.execute(
                "UPDATE held SET rows=0, amounts=? WHERE hour_ms=? AND digest=?", (amounts, hour_ms, digest)
            )
        else:
            removed += db.execute("DELETE FROM held WHERE hour_ms=? AND digest=?", (hour_ms, digest)).rowcount
    return removed


def _check_ids(db: sqlite3.Connection, ids: Sequence[str]) -> None:
    for name in ids:
        try:
            digest = bytes.fromhex(name)
        except ValueError:
            digest = b""
        if not db.execute("SELECT 1 FROM held WHERE digest=? LIMIT 1", (digest,)).fetchone():
            raise UsageError(
                f"nothing is held under {name!r}", hint="proxy-usage unattributed ls --json shows the ids"
            )
