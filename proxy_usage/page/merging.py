"""Several workers' snapshots as one: what can be counted is added, of ages and failures the worst is shown.

Names, versions and settings are the first's that has them. In what order the others come does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import TypeVar

from proxy_usage.page.ring import POINTS, STEP_MS, History
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
from proxy_usage.store.glance import MOST_TOP, DeadGroup, HeldGroup, HeldTop
from proxy_usage.store.week import HOUR_MS

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V", int, str)

PRESSURES = ("none", "ledger", "merge", "exhausted")
"""The better before the worse; what is not here is worst."""


def whole(frame: Snapshot, workers: Sequence[WorkerFigures]) -> Snapshot:
    """All workers under one frame: what their supervisor says of itself and of the configuration.

    A worker that does not answer counts with what it said last, but for what it can only say of now.
    """
    parts = [_faded(one.said) if one.silent else one.said for one in workers if one.said is not None]
    return replace(merge([frame, *parts]), reasons=frame.reasons, workers=tuple(workers))


def _faded(said: Snapshot) -> Snapshot:
    nodes = tuple(replace(node, minute=0) for node in said.nodes)
    return replace(said, nodes=nodes, connections=0, checkpoint_age_ms=0, figures_ms=None, reasons={})


def merge(parts: Sequence[Snapshot]) -> Snapshot:
    """All as one. Of one alone it is that one. There must be at least one."""
    first = parts[0]
    figures = [one.figures_ms for one in parts if one.figures_ms is not None]
    settings: dict[str, str] = {}
    for one in parts:
        settings.update({key: value for key, value in one.settings if key not in settings})
    return replace(
        first,
        now_ms=max(one.now_ms for one in parts),
        settings=tuple(settings.items()),
        reasons=_joined((one.reasons for one in parts), max),
        store=_store([one.store for one in parts]),
        figures_ms=min(figures, default=None),
        store_error=max(one.store_error for one in parts),
        config_error=max(one.config_error for one in parts),
        asides=sum(one.asides for one in parts),
        remarks=tuple(sorted(remark for one in parts for remark in one.remarks)),
        crash_lost=_joined((one.crash_lost for one in parts), sum),
        crash_unknown=max(one.crash_unknown for one in parts),  # a node sends to several: at least so many
        nodes=_nodes(parts),
        minute_ms=max(one.minute_ms for one in parts),
        connections=sum(one.connections for one in parts),
        rows={
            fate: _joined((one.rows.get(fate, {}) for one in parts), sum)
            for fate in dict.fromkeys(fate for one in parts for fate in one.rows)
        },
        windows=sum(one.windows for one in parts),
        tenants_seen=max(one.tenants_seen for one in parts),  # likewise
        checkpoint_age_ms=max(one.checkpoint_age_ms for one in parts),
        outputs=tuple(map(_output, _grouped(parts, "outputs", attrgetter("name")))),
        dead=_dead(parts),
        dead_partial=any(one.dead_partial for one in parts),
        held=_held(parts),
        held_partial=any(one.held_partial for one in parts),
        held_top=_held_top(parts),
        tenants=_tenants([one.tenants for one in parts if one.tenants is not None]),
        audit=_audit(parts),
        history=_history([one.history for one in parts]),
        week=_week([one.week for one in parts if one.week is not None]),
        since=_joined((one.since for one in parts), min),
    )


def _joined(maps: Iterable[Mapping[str, V]], rule: Callable[[list[V]], V]) -> dict[str, V]:
    found: dict[str, list[V]] = {}
    for one in maps:
        for key, value in one.items():
            found.setdefault(key, []).append(value)
    return {key: rule(values) for key, values in found.items()}


def _grouped(parts: Sequence[Snapshot], field: str, key: Callable[[T], Hashable]) -> list[list[T]]:
    """What is about the same thing, of all parts."""
    groups: dict[Hashable, list[T]] = {}
    for part in parts:
        for one in getattr(part, field):
            groups.setdefault(key(one), []).append(one)
    return list(groups.values())


def _store(stores: Sequence[StoreFigures]) -> StoreFigures:
    def added(field: str) -> int | None:
        sizes = [size for one in stores if (size := getattr(one, field)) is not None]
        return sum(sizes) if sizes else None

    sizes = {field: added(field) for field in ("occupied", "used", "room", "limit", "reserve")}
    worst = max((one.pressure for one in stores), key=_pressed)
    return StoreFigures(stores[0].path, **sizes, pressure=worst)


def _pressed(pressure: str) -> tuple[int, str]:
    known = pressure in PRESSURES
    return PRESSURES.index(pressure) if known else len(PRESSURES), pressure


def _nodes(parts: Sequence[Snapshot]) -> tuple[NodeFigures, ...]:
    fields = ("read", "minute", "lost", "unknown")
    groups: list[list[NodeFigures]] = _grouped(parts, "nodes", attrgetter("node"))
    return tuple(
        NodeFigures(group[0].node, *(sum(getattr(one, field) for one in group) for field in fields))
        for group in groups
    )


def _output(group: Sequence[OutputFigures]) -> OutputFigures:
    """As the worst of them fares."""
    worst = max(
        group,
        key=lambda one: (one.paused is not None, one.failures, one.paused or "", one.outcome, one.detail),
    )
    return replace(
        worst,
        fates=_joined((one.fates for one in group), sum),
        oldest_ms=_earliest(one.oldest_ms for one in group),
        paused_ms=_earliest(one.paused_ms for one in group),
        wait_ms=max(one.wait_ms for one in group),
    )


def _earliest(times: Iterable[int | None]) -> int | None:
    return min((time for time in times if time is not None), default=None)


def _dead(parts: Sequence[Snapshot]) -> tuple[DeadGroup, ...]:
    groups: list[list[DeadGroup]] = _grouped(parts, "dead", attrgetter("output", "reason"))
    found = [
        DeadGroup(
            group[0].output,
            group[0].reason,
            sum(one.events for one in group),
            min(one.first_ms for one in group),
            max(one.last_ms for one in group),
        )
        for group in groups
    ]
    return tuple(sorted(found, key=lambda one: (one.output, -one.events, one.reason)))


def _held(parts: Sequence[Snapshot]) -> tuple[HeldGroup, ...]:
    groups: list[list[HeldGroup]] = _grouped(parts, "held", attrgetter("reason"))
    found = [
        HeldGroup(
            group[0].reason,
            sum(one.rows for one in group),
            min(one.first_ms for one in group),
            max(one.last_ms for one in group),
        )
        for group in groups
    ]
    return tuple(sorted(found, key=lambda one: (-one.rows, one.reason)))


def _held_top(parts: Sequence[Snapshot]) -> tuple[HeldTop, ...]:
    groups: list[list[HeldTop]] = _grouped(parts, "held_top", attrgetter("reason", "node", "rule", "value"))
    found = [replace(group[0], rows=sum(one.rows for one in group)) for group in groups]
    found.sort(key=lambda one: (-one.rows, one.reason, one.node, one.value, repr(one.rule)))
    return tuple(found[:MOST_TOP])


def _tenants(figures: Sequence[TenantFigures]) -> TenantFigures | None:
    if not figures:
        return None
    meters: dict[str, list[TopFigures]] = {}
    for one in figures:
        for meter in one.meters:
            meters.setdefault(meter.meter, []).append(meter)
    return TenantFigures(min(one.since_ms for one in figures), tuple(map(_top, meters.values())))


def _top(group: Sequence[TopFigures]) -> TopFigures:
    """Amounts are whole; a tenant is missing what it has where it is not among those that are named."""
    first = _joined((dict(one.first) for one in group), sum)
    ordered = sorted(first.items(), key=lambda item: (-item[1], item[0]))
    tenants = max(len(first), *(one.tenants for one in group))  # at least
    return TopFigures(group[0].meter, group[0].unit, tuple(ordered), sum(one.rest for one in group), tenants)


def _audit(parts: Sequence[Snapshot]) -> tuple[NodeAudit, ...] | None:
    """Of each node the worst that is said: an audit's figures are of all workers already."""
    audits = [part for part in parts if part.audit is not None]
    if not audits:
        return None
    order = {"missing": 0, "unknown": 1}
    groups: list[list[NodeAudit]] = _grouped(audits, "audit", attrgetter("node"))
    return tuple(
        min(group, key=lambda one: (order.get(one.state, 2), -(one.missing or 0), repr(one)))
        for group in groups
    )


def _history(histories: Sequence[History]) -> History:
    """Point by point, by their time. The newest waits until all have it."""
    filled = [one for one in histories if one.end_ms is not None]
    ends = {one.end_ms for one in filled if one.end_ms is not None}
    if not ends:
        return histories[0]
    end_ms = max(ends)
    if end_ms - STEP_MS in ends:
        end_ms -= STEP_MS
    columns: dict[str, list[tuple[int | None, ...]]] = {}
    for one in filled:
        ahead = ((one.end_ms or 0) - end_ms) // STEP_MS
        for name, points in one.columns.items():
            columns.setdefault(name, []).append(_shifted(points, ahead))
    length = min(POINTS, max(len(points) for found in columns.values() for points in found))
    return History(end_ms, {name: _points(name, found, length) for name, found in columns.items()})


def _shifted(points: tuple[int | None, ...], ahead: int) -> tuple[int | None, ...]:
    """Without the points past the end, or with gaps up to it."""
    return points[: len(points) - ahead] if ahead > 0 else points + (None,) * min(-ahead, POINTS)


def _points(name: str, found: Sequence[tuple[int | None, ...]], length: int) -> tuple[int | None, ...]:
    aligned = [((None,) * (length - len(points)) + points)[-length:] if length else () for points in found]
    rule = max if name == "oldest_ms" else sum
    made: list[int | None] = []
    for moment in zip(*aligned, strict=True):
        there = [point for point in moment if point is not None]
        made.append(rule(there) if there else None)
    return tuple(made)


def _week(weeks: Sequence[WeekFigures]) -> WeekFigures | None:
    if not weeks:
        return None
    end_ms = max(one.end_ms for one in weeks)
    hours = max(len(one.events) for one in weeks)

    def added(found: Iterable[tuple[WeekFigures, tuple[int, ...]]]) -> tuple[int, ...]:
        sums = [0] * hours
        for one, values in found:
            first = hours - len(values) - (end_ms - one.end_ms) // HOUR_MS
            for hour, value in enumerate(values, first):
                if hour >= 0:
                    sums[hour] += value
        return tuple(sums)

    meters = dict.fromkeys(meter for one in weeks for meter in one.values)
    return WeekFigures(
        end_ms,
        added((one, one.events) for one in weeks),
        {meter: added((one, one.values[meter]) for one in weeks if meter in one.values) for meter in meters},
        {meter: unit for one in weeks for meter, unit in one.units.items()},
    )
