"""``proxy-usage usage``: what a tenant is billed, line by line."""

from __future__ import annotations

import csv
import heapq
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, OutputOption, reading_config, window_start
from proxy_usage.cli.show import Cell, moment, plain, table
from proxy_usage.errors import UsageError

if TYPE_CHECKING:
    from proxy_usage.cli.stores import Readers
    from proxy_usage.config import Config
    from proxy_usage.store.usage import RowSource, UsageHour, UsageLine, UsageNotes
    from proxy_usage.store.usage_sums import UsageSum

SHOWN = 1_000
"""Lines that people are shown; --json and --csv have all."""
COLUMNS = (
    *("output", "tenant", "meter", "window", "fate", "value", "events", "id", "minted", "at", "status"),
    *("reason", "answer", "merged", "merged_from", "late", "nodes", "rules", "dimensions"),
)
GROUP_COLUMNS = ("output", "tenant", "meter", "group", "fate", "value", "events")


class By(StrEnum):
    """What usage is added up by."""

    ROUTE = "route"
    HOUR = "hour"
    METER = "meter"


def usage(
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose usage.")],
    from_: Annotated[str, typer.Option("--from", metavar="TIME", help="Windows that begin at or after it.")],
    to: Annotated[str, typer.Option("--to", metavar="TIME", help="Windows that begin before it.")],
    by: Annotated[By | None, typer.Option("--by", help="Add it up, in place of single events.")] = None,
    output: OutputOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Answer with CSV: the lines alone.")] = False,
) -> None:
    """Show what a tenant is billed, and why: per meter and window the events and what became of them.

    Times are dates or RFC 3339 in UTC, and begin windows. An event has a line per output. What is older than
    store.keep_delivered is known by the hour. Sums are of all lines.
    """
    from proxy_usage.cli.stores import opened
    from proxy_usage.store.total import total_notes
    from proxy_usage.store.usage_sums import UsageSums

    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other", hint="leave one out")
    loaded = reading_config(config)
    from_ms, to_ms = window_start("--from", from_, loaded), window_start("--to", to, loaded)
    if to_ms <= from_ms:
        raise UsageError("--to is not after --from", hint="the time is from --from up to, and without, --to")
    route = _route(loaded) if by is By.ROUTE else ()
    totals, groups = UsageSums(), UsageSums(by, route)
    with opened(loaded) as stores:
        notes = stores.each(lambda reader: reader.usage_notes(tenant, from_ms, to_ms))
        answer = _Answer(tenant, from_ms, to_ms, total_notes(list(notes.values())))
        chosen = _chosen(stores, tenant, from_ms, to_ms, output)
        first = tuple(itertools.islice(chosen, 1))  # whatever is wrong is wrong before anything is written
        hours = _counted(itertools.chain(first, chosen), (totals.add, groups.add))
        lines = (line for hour in hours for line in hour.lines)
        if as_json:
            answer.json(lines, totals.sums, totals.sources, groups.sums if by else None)
        elif as_csv:
            answer.csv(lines, groups.sums if by else None)
        else:
            answer.people(lines, totals.sums, totals.sources, groups.sums if by else None)


def _route(config: Config) -> tuple[str, ...]:
    """The dimensions that name a route."""
    from proxy_usage.model import FieldKind

    found = [name for name, one in config.dimensions.items() if one.field.kind is FieldKind.ROUTE_NAME]
    if not found:
        raise UsageError("no dimension reads a route's name", hint="--by hour and --by meter work without")
    return tuple(found)


def _chosen(
    stores: Readers, tenant: str, from_ms: int, to_ms: int, output: str | None
) -> Iterator[UsageHour]:
    """The hours of all stores, the earliest first."""
    outputs = stores.each(lambda reader: [one.name for one in reader.status().outputs])
    known = list(dict.fromkeys(itertools.chain.from_iterable(outputs.values())))
    if output is not None and output not in known:
        raise UsageError(f"there is no output {output!r}", hint=f"outputs are {', '.join(known) or 'none'}")
    # Merging begins with the first hour of each store: where one cannot answer, nothing is written.
    each = [reader.usage(tenant, from_ms, to_ms) for reader in stores.readers.values()]
    for hour in heapq.merge(*each, key=lambda hour: hour.hour_ms):
        wanted = tuple(line for line in hour.lines if output in (None, line.output))
        yield replace(hour, lines=wanted)


def _counted(
    hours: Iterable[UsageHour], adders: Iterable[Callable[[UsageHour], None]]
) -> Iterator[UsageHour]:
    for hour in hours:
        for add in adders:
            add(hour)
        yield hour


class _Answer:
    """One answer in one of three forms; lines are written as they are read, sums when all were."""

    def __init__(self, tenant: str, from_ms: int, to_ms: int, notes: UsageNotes) -> None:
        self._tenant, self._from_ms, self._to_ms, self._notes = tenant, from_ms, to_ms, notes

    def json(
        self,
        lines: Iterator[UsageLine],
        sums: Callable[[], tuple[UsageSum, ...]],
        sources: Callable[[], tuple[RowSource, ...]],
        groups: Callable[[], tuple[UsageSum, ...]] | None,
    ) -> None:
        head = {"tenant": self._tenant, "from_ms": self._from_ms, "to_ms": self._to_ms}
        print(json.dumps(head)[:-1] + ", " + ('"lines": [' if groups is None else '"groups": ['))
        shown: Iterator[Any] = iter(plain(line) for line in lines)
        if groups is not None:
            for _ in lines:
                pass
            shown = iter(_sum(one) for one in groups())
        for number, one in enumerate(shown):
            print(("," if number else "") + json.dumps(one))
        rest = {
            "sums": [_sum(one) for one in sums()],
            "sources": plain(sources()),
            "notes": plain(self._notes),
        }
        print("], " + json.dumps(rest)[1:])

    def csv(self, lines: Iterator[UsageLine], groups: Callable[[], tuple[UsageSum, ...]] | None) -> None:
        write = csv.writer(sys.stdout, lineterminator="\n").writerow
        write(COLUMNS if groups is None else GROUP_COLUMNS)
        for line in lines:
            if groups is None:
                write([_harmless(cell) for cell in _fields(line)])
        for one in groups() if groups is not None else ():
            group = "" if not one.group else json.dumps(_named(one), sort_keys=True)
            for fate, sum_ in sorted(one.fates.items()):
                row = (one.output, self._tenant, one.meter, group, fate, sum_.value, sum_.events)
                write([_harmless(cell) for cell in row])

    def people(
        self,
        lines: Iterator[UsageLine],
        sums: Callable[[], tuple[UsageSum, ...]],
        sources: Callable[[], tuple[RowSource, ...]],
        groups: Callable[[], tuple[UsageSum, ...]] | None,
    ) -> None:
        shown: list[dict[str, Cell]] = []
        count = 0
        for line in lines:
            count += 1
            if groups is None and count <= SHOWN:
                shown.append(_row(line))
        print(f"{self._tenant}, {moment(self._from_ms)} to {moment(self._to_ms)}")
        if groups is not None:
            shown = [_named(one) | _totals(one) for one in groups()]
        table(shown, empty="no usage of this tenant is known in that time")
        if groups is None and count > SHOWN:
            print(f"and {count - SHOWN} more lines: --json and --csv have all, --by adds them up")
        if groups is None or any(one.group for one in groups()):
            print("\nall together:")
            table([_totals(one) for one in sums()], empty="nothing")
        print("\ncame from (rows of the whole hours; at least, where a sink crashed):")
        table([plain(one) for one in sources()], empty="nothing is known of it")
        self._tell()

    def _tell(self) -> None:
        notes = self._notes
        print()
        if notes.open_windows:
            print(f"{notes.open_windows} windows are open: what is in them is no event yet")
        if notes.summed:
            since = "" if notes.single_since_ms is None else f" before {moment(notes.single_since_ms)}"
            print(f"of what was settled{since}, hours are known and no single events")
        if notes.known_since_ms is not None:
            print(f"the ledger is kept since {moment(notes.known_since_ms)}: of before, sums were removed")
        rows = sum(one.rows for one in notes.held)
        if rows:
            reasons = ", ".join(sorted({one.reason for one in notes.held}))
            print(
                f"{rows} rows of these hours are held for nobody ({reasons}); whose they are nobody can say:"
                " proxy-usage unattributed ls"
            )


def _sum(one: UsageSum) -> dict[str, Any]:
    fates = {fate: plain(sum_) for fate, sum_ in sorted(one.fates.items())}
    named = {"output": one.output, "meter": one.meter, "group": dict(one.group)}
    return named | {"used": one.used, "delivered": one.delivered, "fates": fates}


def _named(one: UsageSum) -> dict[str, Cell]:
    """A group's name, in columns."""
    return {
        "hour" if name == "hour_ms" else name: moment(value) if isinstance(value, int) else value
        for name, value in one.group.items()
    }


def _totals(one: UsageSum) -> dict[str, Cell]:
    from proxy_usage.store.usage_sums import DELIVERED, WAITING

    told = (*DELIVERED, *WAITING, "dead", "unconfirmed")
    return {
        "meter": one.meter,
        "output": one.output,
        "events": sum(sum_.events for sum_ in one.fates.values()),
        "used": one.used,
        "delivered": one.delivered,
        "waiting": one.of(*WAITING),
        "dead": one.of("dead"),
        "unconfirmed": one.of("unconfirmed"),
        "other": one.used - one.of(*told),
    }


def _row(line: UsageLine) -> dict[str, Cell]:
    notes = [f"{line.events} events of this hour"] if not line.id else []
    if line.merged:
        notes.append(f"stands for {line.merged} events since {moment(line.merged_from_ms)}")
    if line.late:
        notes.append("late part")
    notes += [text for text in (line.reason, line.answer) if text]
    nodes = sorted({one.node for one in line.sources})
    return {
        "window": moment(line.window_ms),
        "meter": line.meter,
        "value": line.value,
        "fate": line.fate,
        "output": line.output,
        "at": moment(line.at_ms),
        "status": line.status,
        "event": line.id or None,
        "nodes": ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""),
        "dimensions": " ".join(f"{name}={value}" for name, value in line.dimensions.items() if value),
        "notes": "; ".join(notes),
    }


def _fields(line: UsageLine) -> list[Cell]:
    """In the order of ``COLUMNS``."""
    return [
        line.output,
        line.tenant,
        line.meter,
        moment(line.window_ms),
        line.fate,
        line.value,
        line.events,
        line.id,
        None if line.minted_ms is None else moment(line.minted_ms),
        None if line.at_ms is None else moment(line.at_ms),
        line.status,
        line.reason,
        line.answer,
        line.merged or None,
        None if line.merged_from_ms is None else moment(line.merged_from_ms),
        int(line.late),
        json.dumps(sorted({one.node for one in line.sources})),
        json.dumps(sorted({one.rule for one in line.sources})),
        json.dumps(dict(line.dimensions), sort_keys=True),
    ]


def _harmless(cell: Cell) -> Cell:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
