"""``proxy-usage status --watch``: what the operator's page shows, in a terminal, again and again."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from proxy_usage.cli.show import moment, safe, size

BARS = "▁▂▃▄▅▆▇█"
MARKS = {
    "ok": "✓",
    "waiting": "…",
    "starting": "…",
    "draining": "…",
    "warning": "!",
    "failing": "✗",
    "note": "i",
}
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, REST_OF_LINE, REST = "\x1b[H", "\x1b[K", "\x1b[J"
Document = dict[str, Any]


def watch(sockets: Sequence[Path], *, interval_s: int, as_json: bool) -> None:
    """Asks the running service every ``interval_s`` seconds until Ctrl-C or SIGTERM: whoever listens on the
    first of the sockets that anybody listens on.

    On a terminal the same screen is drawn over and over, and its last state stays when it ends. Elsewhere
    there is a line each time; with ``as_json`` the whole document.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had them ignored
        signal.signal(number, signal.default_int_handler)
    drawn = sys.stdout.isatty() and not as_json
    last: Document | None = None
    asked_s = time.monotonic()
    if drawn:
        sys.stdout.write(ENTER)
    try:
        while True:
            now, trouble = _ask(sockets)
            if now is not None:
                last, asked_s = now, time.monotonic()
            silent_s = int(time.monotonic() - asked_s)
            if drawn:
                _draw(screen(last, trouble, silent_s))
            elif as_json and now is not None:
                print(json.dumps(now), flush=True)
            elif not as_json:
                print(line(now, trouble), flush=True)
            time.sleep(interval_s)
    except KeyboardInterrupt:
        pass
    finally:
        if drawn:
            sys.stdout.write(LEAVE)
            if last is not None:
                print("\n".join(screen(last, "", 0)))


def _ask(sockets: Sequence[Path]) -> tuple[Document | None, str]:
    from proxy_usage.control import NotRunning, call
    from proxy_usage.errors import ProxyUsageError

    trouble = ""
    for socket in sockets:
        try:
            answer = call(socket, "page")
        except NotRunning as error:
            trouble = f"{error.message}; {error.hint}"
            continue
        except ProxyUsageError as error:
            return None, error.message
        return (answer, "") if isinstance(answer, dict) else (None, "the service gave no answer")
    return None, trouble


def _draw(lines: Sequence[str]) -> None:
    """Over what was there, without clearing it first: that would flicker."""
    columns, rows = shutil.get_terminal_size()
    shown = [text[: columns - 1] for text in lines[: rows - 1]]
    body = "".join(f"{text}{REST_OF_LINE}\n" for text in shown)
    sys.stdout.write(f"{HOME}{body}{REST}")
    sys.stdout.flush()


# --- in words -------------------------------------------------------------------------------------------


def _when(time_ms: int) -> str:
    """A time to the second."""
    return f"{moment(time_ms)[:19]}Z"


def line(now: Document | None, trouble: str) -> str:
    """One moment as a line."""
    if now is None:
        return f"no answer: {safe(trouble)}"
    queued = sum(one["fates"].get("pending", 0) for one in now["outputs"])
    dead = sum(one["events"] for one in now["dead"]["groups"])
    held = sum(one["rows"] for one in now["unattributed"]["groups"])
    return safe(
        f"{_when(now['now_ms'])} {now['state']['word']}: {now['state']['text']}; {_in(now)} in,"
        f" {now['windows']['open']} windows open, {queued} events waiting, {dead} dead letters,"
        f" {held} entries held"
    )


def screen(now: Document | None, trouble: str, silent_s: int) -> list[str]:
    """The page as lines of text, the most important first."""
    if now is None:
        return ["proxy-usage", "", f"✗ No answer: {trouble}", "", "Does the sink run?"]
    texts = [f"proxy-usage {now['version']} on {now['host']}    {_when(now['now_ms'])}"]
    if trouble:
        texts.append(f"✗ No answer for {silent_s} s: {trouble}. Figures are of {_when(now['now_ms'])}.")
    since_ms = now["state"]["since_ms"]
    since = "" if since_ms is None else f"  (since {_when(since_ms)})"
    texts += ["", f"{MARKS.get(now['state']['word'], '?')} {now['state']['text']}{since}", ""]
    for part in (_problems, _flow, _outputs, _nodes, _stuck, _tenants, _store):
        found = list(part(now))
        texts += [*found, ""] if found else []
    return [safe(text) for text in texts]


def _problems(now: Document) -> Iterator[str]:
    for one in now["problems"]:
        since = "" if one["since_ms"] is None else f", since {_when(one['since_ms'])}"
        yield f"{MARKS[one['level']]} {one['title']}{since}"
        if one["detail"]:
            yield f"    {one['detail']}"
        yield f"    lost: {one['lost']}"
        yield f"    do:   {one['do']}"
        if one["command"]:
            yield f"    {one['command']}"
    if now["more_problems"]:
        yield f"  and {now['more_problems']} more"


def _in(now: Document) -> str:
    return _rate(now["intake"]["minute"], now["intake"]["minute_ms"])


def _rate(count: int, span_ms: int) -> str:
    """Per second, to a tenth, rounded down."""
    if span_ms <= 0:
        return "-/s"
    tenths = count * 10_000 // span_ms
    return f"{tenths // 10}.{tenths % 10}/s"


def _flow(now: Document) -> Iterator[str]:
    columns = now["history"]["columns"]
    waiting = sum(one["fates"].get("pending", 0) for one in now["outputs"])
    out = sum(point or 0 for point in columns.get("delivered", [])[-12:])
    yield f"entries in      {_in(now):>12}  {spark(columns.get('entries', []))}"
    yield f"events out      {f'{out}/min':>12}  {spark(columns.get('delivered', []))}"
    yield f"events waiting  {waiting:>12}  {spark(columns.get('queued', []))}"
    yield f"windows open    {now['windows']['open']:>12}  {spark(columns.get('windows', []))}"


def spark(points: Sequence[int | None], width: int = 40) -> str:
    """A line of points as bars, the highest of each stretch; a blank where nobody looked."""
    step = max(1, -(-len(points) // width))
    stretches = [points[at : at + step] for at in range(0, len(points), step)]
    highest = [max((p for p in stretch if p is not None), default=None) for stretch in stretches]
    top = max((value for value in highest if value is not None), default=0)
    return "".join(
        " " if value is None else BARS[value * (len(BARS) - 1) // top] if top else BARS[0]
        for value in highest
    )


def _outputs(now: Document) -> Iterator[str]:
    for one in now["outputs"]:
        state = "works"
        if one["paused"] is not None:
            state = f"paused: {one['paused']}"
        elif one["failures"]:
            state = f"{one['failures']} attempts failed: {one['why']}"
        elif one["format"] == "none":
            state = "records only"
        age = "" if one["oldest_ms"] is None else f", oldest {(now['now_ms'] - one['oldest_ms']) // 1_000} s"
        fates = "".join(
            f", {fate} {events}" for fate, events in one["fates"].items() if events and fate != "pending"
        )
        yield f"output {one['name']}: {state}; {one['fates'].get('pending', 0)} waiting{age}{fates}"


def _nodes(now: Document) -> Iterator[str]:
    intake = now["intake"]
    audit = {one["node"]: one["state"] for one in (now["audit"] or {"nodes": []})["nodes"]}
    for one in intake["nodes"]:
        lost = f", {one['lost']} lost by crashes" if one["lost"] else ""
        lost += " and unknown" if one["unknown"] else ""
        state = f", {audit[one['node']]}" if one["node"] in audit else ""
        flow = _rate(one["minute"], intake["minute_ms"])
        yield f"node {one['node']}: {flow}, {one['read']} read{lost}{state}"
    if intake["others"]["nodes"]:
        yield f"and {intake['others']['nodes']} other nodes: {intake['others']['read']} read"
    if now["audit"] is None:
        yield "completeness: no audit is set up (docs/audit.md)"


def _stuck(now: Document) -> Iterator[str]:
    for one in now["dead"]["groups"]:
        yield f"dead letters of {one['output']}: {one['events']} {one['reason']}: {one['meaning']}"
        yield f"    {one['command']}"
    for one in now["unattributed"]["groups"]:
        yield f"held: {one['rows']} entries {one['reason']}: {one['meaning']}"
        yield f"    {one['command']}"


def _tenants(now: Document) -> Iterator[str]:
    for meter in (now["tenants"] or {"meters": []})["meters"]:
        first = ", ".join(f"{tenant} {value}" for tenant, value in meter["first"][:5])
        if first:
            yield f"most {meter['meter']}: {first}"


def _store(now: Document) -> Iterator[str]:
    store = now["store"]
    if store["room"]:
        percent = store["used"] * 100 // store["room"]
        short = "" if store["pressure"] == "none" else f"; short of room: {store['pressure']}"
        yield f"store: {percent} % of {size(store['room'])} used{short}; {store['path']}"
