"""docs/scaling.md is arithmetic from measured unit costs: who changes a cost changes what follows from it."""

import json
import math
import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "scaling.md").read_text()
MEASURED = json.loads((ROOT / "bench" / "results.json").read_text())
REQUEST = ("sink", "a finished request, from the wire to the queue")
LEASED = ("store", "an event out of the queue, leased and settled")
DELIVERED = ("sink", "delivering an event over HTTP, the store's part with it")
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
    row_s = cost(*REQUEST)
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


def test_what_is_said_of_the_tiers_follows_from_the_unit_costs() -> None:
    row_s, said = cost(*REQUEST), re.sub(r"\s+", " ", PAGE)
    sinks = math.ceil(1e6 * row_s / HALF)
    for sentence in (
        f"one core: {math.floor(1e-3 / row_s):,},000 requests a second",
        f"{math.floor(1e-2 * HALF / row_s) * 100:,} requests a second through one sink",
        f"Up to some {math.floor(2e-3 * HALF / row_s):,},000 requests a second at one site:** two sinks",
        f"A million a second are {sinks} sinks at half load and {round(sinks * KEYS * METERS / 60)} events",
        f"Two sinks with 1,000 keys make {2 * KEYS * METERS // 60} events a second with windows of 60 s",
        f"and {2 * KEYS * METERS / 3_600:.1f} with `1h`",
        f"{math.ceil(1e8 * row_s):,} cores of sinks, wherever they stand: the rows are the cost, 6.7 µs",
        f"delivery over HTTP needs a core for {math.ceil(1e-3 / cost(*DELIVERED)):,},000",
    ):
        assert sentence in said


@pytest.mark.parametrize(
    ("unit", "measured"),
    [
        (REQUEST, MEASURED["cases"]["figures"]["load-2000"]["servers"]["sink:compiled"]["us_entry_whole"][0]),
        (LEASED, MEASURED["delivering"]["figures"]["batch_cpu_us"] / 100),
        (DELIVERED, median(MEASURED["delivering"]["figures"]["us_event"])),
    ],
    ids=["request", "leased", "delivered"],
)
def test_the_unit_costs_are_those_that_were_measured(unit: tuple[str, str], measured: float) -> None:
    """Within the third by which figures differ from one hour to the next on shared cores."""
    assert 3 / 4 < cost(*unit) * 1e6 / measured < 4 / 3
