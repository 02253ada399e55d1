"""``proxy-usage explain``: what becomes of each recorded row, and why."""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy_usage.cli.explain_event import EVENT_ID, explain_event
from proxy_usage.cli.options import ConfigOption, JsonOption, load_config
from proxy_usage.cli.show import Cell, emit, facts, moment, safe, table
from proxy_usage.errors import UsageError

if TYPE_CHECKING:
    from proxy_usage.cli.capture import Message
    from proxy_usage.cli.rows import Row
    from proxy_usage.config import Config
    from proxy_usage.model import Meter

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE|ID", help="Recorded messages, or the id of an event.")
]
RawOption = Annotated[bool, typer.Option("--raw", help="FILE is one message, without a length before it.")]
EntryOption = Annotated[
    int | None, typer.Option("--entry", min=1, metavar="N", help="Show row N alone, with all its fields.")
]
AtOption = Annotated[
    str | None,
    typer.Option("--at", metavar="TIME", help="As if read then, e.g. 2026-09-01T00:00:00Z; default: now."),
]


ReplayOption = Annotated[
    bool, typer.Option("--replay", help="Show what the whole file adds up to, long streams and all.")
]


def explain(
    file: FileArgument,
    config: ConfigOption = None,
    raw: RawOption = False,
    entry: EntryOption = None,
    at: AtOption = None,
    replay: ReplayOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what becomes of each recorded row, and why; or of an event: what became of it, and whence it came.

    FILE holds StreamAccessLogsMessage messages, each behind its length; FILE's name with .streams.json in
    place of its ending may give the number of each message's stream.
    """
    if EVENT_ID.fullmatch(str(file)) and not file.exists():
        if raw or replay or at is not None or entry is not None:
            raise UsageError(
                "an event is explained without options",
                hint="--raw, --entry, --at and --replay are for files",
            )
        explain_event(str(file), config, as_json)
        return
    # Imported here: these load the whole service.
    from proxy_usage.cli.capture import read_capture
    from proxy_usage.cli.rows import Explainer

    loaded = load_config(config)
    meters = loaded.meter_list()
    if replay:
        _show_totals(loaded, read_capture(file, raw=raw), _moment(at), as_json)
        return
    explainer = Explainer(loaded, _moment(at))
    rows = list(explainer.rows(read_capture(file, raw=raw)))
    if entry is not None:
        if entry > len(rows):
            raise UsageError(f"{file} has {len(rows)} rows, there is no row {entry}")
        _show_one(rows[entry - 1], meters, as_json)
    elif as_json:
        emit(
            {
                "meters": [{"name": meter.name, "divisor": meter.divisor} for meter in meters],
                "entries": [row.plain(meters) for row in rows],
                "damage": explainer.damage,
            }
        )
    else:
        table([_line(row, meters) for row in rows], empty="there are no rows in it")
        for damage in explainer.damage:
            print(f"damage: {safe(damage)}")
        fates = Counter(" ".join(filter(None, (row.booked.fate, row.booked.reason))) for row in rows)
        print(f"\n{len(rows)} rows: " + ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items())))


def _show_totals(config: Config, messages: list[Message], now_ms: int, as_json: bool) -> None:
    from proxy_usage.cli.replay import replay

    totals = replay(config, messages, now_ms)
    meters = config.meter_list()
    rows = {" ".join(filter(None, fate)): count for fate, count in sorted(totals.rows.items()) if count}
    if as_json:
        named = [
            {name: dict(zip(config.meters, sums, strict=True)) for name, sums in sorted(part.items())}
            for part in (totals.tenants, totals.held)
        ]
        emit({"tenants": named[0], "held": named[1], "rows": rows})
        return
    for title, part in (("tenant", totals.tenants), ("held", totals.held)):
        table(
            [
                {
                    title: name,
                    **{_in_base_units(meter): value for meter, value in zip(meters, sums, strict=True)},
                }
                for name, sums in sorted(part.items())
            ],
            empty="nothing is counted" if title == "tenant" else "nothing is held",
        )
    print(f"\n{sum(rows.values())} rows: " + ", ".join(f"{count} {fate}" for fate, count in rows.items()))


def _moment(text: str | None) -> int:
    """Milliseconds since the epoch of a time, by default of now."""
    if text is None:
        return time.time_ns() // 1_000_000
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UsageError(
            f"--at: {text!r} is not a time with its zone", hint="write it like 2026-09-01T00:00:00Z"
        )
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def _line(row: Row, meters: tuple[Meter, ...]) -> dict[str, Cell]:
    shown = row.plain(meters)
    rule = shown["rule"]
    return {
        "entry": row.entry,
        "log": row.origin.log_name,
        "type": row.type,
        "fate": row.booked.fate,
        "reason": row.booked.reason,
        "tenant": shown["tenant"],
        "rule": None if rule is None else f"{rule['index']} {rule['field']}",
        "window": moment(row.booked.window_ms),
        **{_in_base_units(meter): shown["amounts"].get(meter.name) for meter in meters},
        "notes": " ".join(row.notes),
    }


def _in_base_units(meter: Meter) -> str:
    """A meter's name, with the unit of its amounts where that is not the billed one."""
    return meter.name if meter.divisor == 1 else f"{meter.name} (ns)"


def _show_one(row: Row, meters: tuple[Meter, ...], as_json: bool) -> None:
    shown = row.plain(meters)
    whole, error = typed(row)
    if as_json:
        emit({**shown, "typed": whole, "typed_error": error})
        return
    rule = shown["rule"]
    facts(
        [
            ("entry", row.entry),
            ("node", row.origin.node_id),
            ("log", row.origin.log_name),
            ("type", f"{row.type} ({shown['kind']})"),
            ("fate", " ".join(filter(None, (row.booked.fate, row.booked.reason)))),
            ("complaint", row.complaint),
            ("notes", " ".join(row.notes) or None),
            ("tenant", shown["tenant"]),
            ("rule", None if rule is None else f"{rule['index']} {rule['field']}"),
            ("window", None if row.booked.window_ms is None else moment(row.booked.window_ms)),
            *((_in_base_units(meter), shown["amounts"].get(meter.name)) for meter in meters),
        ]
    )
    for part in shown["steps"]:
        print(f"\n{part['name']}: {safe(part['raw'])!r} in {part['field'] or 'no field of a rule'}")
        for step in part["steps"]:
            print(f"  {safe(step)}")
    print()
    print(json.dumps(whole, indent=2) if error is None else f"not shown as Envoy's types: {safe(error)}")


def typed(row: Row) -> tuple[Any, str | None]:
    """The whole row as Envoy's schema types it, or why it cannot be shown so: that decoder is strict."""
    from envoy_data_plane.envoy.data.accesslog.v3 import HttpAccessLogEntry, TcpAccessLogEntry

    kind = HttpAccessLogEntry if row.http else TcpAccessLogEntry
    try:
        return kind.parse(row.raw).to_dict(), None
    except (ValueError, EOFError, LookupError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"
