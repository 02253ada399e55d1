"""``proxy-usage audit``: what Envoys sent and nobody received, per node, now and over any time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, instant, reading_config
from proxy_usage.cli.show import Cell, emit, moment, safe, table
from proxy_usage.errors import UsageError

if TYPE_CHECKING:
    from proxy_usage.config import Config

WATCH_S = 2.0
_SHOWN = (
    *("written", "dropped", "flushed", "received", "missing", "missing_http", "missing_tcp"),
    *("crash_lost", "at_least", "at_most"),
)
_ESTIMATE = ("requests", "bytes_in", "bytes_out")
_NOBODY = "no Envoy is configured to be audited: audit.envoys names whom to ask"
_NOT_YET = "the first round of the audit is under way"
_NO_HOUR = "it is configured, but no hour of it is recorded in that time"


def audit(
    from_: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Of hours that begin at or after it.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="Of hours that begin before it.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Answer with CSV, a line for each node.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what Envoys sent and no sink received, per node.

    Without times, the running service says what it knows of the last day. With times (dates or RFC 3339) the
    store says what was found, also without a service; what is not decided yet is not in it, and a configured
    Envoy of which it has nothing is unknown. Exit code 0 if there are nodes and every one is complete, 1 if
    not.
    """
    loaded = reading_config(config)
    if watch and (from_ or to or as_csv):
        raise UsageError("--watch shows the present", hint="leave out --from, --to and --csv")
    if from_ is not None or to is not None:
        answer = _past(
            loaded,
            0 if from_ is None else instant("--from", from_),
            1 << 62 if to is None else instant("--to", to),
        )
    else:
        answer = _present(loaded)
        while watch:
            _show(answer, as_json=as_json, as_csv=False, clear=True)
            time.sleep(WATCH_S)
            answer = _present(loaded)
    _show(answer, as_json=as_json, as_csv=as_csv)
    if not answer["nodes"] or any(node["state"] != "complete" for node in answer["nodes"]):
        raise typer.Exit(1)


def _present(loaded: Config) -> dict[str, Any]:
    """What the running service says."""
    from proxy_usage.control import call, socket_path

    answer = call(socket_path(loaded.store.path), "audit")
    assert isinstance(answer, dict)
    return answer


def _past(loaded: Config, from_ms: int, to_ms: int) -> dict[str, Any]:
    """What the store has of a time: by node, and each hour apart."""
    from msgspec.structs import asdict

    from proxy_usage.completeness import state
    from proxy_usage.figures import Figures
    from proxy_usage.store.reader import Reader

    if to_ms <= from_ms:
        raise UsageError("--to is not after --from", hint="the time is from --from up to, and without, --to")
    with Reader(loaded.store.path) as reader:
        hours, known_as = reader.audit_hours(from_ms, to_ms), reader.audited()
    sums: dict[str, Figures] = {}
    for hour in hours:
        sums.setdefault(hour.node, Figures()).add(hour.figures)
    silent = dict.fromkeys(_silent(loaded, set(sums), known_as), Figures())
    nodes = []
    for node, figures in sorted((sums | silent).items()):
        told, reason = ("unknown", _NO_HOUR) if node in silent else state(figures, None, stale=False)
        least = figures.missing + figures.at_least
        bounds = {"at_least": least, "at_most": None if told == "unknown" else least}
        nodes.append({"node": node, "state": told, "reason": reason, **asdict(figures), **bounds})
    each = [{"hour_ms": hour.hour_ms, "node": hour.node, **asdict(hour.figures)} for hour in hours]
    return {"from_ms": from_ms, "to_ms": to_ms, "nodes": nodes, "hours": each}


def _silent(loaded: Config, recorded: set[str], known_as: Mapping[str, str]) -> Iterator[str]:
    """Configured Envoys that no recorded node can be, by node where it is known, else by URL.

    One that names no node is what it was last known as, or any node that is no other Envoy of the file.
    """
    from proxy_usage.intake import label

    named = {label(one.node) for one in loaded.audit.envoys if one.node is not None}
    nobodys = recorded - named - set(known_as.values())
    for one in loaded.audit.envoys:
        if one.node is not None:
            if label(one.node) not in recorded:
                yield label(one.node)
            continue
        url = str(one.url)
        seen = {node for key, node in known_as.items() if key == url or key.startswith(f"{url} at ")}
        if not (nobodys | seen) & recorded:
            yield url


def _show(answer: Mapping[str, Any], *, as_json: bool, as_csv: bool, clear: bool = False) -> None:
    nodes = answer["nodes"]
    nothing = _NOBODY if "at_ms" not in answer else _NOT_YET
    if (as_json or as_csv) and not nodes:
        print(nothing, file=sys.stderr)
    if as_json:
        emit(answer)
        return
    if as_csv:
        _print_csv(nodes)
        return
    if clear:
        print("\033[2J\033[H", end="")
    if answer.get("at_ms"):
        print(f"as of {moment(answer['at_ms'])}, of the last day; {len(answer.get('sinks', ()))} sinks asked")
    for url in answer.get("away", ()):
        print(f"does not answer: {safe(url)}")
    table([_row(node) for node in nodes], empty=nothing)
    lost = [node for node in nodes if any(node[name] for name in _ESTIMATE)]
    if lost:
        print()
        print("estimate of what was not billed, from Envoy's own counters:")
        table(
            {"node": safe(node["node"]), **{name.replace("_", " "): node[name] for name in _ESTIMATE}}
            for node in lost
        )
    for node in nodes:
        if node["reason"]:
            print(f"{safe(node['node'])}: {safe(node['reason'])}")


def _row(node: Mapping[str, Any]) -> dict[str, Cell]:
    row: dict[str, Cell] = {"node": safe(node["node"]), "state": node["state"]}
    row |= {name.replace("_", " "): node[name] for name in _SHOWN[:-1]}
    most = node["at_most"]
    row["at most"] = "unknown" if most is None else str(most)
    return {**row, "from": moment(node["from_ms"] or None)}


def _print_csv(nodes: list[Mapping[str, Any]]) -> None:
    import csv

    names = ("node", "state", "from_ms", "to_ms", *_SHOWN, "unknown", *_ESTIMATE)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for node in nodes:
        writer.writerow(["" if node[name] is None else node[name] for name in names])
