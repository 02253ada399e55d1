"""docs/scaling.md is arithmetic from measured unit costs: who changes a cost changes what follows from it."""

import math
import re
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
METERS, KEYS, HALF = 4, 1_000, 0.5


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def cost(tier: str, unit: str) -> float:
    """A unit's cost in seconds."""
    (found,) = [row for row in map(cells, PAGE.splitlines()) if row[:2] == [tier, unit]]
    return float(found[2].removesuffix(" µs")) / 1e6


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_table_follows_from_the_unit_costs() -> None:
    row_s = cost("sink", "a finished request, from the wire to the queue")
    stream_s = cost("JetStream", "an event in and out, one replica on disk")
    forward_s = cost("forwarder", "an event from the stream to the endpoint")
    rows = [cells(line) for line in PAGE.splitlines() if re.match(r"\| 1[0,]+ \|", line)]
    assert len(rows) == 9
    for rate, sites, cores, per_site, sinks, minutely, stream, forwarders, hourly in (
        map(number, row) for row in rows
    ):
        assert cores == round(rate * row_s, 2)
        assert per_site == max(2, math.ceil(rate / sites * row_s / HALF))
        assert sinks == per_site * sites
        for events, window_s in ((minutely, 60), (hourly, 3_600)):
            keys = min(KEYS, rate / sinks * window_s)
            assert events == round(sinks * keys * METERS / window_s)
        assert (stream, forwarders) == (round(minutely * stream_s, 2), round(minutely * forward_s, 2))
