"""What an Envoy says it sent against what arrived: the arithmetic of the audit. Pure; times are passed in.

    Envoy's counters   written ──▶ flushed ─ ─ on the way ─ ─▶ received     the sinks' counts, of all members
                          └▶ dropped             └▶ missing

Both sides only grow, so that what happened between two moments is a difference of differences. The sinks are
always asked before the Envoy: ``flushed - received`` is then never less than what is missing. It is exactly
that when nothing is on the way, which is shown in one of two ways: nothing moved on either side between two
readings (``settled``), or the difference is as small as it was at the beginning. A moment of that kind ends
one interval and begins the next; until it comes, what can be said is bounds.

An Envoy takes its counters with it. Where the last reading before its end was final (it was draining, had
no connection left and was settled), the next one goes on exactly; else the interval is unknown, for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from proxy_usage.figures import Figures, Got, Sent, Sight

START_SLACK_MS = 10_000
"""Envoy's uptime is brought up to date every 5 s, in whole seconds: its start may seem to move by so much."""
AWAY_MS = 3_600_000
"""A sink that has not answered for so long is not waited for: the interval is unknown."""


class Point(msgspec.Struct):
    """Both sides at one moment."""

    at_ms: int
    sent: Sent
    got: dict[str, Got]

    def total(self, field: str) -> int:
        """A field of ``Got``, of all sinks together."""
        return sum(getattr(one, field) for one in self.got.values())

    def carried(self, last: Sent) -> Point:
        """The same, for an Envoy that began anew after ``last``: differences go on as if it had not."""
        changes = {
            name: getattr(self.sent, name) - getattr(last, name)
            for name in ("sent", "written", "dropped", "failed", "requests", "bytes_in", "bytes_out")
        }
        return Point(self.at_ms, msgspec.structs.replace(self.sent, **changes), self.got)


class Pending(msgspec.Struct, frozen=True):
    """What is not decided yet."""

    since_ms: int
    at_least: int
    at_most: int | None
    """None: nobody knows."""
    reason: str = ""
    """Why it cannot be decided now; empty: rows are on their way."""


class Track(msgspec.Struct):
    """How far the comparison with one Envoy has come: what the store keeps between two rounds."""

    node: str
    base: Point | None = None
    """Where the interval that is not decided began."""
    last: Point | None = None
    """The last reading."""
    quiet: Point | None = None
    """The last moment at which nothing moved, from which rows of both kinds are told apart."""
    final: bool = False
    """The last reading is the last that this Envoy can have: nothing can have come after it."""
    doubt: str = ""
    """Why the interval can never be decided."""
    owed: int = 0
    """Missing, over all intervals: rows that come late are taken from it."""
    since_quiet: list[int] = msgspec.field(default_factory=lambda: [0, 0])
    """Missing since ``quiet``: of both kinds, and of HTTP."""


class Verdict(NamedTuple):
    """What a round came to."""

    figures: Figures | None
    """Decided; of the time from the last decision until now."""
    pending: Pending | None


def state(figures: Figures, pending: Pending | None, *, stale: bool) -> tuple[str, str]:
    """A node's state, and why."""
    if pending is not None and pending.reason:
        return "unknown", pending.reason
    if figures.unknown:
        return "unknown", "an interval can never be decided: an Envoy or a sink took its counters with it"
    if figures.missing > 0 or figures.dropped or figures.crash_lost:
        return "missing", ""
    if pending is not None and pending.at_least > 0:
        return "missing", ""
    if stale:
        return "unknown", "rows have been on their way for too long to be sure"
    if not figures.to_ms:
        return "unknown", "nothing to begin from yet"
    return "complete", ""


def judge(track: Track, sights: Sequence[Sight], *, settle_ms: int, floor: bool = False) -> Verdict:
    """Takes the readings of one round into account; changes ``track``.

    Args:
        settle_ms: apart from each other at least: two readings that show that nothing moves. Longer than
            Envoy's ``buffer_flush_interval``, and than a row is on its way.
        floor: rows that a crashed sink lost are not in ``Got.rows`` (end rows are counted after reading).
    """
    sights = _follow_adoptions(track, sights)
    points = _of_one_start([point for sight in sights if (point := _point(track, sight)) is not None])
    if not points:
        return Verdict(None, _blind(track, sights))
    if track.last is not None and _restarted(track.last, points[0]):
        _begin_anew(track)
    if track.base is None:
        _first(track, points, settle_ms)
        return Verdict(None, None)
    _trust(track, points[0], points[-1])
    highs = [_difference(track.base, point, point) for point in points]
    high = min(highs)
    low = max((_difference(track.base, a, b) for a, b in _apart(points, settle_ms)), default=0)
    settled = next((b for a, b in _apart(points, settle_ms) if _same(a, b)), None)
    still_final = track.final and track.last is not None and _same(track.last, points[-1])
    ends = settled is not None and settled.sent.draining and settled.sent.connections == 0
    track.last, track.final = points[-1], ends or still_final
    if settled is not None:
        return Verdict(_decide(track, settled, _difference(track.base, settled, settled), True, floor), None)
    if not track.doubt and (high <= 0 or high == low):
        return Verdict(_decide(track, points[highs.index(high)], high, False, floor), None)
    if track.doubt and len(points) > 1:  # what is on its way is noticed by the next rounds
        return Verdict(_decide(track, points[highs.index(high)], low, False, floor), None)
    at_most = None if track.doubt else high
    return Verdict(None, Pending(track.base.at_ms, max(0, low), at_most, track.doubt))


def give_up(track: Track) -> Figures | None:
    """The Envoy is gone for good, or a sink: closes the interval as unknown. None: nothing was open."""
    if track.base is None or track.last is None or track.final:
        return None
    missing = _difference(track.base, track.last, track.last)
    track.doubt = track.doubt or "it is gone"
    return _decide(track, track.last, missing, False, False)


def _follow_adoptions(track: Track, sights: Sequence[Sight]) -> Sequence[Sight]:
    """Where a sink took over another's store, what is remembered of that one is its own from now on.

    Its counts rose by the other's, to the row: so sums over all sinks stay as they were at every moment. But
    of a sink that was never asked, nobody knows what of its rows came before the interval.
    """
    base = track.base
    for sink, now in sights[-1].got.items():
        known = track.last.got.get(sink, Got()).adopted if track.last is not None else {}
        for former, born_ms in now.adopted.items():
            if former in known:
                continue
            if base is not None and any(
                one not in base.got and at_ms <= base.at_ms
                for one, at_ms in ((former, born_ms), (sink, now.born_ms))
            ):
                track.doubt = track.doubt or "a sink took over another, and one of them was never asked"
            for point in (base, track.last, track.quiet):
                if point is not None:
                    point.got = _handed_over(point.got, former, sink, now)
            sights = [sight._replace(got=_handed_over(sight.got, former, sink, now)) for sight in sights]
    return sights


def _handed_over(counts: Mapping[str, Got], former: str, sink: str, now: Got) -> dict[str, Got]:
    """The counts of some moment, those of a former sink added to those of who took it over."""
    rest = dict(counts)
    theirs, mine = rest.pop(former, None), rest.get(sink, Got(born_ms=now.born_ms))
    if theirs is not None:
        names = ("rows", "http", "crash_lost", "crash_lost_http", "doubts")
        sums = {name: getattr(theirs, name) + getattr(mine, name) for name in names}
        rest[sink] = msgspec.structs.replace(mine, **sums, adopted=now.adopted)
    return rest


def _point(track: Track, sight: Sight) -> Point | None:
    """A reading that can be used: nobody is away."""
    known = track.last.got.keys() if track.last is not None else ()
    if sight.sent is None or sight.away or any(sink not in sight.got for sink in known):
        return None
    return Point(sight.at_ms, sight.sent, dict(sight.got))


def _blind(track: Track, sights: Sequence[Sight]) -> Pending | None:
    """Bounds while one side does not answer."""
    seen = sights[-1]
    if seen.sent is None and track.final:
        return None  # it ended as it should: everything is decided
    base, last = track.base, track.last
    if base is None or last is None:
        return Pending(seen.at_ms, 0, None, "nothing to begin from yet")
    got = {**last.got, **seen.got}
    if seen.sent is None:
        now = Point(seen.at_ms, last.sent, got)
        low = 0 if seen.away else max(0, _difference(base, now, now))
        return Pending(base.at_ms, low, None, "the Envoy does not answer")
    now = Point(seen.at_ms, seen.sent, got)
    absent = [sink for sink in last.got if sink not in seen.got]
    if seen.at_ms - last.at_ms > AWAY_MS and not seen.away:
        track.doubt = "a sink is gone for good"
        track.last = msgspec.structs.replace(last, got={k: v for k, v in last.got.items() if k not in absent})
        for point in (base, track.quiet):
            if point is not None:
                point.got = {sink: got for sink, got in point.got.items() if sink not in absent}
    if _restarted(last, now):
        return Pending(base.at_ms, 0, None, "the Envoy was restarted, and a sink is away")
    return Pending(base.at_ms, 0, max(0, _difference(base, now, now)), "a sink is away")


def _restarted(last: Point, now: Point) -> bool:
    """Whether this is another start of the Envoy: a counter went back, or its start is later."""
    grows = ("sent", "written", "dropped", "failed", "requests", "bytes_in", "bytes_out", "uptime_s")
    if any(getattr(now.sent, name) < getattr(last.sent, name) for name in grows):
        return True
    before = last.at_ms - 1_000 * last.sent.uptime_s
    return now.at_ms - 1_000 * now.sent.uptime_s > before + START_SLACK_MS


def _begin_anew(track: Track) -> None:
    assert track.last is not None
    if not track.final:
        track.doubt = track.doubt or "the Envoy ended between two readings, and its counters with it"
    if track.base is not None:
        track.base = track.base.carried(track.last.sent)
    if track.quiet is not None:
        track.quiet = track.quiet.carried(track.last.sent)
    track.last, track.final = None, False


def _first(track: Track, points: Sequence[Point], settle_ms: int) -> None:
    """Begins where least is on its way; the next rounds notice if that was not nothing."""
    quiet = next((b for a, b in _apart(points, settle_ms) if _same(a, b)), None)
    track.base = quiet or min(points, key=lambda point: point.sent.sent - point.total("rows"))
    track.quiet, track.last = quiet, points[-1]


def _of_one_start(points: Sequence[Point]) -> Sequence[Point]:
    """Those before the Envoy was restarted; the others are another round's."""
    for number, (a, b) in enumerate(itertools.pairwise(points), 1):
        if _restarted(a, b):
            return points[:number]
    return points


def _trust(track: Track, first: Point, now: Point) -> None:
    """Takes note of what makes the sinks' side of the interval uncertain."""
    base = track.base
    assert base is not None
    for sink, got in first.got.items():
        if sink not in base.got and got.rows and got.born_ms <= base.at_ms:
            base.got = {**base.got, sink: got}
            track.doubt = "a sink is asked for the first time that had rows before"
    if now.total("doubts") != base.total("doubts"):
        track.doubt = "a sink cannot say what a crash, or the loss of its store, cost"


def _apart(points: Sequence[Point], settle_ms: int) -> list[tuple[Point, Point]]:
    """Pairs of readings, the first at least ``settle_ms`` before the second."""
    pairs = itertools.combinations(points, 2)
    return [(a, b) for a, b in pairs if b.at_ms - a.at_ms >= settle_ms]


def _same(a: Point, b: Point) -> bool:
    """Whether nothing moved in between: what Envoy wrote it has flushed, and what it flushed has arrived."""
    names = ("sent", "written", "dropped", "failed")
    still = all(getattr(a.sent, name) == getattr(b.sent, name) for name in names)
    return still and a.got == b.got


def _difference(base: Point, sent: Point, got: Point) -> int:
    """Sent until one moment and not received until another."""
    return sent.sent.sent - base.sent.sent - (got.total("rows") - base.total("rows"))


def _decide(track: Track, now: Point, missing: int, settled: bool, floor: bool) -> Figures:
    """Ends the interval: ``missing`` of it is exact, unless it is in doubt."""
    base, found = track.base, Figures(from_ms=now.at_ms, to_ms=now.at_ms)
    assert base is not None
    found.from_ms = base.at_ms
    for name, field in (("written", "written"), ("dropped", "dropped"), ("flushed", "sent")):
        setattr(found, name, getattr(now.sent, field) - getattr(base.sent, field))
    for name, field in (("received", "rows"), ("crash_lost", "crash_lost")):
        setattr(found, name, now.total(field) - base.total(field))
    lost_http = now.total("crash_lost_http") - base.total("crash_lost_http")
    if floor and missing > 0 and lost_http > 0:
        track.doubt = track.doubt or "a sink was killed: its end rows are known only as of its checkpoint"
        missing = max(0, missing - lost_http)
    if track.doubt:
        certain = not track.doubt.startswith("a sink")
        if settled and certain and track.quiet is not None:  # what was in the ended Envoy's buffer is lost
            missing = max(missing, _http_missing(track.quiet, now) - track.since_quiet[1])
        found.unknown, found.at_least = 1, max(0, missing) if certain or floor else 0
        gone = found.at_least
        track.quiet, track.since_quiet, track.owed = (now if settled else None), [0, 0], 0
    else:
        # Below 0: late rows of what was given up; beyond that, the first reading had rows on their way.
        found.missing = max(missing, -track.owed)
        track.owed += found.missing
        found.missing_http = gone = _http_part(track, now, found, settled)
        found.missing_tcp = found.missing - found.missing_http
    _estimate(found, base, now, max(0, gone) + found.dropped + lost_http)
    track.base, track.doubt = now, ""
    return found


def _http_part(track: Track, now: Point, found: Figures, settled: bool) -> int:
    """How many of the missing rows are HTTP rows: exact when nothing moves, else in proportion."""
    quiet, (missing, http) = track.quiet, track.since_quiet
    if settled and quiet is not None:
        part = _http_missing(quiet, now) - http
    else:
        part = found.missing * found.written // max(1, found.flushed)
        part = min(found.missing, max(0, part)) if found.missing >= 0 else max(found.missing, min(0, part))
    if settled:
        track.quiet, track.since_quiet = now, [0, 0]
    else:
        track.since_quiet = [missing + found.missing, http + part]
    return part


def _http_missing(quiet: Point, now: Point) -> int:
    """HTTP rows that were written and not received, where none waits in Envoy at either moment."""
    return now.sent.written - quiet.sent.written - (now.total("http") - quiet.total("http"))


def _estimate(found: Figures, base: Point, now: Point, lost: int) -> None:
    """What the lost rows would have been billed for, were they like all of the interval. Rounded down."""
    rows = found.written + found.dropped
    if rows <= 0 or lost <= 0:
        return
    for name in ("requests", "bytes_in", "bytes_out"):
        setattr(found, name, (getattr(now.sent, name) - getattr(base.sent, name)) * lost // rows)
