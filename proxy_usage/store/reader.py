"""Looks into a store beside the service that owns it, without changing anything.

Every method is one short read transaction, so that what it returns belongs together and no writer waits;
only ``conservation(deep=True)`` and ``period`` read whole tables, during which the write-ahead log cannot
shrink.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from proxy_usage.comparison import Ours
from proxy_usage.errors import StoreVersion, UsageError
from proxy_usage.store import sums, usage
from proxy_usage.store.audits import Hour, audited, hours
from proxy_usage.store.database import counters
from proxy_usage.store.held import unpack
from proxy_usage.store.migrate import check_readable
from proxy_usage.store.period import oldest_output, period
from proxy_usage.store.places import waiting
from proxy_usage.store.report import asides
from proxy_usage.store.restore import restored
from proxy_usage.store.schema import connect_readonly, translated
from proxy_usage.store.usage import EventTrace, Kept, UsageHour, UsageNotes
from proxy_usage.store.views import (
    Conservation,
    DeadLetter,
    Doubtful,
    EventView,
    HeldUsage,
    Place,
    QueuedEvent,
    Status,
    WaitingBatch,
)

SQLITE_VERSION = sqlite3.sqlite_version

_ALL_OUTPUTS = (0, (1 << 63) - 1)
LOOK = 50_000
"""Ledger rows read in one transaction where none can be found otherwise."""
_FILES = {"database": "", "log": "-wal", "reserve": ".reserve", "intake": ".intake"}


class Reader:
    """A store, opened for reading. Use it as a context manager, from one thread.

    Raises:
        StoreUnavailable: there is no store at ``path``, or it cannot be read.
        StoreVersion: it is of another version than this program reads. StoreForeign: it is not a store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = connect_readonly(path)
        with translated(path):
            self._version: int = self._db.execute("PRAGMA user_version").fetchone()[0]
        try:
            check_readable(path, self._version)
        except StoreVersion:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Closing twice is harmless."""
        self._db.close()

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        with translated(self.path):
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._db.execute("COMMIT")

    # --- sums -------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """The store at one moment: outputs, meters, rows, losses, sizes."""
        with self._snapshot() as db:
            cells = sums.open_cells(db)
            return Status(
                path=str(self.path),
                schema_version=self._version,
                sizes={name: _size(self.path, suffix) for name, suffix in _FILES.items()},
                outputs=sums.outputs(db, sums.tallies(db)),
                meters=sums.meters(db, cells),
                rows=sums.rows(db),
                intake=dict(db.execute("SELECT node, sum(rows) FROM intake GROUP BY node ORDER BY node")),
                crash_lost=counters(db, "crash_lost"),
                open_windows=len(cells),
                keys=db.execute("SELECT count(*) FROM keys").fetchone()[0],
                unattributed=db.execute("SELECT count(*) FROM held").fetchone()[0],
                crash_unknown=counters(db, "crash_unknown"),
                asides=asides(db),
                restored=restored(db),
            )

    def conservation(self, *, deep: bool = False) -> Conservation:
        """Whether what was counted is where it should be, and every event has one fate per output.

        ``deep`` also adds up the tables and compares: it reads the whole store.
        """
        with self._snapshot() as db:
            kept = sums.tallies(db)
            meters = sums.meters(db, sums.open_cells(db))
            return Conservation(
                meters=meters,
                outputs=sums.output_terms(db, kept, meters),
                deep=deep,
                differences=sums.recount(db, kept, meters) if deep else (),
            )

    def period(
        self,
        outputs: Sequence[str],
        from_ms: int,
        to_ms: int,
        route: tuple[str, str] | None = None,
    ) -> Ours:
        """What the ledger of one output has of windows in ``[from_ms, to_ms)``: of the one added first.

        It reads the whole ledger, during which the write-ahead log cannot shrink.

        Args:
            route: the dimension that names a row's HTTPRoute, and its value where there is none.

        Raises:
            UsageError: the store has none of the outputs; or a bound lies within an hour of which only the
                sum is left.
        """
        with self._snapshot() as db:
            return period(db, oldest_output(db, outputs) or outputs[0], from_ms, to_ms, route)

    def audit_hours(self, from_ms: int, to_ms: int) -> tuple[Hour, ...]:
        """What audits found in hours that begin in ``[from_ms, to_ms)``, by hour and node."""
        with self._snapshot() as db:
            return hours(db, from_ms, to_ms)

    def audited(self) -> dict[str, str]:
        """The node that each audited Envoy was last known as, by its URL, perhaps with an address."""
        with self._snapshot() as db:
            return audited(db)

    # --- queue ------------------------------------------------------------------------------------------

    def queue(self, output: str | None = None, limit: int = 100) -> tuple[QueuedEvent, ...]:
        """Events that an output (None: any) has not settled, in the order of their making.

        Raises UsageError for an output that does not exist.
        """
        with self._snapshot() as db:
            rows = db.execute(
                "SELECT o.name, e.id, k.tenant, e.meter, e.value, e.window_ms, e.minted_ms, length(e.body),"
                " CASE WHEN d.batch IS NULL THEN 'pending' ELSE 'attempted' END,"
                " d.batch, coalesce(b.attempts, 0), b.not_before_ms, d.first_attempt_ms"
                " FROM deliveries d CROSS JOIN events e ON e.seq=d.seq JOIN keys k ON k.key=e.key"
                " JOIN outputs o ON o.output=d.output LEFT JOIN batches b ON b.batch=d.batch"
                " WHERE d.output BETWEEN ? AND ? ORDER BY d.output, d.seq LIMIT ?",
                (*_range(db, output), limit),
            ).fetchall()
        return tuple(QueuedEvent(*row) for row in rows)

    def batches(self, output: str | None = None, limit: int = 100) -> tuple[WaitingBatch, ...]:
        """Batches that were attempted and are not settled, those that are due first before the others.

        Raises UsageError for an output that does not exist.
        """
        with self._snapshot() as db:
            rows = db.execute(
                "SELECT o.name, b.batch, count(d.seq), b.attempts, b.not_before_ms,"
                " coalesce(min(d.first_attempt_ms), 0), b.confirm, b.answer"
                " FROM batches b JOIN outputs o ON o.output=b.output"
                " LEFT JOIN deliveries d ON d.batch=b.batch WHERE b.output BETWEEN ? AND ?"
                " GROUP BY b.batch ORDER BY b.output, b.not_before_ms, b.batch LIMIT ?",
                (*_range(db, output), limit),
            ).fetchall()
        return tuple(
            WaitingBatch(output, batch, events, attempts, not_before_ms, first_ms, bool(confirm), answer)
            for output, batch, events, attempts, not_before_ms, first_ms, confirm, answer in rows
        )

    def event(self, event_id: str) -> EventView | None:
        """An event by its id and what became of it at each output; None when the store knows it no more."""
        with self._snapshot() as db:
            row = db.execute(
                "SELECT e.seq, k.tenant, k.dimensions, e.meter, e.window_ms, e.value, e.minted_ms, e.body"
                " FROM events e JOIN keys k ON k.key=e.key WHERE e.id=?",
                (event_id,),
            ).fetchone()
            places = {} if row is None else {place.output: place for place in waiting(db, row[0])}
        settled = list(self._settled(event_id))
        if row is None and not settled:
            return None
        for one in settled:  # also what was waiting a moment ago
            places[one[5]] = Place(one[5], one[6], at_ms=one[7], status=one[8] or None)
        tenant, dimensions, meter, window_ms, value = settled[0][:5] if row is None else row[1:6]
        return EventView(
            id=event_id,
            tenant=tenant,
            dimensions=json.loads(dimensions),
            meter=meter,
            window_ms=window_ms,
            value=value,
            minted_ms=None if row is None else row[6],
            body=None if row is None else row[7],
            places=tuple(places.values()),
        )

    def _settled(self, event_id: str) -> Iterator[tuple[Any, ...]]:
        """An event's ledger rows. They have no index: the ledger is read in slices, each a transaction."""
        after = 0
        while True:
            with self._snapshot() as db:
                (last,) = db.execute(
                    "SELECT max(entry) FROM (SELECT entry FROM ledger WHERE entry>? ORDER BY entry LIMIT ?)",
                    (after, LOOK),
                ).fetchone()
                rows = db.execute(
                    "SELECT k.tenant, k.dimensions, l.meter, l.window_ms, l.value, o.name, l.fate, l.at_ms,"
                    " l.answer FROM ledger l CROSS JOIN keys k ON k.key=l.key"
                    " CROSS JOIN outputs o ON o.output=l.output"
                    " WHERE l.entry>? AND l.entry<=? AND l.id=? ORDER BY l.entry",
                    (after, last, event_id),
                ).fetchall()
            yield from rows
            if last is None:
                return
            after = last

    def explain(self, event_id: str) -> EventTrace | None:
        """An event with what is known of how it came to be; None when the store knows it no more."""
        view = self.event(event_id)
        if view is None:
            return None
        return usage.trace(self._snapshot, view)

    # --- usage ------------------------------------------------------------------------------------------

    def usage(self, tenant: str, from_ms: int, to_ms: int) -> Iterator[UsageHour]:
        """What a tenant used in windows that begin in ``[from_ms, to_ms)``, hour by hour.

        Each is a transaction of its own, so that nothing waits for whoever reads on.

        Raises:
            UsageError: a bound lies within an hour of which only the sum is left.
        """
        return usage.hours(self._snapshot, tenant, from_ms, to_ms)

    def kept(self) -> Kept:
        """What the ledger still has."""
        with self._snapshot() as db:
            return usage.kept(db)

    def usage_notes(self, tenant: str, from_ms: int, to_ms: int) -> UsageNotes:
        """What is to be said beside ``usage``."""
        with self._snapshot() as db:
            return usage.notes(db, tenant, from_ms, to_ms)

    def dead_letters(
        self, output: str | None = None, reason: str | None = None, limit: int = 100
    ) -> tuple[DeadLetter, ...]:
        """Events that an output (None: any) refused alone, for a reason (None: any); oldest first.

        Raises UsageError for an output that does not exist.
        """
        with self._snapshot() as db:
            rows = db.execute(
                "SELECT o.name, e.id, k.tenant, e.meter, e.value, e.window_ms, d.reason, d.answer, d.at_ms,"
                " d.first_attempt_ms FROM dead d CROSS JOIN events e ON e.seq=d.seq"
                " JOIN keys k ON k.key=e.key JOIN outputs o ON o.output=d.output"
                " WHERE d.output BETWEEN ?1 AND ?2 AND (?3 IS NULL OR d.reason=?3)"
                " ORDER BY d.output, d.seq LIMIT ?4",
                (*_range(db, output), reason, limit),
            ).fetchall()
        return tuple(DeadLetter(*row) for row in rows)

    def dead_reasons(self, output: str | None = None) -> dict[str, int]:
        """Dead letters of an output (None: any) by reason.

        Raises UsageError for an output that does not exist.
        """
        with self._snapshot() as db:
            return dict(
                db.execute(
                    "SELECT reason, count(*) FROM dead WHERE output BETWEEN ? AND ? GROUP BY reason",
                    _range(db, output),
                )
            )

    def ambiguous(self, output: str | None = None, limit: int = 100) -> tuple[Doubtful, ...]:
        """Events that were accepted when the endpoint may have forgotten an earlier attempt; latest first.

        It reads the whole ledger where there are few. Raises UsageError for an output that does not exist.
        """
        with self._snapshot() as db:
            rows = db.execute(
                "SELECT o.name, l.id, k.tenant, l.meter, l.value, l.window_ms, l.at_ms FROM ledger l"
                " JOIN keys k ON k.key=l.key JOIN outputs o ON o.output=l.output"
                " WHERE l.output BETWEEN ? AND ? AND l.fate='delivered_ambiguous'"
                " ORDER BY l.entry DESC LIMIT ?",
                (*_range(db, output), limit),
            ).fetchall()
        return tuple(Doubtful(*row) for row in rows)

    def letters(
        self, output: str | None = None, reason: str | None = None
    ) -> Iterator[tuple[DeadLetter, bytes]]:
        """All dead letters with their bytes, oldest first, read in slices.

        Raises UsageError for an output that does not exist.
        """
        after = (-1, -1)
        while True:
            with self._snapshot() as db:
                rows = db.execute(
                    "SELECT d.output, d.seq, e.body, o.name, e.id, k.tenant, e.meter, e.value, e.window_ms,"
                    " d.reason, d.answer, d.at_ms, d.first_attempt_ms FROM dead d"
                    " CROSS JOIN events e ON e.seq=d.seq JOIN keys k ON k.key=e.key"
                    " JOIN outputs o ON o.output=d.output WHERE (d.output, d.seq) > (?, ?)"
                    " AND d.output BETWEEN ? AND ? AND (?5 IS NULL OR d.reason=?5)"
                    " ORDER BY d.output, d.seq LIMIT 1000",
                    (*after, *_range(db, output), reason),
                ).fetchall()
            if not rows:
                return
            for row in rows:
                yield DeadLetter(*row[3:]), row[2]
            after = rows[-1][0], rows[-1][1]

    # --- unattributed -----------------------------------------------------------------------------------

    def holds(self, held_id: str) -> bool:
        """Whether usage is held under an id, at whatever hour."""
        with self._snapshot() as db:
            statement = "SELECT 1 FROM held WHERE lower(hex(digest))=? LIMIT 1"
            return db.execute(statement, (held_id.lower(),)).fetchone() is not None

    def held_reasons(self) -> dict[str, int]:
        """Rows of held usage by reason."""
        with self._snapshot() as db:
            return dict(db.execute("SELECT reason, count(*) FROM held GROUP BY reason"))

    def unattributed(self, limit: int = 100) -> tuple[HeldUsage, ...]:
        """Usage of nobody, latest hour first, within it the most rows first."""
        with self._snapshot() as db:
            rows = db.execute(
                "SELECT digest, hour_ms, reason, identity, rows, amounts, first_ms, last_ms FROM held"
                " ORDER BY hour_ms DESC, rows DESC, digest LIMIT ?",
                (limit,),
            ).fetchall()
        return tuple(
            HeldUsage(digest.hex(), hour_ms, reason, unpack(packed), count, json.loads(amounts), first, last)
            for digest, hour_ms, reason, packed, count, amounts, first, last in rows
        )


def _size(path: Path, suffix: str) -> int:
    try:
        return path.with_name(path.name + suffix).stat().st_size
    except OSError:
        return 0


def _range(db: sqlite3.Connection, output: str | None) -> tuple[int, int]:
    """The numbers of the outputs that are meant, as bounds that an index can use."""
    if output is None:
        return _ALL_OUTPUTS
    row = db.execute("SELECT output FROM outputs WHERE name=?", (output,)).fetchone()
    if row is None:
        known = [name for (name,) in db.execute("SELECT name FROM outputs ORDER BY output")]
        raise UsageError(f"there is no output {output!r}", hint=f"outputs are {', '.join(known) or 'none'}")
    return row[0], row[0]
