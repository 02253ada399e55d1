"""Tables and plots of docs/performance.md, written from bench/results.json, so that neither can drift.

    python -m bench.tables

In the page each stands between ``<!-- bench: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench import plots
from bench.building import ROOT
from bench.cases import CASES
from bench.results import COMMITTED, read
from bench.rounds import middle, ratios
from bench.targets import STATED, targets

PAGE = ROOT / "docs" / "performance.md"
_MARKED = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NAMES = {
    "sink": "proxy-usage",
    "fold": "decode and fold behind a bare receiver",
    "receive": "grpc.aio with our options, discards",
    "receive-giving-way": "grpc.aio with our options and process, discards",
    "receive-defaults": "grpc.aio with its own options, discards",
    "naive": "grpc.aio, envoy-data-plane, a dict",
    "cpp": "C++: grpc++, full schema",
    "go": "Go: grpc-go, full schema",
}
_ORDER = list(_NAMES)
_MIB = 1 << 20


def title(server: str) -> str:
    """A server's name for people: ``sink:compiled`` is ours with that fold."""
    name, _, fold = server.partition(":")
    return _NAMES[name] + (f", {fold} fold" if fold else "")


def ordered(servers: Iterable[str]) -> list[str]:
    return sorted(servers, key=lambda server: (_ORDER.index(server.partition(":")[0]), server))


def ours(case: dict[str, Any]) -> str:
    """The sink that the others are compared with: with the compiled fold, where that was there."""
    servers: Iterable[str] = case["servers"]
    return min(name for name in servers if name.startswith("sink"))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    median, least, most = middle(values)
    return f"{median:,.{digits}f} ({least:,.{digits}f}–{most:,.{digits}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# --- parts --------------------------------------------------------------------------------------------------


def case_text(case: dict[str, Any]) -> str:
    """Every server of a case."""
    servers, sink = case["servers"], ours(case)
    rows = []
    for name in ordered(servers):
        one = servers[name]
        entry = middle(one["us_entry"])[0]
        rows.append(
            [
                title(name),
                spread(one["us_message"], 1),
                spread(one["us_entry"]),
                f"{1e6 / entry:,.0f}",
                f"{max(one['rss']) // _MIB}",
                spread(ratios(servers, name, sink)),
            ]
        )
    head = ["sink", "µs a message", "µs an entry", "entries/s a core", "MiB", "× proxy-usage, by round"]
    return table(head, rows) + _between(servers)


def _between(servers: dict[str, Any]) -> str:
    """What our sinks cost with all that they did between their rounds."""
    whole = [
        f"{one['us_entry_whole'][0]:,.2f} µs an entry ({title(name)})"
        for name, one in sorted(servers.items())
        if "us_entry_whole" in one
    ]
    if not whole:
        return ""
    return f"\nWith all that it did between its rounds, while others had theirs: {', '.join(whole)}.\n"


def headline(results: dict[str, Any]) -> str:
    return case_text(results["cases"]["figures"]["headline"])


def light(results: dict[str, Any]) -> str:
    return case_text(results["cases"]["figures"]["light"])


def matrix(results: dict[str, Any]) -> str:
    """One line a case."""
    rows = []
    figures = results["cases"]["figures"]
    for case in (figures[case.name] for case in CASES[1:] if case.name in figures):
        servers, sink = case["servers"], ours(case)

        def against(other: str, servers: dict[str, Any] = servers, sink: str = sink) -> str:
            return spread(ratios(servers, sink, other)) if other in servers else "–"

        one = servers[sink]
        rows.append(
            [
                case["says"],
                spread(one["us_message"], 1),
                spread(one["us_entry"]),
                f"{1e6 / middle(one['us_entry'])[0]:,.0f}",
                f"{max(one['rss']) // _MIB}",
                against("receive"),
                against("cpp"),
            ]
        )
    head = ["load", "µs a message", "µs an entry", "entries/s a core", "MiB", "× receive only", "× C++"]
    return table(head, rows)


def goals(results: dict[str, Any]) -> str:
    """What was set out for, and what was reached."""
    rows = []
    for one in targets(results):
        verdict = "" if one.asked == STATED else "reached" if one.met else "**not reached**"
        rows.append([one.what, one.asked, one.measured, verdict])
    return table(["against", "asked for", "measured", ""], rows)


def decoding(results: dict[str, Any]) -> str:
    rows = []
    for fold, shapes in results["decoding"]["figures"].items():
        for shape, one in shapes.items():
            over = [a / b for a, b in zip(one["fold"], one["upb"], strict=True)]
            naive = f"{middle(one['naive'])[0]:,.0f}" if "naive" in one else "–"
            cells = [spread(one[name]) for name in ("fold", "upb", "upb parse")]
            piece = one["piece_ms"]
            held = f"{piece['median']:.2f} / {piece['p999']:.2f} / {piece['most']:.2f}"
            rows.append([fold, shape, *cells, naive, spread(over), held])
    head = [
        *("which", "messages", "fold", "protobuf, full schema", "its parsing alone", "naive"),
        *("fold × protobuf", "a piece of 64 MiB, ms"),
    ]
    return (
        "Microseconds of processor time an entry, in one process, by turns. Last, how long a piece of a\n"
        "message of 64 MiB holds the event loop: median, 99.9 %, most.\n\n" + table(head, rows)
    )


def tenants(results: dict[str, Any]) -> str:
    rows = [
        [
            fold,
            f"{one['tenants']:,}",
            f"{middle(one['us_fold'])[0]:.2f}",
            "–" if one["bytes_row"] is None or one["tenants"] < 1_000 else f"{one['bytes_row']}",
            f"{one['us_entry']:.2f}",
            f"{one['us_first']:.1f}",
            f"{one['us_close']:.0f}",
            f"{one['us_entry_at_60']:.2f}",
            f"{one['bytes_key']:,}" if one["tenants"] >= 1_000 else "–",
            *(held(one, what) for what in ("turn", "plain")),
        ]
        for fold, rows_ in results["tenants"]["figures"].items()
        for one in rows_
    ]
    head = [
        *("fold", "tenants", "µs an entry, decode and fold", "bytes a row"),
        *("µs an entry, whole core", "µs a key's first entry", "µs to close a key"),
        *("µs an entry at 60 a key", "bytes a key"),
        *("pieces of turns over 2 ms; the longest", "of plain counting"),
    ]
    return table(head, rows)


def held(one: dict[str, Any], what: str) -> str:
    """How many of a run's pieces took too long, and the longest."""
    over = f"{one[f'{what}_steps_over_2_ms']:,}"
    if what == "turn":
        over = f"{over} of {one['turn_steps']:,}"
    return f"{over}; {one[f'{what}_stall_ms']:.1f} ms"


def delivering(results: dict[str, Any]) -> str:
    one = results["delivering"]["figures"]
    rows = [
        [
            f"lease and settle a batch of {one['batch_events']}, alone",
            f"{one['batch_cpu_us']:,} µs of processor time, {one['batch_wall_us']:,} µs by the clock",
        ],
        ["events a second through delivery", spread(one["events_s"], 0)],
        ["processor time an event", f"{spread(one['us_event'], 1)} µs"],
    ]
    return table(["figure", ""], rows)


def residence(results: dict[str, Any]) -> str:
    one = results["residence"]["figures"]
    base = middle(one["base"])[0]
    rows = [["ready, nobody connected", f"{base / _MIB:.0f}", "–"]]
    for connections, most in one["most"].items():
        each = (most - base) / _MIB / int(connections)
        rows.append([f"{connections} saturated connections", f"{most / _MIB:.0f}", f"{each:.2f}"])
    return table(["state", "MiB at the most", "MiB a connection above that"], rows)


def envoy(results: dict[str, Any]) -> str:
    one = results["envoy"]["figures"]
    rows = [[name, spread(rounds, 1)] for name, rounds in one["us_request"].items()]
    cost = table(["buffer of Envoy's gRPC log", "µs of Envoy's processor time a request"], rows)
    light = spread(one["sink_us_light"])
    cost += (
        f"\nAt the steady rate the sink took {light} µs a row: a light load, by messages of a second each.\n"
    )
    rows = [
        [f"{loss['buffer']:,} B", spread(loss["meanwhile"], 0), spread(loss["lost"], 0)]
        for loss in one["loss"]
    ]
    return cost + "\n" + table(["buffer_size_bytes", "requests while the sink was away", "rows lost"], rows)


def flush(results: dict[str, Any]) -> str:
    one = results["flush"]["figures"]
    idle_ms = [us / 1_000 for us in one["idle_us_s"]]
    cost, loss = [], []
    for each in one["intervals"]:
        interval = f"{each['interval_ms']:,} ms"
        rows, size = (
            middle([a / b for a, b in zip(each[name], each["messages"], strict=True)])[0]
            for name in ("requests", "bytes")
        )
        beyond = [
            used - idle / one["rate"] for used, idle in zip(each["us_row"], one["idle_us_s"], strict=True)
        ]
        figures = [spread(values, 1) for values in (each["us_row"], beyond, each["us_request"])]
        cost.append([interval, f"{rows:,.0f}", f"{size / 1024:,.0f}", *figures])
        lost = [spread(each[name], 0) for name in ("envoy_killed", "sink_killed", "sink_restarted")]
        loss.append([interval, *lost])
    head = [
        *("buffer_flush_interval", "rows a message", "KiB a message", "sink: µs a row"),
        *("beyond an idle sink's", "Envoy: µs a request"),
    ]
    return (
        table(head, cost)
        + f"\nAn idle sink took {spread(idle_ms, 1)} ms of processor time a second meanwhile.\n\n"
        + table(["buffer_flush_interval", "rows lost: Envoy killed", "sink killed", "sink restarted"], loss)
    )


def machine(results: dict[str, Any]) -> str:
    measured = results["cases"]["measured"]
    names = (
        "python",
        "grpcio",
        "protobuf",
        "xds-protos",
        "envoy-data-plane",
        "grpc++",
        "g++",
        "grpc-go",
        "go",
    )
    versions = ", ".join(f"{name} {measured[name]}" for name in names if measured.get(name))
    dates = sorted({part["measured"]["date"][:10] for part in results.values()})
    return f"{measured['machine']}; {versions}. Measured {' to '.join({dates[0]: 1, dates[-1]: 1})}.\n"


PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "machine": ("cases", machine),
    "goals": ("cases", goals),
    "headline": ("cases", headline),
    "light": ("cases", light),
    "matrix": ("cases", matrix),
    "decoding": ("decoding", decoding),
    "tenants": ("tenants", tenants),
    "delivering": ("delivering", delivering),
    "residence": ("residence", residence),
    "envoy": ("envoy", envoy),
    "flush": ("flush", flush),
}
"""By its name in the page: the part of the results it needs, and what writes it."""


def part_text(part: str, results: dict[str, Any]) -> str:
    """What a terminal shows of a part."""
    return PARTS[part][1](results)


def page(text: str, results: dict[str, Any]) -> str:
    """The page with its tables written anew. KeyError for a table that nothing here writes."""

    def written(match: re.Match[str]) -> str:
        part, write = PARTS[match[2]]
        body = write(results) if part in results else "Not measured yet.\n"
        return f"{match[1]}\n{body}\n{match[3]}"

    return _MARKED.sub(written, text)


def write() -> None:
    """Rewrites the page and the plots."""
    results = read(COMMITTED)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    for path, drawing in plots.drawings(results).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    write()
