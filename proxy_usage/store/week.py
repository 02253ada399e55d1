"""The last week by the hour: how many events were made of each hour's windows, and their values by meter.

Kept beside the sums over the life of the store, one small row per hour and meter, so that a week is a few
hundred rows however many tenants there are. Older hours go as newer ones come.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import NamedTuple

from proxy_usage.store.database import add_counters

HOUR_MS = 3_600_000
HOURS = 168
EVENTS = "hour_events"
VALUE = "hour_value/"
"""Names in the table of counters; the latter with the meter's name."""

Hours = dict[tuple[int, str], tuple[int, int]]
"""``(window_ms, meter) → (events, value)`` as one transaction adds them."""


class Week(NamedTuple):
    """Hours that end with the present one."""

    end_ms: int
    """Start of the present hour."""
    events: tuple[int, ...]
    values: Mapping[str, tuple[int, ...]]
    """By meter."""


def add_hours(db: sqlite3.Connection, hours: Hours, now_ms: int) -> None:
    """Adds events to the hours of their windows; those of hours that are gone are left out."""
    first = now_ms - HOURS * HOUR_MS
    events: dict[str, int] = {}
    values: dict[str, dict[str, int]] = {}
    for (window_ms, meter), (count, value) in hours.items():
        hour_ms = window_ms - window_ms % HOUR_MS
        if hour_ms <= first:
            continue
        label = _label(hour_ms)
        events[label] = events.get(label, 0) + count
        sums = values.setdefault(VALUE + meter, {})
        sums[label] = sums.get(label, 0) + value
    for name, added in ((EVENTS, events), *values.items()):
        add_counters(db, name, added.items())
        db.execute("DELETE FROM counters WHERE name=? AND label<?", (name, _label(max(0, first))))


HOUR = "SELECT label, value FROM counters WHERE name=? AND label>? AND label<=? ORDER BY label"
METERS = "SELECT DISTINCT name FROM counters WHERE name>=? AND name<?"


def week(db: sqlite3.Connection, now_ms: int) -> Week:
    """The last 168 hours, the present one included."""
    end_ms = now_ms - now_ms % HOUR_MS
    names = [name for (name,) in db.execute(METERS, (VALUE, VALUE[:-1] + chr(ord("/") + 1)))]
    return Week(end_ms, _hours(db, EVENTS, end_ms), {n[len(VALUE) :]: _hours(db, n, end_ms) for n in names})


def _hours(db: sqlite3.Connection, name: str, end_ms: int) -> tuple[int, ...]:
    first_ms = end_ms - (HOURS - 1) * HOUR_MS
    found = dict(db.execute(HOUR, (name, _label(first_ms - 1), _label(end_ms))))
    return tuple(int(found.get(_label(first_ms + n * HOUR_MS), "0")) for n in range(HOURS))


def _label(time_ms: int) -> str:
    """A time as text that sorts as the number does, for some 30,000 years."""
    return f"{time_ms:015d}"
