"""Where an event is that an output has not settled, or has refused alone."""

from __future__ import annotations

import sqlite3

from proxy_usage.store.views import Place


def waiting(db: sqlite3.Connection, seq: int) -> list[Place]:
    """The outputs that have not settled an event, and those that refused it."""
    places = [
        Place(
            name,
            "pending" if batch is None else "attempted",
            first_attempt_ms=first_attempt_ms,
            attempts=attempts,
            not_before_ms=not_before_ms,
            answer=answer,
        )
        for name, batch, first_attempt_ms, attempts, not_before_ms, answer in db.execute(
            "SELECT o.name, d.batch, d.first_attempt_ms, coalesce(b.attempts, 0), b.not_before_ms,"
            " coalesce(b.answer, '') FROM outputs o CROSS JOIN deliveries d ON d.output=o.output"
            " LEFT JOIN batches b ON b.batch=d.batch WHERE d.seq=? ORDER BY o.output",
            (seq,),
        )
    ]
    places.extend(
        Place(name, "dead", at_ms=at_ms, first_attempt_ms=first_attempt_ms, reason=reason, answer=answer)
        for name, at_ms, first_attempt_ms, reason, answer in db.execute(
            "SELECT o.name, d.at_ms, d.first_attempt_ms, d.reason, d.answer FROM outputs o"
            " CROSS JOIN dead d ON d.output=o.output WHERE d.seq=? ORDER BY o.output",
            (seq,),
        )
    )
    return places
