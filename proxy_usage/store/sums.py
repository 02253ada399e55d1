"""The sums of a store: what it keeps of them, what they come to, and whether its tables confirm them.

No sum is left to SQL where it could pass 64 bits: values are added in two halves of 32.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec

from proxy_usage.store.database import counters
from proxy_usage.store.history import history
from proxy_usage.store.letters import absent
from proxy_usage.store.records import fold_log
from proxy_usage.store.views import Difference, MeterTerms, OutputStatus, OutputTerms, Tally
from proxy_usage.turn import Layout

Tallies = dict[tuple[int, str, str], Tally]
"""By output (0: all together), fate and meter."""
Cells = Collection[tuple[int, ...]]
"""``(id, rows, *amounts)`` of the open cells, in the order of the layout's meters."""

_NOTHING = Tally(0, 0)


def open_cells(db: sqlite3.Connection) -> Cells:
    """What the windows held that were open at the last checkpoint."""
    return [state for _, state in fold_log(db).values()]


def tallies(db: sqlite3.Connection) -> Tallies:
    """Events by output, fate and meter, as the store keeps them."""
    return {
        (output, fate, meter): Tally(events, int(value))
        for output, fate, meter, events, value in db.execute(
            "SELECT output, fate, meter, events, value FROM tallies"
        )
    }


def outputs(db: sqlite3.Connection, kept: Tallies) -> tuple[OutputStatus, ...]:
    """How the events of each output fare."""
    fates: Counter[tuple[int, str]] = Counter()
    for (output, fate, _), tally in kept.items():
        fates[output, fate] += tally.events
    unanswered = counters(db, "unanswered")
    statuses = []
    for output, name, added_ms, paused, paused_ms, detail in db.execute(
        "SELECT output, name, added_ms, paused, paused_ms, detail FROM outputs ORDER BY output"
    ).fetchall():
        batches, attempted = db.execute(
            "SELECT count(DISTINCT b.batch), count(d.seq) FROM batches b"
            " LEFT JOIN deliveries d ON d.batch=b.batch WHERE b.output=?",
            (output,),
        ).fetchone()
        oldest = db.execute(
            "SELECT e.minted_ms FROM deliveries d JOIN events e ON e.seq=d.seq"
            " WHERE d.output=? ORDER BY d.seq LIMIT 1",
            (output,),
        ).fetchone()
        # The answer is that of the row with the minimum.
        retrying_ms, answer = db.execute(
            "SELECT min(d.first_attempt_ms), b.answer FROM batches b JOIN deliveries d ON d.batch=b.batch"
            " WHERE b.output=? AND b.attempts>0 AND b.answer!=''",
            (output,),
        ).fetchone()
        statuses.append(
            OutputStatus(
                name=name,
                added_ms=added_ms,
                pending=fates[output, "pending"],
                attempted=attempted,
                batches=batches,
                delivered=fates[output, "delivered"] + fates[output, "delivered_ambiguous"],
                ambiguous=fates[output, "delivered_ambiguous"],
                unanswered=unanswered.get(str(output), 0),
                unconfirmed=fates[output, "unconfirmed"],
                dead=fates[output, "dead"],
                recorded=fates[output, "recorded"],
                outside=sum(fates[output, fate] for fate in ("before_start", "after_end", "elsewhere")),
                given_up=fates[output, "redated"] + fates[output, "retired"],
                merged=fates[output, "merged"],
                oldest_ms=oldest[0] if oldest else None,
                paused=paused,
                paused_ms=None if paused is None else paused_ms,
                detail=(detail or "") if paused is not None else "",
                retrying_ms=retrying_ms,
                answer=answer or "",
            )
        )
    return tuple(statuses)


def meters(db: sqlite3.Connection, cells: Cells) -> tuple[MeterTerms, ...]:
    """The conservation sum of each meter; meters that were configured once follow those that are."""
    row = db.execute("SELECT value FROM meta WHERE name='layout'").fetchone()
    layout = msgspec.json.decode(row[0], type=Layout) if row else Layout((), ())
    names = [meter[0] for meter in layout.meters]
    divisors = {meter[0]: meter[4] for meter in layout.meters}
    opened: Counter[str] = Counter()
    for state in cells:
        for name, amount in zip(names, state[2:], strict=True):
            opened[name] += amount
    counted, written_off, expired = (counters(db, name) for name in ("counted", "written_off", "expired"))
    held = _added_up(db.execute("SELECT amounts FROM held"))
    remainders = _added_up(db.execute("SELECT remainders FROM keys WHERE remainders != '{}'"))
    minted, redated = _minted(tallies(db))
    known = counted.keys() | written_off.keys() | held.keys() | remainders.keys() | minted.keys()
    return tuple(
        MeterTerms(
            meter=name,
            divisor=divisors.get(name),
            counted=counted.get(name, 0),
            open=opened[name],
            held=held[name],
            remainders=remainders[name],
            written_off=written_off.get(name, 0),
            expired=expired.get(name, 0),
            minted=minted.get(name, _NOTHING),
            redated=redated.get(name, _NOTHING),
        )
        for name in (*names, *sorted(known - set(names)))
    )


def _minted(kept: Tallies) -> tuple[dict[str, Tally], dict[str, Tally]]:
    """By meter: all that was minted, and what of it takes the place of a dead letter, at whatever output."""
    minted: dict[str, Tally] = {}
    redated: dict[str, Tally] = {}
    for (_, fate, meter), tally in kept.items():
        if fate == "minted":
            minted[meter] = tally
        elif fate == "redated":
            have = redated.get(meter, _NOTHING)
            redated[meter] = Tally(have.events + tally.events, have.value + tally.value)
    return minted, redated


def output_terms(
    db: sqlite3.Connection, kept: Tallies, terms: Iterable[MeterTerms]
) -> tuple[OutputTerms, ...]:
    """The fates of each meter's events at each output."""
    added = db.execute("SELECT output, name, added_ms FROM outputs ORDER BY output").fetchall()
    first_ms = min((row[2] for row in added), default=0)
    gaps = absent(db)
    return tuple(
        OutputTerms(
            output=name,
            meter=meter.meter,
            minted=meter.minted,
            fates={
                fate: tally
                for (number, fate, of), tally in sorted(kept.items())
                if (number, of) == (output, meter.meter)
            },
            partial=added_ms > first_ms or output in gaps,
        )
        for meter in terms
        for output, name, added_ms in added
    )


def recount(db: sqlite3.Connection, kept: Tallies, terms: Iterable[MeterTerms]) -> tuple[Difference, ...]:
    """Adds up the tables and names every sum that differs from the one that is kept."""
    found = _halves(
        db.execute(
            "SELECT d.output, 'pending', e.meter, count(*), sum(e.value >> 32), sum(e.value & 4294967295)"
            " FROM deliveries d CROSS JOIN events e ON e.seq=d.seq GROUP BY d.output, e.meter"
        )
    )
    found |= _halves(
        db.execute(
            "SELECT d.output, 'dead', e.meter, count(*), sum(e.value >> 32), sum(e.value & 4294967295)"
            " FROM dead d CROSS JOIN events e ON e.seq=d.seq GROUP BY d.output, e.meter"
        )
    )
    settled = _halves(
        db.execute(
            "SELECT output, fate, meter, count(*), sum(value >> 32), sum(value & 4294967295)"
            " FROM ledger GROUP BY output, fate, meter"
        )
    )
    past = history(db)
    for place, (events, value) in past.items():
        have = settled.get(place, _NOTHING)
        settled[place] = Tally(have.events + events, have.value + value)
    found |= settled
    found |= _minted_ids(db) if not any(output for output, _, _ in past) else _minted_as_kept(kept)
    # Remainders written off have ledger rows and a counter, in base units, but no tally.
    for meter in terms:
        key = (0, "written_off", meter.meter)
        lines = found[key].events if key in found else 0
        kept = kept | {key: Tally(lines, meter.written_off)}
    names: Mapping[int, str] = dict(db.execute("SELECT output, name FROM outputs"))
    return tuple(
        Difference(f"{names.get(key[0], 'store')}: {key[1]} {key[2]}", have, found.get(key, _NOTHING))
        for key in sorted(kept.keys() | found.keys())
        if (have := kept.get(key, _NOTHING)) != found.get(key, _NOTHING)
    )


def _minted_ids(db: sqlite3.Connection) -> Tallies:
    """What was minted, each id once, as long as a ledger row tells of each that is gone."""
    return _halves(
        db.execute(
            "SELECT 0, 'minted', meter, count(*), sum(value >> 32), sum(value & 4294967295) FROM"
            " (SELECT id, meter, value FROM events UNION SELECT id, meter, value FROM ledger WHERE id != '')"
            " GROUP BY meter"
        )
    )


def _minted_as_kept(kept: Tallies) -> Tallies:
    """Hourly sums and merged events have no ids: what was minted is then what the outputs' fates add up to,
    which ``OutputTerms.balanced`` says."""
    return {place: tally for place, tally in kept.items() if place[:2] == (0, "minted")}


def _halves(rows: Iterable[tuple[int, str, str, int, int, int]]) -> Tallies:
    return {
        (output, fate, meter): Tally(events, (high << 32) + low)
        for output, fate, meter, events, high, low in rows
    }


def _added_up(rows: Iterable[tuple[str]]) -> Counter[str]:
    """The sum of JSON objects that hold integers."""
    total: Counter[str] = Counter()
    for (text,) in rows:
        for name, amount in json.loads(text).items():
            total[name] += amount
    return total


def rows(db: sqlite3.Connection) -> dict[str, dict[str, int]]:
    """Rows by fate and reason."""
    fates: dict[str, dict[str, int]] = {}
    for label, count in sorted(counters(db, "rows").items()):
        fate, _, reason = label.partition("/")
        fates.setdefault(fate, {})[reason] = count
    return fates
