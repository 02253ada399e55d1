"""``proxy-usage compare``: another system's usage beside the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, OutputOption, reading_config, window_start
from proxy_usage.cli.show import Cell, emit, moment, plain, table
from proxy_usage.errors import UsageError

if TYPE_CHECKING:
    from proxy_usage.comparison import Comparison, Line, Theirs
    from proxy_usage.config import Config
    from proxy_usage.model import Meter

UNATTRIBUTED = "(unattributed)"


def compare(
    from_: Annotated[
        str,
        typer.Option("--from", metavar="TIME", help="Windows that begin at or after it."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="TIME", help="Windows that begin before it.")],
    events: Annotated[
        Path | None,
        typer.Option(
            "--events", metavar="FILE", help="Their CloudEvents: a JSON array, or one a line; - reads."
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Their sums of that time: tenant,meter,value; - reads."),
    ] = None,
    meter: Annotated[
        list[str] | None, typer.Option("--meter", metavar="NAME", help="This meter only; repeatable.")
    ] = None,
    output: OutputOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set another system's usage beside the ledger, per tenant and meter.

    Differences are ours less theirs; known ones are named. Times are dates or RFC 3339 in UTC, and begin
    windows. Exit code 0 if all is equal, 1 if not. Without --output the ledger is that of the output that was
    added first.
    """
    from proxy_usage.cli.stores import Readers, opened
    from proxy_usage.comparison import Theirs, combined
    from proxy_usage.comparison import compare as compared

    loaded = reading_config(config)
    from_ms, to_ms = window_start("--from", from_, loaded), window_start("--to", to, loaded)
    if to_ms <= from_ms:
        raise UsageError("--to is not after --from", hint="the time is from --from up to, and without, --to")
    meters = _meters(loaded, meter or [])
    outputs = [one.name for one in loaded.outputs] if output is None else [output]
    if not outputs:
        raise UsageError("no output is configured", hint="name one of the store's by --output")
    theirs = Theirs(meters, from_ms, to_ms)
    with opened(loaded) as stores:
        first = stores.readers[0].period(outputs, from_ms, to_ms, _route(loaded))
        others = Readers({worker: reader for worker, reader in stores.readers.items() if worker})
        rest = others.each(lambda reader: reader.period([first.output], from_ms, to_ms, _route(loaded)))
        ours = combined([first, *rest.values()])
    _read(theirs, events, csv, loaded)
    found = compared(meters, theirs, ours)
    if as_json:
        emit(_as_data(found, ours.output, from_ms, to_ms))
    else:
        _show(found, f"{moment(from_ms)} to {moment(to_ms)}, ledger of {ours.output}")
    if not found.equal:
        raise typer.Exit(1)


def _meters(config: Config, names: list[str]) -> list[Meter]:
    known = {meter.name: meter for meter in config.meter_list()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"there is no meter {unknown[0]!r}", hint=f"meters are {', '.join(known)}")
    return [meter for name, meter in known.items() if not names or name in names]


def _route(config: Config) -> tuple[str, str] | None:
    """The dimension that says which HTTPRoute a row named, and what it says when there was none."""
    from proxy_usage.model import FieldKind

    for name, dimension in config.dimensions.items():
        if dimension.field.kind is FieldKind.ROUTE_NAME:
            return name, dimension.default
    return None


def _read(theirs: Theirs, events: Path | None, csv: Path | None, config: Config) -> None:
    from proxy_usage.cli import foreign

    if events is not None and csv is None:
        for event in foreign.events(events):
            theirs.add_event(event)
    elif csv is not None and events is None:
        known = {name for one in config.meter_list() for name in (one.name, one.type)}
        for line in foreign.sums(csv):
            if line.meter not in known:
                raise UsageError(
                    f"{line.place}: there is no meter {line.meter!r}", hint="name it, or give its event type"
                )
            if name := theirs.name(line.meter):
                theirs.add_sum(line.tenant, name, line.value)
    else:
        raise UsageError(
            "their usage is not given" if events is None else "their usage is given twice",
            hint="name one file: --events for CloudEvents, --csv for sums",
        )


def _as_data(found: Comparison, output: str, from_ms: int, to_ms: int) -> dict[str, Any]:
    return {
        "from_ms": from_ms,
        "to_ms": to_ms,
        "output": output,
        "equal": found.equal,
        "lines": [{**plain(line), "difference": line.difference} for line in found.lines],
        "hints": plain(found.hints),
    }


def _show(found: Comparison, title: str) -> None:
    print(title)
    table([_row(line) for line in found.lines], empty="nothing on either side")
    if found.hints:
        print("known differences:")
    for hint in found.hints:
        print(f"- {hint.text}")
    print("equal" if found.equal else "not equal")


def _row(line: Line) -> dict[str, Cell]:
    return {
        "tenant": UNATTRIBUTED if line.tenant is None else line.tenant,
        "meter": line.meter,
        "theirs": line.theirs,
        "ours": line.ours,
        "difference": line.difference,
    }
