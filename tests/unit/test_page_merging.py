"""Several workers' snapshots as one: figures add up, the worst is shown, and who has a problem is named."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_page_document import CASES, NAMING, NOW, OUTPUT, WELL, monstrous

from proxy_usage.page.document import document
from proxy_usage.page.merging import PRESSURES, merge, whole
from proxy_usage.page.problems import Level
from proxy_usage.page.ring import LEVELS, POINTS, RATES, STEP_MS, History
from proxy_usage.page.snapshot import (
    NodeAudit,
    NodeFigures,
    OutputFigures,
    Snapshot,
    StoreFigures,
    TenantFigures,
    TopFigures,
    WeekFigures,
    WorkerFigures,
)
from proxy_usage.page.workers import found_problems
from proxy_usage.service.housekeeping import Pressure
from proxy_usage.store.glance import MOST_TOP, DeadGroup, HeldGroup, HeldTop
from proxy_usage.store.week import HOUR_MS, HOURS

COUNT = st.integers(0, 1 << 40)
NAMES = st.sampled_from(["a", "b", "c"])
TIME = st.integers(NOW - 9_000, NOW)
POINT = NOW - NOW % STEP_MS
HOUR = NOW - NOW % HOUR_MS
COLUMNS = (*RATES, *LEVELS)


def counts(names: st.SearchStrategy[str] = NAMES) -> st.SearchStrategy[dict[str, int]]:
    return st.dictionaries(names, COUNT)


@st.composite
def histories(draw: st.DrawFn) -> History:
    """As a ring gives it: columns of one length, with gaps."""
    length = draw(st.integers(0, 6))
    point = st.none() | COUNT
    columns = {name: tuple(draw(st.lists(point, min_size=length, max_size=length))) for name in COLUMNS}
    return History(POINT - draw(st.integers(0, 4)) * STEP_MS if length else None, columns)


@st.composite
def weeks(draw: st.DrawFn) -> WeekFigures:
    some = st.lists(COUNT, min_size=HOURS, max_size=HOURS) if draw(st.booleans()) else st.just([1] * HOURS)
    end_ms = HOUR - draw(st.integers(0, 1)) * HOUR_MS
    return WeekFigures(end_ms, tuple(draw(some)), {"requests": tuple(draw(some))}, {"requests": "1"})


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """One worker's, in the order in which a worker gives its parts."""
    first = sorted(draw(counts()).items(), key=lambda item: (-item[1], item[0]))
    held = sorted(draw(counts()).items(), key=lambda item: (-item[1], item[0]))
    dead = sorted(draw(counts()).items(), key=lambda item: (-item[1], item[0]))
    outputs = [
        OutputFigures(
            name,
            "billing",
            "host:1",
            draw(counts()),
            oldest_ms=draw(st.none() | TIME),
            paused=draw(st.none() | st.sampled_from(["tls", "unauthorized"])),
            failures=draw(st.integers(0, 3)),
            wait_ms=draw(COUNT),
        )
        for name in ("billing", "shadow")
    ]
    return replace(
        WELL,
        now_ms=draw(TIME),
        store=replace(
            StoreFigures("usage.db", *draw(st.tuples(*[st.none() | COUNT] * 5))),
            pressure=draw(st.sampled_from(PRESSURES)),
        ),
        figures_ms=draw(st.none() | TIME),
        asides=draw(COUNT),
        remarks=tuple(sorted(draw(st.sets(NAMES)))),
        crash_lost=draw(counts()),
        nodes=tuple(
            NodeFigures(name, *(draw(COUNT) for _ in range(4))) for name in sorted(draw(st.sets(NAMES)))
        ),
        connections=draw(COUNT),
        rows={"counted": draw(counts()), "skipped": draw(counts())},
        windows=draw(COUNT),
        outputs=tuple(outputs),
        dead=tuple(DeadGroup("billing", reason, events, NOW, NOW) for reason, events in dead),
        held=tuple(HeldGroup(reason, rows, NOW, NOW) for reason, rows in held),
        held_top=tuple(HeldTop(reason, "a", 0, b"x", rows) for reason, rows in held),
        tenants=draw(
            st.none()
            | st.builds(
                lambda rest: TenantFigures(
                    NOW, (TopFigures("requests", "1", tuple(first), rest, len(first)),)
                ),
                COUNT,
            )
        ),
        audit=draw(
            st.none()
            | st.builds(
                lambda state, missing: (NodeAudit("a", state, NOW, 9, 0, 9, 1, missing, 0),),
                st.sampled_from(["complete", "missing", "unknown"]),
                st.none() | COUNT,
            )
        ),
        history=draw(histories()),
        week=draw(st.none() | weeks()),
        since=draw(counts()),
    )


@given(snapshots())
def test_one_alone_is_itself(one: Snapshot) -> None:
    assert merge([one]) == one


@given(st.lists(snapshots(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_in_what_order_they_come_does_not_matter(parts: list[Snapshot], dice: random.Random) -> None:
    mixed = [*parts]
    dice.shuffle(mixed)
    one, other = (document(merge([WELL, *found]), tenants=True) for found in (parts, mixed))
    assert one == other


def added(parts: Sequence[Snapshot], path: str) -> int:
    """Every number at a place of the documents, added up."""
    return sum(
        sum(_numbers(json.loads(json.dumps(document(one, tenants=True))), path.split("."))) for one in parts
    )


def _numbers(value: Any, path: list[str]) -> list[int]:
    if not path:
        found = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        return [one for one in found if isinstance(one, int)]
    step, *rest = path
    if value is None:
        return []
    if step == "*":
        inner = value.values() if isinstance(value, dict) else value
        return [number for one in inner for number in _numbers(one, rest)]
    return _numbers(value[step], rest)


@given(st.lists(snapshots(), min_size=1, max_size=4))
def test_sums_add_up_wherever_something_is_counted(parts: list[Snapshot]) -> None:
    merged = [merge(parts)]
    for path in (
        *("intake.read", "intake.minute", "intake.connections", "intake.nodes.*.read", "intake.nodes.*.lost"),
        *("rows.counted", "rows.skipped", "windows.open", "outputs.*.fates", "dead.groups.*.events"),
        *("unattributed.groups.*.rows", "store.used", "store.room", "tenants.meters.*.rest"),
    ):
        assert added(merged, path) == added(parts, path), path
    named = [sum(v for m in one.tenants.meters for _, v in m.first) for one in parts if one.tenants]
    shown = merged[0].tenants
    assert sum(v for m in shown.meters for _, v in m.first) == sum(named) if shown else named == []
    events = [sum(one.week.events) for one in parts if one.week]
    newest = max((one.week.end_ms for one in parts if one.week), default=0)
    gone = [one.week.events[0] for one in parts if one.week and one.week.end_ms < newest]
    assert sum(sum(one.week.events) for one in merged if one.week) == sum(events) - sum(gone)


def history(end: int, *points: int | None) -> History:
    return History(POINT + end * STEP_MS, dict.fromkeys(COLUMNS, points))


def test_points_are_added_by_their_time_and_ages_are_the_oldest() -> None:
    parts = [history(0, 1, 2, None, 4), history(-2, 10, 20), history(0, 100), History(None, {})]
    found = merge([replace(WELL, history=one) for one in parts]).history
    assert found.end_ms == POINT
    assert found.columns["entries"] == (11, 22, None, 104)
    assert found.columns["oldest_ms"] == (10, 20, None, 100)


def test_the_newest_point_waits_until_all_have_it() -> None:
    parts = [history(0, 1, 2, 3), history(-1, 10, 20)]
    found = merge([replace(WELL, history=one) for one in parts]).history
    assert (found.end_ms, found.columns["entries"]) == (POINT - STEP_MS, (11, 22))


def test_an_hour_of_a_worker_that_is_gone_for_long_stays_an_hour() -> None:
    parts = [history(0, *range(POINTS)), history(-3 * POINTS, *range(POINTS)), history(-700, *range(POINTS))]
    found = merge([replace(WELL, history=one) for one in parts]).history
    assert {len(column) for column in found.columns.values()} == {POINTS}
    assert found.columns["entries"][:21] == (*(2 * point + 700 for point in range(20)), 20)


def test_weeks_are_added_hour_by_hour() -> None:
    old = WeekFigures(HOUR - HOUR_MS, (9, 1, 2), {"requests": (9, 1, 2)}, {"requests": "1"})
    new = WeekFigures(HOUR, (10, 20, 30), {"seconds": (1, 1, 1)}, {"seconds": "s"})
    found = merge([replace(WELL, week=old), replace(WELL, week=new)]).week
    assert found is not None
    assert (found.end_ms, found.events) == (HOUR, (11, 22, 30))
    assert found.values == {"requests": (1, 2, 0), "seconds": (1, 1, 1)}


def test_what_is_named_is_bounded_and_the_first_of_all_is_found() -> None:
    tenants = [tuple((f"t{n}", 1_000 - n) for n in range(100)), (("t99", 5_000), ("u", 1))]
    meters = [(TopFigures("requests", "1", first, 7, len(first)),) for first in tenants]
    tops = [HeldTop("unmapped", "a", None, str(n).encode(), n) for n in range(2 * MOST_TOP)]
    parts = [
        replace(WELL, tenants=TenantFigures(NOW, one), held_top=tuple(tops[number::2]))
        for number, one in enumerate(meters)
    ]
    shown = document(merge(parts), tenants=True)
    (meter,) = shown["tenants"]["meters"]
    assert meter["first"][0] == ["t99", 5_901]
    everything = sum(value for first in tenants for _, value in first) + 14
    assert sum(value for _, value in meter["first"]) + meter["rest"] == everything
    assert meter["tenants"] == 101
    assert len(shown["unattributed"]["top"]) == MOST_TOP
    assert document(merge(parts), tenants=False)["tenants"] is None


def test_every_pressure_has_its_rank() -> None:
    assert list(PRESSURES) == [str(one) for one in Pressure]


# --- problems -----------------------------------------------------------------------------------------------


def of(*said: Snapshot | None, **changes: Any) -> Snapshot:
    """Workers that answer; None: one that has not yet."""
    return whole(
        replace(WELL, nodes=(), outputs=(), **changes),
        [
            WorkerFigures(number, one, since_ms=None if one is None else NOW)
            for number, one in enumerate(said)
        ],
    )


def titles(now: Snapshot) -> list[str]:
    return [one.title for one in found_problems(now)]


@pytest.mark.parametrize("case", CASES)
def test_what_all_have_is_said_once_and_what_one_has_with_its_number(case: str) -> None:
    now, _, text = CASES[case]
    alone = found_problems(now)
    if case.startswith(("crash", "remark")):  # each has a number of its own in it
        assert len(titles(of(now, now, now))) == 3
    elif case not in ("dead", "held"):
        assert titles(of(now, now, now)) == [one.title for one in alone]
    (one,) = found_problems(of(WELL, now, WELL))
    assert one.level == alone[0].level
    usage = case in ("audit", "dead", "held")
    assert one.title.startswith("Worker 1: ") is not usage
    two = found_problems(of(WELL, now, now))
    if usage:
        assert [problem.key for problem in two] == [alone[0].key]
    elif len(two) == 1:
        assert two[0].title.startswith("Workers 1, 2: ")
    else:
        assert case.startswith(("crash", "remark"))
    if case not in ("starting", "draining", "remark"):
        assert document(of(WELL, now, WELL), tenants=True)["state"]["word"] == str(alone[0].level)
        assert text[:12].lower() in one.title.lower()


def test_usage_is_added_up_over_workers() -> None:
    dead = CASES["dead"][0], replace(WELL, dead=(DeadGroup("billing", "too_large", 4, NOW - 9, NOW),))
    (one,) = found_problems(of(*dead, WELL))
    assert (one.title, one.since_ms) == ("5 dead letters of output billing", NOW - 9)
    assert one.detail == "4 too_large, 1 not_accepted"
    assert titles(of(CASES["held"][0], CASES["held"][0])) == [
        "10 entries have no tenant: nobody pays for them yet"
    ]


def test_outputs_that_fail_alike_are_one_problem_since_the_first_and_with_all_that_waits() -> None:
    paused = [
        replace(WELL, outputs=(replace(OUTPUT, paused="tls", paused_ms=NOW - n, fates={"pending": n}),))
        for n in (5, 7)
    ]
    failing = replace(
        WELL, outputs=(replace(OUTPUT, failures=1, outcome="connect"),), since={"output billing": NOW - 3}
    )
    first, second = found_problems(of(*paused, failing))
    assert (first.title, first.since_ms) == ("Workers 0, 1: output billing is paused: tls", NOW - 7)
    assert first.lost.startswith("Nothing: 12 events wait")
    assert (second.title[:10], second.since_ms) == ("Worker 2: ", NOW - 3)
    assert len({first.key, second.key}) == 2
    assert document(of(*paused, failing), tenants=True)["outputs"][0]["paused"] == "tls"


def test_a_worker_that_does_not_answer_is_a_problem_and_its_figures_stay() -> None:
    busy = replace(WELL, connections=4, minute_ms=60_000, store_error="disk")
    gone = WorkerFigures(1, busy, "it ended with signal 9", NOW - 4_000)
    now = whole(replace(WELL, nodes=(), outputs=()), [WorkerFigures(0, busy, since_ms=NOW), gone])
    said = document(now, tenants=True)
    assert said["state"] == {
        "word": "failing",
        "text": "Worker 1 does not answer (and 1 more)",
        "since_ms": NOW - 4_000,
    }
    assert said["problems"][0]["detail"] == "it ended with signal 9"
    assert [one["title"] for one in said["problems"][1:]] == ["Worker 0: the store cannot be looked into"]
    assert (said["intake"]["read"], said["intake"]["minute"], said["intake"]["connections"]) == (200, 60, 4)
    assert said["outputs"][0]["fates"] == {"pending": 6, "delivered": 18}


def test_a_worker_that_never_answered_is_starting() -> None:
    (one,) = found_problems(of(WELL, None))
    assert (one.title, one.level) == ("Worker 1 is starting", Level.NOTE)
    assert document(of(WELL, None), tenants=True)["state"]["word"] == "ok"
    every = of(None, None, reasons={"starting": "no worker has answered yet"})
    assert titles(every) == ["The sink is starting"]
    assert document(every, tenants=True)["state"]["word"] == "starting"


def test_when_all_is_stopped_those_that_are_gone_already_are_no_problem() -> None:
    stopping = {"draining": "the service is stopping"}
    gone = WorkerFigures(1, WELL, "it ended with exit code 0", NOW)
    here = WorkerFigures(0, replace(WELL, reasons=stopping), "", NOW)
    assert titles(whole(replace(WELL, reasons=stopping), [here, gone])) == ["The sink is stopping"]


def test_tenants_are_hidden_and_the_document_is_bounded_as_for_one() -> None:
    named, hidden = (json.dumps(document(of(NAMING, NAMING), tenants=tenants)) for tenants in (True, False))
    assert "acme-7" in named
    assert "acme-7" not in hidden
    assert len(json.dumps(document(of(*[monstrous()] * 3), tenants=True))) < 256_000


def test_settings_are_the_wholes_before_a_workers() -> None:
    frame = replace(WELL, settings=(("workers", "2"), ("store", "all")), version="2")
    parts = [
        replace(WELL, settings=(("listen.streams", text), ("store", "half"))) for text in ("s:1", "none")
    ]
    found = merge([frame, *parts])
    assert found.settings == (("workers", "2"), ("store", "all"), ("listen.streams", "s:1"))
    assert found.version == "2"
