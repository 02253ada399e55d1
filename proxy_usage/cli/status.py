"""``proxy-usage status``: the store, its outputs and meters, and the service if it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proxy_usage.cli.options import ConfigOption, JsonOption, load_config
from proxy_usage.cli.show import Cell, emit, facts, moment, plain, size, table

if TYPE_CHECKING:
    from proxy_usage.store.report import Report
    from proxy_usage.store.views import Conservation, MeterTerms, OutputStatus, Status


def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what the store holds and how deliveries fare.

    Works beside a running service, which is then asked as well, and without one. Amounts are base units.
    """
    from proxy_usage.control import NotRunning, call, socket_path
    from proxy_usage.store.reader import Reader

    loaded = load_config(config)
    with Reader(loaded.store.path) as reader:
        found, sums = reader.status(), reader.conservation()
    try:
        service = call(socket_path(loaded.store.path), "status")
    except NotRunning:
        service = None
    if as_json:
        meters = [{**plain(terms), "difference": terms.difference} for terms in found.meters]
        emit({**plain(found), "meters": meters, "balanced": sums.balanced, "service": service})
        return
    facts(
        [
            ("store", f"{found.path} ({size(found.sizes['database'])}, schema {found.schema_version})"),
            ("space", _space(found, loaded.store.max_bytes, service)),
            *_service(service),
            ("rows", _rows(found)),
            ("open windows", found.open_windows),
            ("unattributed", found.unattributed),
            ("audit", _audit(service)),
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


def _service(answer: Any) -> list[tuple[str, Cell]]:
    """What a running service says of itself."""
    if not isinstance(answer, dict):
        return [("service", "not running" if answer is None else str(answer))]
    reasons = answer.get("reasons") or {}
    state = "ready" if not reasons else "not ready"
    lines: list[tuple[str, Cell]] = [("service", f"running, {state}, version {answer.get('version', '?')}")]
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


def _space(found: Status, limit: int, service: Any) -> str:
    """What the store takes of what it may, and what is done about it."""
    parts = ("database", "log", "reserve")
    taken = ", ".join(f"{part} {size(found.sizes[part])}" for part in parts)
    text = f"{size(sum(found.sizes[part] for part in parts))} of {size(limit)} ({taken})"
    space = service.get("space") if isinstance(service, dict) else None
    pressure = space.get("pressure") if isinstance(space, dict) else None
    return text if pressure in (None, "none") else f"{text}; short of room: {pressure}"


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
    paused = (
        None if one.paused is None else f"paused since {moment(one.paused_ms)}: {one.paused} {one.detail}"
    )
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
        "state": paused or "ok",
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
