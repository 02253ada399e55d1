"""A start reads what was open, and nothing of what waits: a backlog of 200,000 events costs it nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from money import LAYOUT, T0, Store, cell, key, mint

from proxy_usage.store import Checkpoints, Database, OutputSlot, Queue
from proxy_usage.store.reader import Reader

EVENTS = 200_000
OUTPUTS = (OutputSlot(0, "billing"), OutputSlot(0, "second"))


@pytest.fixture(scope="module")
def backlog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with so many pending events for two outputs, as turns leave them."""
    place = tmp_path_factory.mktemp("backlog")
    with Store(place, outputs=OUTPUTS) as store:
        store.close_window(cell((1, 0, 0, 0), key=key("alpha")))
        ((body, number),) = store.rows("SELECT body, key FROM events")
        event = json.loads(body)
        meter = mint().meters[0].name
        store.db.execute("BEGIN")
        for seq in range(2, EVENTS + 1):
            event_id = f"01JCZZ{seq:020d}"
            store.db.execute(
                "INSERT INTO events VALUES(?,?,?,?,?,1,?,2,2,?)",
                (seq, event_id, number, meter, T0, T0 + seq, json.dumps(event | {"id": event_id})),
            )
        for slot in store.slots:
            store.db.execute(
                "INSERT OR IGNORE INTO deliveries SELECT ?, seq, NULL, NULL FROM events", (slot.output,)
            )
        store.db.execute("COMMIT")
        store.db.execute(
            "UPDATE tallies SET events=?1, value=?2 WHERE meter=?3", (EVENTS, str(EVENTS), meter)
        )
    return place / "usage.db"


class Work:
    """Counts what SQLite does, in thousands of its machine's instructions, and the plans it has."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.thousands = 0
        self.statements: list[str] = []

    def __enter__(self) -> "Work":
        self.database.db.set_trace_callback(self.statements.append)
        self.database.db.set_progress_handler(self._tick, 1_000)
        return self

    def __exit__(self, *_: object) -> None:
        self.database.db.set_trace_callback(None)
        self.database.db.set_progress_handler(None, 1)

    def _tick(self) -> None:
        self.thousands += 1

    def plans(self) -> Iterator[tuple[str, str]]:
        for statement in self.statements:
            if statement.startswith(("SELECT", "DELETE", "UPDATE")):
                for row in self.database.db.execute(f"EXPLAIN QUERY PLAN {statement}"):
                    yield statement, row[3]


LARGE = ("events", "deliveries", "e", "d", "ledger", "dead")


def test_a_start_touches_nothing_of_the_backlog(backlog: Path) -> None:
    database = Database(backlog)
    try:
        with Work(database) as work:
            checkpoints = Checkpoints(database, max_held=100)
            queue = Queue(database)
            slots = queue.register(OUTPUTS, T0)
            recovered = checkpoints.recover()
            checkpoints.begin(LAYOUT, slots, {})
            database.space.keep(database.db)
        assert recovered.cells == ()
        assert work.thousands <= 5  # of 200,000 events
        scans = [
            (statement, plan)
            for statement, plan in work.plans()
            if plan.startswith("SCAN") and plan.split()[1] in LARGE
        ]
        assert scans == []
    finally:
        database.close()


def test_the_first_batch_and_the_figures_of_readiness_touch_little(backlog: Path) -> None:
    database = Database(backlog)
    try:
        queue = Queue(database)
        with Work(database) as work:
            output = queue.register(OUTPUTS, T0)[0].output
            queue.lease(output, T0 + EVENTS, events=100, max_bytes=1 << 20, linger_ms=0, late_ms=0)
            assert queue.oldest_ms(output) is not None
            assert sum(queue.tallies().values()) >= 2 * EVENTS
        assert work.thousands <= 50
        plans = {plan for _, plan in work.plans()}
        assert "SEARCH d USING INDEX deliveries_pending (output=?)" in plans, plans
        assert not [plan for plan in plans if plan.startswith("SCAN") and plan.split()[1] in LARGE], plans
    finally:
        database.close()


def test_status_does_not_read_the_backlog(backlog: Path) -> None:
    with Reader(backlog) as reader:
        work, db = 0, reader._db

        def tick() -> None:
            nonlocal work
            work += 1

        db.set_progress_handler(tick, 1_000)
        status = reader.status()
        assert reader.conservation().deep is False
        db.set_progress_handler(None, 1)
    assert [output.pending for output in status.outputs] == [EVENTS, EVENTS]
    assert work <= 50
