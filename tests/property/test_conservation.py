"""Nothing is lost and nothing counted twice, whatever arrives, fails, crashes or is answered, in any order.

A sequence of steps runs against a sink without sockets and an endpoint that is a function. Beside them runs
a plain sum of what was sent. After every step the books must balance:

    rows read    = counted + skipped + invalid + lost by crashes + not saved yet
    counted      = events + open windows + remainders + held + written off     per meter, to the unit and ns
    events       = pending + delivered + unconfirmed + dead letters            per output and meter
    every tally  = a recount of the tables
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inner_sink import InnerSink, full, roomy
from money import DAY_MS, HOUR_MS, T0
from wire import DOWNSTREAM_START, http_row, message

from proxy_usage.errors import StoreFull
from proxy_usage.intake import by_node
from proxy_usage.model import MAX_BYTES, NS_PER_MS, NS_PER_SECOND
from proxy_usage.outputs.base import Answer, Retry, Verdict
from proxy_usage.store import Batch
from proxy_usage.store.checkpoint import REMAINDER_IDLE_MS

METERS = ("requests", "ingress_bytes", "egress_bytes", "connection_seconds")
REJECTED, SWALLOWED, POISONED = "rejected", "swallowed", "poisoned"
"""Tenants whose events the endpoint rejects by name, leaves out in silence, refuses the whole batch for."""

tenants = st.sampled_from(["alpha", "beta", "gamma", REJECTED, SWALLOWED, POISONED])
sizes = st.one_of(st.integers(0, 5_000), st.integers(0, MAX_BYTES - 1))
durations_ns = st.one_of(st.integers(0, 3 * NS_PER_SECOND), st.integers(0, 400 * DAY_MS * NS_PER_MS))


@pytest.fixture(autouse=True, scope="module")
def small_steps() -> Iterator[None]:
    """Turns are made in steps of a cell, a total, a row: others come in between."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("proxy_usage.windows.PACK", 1)
        changed.setattr("proxy_usage.pipeline.BOOK", 1)
        changed.setattr("proxy_usage.pipeline.BOOK_ROWS", 1)
        yield


class Row:
    """A row to be sent and what must become of it: a fate, and amounts where it is counted."""

    def __init__(
        self, kind: str, tenant: str, route: str, wire: tuple[int, int], ns: int, ago_ms: int
    ) -> None:
        self.kind, self.tenant, self.route, self.wire, self.ns, self.ago_ms = (
            kind,
            tenant,
            route,
            wire,
            ns,
            ago_ms,
        )

    def __repr__(self) -> str:
        return f"Row({self.kind}, {self.tenant}, {self.route}, {self.wire}, {self.ns}ns, -{self.ago_ms}ms)"

    def build(self, now_ms: int) -> Any:
        end_ns = (now_ms - self.ago_ms) * NS_PER_MS
        how: dict[str, Any] = {
            "start_ns": max(0, end_ns - self.ns),
            "duration_ns": self.ns,
            "wire": self.wire,
        }
        how |= {"tags": {"project_name": self.tenant}, "route": f"httproute/ns-1/{self.route}/rule/0"}
        match self.kind:
            case "future":
                how["start_ns"] = (now_ms + 5 * 365 * DAY_MS) * NS_PER_MS
            case "nobody":
                how["tags"] = {}
            case "misnamed":
                how["tags"] = {"project_name": "Not.A.Project"}
            case "unrouted":
                how |= {"tags": {}, "route": ""}
            case "begun":
                how["type"] = DOWNSTREAM_START
            case "negative":
                how["duration_ns"] = -1
            case "absurd":
                how["wire"] = (MAX_BYTES, 0)
        return http_row(**how)

    @property
    def fate(self) -> str:
        if self.kind in ("negative", "absurd"):
            return "invalid"
        return "skipped" if self.kind in ("begun", "unrouted") else "counted"

    @property
    def amounts(self) -> tuple[int, int, int, int]:
        return (1, *self.wire, self.ns) if self.fate == "counted" else (0, 0, 0, 0)


kinds = st.sampled_from(
    ["plain"] * 6 + ["future", "nobody", "misnamed", "unrouted", "begun", "negative", "absurd"]
)
rows = st.builds(
    Row,
    kinds,
    tenants,
    st.sampled_from(["web", "api"]),
    st.tuples(sizes, sizes),
    durations_ns,
    st.one_of(st.integers(0, 200_000), st.integers(0, 40 * DAY_MS)),
)
answers = st.sampled_from(
    ["good", "good", "429", "503", "lost", "reset", "midway", "html", "empty", "401", "413"]
)
nodes = st.sampled_from(["envoy-1", "envoy-2"])
steps = st.one_of(
    st.tuples(st.just("read"), st.lists(rows, min_size=1, max_size=6), nodes),
    st.tuples(st.just("read"), st.lists(rows, min_size=1, max_size=6), nodes),
    st.tuples(st.just("cut"), st.lists(rows, min_size=1, max_size=4), st.integers(1, 9)),
    st.tuples(st.just("wait"), st.sampled_from([250, 5_000, 66_000, 90_000, HOUR_MS, -5_000, -2 * HOUR_MS])),
    st.tuples(st.just("turn"), st.lists(rows, max_size=2)),
    st.tuples(st.just("turn"), st.lists(rows, max_size=12)),
    st.tuples(st.just("full"), st.integers(0, 3), st.lists(rows, max_size=2)),
    st.tuples(st.just("deliver"), st.lists(answers, min_size=1, max_size=8)),
    st.tuples(st.just("deliver"), st.lists(answers, min_size=1, max_size=8)),
    st.just(("crash",)),
    st.just(("fold",)),
    st.just(("replay",)),
    st.just(("write off",)),
)
noise = st.tuples(st.just("noise"), st.binary(max_size=60))
"""Bytes that are anything: what they come to is not known beforehand, and balances all the same."""


class Endpoint:
    """The billing endpoint as a function: it remembers what it stored and never rejects that later."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.healed = False
        self._script: Iterator[str] = iter(())

    def follow(self, script: list[str]) -> None:
        self._script = iter(script)

    def __call__(self, batch: Batch) -> Answer | Verdict:
        for event in batch.events:
            assert self.stored.get(event.id, event.body) == event.body, "an id came with other bytes"
        match next(self._script, "good"):
            case "429":
                return Answer(429, {"retry-after": "2"}, b"")
            case "503":
                return Answer(503, {}, b"down")
            case "401":
                return Answer(401, {}, b"")
            case "413" if len(batch.events) > 1:
                return Answer(413, {}, b"")
            case "html":
                return Answer(200, {}, b"<html>")
            case "empty":
                return Answer(200, {}, b"")
            case "reset":
                return Retry("broken_answer")
            case "lost":
                self._store(batch, len(batch.events))
                return Retry("timeout")
            case "midway":
                self._store(batch, len(batch.events) // 2)
                return Answer(429, {}, b"")
        return self._answer(batch)

    def _answer(self, batch: Batch) -> Answer:
        if any(self._bad(event.tenant, POISONED) for event in batch.events):
            return Answer(400, {}, b'{"code":"INVALID_REQUEST"}')
        self._store(batch, len(batch.events))
        rejected = [
            {"id": event.id, "reason": "INVALID_VALUE_TYPE"}
            for event in batch.events
            if self._bad(event.tenant, REJECTED)
        ]
        accepted = sum(event.id in self.stored for event in batch.events)
        body: dict[str, object] = {"accepted": accepted} | ({"rejected": rejected} if rejected else {})
        return Answer(207 if rejected else 200, {}, json.dumps(body).encode())

    def _store(self, batch: Batch, count: int) -> None:
        for event in batch.events[:count]:
            if self.healed or event.tenant not in (REJECTED, SWALLOWED, POISONED):
                self.stored[event.id] = event.body

    def _bad(self, tenant: str, kind: str) -> bool:
        return tenant == kind and not self.healed


class Sums:
    """What was sent, added up beside the sink: saved by a turn, or still in memory only."""

    def __init__(self) -> None:
        self.saved: Counter[str] = Counter()
        self.unsaved: Counter[str] = Counter()
        self.exact = True
        """False once bytes came in that say nobody knows what."""

    def sent(self, sent: list[Row]) -> None:
        for row in sent:
            self.unsaved.update({row.fate: 1} | dict(zip(METERS, row.amounts, strict=True)))


class Run:
    """One sequence of steps."""

    def __init__(self, path: Path) -> None:
        self.sink = InnerSink(
            path, now_ms=T0, tenant={"max_tenants": 4, "unattributed": {"max_identities": 3}}
        )
        self.endpoint = Endpoint()
        self.sums = Sums()

    def step(self, step: tuple[Any, ...]) -> None:
        sink = self.sink
        match step:
            case ("read", sent, node):
                self.read(sent, node)
            case ("cut", sent, size):
                # The last row is damaged: it is no row any more, and the message says where it breaks off.
                sink.read_raw(message(*(row.build(sink.now_ms) for row in sent))[:-size])
                self.sums.sent(sent[:-1])
            case ("noise", raw):
                sink.read_raw(raw)
                self.sums.exact = False
            case ("wait", by_ms):
                sink.now_ms += by_ms
            case ("turn", sent):
                self.turn(sent[:2], between=sent[2:])
            case ("full", pages, sent):
                full(sink, pages)
                with suppress(StoreFull):
                    self.turn(sent[:1], between=sent[1:])
                roomy(sink)
            case ("deliver", script):
                self.endpoint.follow(script)
                sink.deliver(self.endpoint, attempts=len(script), until_ms=sink.now_ms + HOUR_MS)
            case ("crash",):
                self.crash()
            case ("fold",):
                sink.storage.checkpoints.fold()
            case ("replay",):
                sink.storage.queue.replay(None, [], None)
            case ("write off",):
                sink.storage.checkpoints.write_off(sink.now_ms + REMAINDER_IDLE_MS + 1)

    def read(self, sent: list[Row], node: str = "envoy-1") -> None:
        self.sink.read(*(row.build(self.sink.now_ms) for row in sent), node=node)
        self.sums.sent(sent)

    def turn(
        self, meanwhile: list[Row], *, everything: bool = False, between: list[Row] | None = None
    ) -> None:
        covered, self.sums.unsaved = self.sums.unsaved, Counter()
        waiting = list(between or ())

        def one_more() -> None:
            if waiting:
                self.read([waiting.pop()])

        try:
            self.sink.turn(
                everything=everything,
                meanwhile=lambda: self.read(meanwhile) if meanwhile else None,
                between=one_more,
            )
        except StoreFull:
            self.sums.unsaved.update(covered)
            raise
        self.sums.saved.update(covered)

    def crash(self) -> None:
        lost = +self.sink.unsaved
        self.sink.crash()
        assert by_node(self.sink.storage.loss.rows) == lost
        assert self.sink.storage.loss.unknown == ()
        self.sums.unsaved = Counter()

    def check(self) -> None:
        """The books, with what is in memory only left out of the sums over the store."""
        self.sink.check_rows()
        self.sink.books.check_tallies()
        if self.sums.exact:
            counted = self.sink.books.counters("counted")
            assert +(self.sink.rows() + counted) == +self.sums.saved
        if not self.sums.unsaved and not self.sink.unsaved:
            self.sink.check_usage()
        bodies = dict(self.sink.books.rows("SELECT id, body FROM events"))
        assert bodies.items() <= self.sink.minted.items()

    def delivered(self) -> dict[str, str]:
        """Events by id that ended, and how."""
        return dict(self.sink.books.rows("SELECT id, fate FROM ledger WHERE output != 0"))

    def finish(self) -> None:
        """Everything is closed and delivered; then the endpoint is mended and dead letters are replayed."""
        sink = self.sink
        sink.now_ms = max(sink.now_ms, T0) + 3 * HOUR_MS
        self.turn([])
        while len(sink.pipeline.windows):
            self.turn([], everything=True)
        self.check()
        assert sink.pipeline.windows.open_amounts() in ((), (0, 0, 0, 0))
        sink.deliver(self.endpoint, until_ms=sink.now_ms + 3 * HOUR_MS)
        self.check()
        self.compare()
        self.endpoint.healed = True
        sink.deliver(self.endpoint)
        while sink.storage.queue.replay(None, [], None):
            sink.deliver(self.endpoint)
        self.check()
        self.compare()
        ended = self.delivered()
        assert ended.keys() == sink.minted.keys()
        assert set(ended.values()) <= {"delivered", "delivered_ambiguous", "unconfirmed"}

    def compare(self) -> None:
        """What is said to be delivered was stored, and no dead letter was."""
        for id_, fate in self.delivered().items():
            assert fate == "unconfirmed" or self.endpoint.stored[id_] == self.sink.minted[id_]
        dead = {id_ for (id_,) in self.sink.books.rows("SELECT e.id FROM dead d JOIN events e USING(seq)")}
        assert not dead & self.endpoint.stored.keys()


def check_all(taken: list[tuple[Any, ...]], path: Path) -> None:
    run = Run(path)
    try:
        for step in taken:
            run.step(step)
            run.check()
        run.finish()
    finally:
        run.sink.storage.close()


@given(taken=st.lists(steps, max_size=40))
def test_the_books_balance_after_every_step(
    tmp_path_factory: pytest.TempPathFactory, taken: list[tuple[Any, ...]]
) -> None:
    check_all(taken, tmp_path_factory.mktemp("sink"))


@given(taken=st.lists(st.one_of(steps, noise), max_size=20))
def test_the_books_balance_whatever_bytes_arrive(
    tmp_path_factory: pytest.TempPathFactory, taken: list[tuple[Any, ...]]
) -> None:
    check_all(taken, tmp_path_factory.mktemp("sink"))


def test_the_books_would_show_a_row_counted_twice(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The checks themselves can fail."""
    run = Run(tmp_path_factory.mktemp("sink"))
    run.read([Row("plain", "alpha", "web", (1, 2), 3, 0)])
    run.turn([])
    run.check()
    db = run.sink.storage.database.db
    db.execute("UPDATE counters SET value=value+1 WHERE name='counted' AND label='requests'")
    with pytest.raises(AssertionError):
        run.check()
    run.sink.storage.close()
