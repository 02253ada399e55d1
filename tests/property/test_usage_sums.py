"""What ``usage`` shows adds up to what the endpoint has stored, whatever happened on the way.

Late rows, answers of all kinds, an endpoint that is away while the backlog is merged, dead letters and their
replay, crashes, ledger rows that became hourly sums: in any order. After every step each output's lines are
its tallies; when all is settled, the delivered ones are what the endpoint holds, per tenant and meter.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from money import DAY_MS, HOUR_MS
from test_conservation import POISONED, REJECTED, SWALLOWED, Endpoint, Row, answers, kinds, tenants

from proxy_usage.demo.checks import METERS
from proxy_usage.store import Merger, Retention
from proxy_usage.store.reader import Reader
from proxy_usage.store.usage_sums import DELIVERED, UsageSums

ALL = ("alpha", "beta", "gamma", REJECTED, SWALLOWED, POISONED)
ALWAYS = 3 * DAY_MS
Steps = list[tuple[Any, ...]]

rows = st.builds(
    Row,
    kinds,
    tenants,
    st.sampled_from(["web", "api"]),
    st.tuples(st.integers(0, 5_000), st.integers(0, 5_000)),
    st.integers(0, 3_000_000_000),
    st.one_of(st.integers(0, 200_000), st.integers(0, DAY_MS)),  # some are late
)
steps = st.one_of(
    st.tuples(
        st.just("read"), st.lists(rows, min_size=1, max_size=8), st.sampled_from(["envoy-1", "envoy-2"])
    ),
    st.tuples(st.just("wait"), st.sampled_from([5_000, 90_000, HOUR_MS])),
    st.just(("turn",)),
    st.tuples(st.just("deliver"), st.lists(answers, min_size=1, max_size=8)),
    st.just(("merge",)),
    st.just(("roll",)),
    st.just(("replay",)),
    st.just(("crash",)),
)


def plain(tenant: str, ago_ms: int = 0, wire: int = 100) -> Row:
    return Row("plain", tenant, "web", (wire, 2 * wire), 2_500_000_000, ago_ms)


OUTAGE: Steps = [
    step
    for minute in range(5)
    for step in (
        ("read", [plain(name, wire=10 + minute) for name in ALL], "envoy-1"),
        ("wait", 90_000),
        ("turn",),
        ("deliver", ["503"] if minute == 1 else []),
    )
]
"""An endpoint that is away for five minutes, in which one batch was tried, and the rest is merged."""
EVERYTHING: Steps = [
    *OUTAGE,
    ("merge",),
    ("read", [plain("alpha")], "envoy-2"),
    ("turn",),
    ("wait", 90_000),
    ("turn",),
    ("read", [plain("alpha", ago_ms=90_000)], "envoy-1"),  # late, in the same window
    ("turn",),
    ("wait", 90_000),
    ("turn",),
    ("deliver", ["lost", "midway"]),
    ("deliver", ["good"] * 8),
    ("replay",),
    ("deliver", ["good"] * 4),
    ("roll",),
    ("read", [plain("beta", ago_ms=3 * HOUR_MS), plain(REJECTED)], "envoy-1"),
    ("crash",),
    ("wait", 90_000),
    ("turn",),
    ("read", [plain("gamma")], "envoy-1"),
    ("turn",),
    ("wait", 90_000),
    ("turn",),
    ("read", [plain("gamma", ago_ms=90_000)], "envoy-1"),
    ("turn",),
    ("wait", 90_000),
    ("turn",),
]


class Run:
    """A sink, an endpoint, and what both say of a tenant."""

    def __init__(self, path: Path) -> None:
        from inner_sink import InnerSink

        self.sink = InnerSink(path)
        self.endpoint = Endpoint()
        self.seen: Counter[str] = Counter()
        self.unconfirmed: Counter[tuple[str, str]] = Counter()

    def step(self, step: tuple[Any, ...]) -> None:
        sink = self.sink
        match step:
            case ("read", sent, node):
                sink.read(*(row.build(sink.now_ms) for row in sent), node=node)
            case ("wait", by_ms):
                sink.now_ms += by_ms
            case ("turn",):
                sink.turn()
            case ("deliver", script):
                self.endpoint.follow(script)
                sink.deliver(self.endpoint, attempts=len(script), until_ms=sink.now_ms + HOUR_MS)
            case ("merge",):
                self.merge()
            case ("roll",):
                self.keeper().roll(sink.now_ms, short=True)
            case ("replay",):
                sink.storage.queue.replay(None, [], None)
            case ("crash",):
                sink.crash()

    def merge(self) -> None:
        merger, done = Merger(self.sink.storage.database, self.sink.mint), False
        while not done:
            done = merger.step(self.sink.now_ms).done
        self.sink.minted.update(self.sink.books.rows("SELECT id, body FROM events"))

    def keeper(self) -> Retention:
        return Retention(
            self.sink.storage.database,
            ledger_max_bytes=1 << 30,
            keep_delivered_ms=7 * DAY_MS,
            keep_sums_ms=400 * DAY_MS,
            keep_held_ms=90 * DAY_MS,
        )

    def shown(self) -> dict[str, UsageSums]:
        """By tenant, over all time."""
        start_ms = (self.sink.now_ms - ALWAYS) // DAY_MS * DAY_MS
        found = {}
        with Reader(self.sink.storage.database.path) as reader:
            for tenant in ALL:
                sums = found[tenant] = UsageSums()
                for hour in reader.usage(tenant, start_ms, start_ms + 4 * ALWAYS):
                    sums.add(hour)
                    self.seen.update("late" for line in hour.lines if line.late)
                    self.seen.update("merged" for line in hour.lines if line.merged)
                    self.seen.update(line.fate for line in hour.lines)
        return found

    def check(self) -> None:
        """Every tally is in the lines, and nothing else is."""
        found: Counter[tuple[str, str, str]] = Counter()
        values: Counter[tuple[str, str, str]] = Counter()
        for sums in self.shown().values():
            for one in sums.sums():
                for fate, sum_ in one.fates.items():
                    place = one.output, "pending" if fate == "attempted" else fate, one.meter
                    found[place] += sum_.events
                    values[place] += sum_.value
        tallies = {
            ("billing", fate, meter): sums
            for (output, fate, meter), sums in self.sink.books.tallies().items()
            if output
        }
        assert {place: (found[place], values[place]) for place in found} == tallies

    def finish(self) -> None:
        """All that was sent is settled, and the endpoint has what is shown as delivered."""
        sink = self.sink
        sink.now_ms += 3 * HOUR_MS
        sink.close_all()
        self.endpoint.follow([])
        sink.deliver(self.endpoint, until_ms=sink.now_ms + 3 * HOUR_MS)
        self.check()
        self.endpoint.healed = True
        sink.deliver(self.endpoint)
        while sink.storage.queue.replay(None, [], None):
            sink.deliver(self.endpoint)
        self.check()
        self.compare()

    def compare(self) -> None:
        stored: Counter[tuple[str, str]] = Counter()
        for body in self.endpoint.stored.values():
            event = json.loads(body)
            stored[event["subject"], event["type"]] += int(event["data"]["value"])
        types = dict(zip(self.sink.config.meters, METERS, strict=True))
        delivered: Counter[tuple[str, str]] = Counter()
        unconfirmed: Counter[tuple[str, str]] = Counter()
        for tenant, sums in self.shown().items():
            for one in sums.sums():
                place = f"projects/{tenant}", types[one.meter]
                delivered[place] += one.of(*DELIVERED)
                unconfirmed[place] += one.of("unconfirmed")
        self.unconfirmed = +unconfirmed
        for place in stored | delivered:  # of what is unconfirmed nobody can say whether it was stored
            assert delivered[place] <= stored[place] <= delivered[place] + unconfirmed[place], place


def check_all(taken: Steps, path: Path) -> Run:
    run = Run(path)
    try:
        for step in taken:
            run.step(step)
        run.check()
        run.finish()
    finally:
        run.sink.storage.close()
    return run


@settings(max_examples=20)
@given(taken=st.lists(steps, max_size=25))
@example(taken=EVERYTHING)
def test_what_usage_shows_is_what_was_delivered(
    tmp_path_factory: pytest.TempPathFactory, taken: Steps
) -> None:
    check_all(taken, tmp_path_factory.mktemp("sink"))


def test_one_run_has_it_all(tmp_path: Path) -> None:
    run = check_all(EVERYTHING, tmp_path)
    assert {"late", "merged", "dead", "delivered"} <= run.seen.keys()
    # All others were compared to the unit.
    assert {subject for subject, _ in run.unconfirmed} <= {f"projects/{SWALLOWED}"}


def test_a_unit_too_many_would_show(tmp_path: Path) -> None:
    """The checks themselves can fail."""
    run = Run(tmp_path)
    for step in EVERYTHING:
        run.step(step)
    run.check()
    db = run.sink.storage.database.db
    db.execute("UPDATE sums SET value=value+1 WHERE fate='delivered' AND meter='requests'")
    assert db.execute("SELECT changes()").fetchone()[0]
    with pytest.raises(AssertionError):
        run.check()
    with pytest.raises(AssertionError):
        run.compare()
    run.sink.storage.close()
