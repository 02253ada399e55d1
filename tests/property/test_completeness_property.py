"""Whatever happens between an Envoy and its sinks: once all is quiet, the audit says what was lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from proxy_usage.completeness import START_SLACK_MS, Track, judge
from proxy_usage.figures import Figures, Got, Sent, Sight

SETTLE_MS = 1_000
APART_MS = START_SLACK_MS + 1_000
"""Between two readings: an Envoy that begins anew sooner may pass for the one before."""
SINKS = ("a", "b")

ROWS = st.integers(1, 50)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "drop", "tcp", "crash"]), ROWS),
        st.tuples(
            st.sampled_from(["flush", "fail", "arrive", "lose", "look", "round", "end", "adopt"]), st.just(0)
        ),
    ),
    max_size=60,
)


class Life:
    """An Envoy, the rows that it handed over and that are on their way, and two sinks."""

    def __init__(self) -> None:
        self.track = Track("edge")
        self.found = Figures()
        self.now_ms = 1_800_000_000_000
        self.lost = Counter[str]()
        self.waiting = 0
        self.on_the_way: list[tuple[str, int]] = []
        self.got = {sink: Counter[str]() for sink in SINKS}
        self.sent = Counter[str]()
        self.draining = False
        self.round()

    def write(self, rows: int) -> None:
        self.sent["written"] += rows
        self.waiting += rows

    def drop(self, rows: int) -> None:
        self.sent["dropped"] += rows
        self.lost["dropped"] += rows

    def tcp(self, rows: int) -> None:
        self.sent["sent"] += rows
        self.on_the_way.append(("tcp", rows))

    def crash(self, rows: int) -> None:
        """A sink that was killed lost rows it had read."""
        self.got["a"]["crash_lost"] += rows
        self.lost["crash"] += rows

    def adopt(self, _: int) -> None:
        """The first sink takes over the other's store; whatever is on its way comes to it."""
        self.got["a"].update(self.got.pop("b", Counter()))

    def flush(self, _: int) -> None:
        if self.waiting:
            self.sent["sent"] += self.waiting
            self.on_the_way.append(("http", self.waiting))
            self.waiting = 0

    def fail(self, _: int) -> None:
        self.sent["failed"] += self.waiting

    def arrive(self, _: int) -> None:
        if self.on_the_way:
            kind, rows = self.on_the_way.pop()
            got = self.got[SINKS[rows % 2 if len(self.got) > 1 else 0]]
            got["rows"] += rows
            got["http"] += rows if kind == "http" else 0

    def lose(self, _: int) -> None:
        if self.on_the_way:
            kind, rows = self.on_the_way.pop(0)
            self.lost[kind] += rows

    def sight(self) -> Sight:
        self.now_ms += APART_MS
        self.sent["uptime_s"] += APART_MS // 1_000
        sent = Sent(**self.sent, draining=self.draining)
        got = {
            sink: _got(counts, {"b": 0} if len(self.got) == 1 else {}) for sink, counts in self.got.items()
        }
        if self.waiting:
            self.sent["failed"] += self.waiting  # Envoy tries each second, and counts that
        return Sight(self.now_ms, sent, got)

    def judged(self, *sights: Sight) -> None:
        verdict = judge(self.track, sights, settle_ms=SETTLE_MS)
        if verdict.figures is not None:
            self.found.add(verdict.figures)

    def look(self, _: int) -> None:
        self.judged(self.sight())

    def round(self, _: int = 0) -> None:
        self.judged(self.sight(), self.sight())

    def quiet(self) -> None:
        self.flush(0)
        while self.on_the_way:
            self.arrive(0)
        self.round()

    def end(self, _: int) -> None:
        """Drained, seen so, and begun anew."""
        self.draining = True
        self.quiet()
        self.sent, self.draining = Counter(), False
        self.look(0)  # a life that nobody looks at is one that nobody knows of

    def kill(self) -> None:
        self.lost["http"] += self.waiting
        self.waiting, self.sent = 0, Counter()

    def take(self, steps: list[tuple[str, int]]) -> None:
        for name, rows in steps:
            getattr(self, name)(rows)


def _got(counts: Counter[str], adopted: dict[str, int]) -> Got:
    names = ("rows", "http", "crash_lost")
    rows, http, crash_lost = (counts[name] for name in names)
    return Got(rows=rows, http=http, crash_lost=crash_lost, adopted=adopted)


@given(STEPS)
def test_what_is_lost_is_what_the_audit_says(steps: list[tuple[str, int]]) -> None:
    life = Life()
    life.take(steps)
    life.quiet()
    found = life.found
    assert found.unknown == 0
    assert found.missing == life.lost["http"] + life.lost["tcp"]
    assert found.dropped == life.lost["dropped"]
    assert found.crash_lost == life.lost["crash"]
    assert found.flushed == found.received + found.missing
    assert found.missing_http == life.lost["http"]
    assert found.missing_tcp == life.lost["tcp"]


@given(st.lists(STEPS, min_size=2, max_size=4))
def test_an_envoy_that_is_killed_makes_it_unknown_and_no_figure_too_high(
    lives: list[list[tuple[str, int]]],
) -> None:
    life = Life()
    for number, steps in enumerate(lives):
        if number:
            life.kill()
            life.look(0)
        for name, rows in steps:
            getattr(life, name)(rows)
            while life.on_the_way:  # nothing is on its way for as long as it takes to settle
                life.arrive(0)
    life.quiet()
    life.round()
    lost = life.lost["http"] + life.lost["tcp"]
    told = life.found.missing + life.found.at_least
    assert told <= lost
    assert life.found.unknown or told == lost
