"""Each way in which rows go missing, and each in which nobody can know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from proxy_usage.completeness import AWAY_MS, START_SLACK_MS, Pending, Track, Verdict, give_up, judge, state
from proxy_usage.figures import Figures, Got, Sent, Sight

SETTLE_MS = 1_000
T0 = 1_800_000_000_000


class Pair:
    """An Envoy and its sinks, read once a second."""

    def __init__(self) -> None:
        self.track = Track("edge-1")
        self.now_ms = T0
        self.sent: dict[str, Any] = {"uptime_s": 100}
        self.got: dict[str, dict[str, int]] = {"a": {}}
        self.found = Figures()
        self.adopted: dict[str, dict[str, int]] = {}

    def send(self, rows: int, *, arrive: int | None = None, tcp: int = 0, sink: str = "a") -> None:
        """Envoy writes and flushes rows; so many arrive, by default all."""
        for name, more in (
            ("sent", rows + tcp),
            ("written", rows),
            ("requests", rows),
            ("bytes_in", 100 * rows),
            ("bytes_out", 1_000 * rows),
        ):
            self.sent[name] = self.sent.get(name, 0) + more
        self.arrive(rows if arrive is None else arrive, tcp, sink)

    def arrive(self, http: int, tcp: int = 0, sink: str = "a") -> None:
        got = self.got.setdefault(sink, {})
        got["rows"] = got.get("rows", 0) + http + tcp
        got["http"] = got.get("http", 0) + http

    def look(self, *, answers: bool = True, away: int = 0) -> Sight:
        """A reading; a second passes."""
        self.now_ms += 1_000
        self.sent["uptime_s"] += 1
        got: Mapping[str, Got] = {
            sink: Got(**fields, adopted=self.adopted.get(sink, {})) for sink, fields in self.got.items()
        }
        return Sight(self.now_ms, Sent(**self.sent) if answers else None, got, away)

    def round(self, *, floor: bool = False, **how: Any) -> Verdict:
        """A round in which nothing moves."""
        return self.judged(self.look(**how), self.look(**how), floor=floor)

    def judged(self, *sights: Sight, floor: bool = False) -> Verdict:
        verdict = judge(self.track, sights, settle_ms=SETTLE_MS, floor=floor)
        if verdict.figures is not None:
            self.found.add(verdict.figures)
        return verdict

    def adopt(self, former: str, sink: str = "a", *, born_ms: int = 1) -> None:
        """A sink takes over the store of another, with all its counts."""
        for name, more in self.got.pop(former, {}).items():
            if name != "born_ms":
                self.got[sink][name] = self.got[sink].get(name, 0) + more
        self.adopted[sink] = {**self.adopted.get(sink, {}), former: born_ms}

    def restart(self) -> None:
        """The Envoy begins anew."""
        self.sent = {"uptime_s": 0}


@pytest.fixture
def pair() -> Pair:
    """An Envoy that was audited for a while, and had a life before that."""
    pair = Pair()
    pair.send(5_000, arrive=20)
    assert pair.round() == Verdict(None, None)
    return pair


def figures(found: Figures) -> tuple[int, ...]:
    return found.written, found.dropped, found.flushed, found.received, found.missing


def test_what_was_before_the_first_round_is_not_judged(pair: Pair) -> None:
    pair.send(10)
    assert pair.round().pending is None
    assert figures(pair.found) == (10, 0, 10, 10, 0)
    assert state(pair.found, None, stale=False) == ("complete", "")


def test_flushed_and_not_received_is_missing_to_the_row(pair: Pair) -> None:
    pair.send(1_000, arrive=436, tcp=7)
    assert pair.round().pending is None
    assert figures(pair.found) == (1_000, 0, 1_007, 443, 564)
    assert (pair.found.missing_http, pair.found.missing_tcp) == (564, 0)
    assert state(pair.found, None, stale=False)[0] == "missing"


def test_rows_of_tcp_connections_are_told_apart_when_nothing_moves(pair: Pair) -> None:
    pair.send(100, tcp=50)
    pair.sent["sent"] += 9
    pair.round()
    assert (pair.found.missing, pair.found.missing_http, pair.found.missing_tcp) == (9, 0, 9)


def test_the_estimate_is_in_proportion_and_rounded_down(pair: Pair) -> None:
    pair.send(300, arrive=200)
    pair.sent["dropped"] = 33
    pair.round()
    assert (pair.found.missing, pair.found.dropped) == (100, 33)
    assert pair.found.requests == 300 * 133 // 333
    assert pair.found.bytes_in == 30_000 * 133 // 333
    assert pair.found.bytes_out == 300_000 * 133 // 333


def test_what_a_sink_read_and_lost_is_shown_beside_what_is_missing(pair: Pair) -> None:
    pair.send(300)
    pair.got["a"] |= {"crash_lost": 12, "crash_lost_http": 10}
    pair.round()
    assert (pair.found.missing, pair.found.crash_lost, pair.found.requests) == (0, 12, 10)
    assert state(pair.found, None, stale=False)[0] == "missing"


def test_rows_on_their_way_are_bounds_and_then_nothing(pair: Pair) -> None:
    first = pair.look()
    pair.send(40, arrive=30)
    verdict = pair.judged(first, pair.look())
    assert verdict.figures is not None  # the first reading was complete: up to there it is decided
    pair.send(40, arrive=30)
    verdict = pair.judged(pair.look())
    assert verdict.pending == Pending(pair.track.base.at_ms if pair.track.base else 0, 0, 20)
    pair.arrive(20)
    assert pair.round().pending is None
    assert figures(pair.found) == (80, 0, 80, 80, 0)


def test_one_moment_without_rows_on_their_way_decides_under_load(pair: Pair) -> None:
    sights = []
    for on_the_way in (5, 0, 9):
        pair.send(100, arrive=100 - on_the_way)
        sights.append(pair.look())
        pair.arrive(on_the_way)
    verdict = pair.judged(*sights)
    assert verdict.figures is not None
    assert verdict.figures.to_ms == sights[1].at_ms
    assert figures(pair.found) == (200, 0, 200, 200, 0)


def test_a_loss_under_load_is_decided_when_bounds_meet(pair: Pair) -> None:
    pair.send(100, arrive=60)
    first = pair.look()
    pair.send(100, arrive=0)
    second = pair.look()  # the 100 are on their way
    pair.arrive(100)
    pair.send(50, arrive=0)
    verdict = pair.judged(first, second, pair.look())
    assert verdict.figures is not None
    assert verdict.figures.missing == 40


def test_rows_that_wait_in_envoy_are_not_missing(pair: Pair) -> None:
    pair.sent["written"] += 70
    pair.sent["failed"] = 70
    first = pair.look()
    pair.sent["failed"] = 140
    pair.judged(first, pair.look())
    assert pair.found.missing == 0
    pair.sent["sent"] += 70
    pair.arrive(70)
    pair.round()
    assert (pair.found.missing, pair.found.missing_http) == (0, 0)


def test_the_first_reading_may_have_had_rows_on_their_way() -> None:
    pair = Pair()
    pair.send(100, arrive=90)
    pair.judged(pair.look())
    pair.arrive(10)
    pair.send(50, arrive=45)
    pair.round()
    pair.send(10)
    pair.round()
    assert figures(pair.found)[2:] == (60, 65, 0)  # 5 of 60 seem to be there: the 10 came for the 5
    pair.send(100, arrive=80)
    pair.round()
    assert pair.found.missing == 20


def test_rows_that_come_after_they_were_given_up_are_taken_back(pair: Pair) -> None:
    pair.send(100, arrive=60)
    pair.round()
    assert pair.found.missing == 40
    pair.arrive(30)
    pair.round()
    assert (pair.found.missing, pair.found.missing_http) == (10, 10)


# --- Envoy's end -----------------------------------------------------------------------------------------


def test_an_envoy_that_ended_as_it_should_and_its_successor_are_exact(pair: Pair) -> None:
    pair.send(100, arrive=90)
    pair.sent["draining"] = True
    pair.round()
    assert pair.track.final
    assert pair.round(answers=False) == Verdict(None, None)
    pair.restart()
    pair.send(1_000, arrive=999)
    pair.round()
    assert figures(pair.found) == (1_100, 0, 1_100, 1_089, 11)
    assert (pair.found.unknown, pair.found.missing_http) == (0, 11)


def test_readings_that_broke_off_do_not_take_back_that_the_last_one_was_final(pair: Pair) -> None:
    pair.sent["draining"] = True
    pair.round()
    pair.judged(pair.look(), pair.look(answers=False))
    assert pair.track.final
    pair.send(1)
    pair.judged(pair.look(), pair.look(answers=False))
    assert not pair.track.final


@pytest.mark.parametrize("change", [{"connections": 1, "draining": True}, {"draining": False}])
def test_an_envoy_that_may_still_have_served_takes_what_it_knew_with_it(
    pair: Pair, change: dict[str, Any]
) -> None:
    pair.send(100)
    pair.sent |= change
    pair.round()
    pending = pair.round(answers=False).pending
    assert pending is not None
    assert (pending.at_least, pending.at_most, pending.reason) == (0, None, "the Envoy does not answer")
    pair.restart()
    pair.send(10)
    pair.round()
    assert (pair.found.unknown, pair.found.at_least, pair.found.missing) == (1, 0, 0)
    assert state(pair.found, None, stale=False)[0] == "unknown"
    pair.send(10, arrive=7)
    pair.round()
    assert (pair.found.unknown, pair.found.missing) == (1, 3)  # from then on it is exact again


def test_what_is_certain_of_an_envoy_that_was_killed_is_a_lower_bound(pair: Pair) -> None:
    pair.sent["written"] += 50  # written, read so by the audit, and never flushed
    pair.sent["failed"] = 50
    pair.judged(pair.look())
    pair.restart()
    pair.send(10)
    pair.round()
    assert (pair.found.unknown, pair.found.at_least) == (1, 50)


def test_a_restart_is_seen_by_a_later_start_alone(pair: Pair) -> None:
    """Its counters have grown beyond those of the one before."""
    pair.send(10)
    pair.round()
    pair.now_ms += 2 * START_SLACK_MS + 200_000
    pair.send(10_000)
    pair.round()
    assert pair.found.unknown == 1


def test_counters_are_compared_within_a_round_too(pair: Pair) -> None:
    pair.send(100)
    first = pair.look()
    pair.restart()
    pair.judged(first, pair.look())
    pair.round()
    assert (pair.found.written, pair.found.unknown) == (100, 1)


def test_an_envoy_that_is_gone_for_good_is_given_up(pair: Pair) -> None:
    pair.send(100, arrive=60)
    pair.judged(pair.look())
    found = give_up(pair.track)
    assert found is not None
    assert (found.unknown, found.at_least) == (1, 40)
    assert give_up(Track("never read")) is None


def test_one_that_ended_as_it_should_leaves_nothing_open(pair: Pair) -> None:
    pair.sent["draining"] = True
    pair.round()
    assert give_up(pair.track) is None


# --- sinks -----------------------------------------------------------------------------------------------


def test_rows_of_all_sinks_are_added_and_a_new_one_begins_with_nothing(pair: Pair) -> None:
    pair.got["b"] = {"born_ms": pair.now_ms + 1}
    pair.send(100, sink="b")
    pair.send(10)
    pair.round()
    assert (pair.found.received, pair.found.missing, pair.found.unknown) == (110, 0, 0)


def test_a_sink_that_had_rows_before_it_was_asked_makes_the_interval_unknown(pair: Pair) -> None:
    pair.got["b"] = {"born_ms": 1, "rows": 500, "http": 500}
    pair.send(10)
    pair.round()
    assert (pair.found.unknown, pair.found.at_least) == (1, 0)
    pair.send(100, arrive=99, sink="b")
    pair.round()
    assert (pair.found.unknown, pair.found.missing) == (1, 1)


def test_while_a_sink_is_away_there_is_an_upper_bound_and_later_nothing_is_missing(pair: Pair) -> None:
    pair.got["b"] = {"born_ms": pair.now_ms + 1}
    pair.send(10, sink="b")
    pair.round()
    away = pair.got.pop("b")
    pair.send(100, arrive=30)
    pending = pair.round(away=1).pending
    assert pending is not None
    assert (pending.at_least, pending.at_most, pending.reason) == (0, 70, "a sink is away")
    pair.got["b"] = away
    pair.arrive(70, sink="b")
    assert pair.round().pending is None
    assert (pair.found.missing, pair.found.unknown) == (0, 0)


def test_a_sink_that_never_comes_back_leaves_an_unknown_interval(pair: Pair) -> None:
    pair.got["b"] = {"born_ms": pair.now_ms + 1}
    pair.round()
    del pair.got["b"]
    pair.send(100, arrive=30)
    assert pair.round().pending is not None
    pair.now_ms += AWAY_MS
    pair.sent["uptime_s"] += AWAY_MS // 1_000
    pair.round()
    pair.round()
    assert (pair.found.unknown, pair.found.at_least) == (1, 0)
    pair.send(5)
    assert pair.round().pending is None


def test_a_sink_that_cannot_say_what_it_lost_makes_the_interval_unknown(pair: Pair) -> None:
    pair.send(10, arrive=4)
    pair.got["a"]["doubts"] = 1
    pair.round()
    assert (pair.found.unknown, pair.found.at_least, pair.found.missing) == (1, 0, 0)


def test_end_rows_that_a_crash_took_bound_what_is_missing_of_requests(pair: Pair) -> None:
    pair.send(100, arrive=70)
    pair.got["a"] |= {"crash_lost": 20, "crash_lost_http": 20}
    pair.round(floor=True)
    assert (pair.found.unknown, pair.found.at_least, pair.found.missing) == (1, 10, 0)


@pytest.mark.parametrize(
    ("found", "pending", "stale", "told"),
    [
        (Figures(to_ms=1), Pending(0, 0, 9), False, "complete"),
        (Figures(to_ms=1), Pending(0, 0, 9), True, "unknown"),
        (Figures(to_ms=1), Pending(0, 3, 9), False, "missing"),
        (Figures(to_ms=1, missing=4), None, False, "missing"),
        (Figures(to_ms=1, dropped=4), None, False, "missing"),
        (Figures(to_ms=1, missing=4, unknown=1), None, False, "unknown"),
        (Figures(to_ms=1), Pending(0, 0, None, "why"), False, "unknown"),
        (Figures(), None, False, "unknown"),
    ],
)
def test_state(found: Figures, pending: Pending | None, stale: bool, told: str) -> None:
    assert state(found, pending, stale=stale)[0] == told


# --- a sink that took over another ----------------------------------------------------------------------


def test_a_sink_that_was_taken_over_is_no_sink_that_is_away(pair: Pair) -> None:
    pair.got["b"] = {"born_ms": pair.now_ms + 1}
    pair.send(40, arrive=30, sink="b")
    pair.round()
    pair.send(100, arrive=90, sink="b")
    pair.send(10)
    pair.adopt("b")
    assert pair.round().pending is None
    assert figures(pair.found) == (150, 0, 150, 130, 20)
    assert pair.found.unknown == 0
    pair.send(7)
    pair.round()  # and it is no news any more
    assert (pair.found.missing, pair.found.unknown) == (20, 0)


def test_it_is_so_while_the_envoy_does_not_answer_and_afterwards(pair: Pair) -> None:
    pair.got["b"] = {"born_ms": pair.now_ms + 1}
    pair.send(40, sink="b")
    pair.round()
    pair.send(100, arrive=90, sink="b")
    pair.adopt("b", born_ms=1)
    pending = pair.round(answers=False).pending
    assert pending is not None
    assert (pending.at_least, pending.at_most, pending.reason) == (0, None, "the Envoy does not answer")
    assert pair.round().pending is None
    assert (pair.found.missing, pair.found.unknown) == (10, 0)


def test_it_may_happen_between_two_readings_of_a_round(pair: Pair) -> None:
    pair.got["b"] = {"born_ms": pair.now_ms + 1}
    pair.send(40, sink="b")
    pair.round()
    pair.send(10, arrive=6, sink="b")
    first = pair.look()
    pair.adopt("b")
    assert pair.judged(first, pair.look()).pending is None
    assert (pair.found.missing, pair.found.unknown) == (4, 0)


def test_rows_of_one_that_was_never_asked_make_the_interval_unknown(pair: Pair) -> None:
    pair.got["a"]["rows"] += 500
    pair.adopt("b", born_ms=T0 - 1)
    pair.send(100, arrive=60)
    pair.round()
    assert (pair.found.unknown, pair.found.missing, pair.found.at_least) == (1, 0, 0)
    pair.send(100, arrive=60)
    pair.round()
    assert (pair.found.unknown, pair.found.missing) == (1, 40)


def test_one_that_was_made_since_needs_no_memory_of_it(pair: Pair) -> None:
    pair.got["b"] = {"born_ms": pair.now_ms + 1}
    pair.send(30, arrive=20, sink="b")
    pair.adopt("b", born_ms=pair.now_ms + 1)
    pair.round()
    assert (pair.found.missing, pair.found.unknown) == (10, 0)
