"""One tenant's usage of a time, line by line: what was made of it, where that is, and where it came from.

    waiting or sent (deliveries) ┐
    dead letters                 ├─ one line an event and output ─┐
    settled (ledger)             │                                ├─▶ UsageLine
    settled long ago (sums)      ┘  one an hour, fate and meter ──┘

What is of one key and hour moves between these places, never out of them. So it is read together, in one
short transaction: a hundred keys of one hour at a time, whatever the time asked for. At one output each event
is in exactly one line, and so the lines add up to what was delivered.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from ulid import ULID

from proxy_usage.errors import UsageError
from proxy_usage.events import rfc3339
from proxy_usage.store.database import counters
from proxy_usage.store.history import HOUR_MS
from proxy_usage.store.records import fold_log
from proxy_usage.store.schema import dumps
from proxy_usage.store.views import EventView

Snapshot = Callable[[], AbstractContextManager[sqlite3.Connection]]
"""One read transaction."""
KEYS = 100
"""Keys read together."""
REPLACED = ("redated", "elsewhere")
"""Fates of what is another event's usage: it is not added to what the tenant used."""

_EVENTS = (
    "SELECT d.output, CASE WHEN d.batch IS NULL THEN 'pending' ELSE 'attempted' END, e.key, e.meter,"
    " e.window_ms, e.value, e.id, d.first_attempt_ms, 0, '', coalesce(b.answer, '')"
    " FROM events e INDEXED BY events_window CROSS JOIN outputs o"
    " CROSS JOIN deliveries d ON d.output=o.output AND d.seq=e.seq LEFT JOIN batches b ON b.batch=d.batch"
    " WHERE e.window_ms>=?1 AND e.window_ms<?2 AND e.key IN (SELECT value FROM json_each(?3))"
)
_DEAD = (
    "SELECT d.output, 'dead', e.key, e.meter, e.window_ms, e.value, e.id, d.at_ms, 0, d.reason, d.answer"
    " FROM events e INDEXED BY events_window CROSS JOIN outputs o"
    " CROSS JOIN dead d ON d.output=o.output AND d.seq=e.seq"
    " WHERE e.window_ms>=?1 AND e.window_ms<?2 AND e.key IN (SELECT value FROM json_each(?3))"
)
# Through the spans, whose entries are read one after the other: those of other keys are passed over.
_LEDGER = (
    "SELECT l.output, l.fate, l.key, l.meter, l.window_ms, l.value, l.id, l.at_ms, l.answer, '', ''"
    " FROM spans s INDEXED BY spans_last"
    " CROSS JOIN ledger l ON l.entry BETWEEN s.span << 8 AND (s.span << 8) + 255"
    " WHERE s.last_ms>=?1 AND s.first_ms<?2 AND l.window_ms>=?1 AND l.window_ms<?2 AND l.output>0"
    " AND l.key IN (SELECT value FROM json_each(?3))"
)
# The tallies know which fates there are.
_SUMS = (
    "SELECT s.output, s.fate, s.key, s.meter, s.events, s.value"
    " FROM (SELECT DISTINCT output, fate FROM tallies WHERE output>0) f CROSS JOIN json_each(?2) j"
    " CROSS JOIN sums s ON s.hour_ms=?1 AND s.output=f.output AND s.fate=f.fate AND s.key=j.value"
)
_ORIGINS = (
    "SELECT o.key, coalesce(s.rule, ''), coalesce(s.node, ''), o.rows FROM json_each(?2) j"
    " CROSS JOIN origins o ON o.hour_ms=?1 AND o.key=j.value LEFT JOIN sources s ON s.source=o.source"
)
_NEXT = {
    "sums": "SELECT min(hour_ms) FROM sums WHERE hour_ms>=?",
    "events": "SELECT min(window_ms) FROM events WHERE window_ms>=?",
    # Of a span that holds such a window; perhaps an hour of which there is nothing.
    "ledger": "SELECT max(?1, min(first_ms)) FROM spans WHERE last_ms>=?1",
}


@dataclass(frozen=True, slots=True)
class RowSource:
    """Rows that one node sent and one tenant rule attributed."""

    node: str
    """Empty, with the rule: of sources past their bound."""
    rule: str
    """Index and text of the rule, as it was then."""
    rows: int


@dataclass(frozen=True, slots=True)
class UsageLine:
    """An event at an output; or, once single events are gone, an hour's events of one fate."""

    output: str
    tenant: str
    dimensions: Mapping[str, str]
    meter: str
    window_ms: int
    """Begin of the window, or of the hour."""
    fate: str
    """``pending``, ``attempted``, ``dead``, or the fate in the ledger."""
    value: int
    events: int = 1
    id: str = ""
    """Empty: a sum of an hour."""
    minted_ms: int | None = None
    at_ms: int | None = None
    """When it was settled, refused, or, still waiting, first sent."""
    status: int | None = None
    """HTTP status that settled it."""
    reason: str = ""
    answer: str = ""
    merged: int = 0
    """How many events it stands for, if not for itself alone."""
    merged_from_ms: int | None = None
    """Begin of the first window that it stands for; ``window_ms`` is the last."""
    late: bool = False
    """Another event of the same key, meter and window was made before it."""
    sources: tuple[RowSource, ...] = field(default=(), repr=False)
    """Of its key in its hour."""

    @property
    def counts(self) -> bool:
        """Whether it is usage of its own: not what another line has, too."""
        return self.fate not in REPLACED


@dataclass(frozen=True, slots=True)
class UsageHour:
    """Some keys of a tenant in one UTC hour."""

    hour_ms: int
    lines: tuple[UsageLine, ...]
    """By key, window, meter and output."""
    sources: tuple[RowSource, ...]
    """Of these keys in the whole hour."""


@dataclass(frozen=True, slots=True)
class HeldHour:
    """Usage of nobody in an hour: whose it is, or would be, nobody can say."""

    hour_ms: int
    reason: str
    rows: int
    amounts: Mapping[str, int]
    """Base units by meter."""


@dataclass(frozen=True, slots=True)
class UsageNotes:
    """What the lines of a time do not say."""

    open_windows: int
    """Of the tenant: what is in them is no event yet."""
    held: tuple[HeldHour, ...]
    summed: bool
    """Whether of some events only hourly sums are left."""
    single_since_ms: int | None
    """When the oldest event was settled that the ledger has by itself; None: it has none."""
    known_since_ms: int | None
    """Of hours before this, sums were removed; None: none ever was."""


@dataclass(frozen=True, slots=True)
class EventTrace:
    """One event, and what is known of how it came to be."""

    event: EventView
    minted_ms: int
    merged: int
    """How many events it stands for, if not for itself alone."""
    merged_from_ms: int | None
    late: bool
    """Another event of its key, meter and window was made before it, at some output."""
    others: tuple[str, ...]
    """Other events of its key, meter and window."""
    hour_ms: int
    sources: tuple[RowSource, ...]
    """Where the rows of its key came from in this hour."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the ledger still has."""

    singles_ms: int | None
    """When the oldest event that it has was settled; None: it has none."""
    merged: bool
    """Whether events were ever merged: of their parts no ids are kept."""


def kept(db: sqlite3.Connection) -> Kept:
    """What the ledger still has."""
    oldest = db.execute("SELECT at_ms FROM ledger ORDER BY entry LIMIT 1").fetchone()
    merged = db.execute("SELECT 1 FROM tallies WHERE fate='merged' AND events>0 LIMIT 1").fetchone()
    return Kept(None if oldest is None else oldest[0], merged is not None)


def outputs(db: sqlite3.Connection) -> dict[int, str]:
    """Names by number."""
    return dict(db.execute("SELECT output, name FROM outputs ORDER BY output"))


def keys_of(db: sqlite3.Connection, tenant: str) -> dict[int, Mapping[str, str]]:
    """A tenant's keys by number, with their dimensions; ordered by these."""
    rows = db.execute("SELECT key, dimensions FROM keys WHERE tenant=? ORDER BY dimensions", (tenant,))
    return {key: json.loads(text) for key, text in rows}


def _next_hour(db: sqlite3.Connection, from_ms: int) -> int | None:
    """The first hour that may hold something of a window at or after a moment."""
    found = [ms for text in _NEXT.values() if (ms := db.execute(text, (from_ms,)).fetchone()[0]) is not None]
    return min(found) // HOUR_MS * HOUR_MS if found else None


def hours(snapshot: Snapshot, tenant: str, from_ms: int, to_ms: int) -> Iterator[UsageHour]:
    """A tenant's usage, hour by hour; each is a transaction, so that nothing waits for whoever reads on.

    Raises:
        UsageError: a bound lies within an hour of which only the sum is left.
    """
    with snapshot() as db:
        for at_ms in (from_ms, to_ms):
            _check_hour(db, at_ms)
        keys = keys_of(db, tenant)
        hour_ms = _next_hour(db, from_ms)
    while hour_ms is not None and hour_ms < to_ms:
        begin_ms, end_ms = max(from_ms, hour_ms), min(to_ms, hour_ms + HOUR_MS)
        for part in _chunks(keys):
            with snapshot() as db:
                found = hour(db, tenant, part, begin_ms, end_ms)
            if found.lines:
                yield found
        with snapshot() as db:
            hour_ms = _next_hour(db, hour_ms + HOUR_MS)


def trace(snapshot: Snapshot, event: EventView) -> EventTrace:
    """What is known of how an event came to be."""
    with snapshot() as db:
        keys = {key: named for key, named in keys_of(db, event.tenant).items() if named == event.dimensions}
        found = hour(db, event.tenant, keys, event.window_ms, event.window_ms + 1)
    singles = [line for line in found.lines if line.id and line.meter == event.meter]
    own = [line for line in singles if line.id == event.id]
    return EventTrace(
        event=event,
        minted_ms=minted(event.id),
        merged=own[0].merged if own else 0,
        merged_from_ms=own[0].merged_from_ms if own else None,
        late=any(line.late for line in own),
        others=tuple(dict.fromkeys(line.id for line in singles if line.id != event.id)),
        hour_ms=found.hour_ms,
        sources=found.sources,
    )


def hour(
    db: sqlite3.Connection,
    tenant: str,
    keys: Mapping[int, Mapping[str, str]],
    from_ms: int,
    to_ms: int,
) -> UsageHour:
    """Some keys within one hour.

    Sums of the hour are there whole, also where the time begins or ends within it.
    """
    hour_ms = from_ms - from_ms % HOUR_MS
    named = dumps(list(keys))
    names = outputs(db)
    sources = _sources(db, hour_ms, named)
    lines: list[tuple[int, UsageLine]] = []
    for output, fate, key, meter, events, value in db.execute(_SUMS, (hour_ms, named)):
        one = UsageLine(names[output], tenant, keys[key], meter, hour_ms, fate, int(value), events)
        lines.append((key, replace(one, sources=sources.get(key, ()))))
    found = [row for text in (_EVENTS, _DEAD, _LEDGER) for row in db.execute(text, (from_ms, to_ms, named))]
    first: dict[tuple[object, ...], int] = {}
    for output, fate, key, meter, window_ms, _, event_id, *_ in found:
        if fate not in REPLACED:
            place = (output, key, meter, window_ms)
            first[place] = min(minted(event_id), first.get(place, 1 << 62))
    for output, fate, key, meter, window_ms, value, event_id, at_ms, status, reason, answer in found:
        minted_ms = minted(event_id)
        merged = db.execute("SELECT events, first_ms FROM merges WHERE id=?", (event_id,)).fetchone()
        one = UsageLine(
            names[output],
            tenant,
            keys[key],
            meter,
            window_ms,
            fate,
            value,
            id=event_id,
            minted_ms=minted_ms,
            at_ms=at_ms,
            status=status or None,
            reason=reason,
            answer=answer,
            merged=0 if merged is None else merged[0],
            merged_from_ms=None if merged is None else merged[1],
            late=first.get((output, key, meter, window_ms), minted_ms) < minted_ms,
            sources=sources.get(key, ()),
        )
        lines.append((key, one))
    order = {key: place for place, key in enumerate(keys)}
    lines.sort(key=lambda two: (order[two[0]], two[1].window_ms, two[1].meter, two[1].output, two[1].id))
    return UsageHour(
        hour_ms, tuple(one for _, one in lines), tuple(one for key in keys for one in sources.get(key, ()))
    )


def _chunks(keys: Mapping[int, Mapping[str, str]]) -> Iterator[dict[int, Mapping[str, str]]]:
    """So many keys as are read together."""
    numbers = list(keys)
    for at in range(0, len(numbers), KEYS):
        yield {number: keys[number] for number in numbers[at : at + KEYS]}


def _held(db: sqlite3.Connection, from_ms: int, to_ms: int) -> tuple[HeldHour, ...]:
    """Usage of nobody in the hours that a time touches, by hour and reason."""
    rows: Counter[tuple[int, str]] = Counter()
    amounts: dict[tuple[int, str], Counter[str]] = {}
    for hour_ms, reason, count, text in db.execute(
        "SELECT hour_ms, reason, rows, amounts FROM held WHERE hour_ms>=? AND hour_ms<?",
        (from_ms - from_ms % HOUR_MS, to_ms),
    ):
        rows[hour_ms, reason] += count
        amounts.setdefault((hour_ms, reason), Counter()).update(json.loads(text))
    return tuple(HeldHour(*place, rows[place], dict(amounts[place])) for place in sorted(amounts))


def minted(event_id: str) -> int:
    """When an event was made, in milliseconds since the epoch: its id says so."""
    return int.from_bytes(ULID.from_str(event_id).bytes[:6], "big")


def notes(db: sqlite3.Connection, tenant: str, from_ms: int, to_ms: int) -> UsageNotes:
    """What the lines of a time do not say."""
    births = (birth for birth, _ in fold_log(db).values())
    rolled = db.execute("SELECT 1 FROM sums WHERE fate!='merged' LIMIT 1").fetchone()
    (known_ms,) = db.execute("SELECT min(hour_ms) FROM sums").fetchone()
    return UsageNotes(
        open_windows=sum(birth[2] == tenant and from_ms <= birth[1] < to_ms for birth in births),
        held=_held(db, from_ms, to_ms),
        summed=rolled is not None,
        single_since_ms=kept(db).singles_ms,
        known_since_ms=known_ms if counters(db, "forgotten_events") else None,
    )


def _check_hour(db: sqlite3.Connection, at_ms: int) -> None:
    """A bound within an hour of which only sums are left cannot be answered.

    Raises:
        UsageError: it lies within one.
    """
    hour_ms = at_ms - at_ms % HOUR_MS
    summed = db.execute("SELECT 1 FROM sums WHERE hour_ms=? AND value!='0' LIMIT 1", (hour_ms,))
    if at_ms != hour_ms and summed.fetchone() is not None:
        raise UsageError(
            f"{rfc3339(at_ms)} lies within an hour of which the store keeps only the sum",
            hint=f"begin and end on hours, e.g. {rfc3339(hour_ms)} or {rfc3339(hour_ms + HOUR_MS)}:"
            " what is older than store.keep_delivered is kept by the hour",
        )


def _sources(db: sqlite3.Connection, hour_ms: int, named: str) -> dict[int, tuple[RowSource, ...]]:
    found: dict[int, list[RowSource]] = {}
    for key, rule, node, rows in db.execute(_ORIGINS, (hour_ms, named)):
        found.setdefault(key, []).append(RowSource(node, rule, rows))
    return {
        key: tuple(sorted(sources, key=lambda one: (-one.rows, one.node, one.rule)))
        for key, sources in found.items()
    }
