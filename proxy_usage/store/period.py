"""What one output's ledger has of a time: per tenant and meter, wherever its events are by now.

    waiting or sent (deliveries) ┐
    dead letters                 ├─ by window ──▶ sums per tenant and meter
    settled (ledger)             │
    settled long ago (sums)      ┘  by hour

At one output each event is in exactly one of these places, so that nothing counts twice. A dead letter that
a new event replaced counts as that one; what was made for another output counts there.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from proxy_usage.comparison import Ours
from proxy_usage.errors import UsageError
from proxy_usage.events import rfc3339
from proxy_usage.store.database import counters
from proxy_usage.store.history import HOUR_MS
from proxy_usage.store.records import fold_log
from proxy_usage.store.report import asides

# Values are added in two halves: a sum may pass 64 bits.
_EVENTS = (
    "SELECT e.key, e.meter, '', sum(e.value >> 32), sum(e.value & 4294967295)"
    " FROM deliveries d CROSS JOIN events e ON e.seq=d.seq"
    " WHERE d.output=? AND e.window_ms>=? AND e.window_ms<? GROUP BY e.key, e.meter"
)
_DEAD = (
    "SELECT e.key, e.meter, '', sum(e.value >> 32), sum(e.value & 4294967295)"
    " FROM dead d CROSS JOIN events e ON e.seq=d.seq"
    " WHERE d.output=? AND e.window_ms>=? AND e.window_ms<? GROUP BY e.key, e.meter"
)
_LEDGER = (
    "SELECT key, meter, fate, sum(value >> 32), sum(value & 4294967295) FROM ledger"
    " WHERE output=? AND window_ms>=? AND window_ms<? GROUP BY key, meter, fate"
)
_SUMS = "SELECT key, meter, fate, value FROM sums WHERE hour_ms>=? AND hour_ms<? AND output=?"
_Part = tuple[int, str, str, int]  # key, meter, fate, value


def period(
    db: sqlite3.Connection, output: str, from_ms: int, to_ms: int, route: tuple[str, str] | None
) -> Ours:
    """Adds up what an output's ledger has of windows that begin in ``[from_ms, to_ms)``.

    Args:
        route: the dimension that names a row's HTTPRoute, and its value where there is none.

    Raises:
        UsageError: there is no such output; or a bound lies within an hour of which only the sum is left.
    """
    number, added_ms = _output(db, output)
    for at_ms in (from_ms, to_ms):
        _check_hour(db, number, at_ms)
    sums: Counter[tuple[str, str]] = Counter()
    no_route: Counter[tuple[str, str]] = Counter()
    elsewhere: Counter[str] = Counter()
    keys: dict[int, tuple[str, bool]] = {}
    for key, meter, fate, value in _parts(db, number, from_ms, to_ms):
        if fate == "elsewhere":
            elsewhere[meter] += value
        elif value and fate != "redated":
            if key not in keys:
                keys[key] = _key(db, key, route)
            tenant, routed = keys[key]
            sums[tenant, meter] += value
            no_route[tenant, meter] += 0 if routed else value
    return Ours(
        output=output,
        sums=sums,
        no_route=no_route,
        keys=Counter(tenant for tenant, _ in keys.values()),
        held=_held(db, from_ms, to_ms),
        whole_hours=from_ms % HOUR_MS == to_ms % HOUR_MS == 0,
        elsewhere={meter: value for meter, value in elsewhere.items() if value},
        open_windows=sum(from_ms <= birth[1] < to_ms for birth, _ in fold_log(db).values()),
        late_start=rfc3339(added_ms) if added_ms > from_ms else "",
        forgotten=_forgotten(db, number, from_ms),
        set_aside=sum(aside.at_ms > from_ms for aside in asides(db)),
    )


def oldest_output(db: sqlite3.Connection, names: Iterable[str]) -> str | None:
    """Of these outputs the one that was added first, so that its ledger goes back furthest."""
    known = [name for (name,) in db.execute("SELECT name FROM outputs ORDER BY added_ms, output")]
    wanted = set(names)
    return next((name for name in known if name in wanted), None)


def _output(db: sqlite3.Connection, name: str) -> tuple[int, int]:
    row = db.execute("SELECT output, added_ms FROM outputs WHERE name=?", (name,)).fetchone()
    if row is None:
        known = [name for (name,) in db.execute("SELECT name FROM outputs ORDER BY output")]
        raise UsageError(f"there is no output {name!r}", hint=f"outputs are {', '.join(known) or 'none'}")
    return row[0], row[1]


def _check_hour(db: sqlite3.Connection, output: int, at_ms: int) -> None:
    hour_ms = at_ms - at_ms % HOUR_MS
    if at_ms == hour_ms:
        return
    kept = db.execute("SELECT 1 FROM sums WHERE hour_ms=? AND output=? LIMIT 1", (hour_ms, output))
    if kept.fetchone() is not None:
        raise UsageError(
            f"{rfc3339(at_ms)} lies within an hour of which the store keeps only the sum",
            hint=f"begin and end on hours, e.g. {rfc3339(hour_ms)} or {rfc3339(hour_ms + HOUR_MS)}:"
            " what is older than store.keep_delivered, or was merged to save room, is kept by the hour",
        )


def _parts(db: sqlite3.Connection, output: int, from_ms: int, to_ms: int) -> Iterator[_Part]:
    time = (output, from_ms, to_ms)
    for statement in (_EVENTS, _DEAD, _LEDGER):
        for key, meter, fate, high, low in db.execute(statement, time):
            yield key, meter, fate, (high << 32) + low
    for key, meter, fate, value in db.execute(_SUMS, (from_ms, to_ms, output)):
        yield key, meter, fate, int(value)


def _key(db: sqlite3.Connection, key: int, route: tuple[str, str] | None) -> tuple[str, bool]:
    """Its tenant, and whether its rows named a route (True where no dimension tells)."""
    tenant, text = db.execute("SELECT tenant, dimensions FROM keys WHERE key=?", (key,)).fetchone()
    return tenant, route is None or json.loads(text).get(route[0]) != route[1]


def _held(db: sqlite3.Connection, from_ms: int, to_ms: int) -> Mapping[str, int]:
    held: Counter[str] = Counter()
    for (text,) in db.execute(
        "SELECT amounts FROM held WHERE hour_ms>=? AND hour_ms<?", (from_ms - from_ms % HOUR_MS, to_ms)
    ):
        held.update(json.loads(text))
    return held


def _forgotten(db: sqlite3.Connection, output: int, from_ms: int) -> bool:
    """Whether sums were removed, and none that is left is as old as the time's beginning."""
    if not any(label.startswith(f"{output}/") for label in counters(db, "forgotten_events")):
        return False
    (oldest_ms,) = db.execute("SELECT min(hour_ms) FROM sums").fetchone()
    return oldest_ms is None or from_ms < oldest_ms
