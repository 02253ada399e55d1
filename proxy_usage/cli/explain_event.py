"""``proxy-usage explain ID``: what became of an event, and whence it came."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from proxy_usage.cli.options import reading_config
from proxy_usage.cli.queue import place_row
from proxy_usage.cli.show import Cell, emit, facts, moment, plain, table
from proxy_usage.errors import UsageError

if TYPE_CHECKING:
    from proxy_usage.cli.stores import Readers
    from proxy_usage.store.usage import EventTrace

EVENT_ID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
"""A ULID, as events have them."""
HOUR_MS = 3_600_000


def explain_event(event_id: str, config: Path | None, as_json: bool) -> None:
    """Shows an event's way, from the rows to the answers.

    Raises:
        UsageError: no store knows it. DecodeError: what it stored is not a CloudEvent.
    """
    from proxy_usage.cli.stores import opened
    from proxy_usage.samples import read_event

    with opened(reading_config(config)) as stores:
        traces = ((worker, reader.explain(event_id)) for worker, reader in stores.readers.items())
        worker, trace = next((found for found in traces if found[1] is not None), (0, None))
        if trace is None:
            raise _unknown(event_id, stores)
        mark = stores.mark(worker)
    event = None if trace.event.body is None else read_event(trace.event.body)
    more = _more(trace)
    if as_json:
        emit({**plain(trace), "event": {**plain(trace.event), "cloudevent": event}, "more": more, **mark})
        return
    _show(trace, mark)
    print()
    print(_GONE if event is None else json.dumps(event, indent=2))
    print("\nmore:")
    for command in more:
        print(f"  {command}")


_GONE = "Every output has settled it; its bytes are gone."


def _unknown(event_id: str, stores: Readers) -> UsageError:
    from proxy_usage.store.usage import minted

    kept = stores.each(lambda reader: reader.kept()).values()
    singles_ms = max((one.singles_ms for one in kept if one.singles_ms is not None), default=None)
    since = "nothing yet" if singles_ms is None else f"what was settled since {moment(singles_ms)}"
    merged = " or it was merged into another before it was sent," if any(one.merged for one in kept) else ""
    where = f"the stores of {len(kept)} workers" if stores.several else str(stores.readers[0].path)
    return UsageError(
        f"event {event_id}, which was made at {moment(minted(event_id))}, is unknown to {where}: it is not in"
        f" the queue, not among the dead letters, and not in the ledger, which has {since}",
        hint=f"it is of another sink,{merged} or older: proxy-usage usage has the sum of its hour",
    )


def _show(trace: EventTrace, mark: Mapping[str, int]) -> None:
    event = trace.event
    stands = None
    if trace.merged:
        stands = f"{trace.merged} events of windows from {moment(trace.merged_from_ms)} on, merged for room"
    facts(
        [
            ("id", event.id),
            *mark.items(),
            ("tenant", event.tenant),
            *event.dimensions.items(),
            (event.meter, event.value),
            ("window", moment(event.window_ms)),
            ("minted", moment(trace.minted_ms)),
            ("stands for", stands),
            ("late part", f"beside {', '.join(trace.others)}" if trace.late else None),
            ("later parts", ", ".join(trace.others) if trace.others and not trace.late else None),
        ]
    )
    print()
    table([place_row(one) for one in event.places])
    until = moment(trace.hour_ms + HOUR_MS)
    print(f"\nrows of its tenant and dimensions, {moment(trace.hour_ms)} to {until}, all meters:")
    sources: list[dict[str, Cell]] = [
        {"rule": one.rule or "(past the bound)", "node": one.node, "rows": one.rows} for one in trace.sources
    ]
    table(sources, empty="none are known: they are noted within a minute, and kept as long as sums are")


def _more(trace: EventTrace) -> list[str]:
    """Commands that show more."""
    event, hour_ms = trace.event, trace.hour_ms
    commands = [
        f"proxy-usage usage --tenant {event.tenant} --from {moment(hour_ms)} --to {moment(hour_ms + HOUR_MS)}"
    ]
    states = {place.state for place in event.places}
    if "dead" in states:
        commands.append(f"proxy-usage deadletters show {event.id}")
    if states & {"pending", "attempted"}:
        commands.append(f"proxy-usage queue show {event.id}")
    return commands
