"""Dead letters: put back, minted anew, or given up with their output.

             ┌─ replay: same id, time and bytes ─▶ pending; perhaps stored: attempted, a batch of its own
    dead ────┼─ redate: another id and time ─────▶ redated here, its successor pending here
             └─ retire: the output is no more ───▶ retired

Whether an event may be stored out there is decided by why it became a dead letter, and by the mark of its
first attempt: a refusal proves that nothing of it is stored, a mark without one proves nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from proxy_usage.errors import UsageError
from proxy_usage.events import Mint
from proxy_usage.store.database import Database, Sums, add_tallies, tally
from proxy_usage.store.schema import dumps

TOO_LATE = "too_late"
UNREFUSED = (TOO_LATE, "restored", "salvaged")
"""Reasons of our own, which say nothing of what is stored. All others are refusals: of those nothing is."""
UNMARKED = ("restored", "salvaged")
"""Of these even the mark may be lacking: another process may have sent the event since."""
SLICE = 1_000


def may_be_stored(reason: str, first_attempt_ms: int | None) -> bool:
    """Whether the endpoint may hold an event that became a dead letter for this reason."""
    return reason in UNREFUSED and (first_attempt_ms is not None or reason in UNMARKED)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which dead letters are meant."""

    output: str | None = None
    """Only this output's; None: any."""
    ids: Sequence[str] = ()
    """Only these events; empty: all that the other conditions leave."""
    reason: str | None = None
    after: tuple[int, int] = (-1, -1)
    """Only those past this ``(seq, output)``."""
    until: int | None = None
    """Only events up to this ``seq``: with ``after``, none is met twice, also if it comes back at once."""


class Slice(NamedTuple):
    """Dead letters that one call took."""

    taken: int
    position: tuple[int, int] | None
    """Where to go on; None: there was none left."""


class _Letter(NamedTuple):
    output: int
    seq: int
    id: str
    key: int
    meter: str
    value: int
    window_ms: int
    minted_ms: int
    reason: str
    first_attempt_ms: int | None


class Letters:
    """What people decide about dead letters. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def replay(
        self, wanted: Wanted, *, late_ms: int | None = None, together: int = 1, limit: int = SLICE
    ) -> Slice:
        """Puts dead letters back into the queue: id, time and bytes unchanged.

        Args:
            late_ms: events of windows before this would be dead letters again at once: they are left alone.
            together: events that may have been stored are sent in batches of so many, apart from others.
            limit: without ids, at most so many.

        Raises:
            UsageError: an id that is no dead letter, or too old; an output that does not exist.
        """
        sums: Sums = {}
        with self._database.transaction() as db:
            rows = _select(db, wanted, limit, from_ms=None if wanted.ids else late_ms)
            late = [row.id for row in rows if late_ms is not None and row.window_ms < late_ms]
            if late:
                raise UsageError(
                    f"too old to be sent as they are: {_some(late)}",
                    hint="deadletters replay --redate gives them another id and the present time",
                )
            doubtful: dict[int, list[_Letter]] = {}
            for row in rows:
                db.execute("DELETE FROM dead WHERE output=? AND seq=?", (row.output, row.seq))
                tally(sums, row.output, "dead", row.meter, -row.value, -1)
                tally(sums, row.output, "pending", row.meter, row.value)
                if may_be_stored(row.reason, row.first_attempt_ms):
                    doubtful.setdefault(row.output, []).append(row)
                else:
                    db.execute(
                        "INSERT INTO deliveries VALUES(?,?,NULL,?)",
                        (row.output, row.seq, row.first_attempt_ms),
                    )
            for output, letters in doubtful.items():
                for at in range(0, len(letters), together):
                    _resend(db, output, letters[at : at + together])
            add_tallies(db, sums)
        return _slice(rows)

    def last(self) -> int:
        """The number of the newest event."""
        with self._database.reading() as db:
            newest: int = db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        return newest

    def count(self, wanted: Wanted, *, late_ms: int | None = None) -> int:
        """Dead letters that are meant and are of windows before ``late_ms``; None: that may be stored."""
        safe = False if late_ms is None else None
        with self._database.transaction() as db:
            return len(_select(db, wanted, -1, before_ms=late_ms, safe=safe, missing=False))

    def redate(
        self,
        wanted: Wanted,
        mint: Mint,
        now_ms: int,
        *,
        accept_duplicates: bool = False,
        limit: int = SLICE,
    ) -> Slice:
        """Makes new events in the place of dead letters: same value and dimensions, the present window.

        The old one's fate is ``redated``; the new one is for the output that refused it, and has the fate
        ``elsewhere`` at the others. Those that may be stored are left alone unless
        ``accept_duplicates``.

        Raises:
            UsageError: an id that is no dead letter, or that may be stored; an output that does not exist.
        """
        sums: Sums = {}
        with self._database.transaction() as db:
            rows = _select(db, wanted, limit, safe=None if accept_duplicates or wanted.ids else True)
            if not accept_duplicates:
                risky = [row.id for row in rows if may_be_stored(row.reason, row.first_attempt_ms)]
                if risky:
                    raise UsageError(
                        f"may have been stored before they became dead letters: {_some(risky)}",
                        hint="look for them at the endpoint; --accept-duplicates bills them again anyhow",
                    )
            others = _configured(db)
            for row in rows:
                _anew(db, row, mint, now_ms, others - {row.output}, sums)
            add_tallies(db, sums)
        return _slice(rows)

    def retire(self, name: str, configured: Collection[str], now_ms: int, *, limit: int = SLICE) -> int:
        """Gives up what an output that is no longer configured has not settled, dead letters too.

        Their fate is ``retired``; call again until it returns 0.

        Raises:
            UsageError: the output is configured, or there is none of this name.
        """
        if name in configured:
            raise UsageError(
                f"output {name!r} is configured", hint="take it out of the configuration and restart first"
            )
        sums: Sums = {}
        with self._database.transaction() as db:
            output = _number(db, name)
            done = 0
            for fate, table in (("pending", "deliveries"), ("dead", "dead")):
                rows = db.execute(
                    f"SELECT d.seq, e.meter, e.value FROM {table} d CROSS JOIN events e ON e.seq=d.seq"  # noqa: S608
                    " WHERE d.output=? ORDER BY d.seq LIMIT ?",
                    (output, limit - done),
                ).fetchall()
                for seq, meter, value in rows:
                    db.execute(f"DELETE FROM {table} WHERE output=? AND seq=?", (output, seq))  # noqa: S608
                    tally(sums, output, fate, meter, -value, -1)
                    tally(sums, output, "retired", meter, value)
                    settle_event(db, output, seq, "retired", 0, now_ms)
                done += len(rows)
            db.execute(
                "DELETE FROM batches WHERE output=?"
                " AND NOT EXISTS(SELECT 1 FROM deliveries WHERE deliveries.batch=batches.batch)",
                (output,),
            )
            mark_absent(db, [output], now_ms)
            add_tallies(db, sums)
        return done


def too_old(db: sqlite3.Connection, batch: int, late_ms: int) -> list[int]:
    """The events of a batch whose windows begin before ``late_ms``."""
    rows = db.execute(
        "SELECT d.seq FROM deliveries d CROSS JOIN events e ON e.seq=d.seq WHERE d.batch=? AND e.window_ms<?",
        (batch, late_ms),
    )
    return [seq for (seq,) in rows]


def expire(db: sqlite3.Connection, output: int, seqs: Sequence[int], now_ms: int) -> int:
    """Makes dead letters of waiting events that are too old to be sent. Returns how many."""
    sums: Sums = {}
    for seq in seqs:
        meter, value = db.execute("SELECT meter, value FROM events WHERE seq=?", (seq,)).fetchone()
        batch, first_ms = db.execute(
            "DELETE FROM deliveries WHERE output=? AND seq=? RETURNING batch, first_attempt_ms", (output, seq)
        ).fetchone()
        db.execute("INSERT INTO dead VALUES(?,?,?,'',?,?)", (output, seq, TOO_LATE, now_ms, first_ms))
        tally(sums, output, "pending", meter, -value, -1)
        tally(sums, output, "dead", meter, value)
        if not db.execute("SELECT 1 FROM deliveries WHERE batch=? LIMIT 1", (batch,)).fetchone():
            db.execute("DELETE FROM batches WHERE batch=?", (batch,))
    add_tallies(db, sums)
    return len(seqs)


def settle_event(db: sqlite3.Connection, output: int, seq: int, fate: str, answer: int, now_ms: int) -> None:
    """Writes an event's fate at an output into the ledger; the last output to settle it frees its bytes."""
    db.execute(
        "INSERT INTO ledger(output,fate,key,meter,window_ms,value,at_ms,answer,id)"
        " SELECT ?,?,key,meter,window_ms,value,?,?,id FROM events WHERE seq=?",
        (output, fate, now_ms, answer, seq),
    )
    db.execute("UPDATE events SET outputs=outputs-1 WHERE seq=?", (seq,))
    db.execute("DELETE FROM events WHERE seq=? AND outputs=0", (seq,))


def mark_absent(db: sqlite3.Connection, outputs: Iterable[int], now_ms: int) -> None:
    """Notes that outputs are not configured, so that what is minted meanwhile has no fate there."""
    db.executemany(
        "INSERT OR IGNORE INTO meta VALUES(?,?)", [(f"absent/{output}", str(now_ms)) for output in outputs]
    )


def absent(db: sqlite3.Connection) -> set[int]:
    """Outputs that are, or were for a while, not configured."""
    rows = db.execute("SELECT name FROM meta WHERE name BETWEEN 'absent/' AND 'absent/~'")
    return {int(name.removeprefix("absent/")) for (name,) in rows}


def _configured(db: sqlite3.Connection) -> set[int]:
    return {number for (number,) in db.execute("SELECT output FROM outputs")} - absent(db)


def _number(db: sqlite3.Connection, output: str) -> int:
    row = db.execute("SELECT output FROM outputs WHERE name=?", (output,)).fetchone()
    if row is None:
        raise UsageError(f"there is no output {output!r}", hint="proxy-usage status names them")
    number: int = row[0]
    return number


def _select(
    db: sqlite3.Connection,
    wanted: Wanted,
    limit: int,
    *,
    from_ms: int | None = None,
    before_ms: int | None = None,
    safe: bool | None = None,
    missing: bool = True,
) -> list[_Letter]:
    """The dead letters that are meant, in the order of their making.

    Args:
        from_ms, before_ms: bounds on the start of their windows.
        safe: only those of which the endpoint holds nothing; False: only those of which it may.

    Raises:
        UsageError: an output that does not exist; with ``missing``, an id that is no dead letter.
    """
    number = None if wanted.output is None else _number(db, wanted.output)
    rows = db.execute(
        "SELECT d.output, d.seq, e.id, e.key, e.meter, e.value, e.window_ms, e.minted_ms, d.reason,"
        " d.first_attempt_ms FROM dead d JOIN events e ON e.seq=d.seq"
        " WHERE (?1 IS NULL OR d.output=?1) AND (?2 IS NULL OR d.reason=?2)"
        " AND (?3='[]' OR e.id IN (SELECT value FROM json_each(?3)))"
        " AND (d.seq, d.output)>(?4, ?5) AND (?6 IS NULL OR d.seq<=?6)"
        " AND (?7 IS NULL OR e.window_ms>=?7) AND (?8 IS NULL OR e.window_ms<?8)"
        " AND (?9 IS NULL OR ?9!=(d.reason IN (SELECT value FROM json_each(?10)) AND"
        " (d.first_attempt_ms IS NOT NULL OR d.reason IN (SELECT value FROM json_each(?11)))))"
        " ORDER BY d.seq, d.output LIMIT ?12",
        (
            number,
            wanted.reason,
            dumps(list(wanted.ids)),
            *wanted.after,
            wanted.until,
            from_ms,
            before_ms,
            safe,
            dumps(list(UNREFUSED)),
            dumps(list(UNMARKED)),
            -1 if wanted.ids else limit,
        ),
    )
    found = [_Letter(*row) for row in rows]
    lacking = set(wanted.ids) - {row.id for row in found}
    if missing and lacking:
        raise UsageError(
            f"not a dead letter: {_some(sorted(lacking))}", hint="proxy-usage deadletters ls shows their ids"
        )
    return found


def _slice(rows: Sequence[_Letter]) -> Slice:
    return Slice(len(rows), (rows[-1].seq, rows[-1].output) if rows else None)


def _resend(db: sqlite3.Connection, output: int, letters: Sequence[_Letter]) -> None:
    """Puts events that may be stored into one batch that counts as attempted, from the first time on."""
    batch = db.execute(
        "INSERT INTO batches(output,attempts,not_before_ms,confirm,answer) VALUES(?,0,0,0,'')", (output,)
    ).lastrowid
    db.executemany(
        "INSERT INTO deliveries VALUES(?,?,?,?)",
        [(output, row.seq, batch, row.first_attempt_ms or row.minted_ms) for row in letters],
    )


def _anew(
    db: sqlite3.Connection, row: _Letter, mint: Mint, now_ms: int, others: Iterable[int], sums: Sums
) -> None:
    """One new event in the place of a dead letter."""
    body = db.execute("SELECT body FROM events WHERE seq=?", (row.seq,)).fetchone()[0]
    event_id, window_ms, renewed = mint.anew(body, now_ms)
    seq = db.execute(
        "INSERT INTO events(id,key,meter,window_ms,value,minted_ms,outputs,body) VALUES(?,?,?,?,?,?,1,?)",
        (event_id, row.key, row.meter, window_ms, row.value, now_ms, renewed),
    ).lastrowid
    db.execute("INSERT INTO deliveries(output, seq) VALUES(?,?)", (row.output, seq))
    tally(sums, 0, "minted", row.meter, row.value)
    tally(sums, row.output, "pending", row.meter, row.value)
    for other in others:
        tally(sums, other, "elsewhere", row.meter, row.value)
        db.execute(
            "INSERT INTO ledger(output,fate,key,meter,window_ms,value,at_ms,answer,id)"
            " VALUES(?,'elsewhere',?,?,?,?,?,0,?)",
            (other, row.key, row.meter, window_ms, row.value, now_ms, event_id),
        )
    db.execute("DELETE FROM dead WHERE output=? AND seq=?", (row.output, row.seq))
    tally(sums, row.output, "dead", row.meter, -row.value, -1)
    tally(sums, row.output, "redated", row.meter, row.value)
    settle_event(db, row.output, row.seq, "redated", 0, now_ms)


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return ", ".join(ids[:5]) + more
