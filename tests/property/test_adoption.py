"""A store that is taken over: whatever two stores hold, afterwards one holds it, to the unit and to the byte.

Two sinks without sockets go through any sequence of rows, turns, deliveries with all kinds of answers,
crashes, replays and upkeep. Then the second is left behind, and the first takes it over. It is killed at each
named step, and started again with as many workers as before or with fewer.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from adoption import Books, books, check_rows, together
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inner_sink import InnerSink
from money import DAY_MS, HOUR_MS, T0, Store
from test_conservation import Endpoint, Row, answers, rows

from proxy_usage.config import Config
from proxy_usage.config.workers import worker_path
from proxy_usage.intake import Intake, Source
from proxy_usage.model import NS_PER_SECOND
from proxy_usage.service.adopting import adopt_all
from proxy_usage.service.build import Storage, open_storage
from proxy_usage.store import Retention
from proxy_usage.store.checkpoint import REMAINDER_IDLE_MS
from proxy_usage.store.merging import Merger
from proxy_usage.store.reader import Reader
from proxy_usage.turn import Layout

OUTPUTS = [
    {"name": "billing", "url": "http://127.0.0.1:9/events"},
    {"name": "archive", "url": "http://127.0.0.1:9/events"},
]
STEPS = ("mark", "within bring", "bring", "discard", "forget")

steps = st.one_of(
    st.tuples(st.just("read"), st.lists(rows, min_size=1, max_size=5), st.sampled_from(["n1", "n2"])),
    st.tuples(st.just("read"), st.lists(rows, min_size=1, max_size=5), st.sampled_from(["n1", "n2"])),
    st.tuples(st.just("turn"), st.sampled_from([0, 70_000, HOUR_MS])),
    st.tuples(st.just("turn"), st.sampled_from([0, 70_000, HOUR_MS])),
    st.tuples(st.just("deliver"), st.lists(answers, min_size=1, max_size=6)),
    st.just(("crash",)),
    st.just(("replay",)),
    st.just(("roll",)),
    st.just(("merge",)),
    st.just(("write off",)),
)
histories = st.lists(steps, min_size=3, max_size=14)


class Sinks:
    """Worker 0 and worker 1 of two, each by itself."""

    def __init__(self, place: Path) -> None:
        self.sinks = [
            InnerSink(
                place,
                now_ms=T0,
                tenant={"max_tenants": 4, "unattributed": {"max_identities": 3}},
                workers=2,
                outputs=OUTPUTS,
                store={"path": str(worker_path(place / "usage.db", worker))},
            )
            for worker in range(2)
        ]
        self.endpoint = Endpoint()

    def live(self, worker: int, history: list[tuple[Any, ...]]) -> None:
        sink = self.sinks[worker]
        for step in history:
            self._step(sink, step)
        sink.turn()

    def _step(self, sink: InnerSink, step: tuple[Any, ...]) -> None:
        match step:
            case ("read", sent, node):
                sink.read(*(row.build(sink.now_ms) for row in sent), node=node)
            case ("turn", by_ms):
                sink.turn(sink.now_ms + by_ms)
            case ("deliver", script):
                self.endpoint.follow(script)
                sink.deliver(self.endpoint, attempts=len(script), until_ms=sink.now_ms + HOUR_MS)
            case ("crash",):
                sink.crash()
            case ("replay",):
                sink.storage.queue.replay(None, [], None)
            case ("merge",):
                merge_backlog(sink)
            case ("roll",):
                retention(sink).roll(sink.now_ms + 2 * DAY_MS)
            case ("write off",):
                sink.storage.checkpoints.write_off(sink.now_ms + REMAINDER_IDLE_MS + 1)

    @property
    def config(self) -> Config:
        return self.sinks[0].config

    def close(self) -> Books:
        """Gives both stores up. What they hold together."""
        held = [held_by(sink.storage, sink.config) for sink in self.sinks]
        for sink in self.sinks:
            sink.storage.close()
        return together(*held)


def retention(sink: InnerSink) -> Retention:
    return Retention(
        sink.storage.database,
        ledger_max_bytes=1 << 30,
        keep_delivered_ms=DAY_MS,
        keep_sums_ms=400 * DAY_MS,
        keep_held_ms=90 * DAY_MS,
    )


def merge_backlog(sink: InnerSink) -> None:
    """As upkeep does where there is little room."""
    merger = Merger(sink.storage.database, sink.mint)
    while not merger.step(sink.now_ms).done:
        continue
    sink.minted.update(sink.storage.database.db.execute("SELECT id, body FROM events"))


def held_by(storage: Storage, config: Config) -> Books:
    names = [meter.name for meter in config.meter_list()]
    return books(storage.database.db, names, config.dimensions)


def with_workers(config: Config, workers: int) -> Config:
    return config.model_copy(update={"workers": workers})


def check(config: Config, expected: Books, *, workers: int = 1) -> None:
    """What all stores hold is what it should be, and what each says of itself adds up."""
    found = []
    for worker in range(workers):
        path = worker_path(config.store.path, worker)
        part = with_workers(
            config.model_copy(update={"store": config.store.model_copy(update={"path": path})}), workers
        )
        storage = open_storage(part, adopts=worker == 0)
        try:
            assert (storage.loss.rows, storage.loss.unknown) == ({}, ())
            found.append(held_by(storage, config))
            check_rows(storage.database.db)
            for (text,) in storage.database.db.execute("SELECT remainders FROM keys"):
                carried = json.loads(text)
                assert all(carried.get(m.name, 0) < max(2, m.divisor) for m in config.meter_list())
        finally:
            storage.close()
        with Reader(path) as reader:
            sums = reader.conservation(deep=True)
        assert sums.balanced, sums
    assert together(*found) == expected


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=histories, second=histories)
def test_one_store_holds_what_two_held(
    tmp_path_factory: pytest.TempPathFactory, first: list[Any], second: list[Any]
) -> None:
    place = tmp_path_factory.mktemp("adoption")
    sinks = Sinks(place)
    sinks.live(0, first)
    sinks.live(1, second)
    expected = sinks.close()
    check(sinks.config, expected)
    left = {path.name for path in place.iterdir() if ".worker-" in path.name}
    assert left == {"usage.worker-1.db.lock"}
    check(sinks.config, expected)  # and it stays so


def lived(place: Path) -> tuple[Config, Books]:
    """Two stores with something of everything."""
    sinks = Sinks(place)
    for worker in range(2):
        sinks.live(
            worker,
            [
                (
                    "read",
                    [Row(kind, "alpha", "web", (7, 9), NS_PER_SECOND * 3 // 4, 0) for kind in KINDS],
                    "n1",
                ),
                ("turn", 0),
                ("turn", 90_000),
                ("deliver", ["good"]),
                ("read", [Row("plain", t, "api", (1, 2), 5, 0) for t in ("rejected", "beta", "alpha")], "n2"),
                ("turn", 0),
                ("turn", 90_000),
                ("deliver", ["good"]),
                ("read", [Row("plain", t, "api", (1, 2), 5, 0) for t in ("beta", "gamma")], "n2"),
                ("turn", 0),
                ("turn", 90_000),
                ("deliver", ["lost"]),
                *(2 * [("read", [Row("plain", "gamma", "web", (1, 2), 5, 0)], "n1"), *CLOSED]),
                ("merge",),
                ("read", [Row("plain", "beta", "web", (worker, 2), 5, 0)], "n2"),
                ("turn", 0),
            ],
        )
    expected = sinks.close()
    names = ("events", "deliveries", "dead", "ledger", "batches", "intake", "held", "unfinished")
    for name in (*names, "origins", "merges"):
        assert expected[name], f"nothing in {name}"
    assert any(row[2] is not None for row in expected["deliveries"])  # some were attempted
    assert {"ended", "rows"} <= {name for name, _ in expected["counters"]}
    return sinks.config, expected


CLOSED = (("turn", 0), ("turn", 90_000))
KINDS = ("plain", "plain", "nobody", "begun", "negative")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Stumbling(Intake):
    """Asked for the first node, at the end of the transaction, it ends the process."""

    def known_as(self, source: Source) -> Source:
        die()
        return source


def killed_at(step: str, config: Config) -> None:
    """Worker 0 starts as the only one, in a process of its own, and is killed after a step."""
    child = os.fork()
    if not child:
        try:
            adopt_until(step, config)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def adopt_until(step: str, config: Config) -> None:
    def passed(done: str) -> None:
        if done == step:
            die()

    alone = with_workers(config, 1)
    storage = open_storage(alone, adopts=False)
    intake = Stumbling(storage.intake.path) if step == "within bring" else storage.intake
    layout = Layout.of(config.meter_list(), tuple(config.dimensions), config.windows.length)
    opened: Callable[[Config], Storage] = partial(open_storage, adopts=False)
    adopt_all(alone, storage.database, intake, layout, T0, opened, passed)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_each_step_nothing_is_lost_or_doubled(tmp_path: Path, step: str, workers: int) -> None:
    config, expected = lived(tmp_path)
    killed_at(step, config)
    check(config, expected, workers=workers)
    check(config, expected)
    check(config, expected, workers=2)  # a new, empty second store is no more of it
    check(config, expected)


def test_remainders_that_make_a_whole_unit_are_billed_without_another_row(tmp_path: Path) -> None:
    sinks = Sinks(tmp_path)
    for worker in range(2):
        row = Row("plain", "alpha", "web", (0, 0), NS_PER_SECOND * 3 // 4, 0)
        sinks.live(worker, [("read", [row], "n1"), ("turn", 90_000), ("turn", 70_000)])
    sinks.close()
    with InnerSink(tmp_path, tenant={}, outputs=OUTPUTS) as sink:
        assert len(sink.pipeline.windows) == 1
        sink.close_all()
        assert {json.loads(body)["data"]["value"] for body in sink.minted.values()} == {"1"}
        store = Store.around(
            sink.storage.database, sink.storage.queue, sink.storage.checkpoints, sink.storage.slots
        )
        assert store.remainders() == {"connection_seconds": NS_PER_SECOND // 2}
