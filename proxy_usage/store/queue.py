"""The queue: events on their way to an output.

              ┌────────────── replay (same id, time, bytes) ─────────────┐
              ▼                                                          │
    ┌──────────────┐ lease: mark ┌───────────────┐ refused      ┌─────────────────┐
    │   pending    │────────────▶│   attempted   │─────────────▶│   dead letter   │
    │ (no batch)   │  committed  │   (a batch)   │              │ (reason, answer)│
    └──────────────┘  before the └───────────────┘              └─────────────────┘
                      first byte   │   ▲  │  │ accepted  ┌───────────┐
                                   │   │  │  └──────────▶│ delivered │  ledger row; bytes go when no
                                   │   │  │              ├───────────┤  output needs them any more
                            retry: └───┘  └─────────────▶│unconfirmed│
                            same batch,    nobody can    └───────────┘
                            same bytes       say

A batch is what was sent together. It is resent together, byte for byte, until an answer settles it or splits
it; ``first_attempt_ms`` of its deliveries is the one mark that tells "never attempted" from "perhaps stored",
and it is committed before the first byte leaves.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from proxy_usage.errors import ConfigError
from proxy_usage.store.ages import Ages
from proxy_usage.store.database import Database, Sums, add_counters, add_tallies, tally
from proxy_usage.store.letters import Letters, Wanted, expire, mark_absent, settle_event, too_old
from proxy_usage.turn import OutputSlot

SCAN = 1_000
"""Pending events looked at to fill one batch when some tenants are batched apart."""
ANSWER_CHARS = 500
"""An endpoint's answer is kept up to here."""


class Queued(NamedTuple):
    """An event in a batch."""

    seq: int
    id: str
    tenant: str
    meter: str
    value: int
    body: bytes
    window_ms: int | None = None
    """When its window began; None where only the bytes are known."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Events that were, or now may be, sent together; marked as attempted in the store."""

    id: int
    output: int
    events: tuple[Queued, ...]
    attempts: int
    """Attempts before this one."""
    first_attempt_ms: int
    """Earliest first attempt of any of its events: what the endpoint's duplicate window counts from."""
    confirm: bool
    """An event of a batch of which fewer were accepted than sent: it is asked about alone."""
    resent: bool = field(default=False, compare=False)
    """An earlier attempt may have stored it: it ended without an answer, or nothing is known of it."""
    too_late: int = field(default=0, compare=False)
    """Events that this lease found too old and made dead letters."""


class Idle(NamedTuple):
    """Nothing may be sent now."""

    until_ms: int | None
    """When something may, as far as the store knows; None: when new events come."""
    too_late: int = 0
    """Events that this lease found too old and made dead letters."""


class Fate(NamedTuple):
    """How a delivery ended."""

    name: str
    """``delivered``, ``delivered_ambiguous``, ``unconfirmed`` or ``dead``."""
    status: int = 0
    """HTTP status of the answer, 0 where there was none."""
    reason: str = ""
    answer: str = ""


class Queue:
    """Delivery's side of the store. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ages = Ages()

    # --- outputs ----------------------------------------------------------------------------------------

    def register(self, outputs: Sequence[OutputSlot], now_ms: int) -> tuple[OutputSlot, ...]:
        """Numbers the configured outputs (``OutputSlot.output`` is ignored) and checks that none got lost.

        Raises:
            ConfigError: an output that is no longer configured, or sends nothing now, still has events.
        """
        self._ages.at(now_ms)
        with self._database.transaction() as db:
            db.executemany(
                "INSERT INTO outputs(name, added_ms) VALUES(?,?) ON CONFLICT(name) DO NOTHING",
                [(slot.name, now_ms) for slot in outputs],
            )
            known: dict[str, int] = dict(db.execute("SELECT name, output FROM outputs"))
            wanted = {slot.name for slot in outputs}
            sending = {slot.name for slot in outputs if not slot.keeps_only}
            for name, number in known.items():
                if name in sending:
                    continue
                if db.execute("SELECT 1 FROM deliveries WHERE output=? LIMIT 1", (number,)).fetchone():
                    if name in wanted:
                        raise ConfigError(
                            f"outputs: {name!r} has events to deliver, and format none would never send them",
                            hint="to end it, keep its format and set until; format none is for a new name",
                        )
                    raise ConfigError(
                        f"outputs: {name!r} is gone from the configuration but has events to deliver",
                        hint=f"configure it again, or give its events up: proxy-usage outputs retire {name}",
                    )
            mark_absent(db, (number for name, number in known.items() if name not in wanted), now_ms)
        return tuple(slot._replace(output=known[slot.name]) for slot in outputs)

    def pause(self, output: int, reason: str | None, detail: str, now_ms: int) -> None:
        """Notes that an output is paused and why, or (None) that it is no longer."""
        with self._database.transaction() as db:
            db.execute(
                "UPDATE outputs SET paused_ms=CASE WHEN paused IS ? THEN paused_ms ELSE ? END,"
                " paused=?, detail=? WHERE output=?",
                (reason, now_ms, reason, detail[:ANSWER_CHARS], output),
            )

    # --- sending ----------------------------------------------------------------------------------------

    def lease(
        self,
        output: int,
        now_ms: int,
        *,
        events: int,
        max_bytes: int,
        linger_ms: int,
        again: bool = True,
        fresh: bool = True,
        busy: frozenset[int] = frozenset(),
        apart: frozenset[str] = frozenset(),
        late_ms: int | None = None,
        longest_ms: int | None = None,
    ) -> Batch | Idle:
        """The next batch to send: one attempted before if any is due, else a new one of pending events.

        A new batch is marked as attempted in the same transaction, so that it is durable before the caller
        can send a byte.

        Args:
            events, max_bytes: bounds of a new batch; it holds at least one event.
            linger_ms: a new batch that is not full waits until its oldest event is this old.
            again: False: only what was never attempted is offered.
            fresh: False while the output fails: only what was attempted before is offered, if anything was.
            busy: batches that are under way.
            apart: tenants whose events are batched alone.
            late_ms: events of windows before this are not sent any more, attempted or not: they become dead
                letters. Where that empties a batch, the answer is to ask again at once.
            longest_ms: no batch is made to wait for longer: one that would be was postponed under a clock
                that was ahead, and is due.
        """
        self._ages.at(now_ms)
        last_ms = None if longest_ms is None else now_ms + longest_ms
        with self._database.transaction() as db:
            waiting: int | None = None
            attempted = False
            for batch, not_before_ms in db.execute(
                "SELECT batch, not_before_ms FROM batches WHERE output=?"
                " ORDER BY not_before_ms, batch LIMIT ?",
                (output, len(busy) + 1 if again else 0),
            ):
                attempted = True
                if batch in busy:
                    continue
                if not_before_ms <= now_ms or (last_ms is not None and not_before_ms > last_ms):
                    late = 0 if late_ms is None else expire(db, output, too_old(db, batch, late_ms), now_ms)
                    loaded = _load(db, batch)
                    return Idle(now_ms, late) if loaded is None else _begin(db, loaded, late, now_ms)
                waiting = not_before_ms
                break
            if attempted and not fresh:
                return Idle(waiting)
            found = self._pending(db, output, events, max_bytes, apart)
            if late_ms is not None and (old := [row[0] for row in found if row[4] < late_ms]):
                return Idle(now_ms, expire(db, output, old, now_ms))
            if not found:
                return Idle(waiting)
            due_ms = found[0][3] + linger_ms
            # Further away than the linger only after the clock was moved back: that must not hold events up.
            if len(found) < events and now_ms < due_ms <= now_ms + linger_ms:
                return Idle(due_ms if waiting is None else min(due_ms, waiting))
            batch = db.execute(
                "INSERT INTO batches(output,attempts,not_before_ms,confirm,answer) VALUES(?,0,?,0,'')",
                (output, now_ms),
            ).lastrowid
            assert batch is not None
            db.executemany(
                # A replayed event has a mark already. It was refused then, so that nothing of it is stored
                # out there: what the endpoint remembers of it begins now, as for the others of the batch.
                "UPDATE deliveries SET batch=?, first_attempt_ms=? WHERE output=? AND seq=?",
                [(batch, now_ms, output, row[0]) for row in found],
            )
            leased = _load(db, batch)
            assert leased is not None
            return leased

    @staticmethod
    def _pending(
        db: sqlite3.Connection, output: int, events: int, max_bytes: int, apart: frozenset[str]
    ) -> list[tuple[int, str, int, int, int]]:
        """``(seq, tenant, bytes, minted, window)`` of the pending events that belong into the next batch.

        The head of the queue always belongs, and decides: a tenant that is batched apart is alone, the
        others leave those tenants out.
        """
        found: list[tuple[int, str, int, int, int]] = []
        size = 0
        for row in db.execute(
            # Named, since SQLite would take the primary key and step over all that was attempted before.
            "SELECT d.seq, k.tenant, length(e.body), e.minted_ms, e.window_ms"
            " FROM deliveries d INDEXED BY deliveries_pending"
            " CROSS JOIN events e ON e.seq=d.seq CROSS JOIN keys k ON k.key=e.key"
            " WHERE d.output=? AND d.batch IS NULL ORDER BY d.seq LIMIT ?",
            (output, SCAN if apart else events),
        ):
            tenant = row[1]
            if found and (tenant in apart or found[0][1] in apart) and tenant != found[0][1]:
                continue
            if found and (len(found) == events or size + row[2] + 1 > max_bytes):
                break
            found.append(row)
            size += row[2] + 1
        return found

    def postpone(
        self,
        batch: int,
        not_before_ms: int,
        answer: str,
        *,
        unanswered: bool = False,
        clean: bool = False,
    ) -> None:
        """An attempt that settled nothing: the same batch goes again, not before ``not_before_ms``.

        Args:
            unanswered: it ended without an answer that says what was stored; such attempts are counted.
            clean: neither it nor one before it can have stored anything.
        """
        with self._database.transaction() as db:
            if unanswered:
                row = db.execute("SELECT output FROM batches WHERE batch=?", (batch,)).fetchone()
                add_counters(db, "unanswered", [(str(row[0]), 1)] if row else [])
            db.execute(
                "UPDATE batches SET attempts=attempts+1, not_before_ms=?, answer=?, clean=? WHERE batch=?",
                (not_before_ms, answer[:ANSWER_CHARS], clean, batch),
            )

    def settle(
        self,
        batch: Batch,
        fates: Mapping[int, Fate],
        now_ms: int,
        *,
        rest: Iterable[Sequence[int]] = (),
        confirm: bool = False,
        clean: bool = False,
    ) -> list[int]:
        """Ends deliveries by ``seq``; what is left of the batch goes on as the batches given by ``rest``.

        One transaction, so that an event is never both settled and waiting. Events of the batch that are
        neither in ``fates`` nor in ``rest`` stay in it. ``clean``: nothing of ``rest`` can be stored yet.
        Returns the ids of the new batches.
        """
        sums: Sums = {}
        parts: list[int] = []
        with self._database.transaction() as db:
            if not db.execute("SELECT 1 FROM batches WHERE batch=?", (batch.id,)).fetchone():
                return []  # settled before: its events may be in other batches by now
            for event in batch.events:
                fate = fates.get(event.seq)
                if fate is not None:
                    self._end(db, batch.output, event, fate, now_ms, sums)
            for group in rest:
                number = db.execute(
                    "INSERT INTO batches(output,attempts,not_before_ms,confirm,clean,answer)"
                    " VALUES(?,?,?,?,?,'')",
                    (batch.output, batch.attempts + 1, now_ms, confirm, clean),
                ).lastrowid
                assert number is not None
                parts.append(number)
                db.executemany(
                    "UPDATE deliveries SET batch=? WHERE output=? AND seq=?",
                    [(number, batch.output, seq) for seq in group],
                )
            if not db.execute("SELECT 1 FROM deliveries WHERE batch=? LIMIT 1", (batch.id,)).fetchone():
                db.execute("DELETE FROM batches WHERE batch=?", (batch.id,))
            add_tallies(db, sums)
        return parts

    def attempted(self, output: int) -> int:
        """How many batches of an output were attempted and are not settled."""
        with self._database.reading() as db:
            count: int = db.execute("SELECT count(*) FROM batches WHERE output=?", (output,)).fetchone()[0]
        return count

    def oldest_ms(self, output: int) -> int | None:
        """When the oldest event that an output has not settled was minted; None when there is none.

        Never far ahead of the clock (``Ages``)."""
        with self._database.reading() as db:
            row = db.execute(
                "SELECT d.seq, e.minted_ms FROM deliveries d JOIN events e ON e.seq=d.seq"
                " WHERE d.output=? ORDER BY d.seq LIMIT 1",
                (output,),
            ).fetchone()
        return self._ages.since_ms(output, *row) if row else None

    def tallies(self) -> dict[tuple[int, str], int]:
        """Events by output (0: all together) and fate. ``pending`` and ``dead`` are the present numbers."""
        with self._database.reading() as db:
            rows = db.execute("SELECT output, fate, sum(events) FROM tallies GROUP BY output, fate")
            return {(output, fate): events for output, fate, events in rows}

    @staticmethod
    def _end(db: sqlite3.Connection, output: int, event: Queued, fate: Fate, now_ms: int, sums: Sums) -> None:
        removed = db.execute(
            "DELETE FROM deliveries WHERE output=? AND seq=? RETURNING first_attempt_ms", (output, event.seq)
        ).fetchone()
        if removed is None:  # settled already: an answer must not count twice
            return
        tally(sums, output, "pending", event.meter, -event.value, -1)
        tally(sums, output, fate.name, event.meter, event.value)
        if fate.name == "dead":
            db.execute(
                "INSERT INTO dead VALUES(?,?,?,?,?,?)",
                (output, event.seq, fate.reason, fate.answer[:ANSWER_CHARS], now_ms, removed[0]),
            )
            return
        settle_event(db, output, event.seq, fate.name, fate.status, now_ms)

    # --- dead letters -----------------------------------------------------------------------------------

    def replay(self, output: str | None, ids: Sequence[str], reason: str | None, limit: int = 1_000) -> int:
        """Puts dead letters back into the queue, as ``Letters.replay`` does. Returns how many."""
        return Letters(self._database).replay(Wanted(output, ids, reason), limit=limit).taken


def _begin(db: sqlite3.Connection, batch: Batch, too_late: int, now_ms: int) -> Batch:
    """Another attempt begins. Where none before it can have stored anything, it counts as the first."""
    (clean,) = db.execute("SELECT clean FROM batches WHERE batch=?", (batch.id,)).fetchone()
    if not clean:
        return replace(batch, resent=True, too_late=too_late)
    db.execute("UPDATE batches SET clean=0 WHERE batch=?", (batch.id,))
    db.execute("UPDATE deliveries SET first_attempt_ms=? WHERE batch=?", (now_ms, batch.id))
    return replace(batch, first_attempt_ms=now_ms, too_late=too_late)


def _load(db: sqlite3.Connection, batch: int) -> Batch | None:
    """A batch; None when no event is left in it."""
    rows = db.execute(
        "SELECT d.seq, e.id, k.tenant, e.meter, e.value, e.body, e.window_ms, d.first_attempt_ms"
        " FROM deliveries d JOIN events e ON e.seq=d.seq JOIN keys k ON k.key=e.key"
        " WHERE d.batch=? ORDER BY d.seq",
        (batch,),
    ).fetchall()
    if not rows:
        return None
    output, attempts, confirm = db.execute(
        "SELECT output, attempts, confirm FROM batches WHERE batch=?", (batch,)
    ).fetchone()
    return Batch(
        id=batch,
        output=output,
        events=tuple(Queued(*row[:7]) for row in rows),
        attempts=attempts,
        first_attempt_ms=min(row[7] for row in rows),
        confirm=bool(confirm),
    )
