"""The quick look: the right figures, by index, and the same work however much was billed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from made_store import MINUTE, START, MadeStore

from proxy_usage.errors import StoreForeign, StoreUnavailable
from proxy_usage.store import Fate
from proxy_usage.store.glance import DEAD, HELD, MOST_DEAD, MOST_HELD, OLDEST, glance, look
from proxy_usage.store.week import EVENTS, HOUR, HOUR_MS, HOURS, METERS, VALUE, add_hours, week

NOW = START + 5 * MINUTE


@pytest.fixture
def store(tmp_path: Path) -> MadeStore:
    return MadeStore(tmp_path / "usage.db")


def test_it_shows_what_the_store_has(store: MadeStore) -> None:
    store.use("alpha", 3, 0)
    store.use("bravo", 4, 2 * 10**9)
    store.close_windows()
    store.answer(store.send(), *[Fate("dead", 200, "not_accepted")] * 3)
    store.use("charlie", 5, 0)
    store.hold("no_match", b"nobody", 7, 0)
    store.close_windows()
    found = glance(store.database.path, NOW)
    (output,) = found.outputs
    assert (output.name, output.fates["pending"], output.fates["dead"]) == ("billing", 1, 3)
    assert output.oldest_ms is not None
    assert found.minted == 4
    ((group),) = found.dead
    assert (group.output, group.reason, group.events) == ("billing", "not_accepted", 3)
    assert found.dead_partial is False
    assert [(held.reason, held.rows) for held in found.held] == [("no_match", 1)]
    assert found.held_top[0].value == b"nobody"
    assert found.week.values["requests"][-1] == 12
    assert found.week.events[-1] == 4


def test_a_store_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no store"):
        glance(tmp_path / "usage.db", NOW)


def test_what_nobody_wrote_is_an_error_of_the_store(store: MadeStore) -> None:
    store.database.db.execute("INSERT INTO held VALUES(?,X'00','no_match',X'FF',1,'{}',0,0)", (START,))
    with pytest.raises(StoreForeign, match="what nobody wrote"):
        glance(store.database.path, NOW)


def test_more_than_is_looked_at_is_said(store: MadeStore) -> None:
    db = store.database.db
    db.executemany(
        "INSERT INTO dead VALUES(1,?,'refused','',?,NULL)", [(n, START + n) for n in range(MOST_DEAD + 5)]
    )
    db.execute("INSERT INTO tallies VALUES(1,'dead','requests',?,'1')", (MOST_DEAD + 5,))
    db.executemany(
        "INSERT INTO held VALUES(?,?,'no_match',X'',2,'{}',?,?)",
        [(START, n.to_bytes(16, "big"), START, START + n) for n in range(MOST_HELD + 5)],
    )
    found = look(db, NOW)
    assert (found.dead_partial, found.held_partial) == (True, True)
    assert found.dead[0].events == MOST_DEAD
    assert found.held[0].rows == 2 * MOST_HELD


def grow(db: sqlite3.Connection, tenants: int, hours: int) -> None:
    """What a store holds of so many tenants after so long, as far as it grows with them."""
    keys = range(1, tenants + 1)
    db.executemany(
        "INSERT INTO keys VALUES(?,?,?,'{}','{}',0)",
        [(key, key.to_bytes(8, "big"), f"t-{key}") for key in keys],
    )
    db.executemany(
        "INSERT INTO ledger(output,fate,key,meter,window_ms,value,at_ms,answer,id)"
        " VALUES(1,'delivered',?,'requests',?,1,?,200,?)",
        [(key, START, START, f"id-{key}") for key in keys],
    )
    db.executemany(
        "INSERT INTO sums VALUES(?,1,'delivered',?,'requests',1,'1')",
        [(START - hour * HOUR_MS, key) for hour in range(hours) for key in keys],
    )
    db.executemany(
        "INSERT INTO events(id,key,meter,window_ms,value,minted_ms,outputs,body)"
        " VALUES(?,?,'requests',?,1,?,1,X'')",
        [(f"e-{key}", key, START, START) for key in keys],
    )
    db.executemany("INSERT INTO deliveries VALUES(1,?,NULL,NULL)", [(key,) for key in keys])


def steps(db: sqlite3.Connection) -> int:
    """How many instructions of SQLite a look takes."""
    taken = 0

    def tick() -> int:
        nonlocal taken
        taken += 1
        return 0

    db.set_progress_handler(tick, 1)
    try:
        look(db, NOW)
    finally:
        db.set_progress_handler(None, 0)
    return taken


def test_the_work_does_not_grow_with_tenants_and_history(tmp_path: Path) -> None:
    taken = []
    for tenants, hours in ((10, 2), (500, 6)):
        with MadeStore(tmp_path / f"{tenants}.db") as store:
            grow(store.database.db, tenants, hours)
            taken.append(steps(store.database.db))
    assert 0 < taken[0] == taken[1]


@pytest.mark.parametrize(
    ("sql", "values"),
    [
        (OLDEST, (1,)),
        (DEAD, (1, 10)),
        (HELD, (10,)),
        (HOUR, ("x", "0", "1")),
        (METERS, ("a", "b")),
    ],
)
def test_every_question_is_answered_by_an_index(
    store: MadeStore, sql: str, values: tuple[object, ...]
) -> None:
    plan = [row[3] for row in store.database.db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    assert all("USE TEMP B-TREE FOR ORDER BY" not in step or "reason" in sql for step in plan), plan
    scans = [step for step in plan if step.startswith("SCAN")]
    # Held usage is read along its primary key, and a bounded slice of dead letters is grouped.
    assert scans in ([], ["SCAN held"], ["SCAN (subquery-1)"]), plan


def test_a_week_is_kept_by_the_hour_and_no_longer(store: MadeStore) -> None:
    db = store.database.db
    hour = START
    for number in range(HOURS + 5):
        now_ms = hour + number * HOUR_MS
        add_hours(db, {(now_ms + MINUTE, "requests"): (1, 10 + number)}, now_ms)
    end = hour + (HOURS + 4) * HOUR_MS
    found = week(db, end + 59 * MINUTE)
    assert found.end_ms == end
    assert found.events == (1,) * HOURS
    assert found.values["requests"] == tuple(range(15, 15 + HOURS))
    kept = db.execute("SELECT count(*) FROM counters WHERE name IN (?,?)", (EVENTS, f"{VALUE}requests"))
    assert kept.fetchone()[0] <= 2 * (HOURS + 1)


def test_late_usage_goes_to_its_hour_unless_that_is_gone(store: MadeStore) -> None:
    db = store.database.db
    add_hours(
        db, {(START - 3 * HOUR_MS, "requests"): (2, 5), (START - 30 * 86_400_000, "requests"): (9, 9)}, START
    )
    found = week(db, START)
    assert sum(found.events) == 2
    assert found.values["requests"][-4] == 5
