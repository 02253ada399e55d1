"""What two stores hold together, so that it can be compared with what one holds that took the other over."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable
from typing import Any

from proxy_usage.store.records import fold_log

Books = dict[str, Counter[Any]]
"""By what it is about: amounts, or how many rows, by names that mean the same in every store."""

_EVENT = (
    "SELECT e.id, k.tenant, k.dimensions, e.meter, e.window_ms, e.value, e.minted_ms, e.outputs, e.given,"
    " e.body FROM events e JOIN keys k ON k.key=e.key"
)
_DELIVERY = (
    "SELECT o.name, e.id, d.first_attempt_ms, b.attempts, b.not_before_ms, b.confirm, b.clean, b.answer,"
    " (SELECT group_concat(id) FROM (SELECT x.id FROM deliveries y JOIN events x ON x.seq=y.seq"
    " WHERE y.batch=d.batch ORDER BY x.id))"
    " FROM deliveries d JOIN events e ON e.seq=d.seq JOIN outputs o ON o.output=d.output"
    " LEFT JOIN batches b ON b.batch=d.batch AND b.output=d.output"
)
_DEAD = (
    "SELECT o.name, e.id, d.reason, d.answer, d.at_ms, d.first_attempt_ms"
    " FROM dead d JOIN events e ON e.seq=d.seq JOIN outputs o ON o.output=d.output"
)
_LEDGER = (
    "SELECT coalesce(o.name, ''), l.fate, k.tenant, k.dimensions, l.meter, l.window_ms, l.value, l.at_ms,"
    " l.answer, l.id FROM ledger l JOIN keys k ON k.key=l.key LEFT JOIN outputs o ON o.output=l.output"
)
_SUMS = (
    "SELECT s.hour_ms, coalesce(o.name, ''), s.fate, k.tenant, k.dimensions, s.meter, s.events, s.value"
    " FROM sums s JOIN keys k ON k.key=s.key LEFT JOIN outputs o ON o.output=s.output"
)


_ORIGINS = (
    "SELECT r.hour_ms, coalesce(k.tenant, ''), coalesce(k.dimensions, ''), coalesce(s.rule, ''),"
    " coalesce(s.node, ''), r.rows FROM origins r LEFT JOIN keys k ON k.key=r.key"
    " LEFT JOIN sources s ON s.source=r.source"
)


def check_rows(db: sqlite3.Connection) -> None:
    """What tables say of each other: how many origins and sums there are, and when the ledger's were."""
    for table in ("origins", "sums"):
        kept = db.execute("SELECT coalesce(sum(value), 0) FROM counters WHERE name=?", (table,)).fetchone()
        assert kept == db.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert db.execute(
        "SELECT count(*) FROM ledger l LEFT JOIN spans s ON s.span=l.entry >> 8"
        " WHERE s.span IS NULL OR l.window_ms NOT BETWEEN s.first_ms AND s.last_ms"
    ).fetchone() == (0,)


def books(db: sqlite3.Connection, meters: Iterable[str], dimensions: Iterable[str]) -> Books:
    """Everything that one store holds."""
    names, labels = list(meters), list(dimensions)
    found: Books = {
        "events": Counter(db.execute(_EVENT).fetchall()),
        "deliveries": Counter(db.execute(_DELIVERY).fetchall()),
        "dead": Counter(db.execute(_DEAD).fetchall()),
        "ledger": Counter(db.execute(_LEDGER).fetchall()),
        "intake": Counter(
            {tuple(source): rows for *source, rows in db.execute("SELECT node, log, kind, rows FROM intake")}
        ),
        "merges": Counter(db.execute("SELECT id, first_ms, events, outputs FROM merges").fetchall()),
        "origins": Counter({tuple(place): rows for *place, rows in db.execute(_ORIGINS)}),
        "batches": Counter(batches=db.execute("SELECT count(*) FROM batches").fetchone()[0]),
    }
    for name in ("sums", "tallies", "held", "counters", "unfinished"):
        found[name] = Counter()
    for *place, events, value in db.execute(_SUMS):
        found["sums"].update({(*place, "events"): events, (*place, "value"): int(value)})
    for *place, events, value in db.execute(
        "SELECT coalesce(o.name, ''), t.fate, t.meter, t.events, t.value"
        " FROM tallies t LEFT JOIN outputs o ON o.output=t.output"
    ):
        found["tallies"].update({(*place, "events"): events, (*place, "value"): int(value)})
    for hour_ms, reason, identity, rows, text in db.execute(
        "SELECT hour_ms, reason, identity, rows, amounts FROM held"
    ):
        sizes = {(hour_ms, reason, identity, name): size for name, size in json.loads(text).items()}
        found["held"].update(sizes | {(hour_ms, reason, identity, "rows"): rows})
    outputs = dict(db.execute("SELECT output, name FROM outputs"))
    for name, label, value in db.execute(
        "SELECT name, label, value FROM counters WHERE name NOT IN ('origins', 'sums')"  # see check_rows
    ):
        if name == "unanswered":
            label = outputs[int(label)]
        found["counters"][name, label] += int(value)
    # What is not billed yet: whole units of remainders may have become an open window.
    for tenant, text, carried in db.execute("SELECT tenant, dimensions, remainders FROM keys"):
        for name, amount in json.loads(carried).items():
            found["unfinished"][tenant, text, name] += amount
    for (_, _, tenant, values, _), (_, _, *amounts) in fold_log(db).values():
        text = json.dumps(dict(zip(labels, values, strict=True)), separators=(",", ":"), sort_keys=True)
        for name, more in zip(names, amounts, strict=True):
            found["unfinished"][tenant, text, name] += more
    return found


def together(*all_books: Books) -> Books:
    """The sum of several; what is nothing is left out."""
    total: Books = {}
    for one in all_books:
        for name, counter in one.items():
            total.setdefault(name, Counter()).update(counter)
    return {name: +counter for name, counter in total.items()}
