"""The one document of the operator's page: bounded, all of it fit to be shown, made of a snapshot alone."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from proxy_usage.page.names import name, octets
from proxy_usage.page.problems import DEAD, FAILING, LIFE, Level, Problem, command, held_advice
from proxy_usage.page.ring import STEP_MS, History
from proxy_usage.page.snapshot import NodeFigures, OutputFigures, Snapshot
from proxy_usage.page.workers import found_problems
from proxy_usage.store.week import HOUR_MS

FORMAT = 1
"""Of the document. It changes when what is there means something else."""
NODES = 20
PROBLEMS = 20
GROUPS = 20
TENANTS = 20
ROWS = ("counted", "skipped", "invalid", "held")
LONG = 500
"""Characters of a sentence that somebody else wrote."""

Json = dict[str, Any]


def document(now: Snapshot, *, tenants: bool) -> Json:
    """What ``/api/state`` says: some 30 KB, and never 256 KB, whatever was counted.

    Args:
        tenants: whether tenants, and values that may name one, may be shown to who asks.
    """
    found = found_problems(now)
    shown = found[:PROBLEMS]
    return {
        "format": FORMAT,
        "now_ms": now.now_ms,
        "started_ms": now.started_ms,
        "figures_ms": now.figures_ms,
        "version": now.version,
        "host": name(now.host),
        "state": state(now, found),
        "problems": [_problem(one, now, tenants=tenants) for one in shown],
        "more_problems": len(found) - len(shown),
        "intake": _intake(now),
        "rows": {fate: _first(now.rows.get(fate, {})) for fate in ROWS},
        "windows": {
            "open": now.windows,
            "length_ms": now.window_ms,
            "tenants": now.tenants_seen,
            "checkpoint_age_ms": now.checkpoint_age_ms,
        },
        "outputs": [_output(one, tenants=tenants) for one in now.outputs[:GROUPS]],
        "dead": _dead(now),
        "unattributed": _unattributed(now, tenants=tenants),
        "tenants": _tenants(now) if tenants else None,
        "audit": None if now.audit is None else _audit(now),
        "store": _store(now),
        "settings": [[key, name(value, LONG)] for key, value in now.settings],
        "history": _history(now.history),
        "week": _week(now),
    }


def state(now: Snapshot, found: Sequence[Problem]) -> Json:
    """The whole in one word and one sentence: the page's headline."""
    worst = found[0] if found else None
    if worst is not None and worst.key in LIFE:
        word, text = worst.key, worst.title
    elif worst is not None and worst.level is not Level.NOTE:
        others = sum(one.level is not Level.NOTE for one in found) - 1
        more = f" (and {others} more)" if others else ""
        word, text = str(worst.level), worst.title + more
    elif not any(node.read for node in now.nodes):
        word, text = "waiting", "Nothing has arrived yet"
    else:
        word, text = "ok", "All is well"
    since_ms = now.started_ms if worst is None else _since(worst, now)
    return {"word": word, "text": text, "since_ms": since_ms}


def _since(problem: Problem, now: Snapshot) -> int | None:
    return problem.since_ms if problem.since_ms is not None else now.since.get(problem.key)


def _problem(problem: Problem, now: Snapshot, *, tenants: bool) -> Json:
    hidden = problem.private and not tenants
    return {
        "key": name(problem.key),
        "level": str(problem.level),
        "title": problem.title,
        "since_ms": _since(problem, now),
        "lost": problem.lost,
        "do": problem.do,
        "detail": "" if hidden else name(problem.detail, LONG),
        "command": problem.command,
        "runbook": problem.runbook,
    }


def _intake(now: Snapshot) -> Json:
    ordered = sorted(now.nodes, key=_busiest)
    rest = ordered[NODES:]
    return {
        "read": sum(node.read for node in ordered),
        "minute": sum(node.minute for node in ordered),
        "minute_ms": now.minute_ms,
        "connections": now.connections,
        "nodes": [_node(node) for node in sorted(ordered[:NODES], key=attrgetter("node"))],
        "others": {
            "nodes": len(rest),
            **{
                field: sum(getattr(node, field) for node in rest)
                for field in ("read", "minute", "lost", "unknown")
            },
        },
    }


def _busiest(node: NodeFigures) -> tuple[int, int, str]:
    return -node.minute, -node.read, node.node


def _node(node: NodeFigures) -> Json:
    return {
        "node": name(node.node),
        "read": node.read,
        "minute": node.minute,
        "lost": node.lost,
        "unknown": node.unknown,
    }


def _first(reasons: Any) -> Json:
    """The most frequent reasons; the rest as one."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    first = {name(reason): count for reason, count in ordered[:GROUPS]}
    beyond = sum(count for _, count in ordered[GROUPS:])
    return first | ({"others": beyond} if beyond else {})


def _output(one: OutputFigures, *, tenants: bool) -> Json:
    return {
        "name": name(one.name),
        "format": one.format,
        "target": name(one.target),
        "fates": dict(sorted(one.fates.items())),
        "oldest_ms": one.oldest_ms,
        "paused": one.paused,
        "paused_ms": one.paused_ms,
        "failures": one.failures,
        "why": FAILING.get(one.outcome, name(one.outcome)),
        "detail": name(one.detail, LONG) if tenants else "",
        "wait_ms": one.wait_ms,
    }


def _dead(now: Snapshot) -> Json:
    return {
        "partial": now.dead_partial,
        "groups": [
            {
                "output": name(group.output),
                "reason": name(group.reason),
                "meaning": DEAD.get(group.reason, "the endpoint's own code"),
                "events": group.events,
                "first_ms": group.first_ms,
                "last_ms": group.last_ms,
                "command": command(
                    now, "deadletters", "replay", "--output", group.output, "--reason", group.reason
                ),
            }
            for group in now.dead[:GROUPS]
        ],
    }


def _unattributed(now: Snapshot, *, tenants: bool) -> Json:
    groups = []
    for group in now.held[:GROUPS]:
        meaning, do = held_advice(group.reason)
        groups.append(
            {
                "reason": name(group.reason),
                "meaning": meaning,
                "do": do,
                "rows": group.rows,
                "first_ms": group.first_ms,
                "last_ms": group.last_ms,
                "command": command(now, "unattributed", "replay", "--reason", group.reason),
            }
        )
    top = [
        {
            "reason": name(one.reason),
            "node": name(one.node),
            "rule": one.rule,
            "value": octets(one.value),
            "rows": one.rows,
        }
        for one in now.held_top
    ]
    return {"partial": now.held_partial, "groups": groups, "top": top if tenants else None}


def _tenants(now: Snapshot) -> Json | None:
    if now.tenants is None:
        return None
    return {
        "since_ms": now.tenants.since_ms,
        "meters": [
            {
                "meter": one.meter,
                "unit": one.unit,
                "first": [[name(tenant), value] for tenant, value in one.first[:TENANTS]],
                "rest": one.rest + sum(value for _, value in one.first[TENANTS:]),
                "tenants": one.tenants,
            }
            for one in now.tenants.meters
        ],
    }


def _audit(now: Snapshot) -> Json:
    order = {"missing": 0, "unknown": 1}
    nodes = sorted(now.audit or (), key=lambda one: (order.get(one.state, 2), -(one.missing or 0), one.node))
    fields = ("state", "since_ms", "written", "dropped", "flushed", "received", "missing", "lost")
    return {
        "nodes": [
            {"node": name(one.node), **{field: getattr(one, field) for field in fields}}
            for one in nodes[:NODES]
        ],
        "others": len(nodes[NODES:]),
    }


def _store(now: Snapshot) -> Json:
    store = now.store
    return {
        "path": name(store.path, LONG),
        "occupied": store.occupied,
        "used": store.used,
        "room": store.room,
        "limit": store.limit,
        "reserve": store.reserve,
        "pressure": store.pressure,
    }


def _history(history: History) -> Json:
    return {"step_ms": STEP_MS, "end_ms": history.end_ms, "columns": dict(history.columns)}


def _week(now: Snapshot) -> Json | None:
    week = now.week
    if week is None:
        return None
    return {
        "step_ms": HOUR_MS,
        "end_ms": week.end_ms,
        "events": week.events,
        "totals": [
            {"meter": meter, "unit": week.units.get(meter, ""), "value": sum(values)}
            for meter, values in week.values.items()
        ],
    }
