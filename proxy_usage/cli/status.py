"""``proxy-usage status``: the store, its outputs and meters, and the service if it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, reading_config
from proxy_usage.cli.show import Cell, emit, facts, moment, plain, size, table

if TYPE_CHECKING:
    from proxy_usage.store.report import Report
    from proxy_usage.store.views import Conservation, MeterTerms, OutputStatus, Status


def status(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show what the operator's page shows, until Ctrl-C.")
    ] = False,
    interval: Annotated[
        int, typer.Option("--interval", metavar="SECONDS", min=1, help="With --watch: how often.")
    ] = 2,
) -> None:
    """Show what the store holds and how deliveries fare.

    Works beside a running service, which is then asked as well, and without one. Amounts are base units.
    """
    from proxy_usage.cli.stores import opened
    from proxy_usage.store.total import total_conservation, total_status

    loaded = reading_config(config)
    if watch:
        from proxy_usage.cli.watch import watch as keep_watching
        from proxy_usage.control import socket_path, supervisor_socket

        # The supervisor first: the file may say one worker, and several run since before it did.
        sockets = [supervisor_socket(loaded.store.path)]
        if loaded.workers == 1:
            sockets.append(socket_path(loaded.store.path))
        keep_watching(sockets, interval_s=interval, as_json=as_json)
        return
    with opened(loaded) as stores:
        each = stores.each(lambda reader: (reader.status(), reader.conservation()))
    found = total_status([status for status, _ in each.values()])
    sums = total_conservation([conservation for _, conservation in each.values()])
    services = {worker: _asked(Path(status.path)) for worker, (status, _) in each.items()}
    if as_json:
        emit(_as_data(found, sums, services[0]) | _workers(each, services, several=stores.several))
        return
    facts(
        [
            ("store", f"{found.path} ({size(found.sizes['database'])}, schema {found.schema_version})"),
            ("stores", f"{len(each)}, of workers; all figures are of all of them" if len(each) > 1 else None),
            ("space", _space(found, loaded.store.max_bytes, services.values())),
            *(line for worker, one in services.items() for line in _service(one, worker, loaded.workers)),
            ("rows", _rows(found)),
            ("open windows", found.open_windows),
            ("unattributed", found.unattributed),
            ("audit", _audit(services[0])),
            ("balanced", _balance(sums)),
            *_past(found),
        ]
    )
    print()
    table([_output(one) for one in found.outputs], empty="no output yet")
    print()
    table([_meter(one) for one in found.meters], empty="no meter yet")
    print()
    table(
        (
            {"node": node, "rows read": found.intake.get(node, 0), "lost by crashes": _lost(found, node)}
            for node in sorted(found.intake.keys() | found.crash_unknown.keys())
        ),
        empty="no node has sent rows yet",
    )


def _asked(store: Path) -> object:
    """What the process that owns a store says of itself; None: there is none."""
    from proxy_usage.control import NotRunning, call, socket_path

    try:
        return call(socket_path(store), "status")
    except NotRunning:
        return None


def _as_data(found: Status, sums: Conservation, service: object) -> dict[str, Any]:
    meters = [{**plain(terms), "difference": terms.difference} for terms in found.meters]
    return {**plain(found), "meters": meters, "balanced": sums.balanced, "service": service}


def _workers(
    each: Mapping[int, tuple[Status, Conservation]], services: Mapping[int, object], *, several: bool
) -> dict[str, Any]:
    """Each worker by itself, where there are several."""
    if not several:
        return {}
    return {
        "workers": [
            {"worker": worker, **_as_data(status, sums, services[worker])}
            for worker, (status, sums) in each.items()
        ]
    }


def _service(answer: Any, worker: int, workers: int) -> list[tuple[str, Cell]]:
    """What a running service, or a worker of it, says of itself."""
    name = "service" if workers == 1 and worker == 0 else f"worker {worker}"
    if worker >= workers:
        return [(name, "is configured no more: worker 0 takes its store over at the next start")]
    if not isinstance(answer, dict):
        return [(name, "not running" if answer is None else str(answer))]
    reasons = answer.get("reasons") or {}
    state = "ready" if not reasons else "not ready"
    lines: list[tuple[str, Cell]] = [(name, f"running, {state}, version {answer.get('version', '?')}")]
    lines.extend(("", f"{name}: {reason}") for name, reason in reasons.items())
    lines.extend(("remark", remark) for remark in (answer.get("remarks") or {}).values())
    if answer.get("config_error"):
        lines.append(("", f"reload refused: {answer['config_error']}"))
    return lines


def _audit(service: Any) -> str | None:
    """How complete the rows are, by the audit of a running service; None where it has none."""
    told = service.get("audit") if isinstance(service, dict) else None
    if told is None:
        return None
    if not told:
        return "the first round is under way"
    states = ", ".join(f"{told[name]} {name}" for name in ("complete", "missing", "unknown") if told[name])
    return f"{states or 'no node'}; {told['missing_entries']} entries of the last day missing"


def _space(found: Status, limit: int, services: Iterable[Any]) -> str:
    """What the store takes of what it may, and what is done about it."""
    parts = ("database", "log", "reserve")
    taken = ", ".join(f"{part} {size(found.sizes[part])}" for part in parts)
    text = f"{size(sum(found.sizes[part] for part in parts))} of {size(limit)} ({taken})"
    spaces = [service.get("space") for service in services if isinstance(service, dict)]
    pressures = [space.get("pressure") for space in spaces if isinstance(space, dict)]
    short = [pressure for pressure in pressures if pressure not in (None, "none")]
    return f"{text}; short of room: {', '.join(short)}" if short else text


def _lost(found: Status, node: str) -> str:
    """Rows that crashes lost, as far as it is known."""
    lost = str(found.crash_lost.get(node, 0))
    return f"{lost}, and unknown" if node in found.crash_unknown else lost


def _past(found: Status) -> list[tuple[str, Cell]]:
    """Stores that were here before, and what came of them."""
    lines: list[tuple[str, Cell]] = []
    if (back := found.restored) is not None:
        lines.append(("restored", f"{moment(back.at_ms)} from a backup, {back.events} dead letters"))
    for aside in found.asides:
        lines.append(("set aside", f"{aside.file}: {aside.reason}"))
        lines.append(("", salvaged(aside.report)))
    return lines


def salvaged(report: Report) -> str:
    """What could be read of a store that was set aside, in words."""
    if report.state != "done":
        words = {"gone": "the file is gone", "unreadable": f"nothing of it can be read: {report.trouble}"}
        return words.get(report.state, f"salvage is under way, {report.events} events so far")
    missing = "unknown" if report.missing is None else sum(events for events, _ in report.missing.values())
    parts = [f"salvaged {report.events} events, {report.windows} open windows among them; missing: {missing}"]
    if report.uncertain or report.nameless:
        parts.append("windows that may have been billed were left out")
    return "; ".join(parts)


def _rows(found: Status) -> str:
    parts = [
        f"{fate}{' (' + reason + ')' if reason else ''} {count}"
        for fate, reasons in found.rows.items()
        for reason, count in reasons.items()
    ]
    return ", ".join(parts) or "none"


def _balance(sums: Conservation) -> str:
    """Whether everything adds up, in words."""
    wrong = [
        f"{terms.meter}: {abs(terms.difference)} {'nowhere' if terms.difference > 0 else 'not counted'}"
        for terms in sums.meters
        if terms.difference
    ]
    wrong.extend(
        f"{terms.output}, {terms.meter}: {terms.missing.events} events without a fate"
        for terms in sums.outputs
        if terms.balanced is False
    )
    return f"NO: {'; '.join(wrong)}" if wrong else "yes"


def _output(one: OutputStatus) -> dict[str, Cell]:
    state = "ok"
    if one.paused is not None:
        state = f"paused since {moment(one.paused_ms)}: {one.paused} {one.detail}"
    elif one.retrying_ms is not None:
        state = f"retrying since {moment(one.retrying_ms)}: {one.answer[:80]}"
    return {
        "output": one.name,
        "pending": one.pending,
        "attempted": one.attempted,
        "delivered": one.delivered,
        "ambiguous": one.ambiguous,
        "unanswered": one.unanswered,
        "unconfirmed": one.unconfirmed,
        "dead": one.dead,
        "recorded": one.recorded,
        "outside": one.outside,
        "given up": one.given_up,
        "merged": one.merged,
        "oldest": moment(one.oldest_ms),
        "state": state,
    }


def _meter(one: MeterTerms) -> dict[str, Cell]:
    return {
        "meter": one.meter,
        "base units in a value": one.divisor,
        "counted": one.counted,
        "open": one.open,
        "held": one.held,
        "remainders": one.remainders,
        "written off": one.written_off,
        "expired": one.expired,
        "events": one.minted.events,
        "billed value": one.minted.value,
    }
