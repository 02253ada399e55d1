"""Merging: pending events that differ only in their window become one, where room is short.

    12:00  a 5   b 1   c 7 ┐                    12:02  a 9
    12:01  a 3   b 2       ├─ the hour of 12 ─▶ 12:01  b 3
    12:02  a 1             ┘                    12:00  c 7    (alone: stays as it is)

Only events are merged that no output has attempted, for all of their outputs at once, and only within their
UTC hour, so that a month stays a month. The new one has an id of its own, the exact sum, the time of the
latest, and the place in the queue of the first. In an output's books ``n`` pending events become one pending
event of the same value and ``n - 1`` with the fate ``merged`` and no value.

The backlog may be of millions of events, keys may be so many that two windows of one key are far apart. So
it is gone through by ``seq`` in slices, and what is found is gathered up to a bound. Where the bound is
reached before much of it belongs together, only a half of the keys, a quarter, … is looked for at a time.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from proxy_usage.errors import DecodeError
from proxy_usage.events import Mint, likeness
from proxy_usage.store.database import Database, Sums, add_tallies, tally
from proxy_usage.store.history import HOUR_MS, add_sums
from proxy_usage.store.schema import dumps
from proxy_usage.store.spans import note_merge

SLICE = 4_000
"""Events looked at in one step."""
AT_ONCE = 1_000
"""Events replaced in one transaction, or one group of more."""
GROUP = 60
"""Events of one group that are replaced at once: so many windows of a minute has an hour."""
GATHER = 100_000
"""Events remembered between two steps."""
MAX_PARTS = 256

SCAN = "SELECT seq, key, meter, window_ms, given FROM events WHERE seq>? ORDER BY seq LIMIT ?"
WAITING = (
    "SELECT seq, batch IS NULL AND first_attempt_ms IS NULL FROM deliveries"
    " WHERE output=? AND seq>? AND seq<=?"
)
LOAD = (
    "SELECT e.seq, e.window_ms, e.value, e.minted_ms, e.body, e.id FROM json_each(?) j"
    " CROSS JOIN events e ON e.seq=j.value ORDER BY e.window_ms, e.seq"
)
UNTOUCHED = (
    "SELECT count(*) FROM json_each(?) j CROSS JOIN deliveries d ON d.output=? AND d.seq=j.value"
    " WHERE d.batch IS NULL AND d.first_attempt_ms IS NULL"
)


class Progress(NamedTuple):
    """What one step came to."""

    looked: int
    """Events looked at."""
    merged: int
    """Events that are gone: each is part of another one now."""
    done: bool
    """The whole backlog was gone through; the next step begins anew."""


class _Group(NamedTuple):
    key: int
    meter: str
    hour: int
    outputs: tuple[int, ...]


class _Row(NamedTuple):
    seq: int
    window_ms: int
    value: int
    minted_ms: int
    body: bytes
    id: str


@dataclass(slots=True)
class _Pass:
    """One way through the backlog, and how far it is."""

    end: int
    """The last event there was when it began."""
    parts: int = 1
    part: int = 0
    cursor: int = 0
    gathered: int = 0
    groups: dict[_Group, list[int]] = field(default_factory=dict)
    ready: list[tuple[_Group, list[int]]] = field(default_factory=list)


class Merger:
    """Merges a store's backlog, step by step. Each step is at most one short transaction.

    Args:
        mint: gives the new events their ids.
    """

    def __init__(
        self, database: Database, mint: Mint, *, gather: int = GATHER, at_once: int = AT_ONCE
    ) -> None:
        self._database = database
        self._mint = mint
        self._gather = gather
        self._at_once = at_once
        self._pass: _Pass | None = None

    def step(self, now_ms: int) -> Progress:
        """Looks at a slice of the backlog, or merges some of what was found.

        Raises:
            StoreFull, StoreUnavailable: nothing was changed; what was found is looked for again.
        """
        with self._database.reading() as db:
            (end,) = db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()
            under_way = self._pass or _Pass(end)
            # Until this step is done: one that fails begins a new pass.
            self._pass = None
            if under_way.ready:
                progress = Progress(0, self._merge(under_way, now_ms), done=False)
            else:
                progress = self._look(db, under_way)
        if not progress.done:
            self._pass = under_way
        return progress

    def _look(self, db: sqlite3.Connection, under_way: _Pass) -> Progress:
        rows = [
            row for row in db.execute(SCAN, (under_way.cursor, SLICE)).fetchall() if row[0] <= under_way.end
        ]
        if rows:
            waiting = _waiting(db, under_way.cursor, rows[-1][0])
            under_way.cursor = rows[-1][0]
            for seq, key, meter, window_ms, given in rows:
                outputs = waiting.get(seq, ())
                group = _Group(key, meter, window_ms // HOUR_MS, outputs)
                # An output that settled it has attempted it.
                if given and len(outputs) == given and _part(group, under_way.parts) == under_way.part:
                    under_way.groups.setdefault(group, []).append(seq)
                    under_way.gathered += 1
        if under_way.gathered >= self._gather and len(under_way.groups) > under_way.gathered // 2:
            self._halve(under_way)
        if under_way.gathered >= self._gather or not rows:
            under_way.ready = [found for found in under_way.groups.items() if len(found[1]) > 1]
            under_way.groups, under_way.gathered = {}, 0
        done = False
        if not rows and not under_way.ready:
            under_way.part, under_way.cursor = under_way.part + 1, 0
            done = under_way.part >= under_way.parts
        return Progress(len(rows), 0, done)

    @staticmethod
    def _halve(under_way: _Pass) -> None:
        """Goes on with fewer keys, so that what belongs together is found within the bound."""
        if under_way.parts >= MAX_PARTS:
            return
        under_way.parts *= 2
        under_way.groups = {
            group: seqs
            for group, seqs in under_way.groups.items()
            if _part(group, under_way.parts) == under_way.part
        }
        under_way.gathered = sum(len(seqs) for seqs in under_way.groups.values())

    def _merge(self, under_way: _Pass, now_ms: int) -> int:
        sums: Sums = {}
        merged: Counter[tuple[int, int, str, int, str]] = Counter()
        taken = gone = 0
        with self._database.transaction() as db:
            while under_way.ready and taken < self._at_once:
                group, seqs = under_way.ready.pop()
                if len(seqs) > GROUP + 1:  # what the parts become is merged on the next way
                    under_way.ready.append((group, seqs[GROUP:]))
                    seqs = seqs[:GROUP]
                taken += len(seqs)
                lost = self._replace(db, group, seqs, now_ms)
                if lost:
                    gone += lost
                    for output in group.outputs:
                        tally(sums, output, "pending", group.meter, 0, -lost)
                        tally(sums, output, "merged", group.meter, 0, lost)
                        merged[group.hour * HOUR_MS, output, "merged", group.key, group.meter] += lost
            add_sums(db, {place: (events, 0) for place, events in merged.items()})
            add_tallies(db, sums)
        return gone

    def _replace(self, db: sqlite3.Connection, group: _Group, seqs: Sequence[int], now_ms: int) -> int:
        """Puts one event in the place of several. Returns by how many there are fewer now."""
        named = dumps(list(seqs))
        # Since they were found, an output may have taken some: then they are left to another pass.
        for output in group.outputs:
            if db.execute(UNTOUCHED, (named, output)).fetchone()[0] != len(seqs):
                return 0
        rows = _alike([_Row(*row) for row in db.execute(LOAD, (named,))])
        if len(rows) < 2:
            return 0
        made = list(self._mint.merged(rows[-1].body, sum(row.value for row in rows), now_ms))
        if len(made) == len(rows):
            return 0
        places = sorted(row.seq for row in rows)
        for seq in places[len(made) :]:
            db.execute("DELETE FROM events WHERE seq=?", (seq,))
            db.executemany(
                "DELETE FROM deliveries WHERE output=? AND seq=?", [(output, seq) for output in group.outputs]
            )
        waits_since = min(row.minted_ms for row in rows)
        for seq, (event_id, value, body) in zip(places, made, strict=False):
            db.execute(
                "UPDATE events SET id=?, window_ms=?, value=?, minted_ms=?, body=? WHERE seq=?",
                (event_id, rows[-1].window_ms, value, waits_since, body, seq),
            )
        note_merge(
            db,
            [row.id for row in rows],
            [event_id for event_id, _, _ in made],
            rows[0].window_ms,
            len(group.outputs),
        )
        return len(rows) - len(made)


def _alike(rows: Sequence[_Row]) -> list[_Row]:
    """Those that say the same as the last of them; a configuration may have given a key other bodies."""
    found: list[_Row] = []
    try:
        wanted = likeness(rows[-1].body) if rows else {}
        found = [row for row in rows if likeness(row.body) == wanted]
    except DecodeError:
        return []
    return found


def _waiting(db: sqlite3.Connection, after: int, last: int) -> dict[int, tuple[int, ...]]:
    """The outputs that wait for an event without having attempted it, by ``seq``; () where one has."""
    found: dict[int, tuple[int, ...]] = {}
    for (output,) in db.execute("SELECT output FROM outputs ORDER BY output").fetchall():
        for seq, untouched in db.execute(WAITING, (output, after, last)):
            found[seq] = (*found.get(seq, ()), output) if untouched else ()
    return found


def _part(group: _Group, parts: int) -> int:
    """The same for all events of a group, and spread over the parts."""
    return hash(group[:3]) % parts
