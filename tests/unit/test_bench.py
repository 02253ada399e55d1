"""The benchmark's own parts: what it sends, what it makes of results, that the page says what they are."""

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from envoy.service.accesslog.v3 import als_pb2

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import check, flushing, plots, results, tables  # noqa: E402
from bench.cases import CASES  # noqa: E402
from bench.decoding import Upb  # noqa: E402
from bench.messages import KIB, hello, messages, numbered, places, read, write  # noqa: E402
from bench.peers.server import Folds, Naive, Windows  # noqa: E402
from bench.processes import cpu_ns  # noqa: E402

SECOND = 1_800_000_000


def opened(raw: bytes) -> Any:
    return als_pb2.StreamAccessLogsMessage.FromString(raw)


@pytest.mark.parametrize(("kind", "size"), [("http", 16), ("http", 256), ("tcp", 16)])
def test_messages_are_those_that_envoy_flushes(kind: str, size: int) -> None:
    for message in messages(kind, size * KIB, count=2):
        whole = opened(message.raw)
        rows = whole.http_logs.log_entry if kind == "http" else whole.tcp_logs.log_entry
        assert len(rows) == message.entries
        last = rows[-1].ByteSize()
        assert size * KIB < len(message.raw) < size * KIB + last + 3 * len(rows) + 8
        received = [row.common_properties.downstream_wire_bytes_received for row in rows]
        assert sum(received) == message.amounts.received
        assert sum(row.common_properties.duration.ToNanoseconds() for row in rows) == message.amounts.ns


def test_the_file_of_messages_is_read_as_it_was_written(tmp_path: Path) -> None:
    first, *others = read(write(tmp_path / "m.bin", "tcp", 2 * KIB))
    assert (first.raw, first.places) == (hello().raw, [])
    for template, message in zip(others, messages("tcp", 2 * KIB), strict=True):
        assert (template.raw, template.amounts) == (message.raw, message.amounts)
        assert template.places == list(places(message))


def test_messages_are_the_same_each_time() -> None:
    assert messages("http", KIB, count=2) == messages("http", KIB, count=2)


def test_what_is_overwritten_is_the_tenant_its_route_and_the_second_alone() -> None:
    (message,) = messages("http", 16 * KIB, count=1)
    before, after = opened(message.raw), opened(numbered(message, 10**7, random.Random(1), SECOND))
    numbers = set()
    for old, new in zip(before.http_logs.log_entry, after.http_logs.log_entry, strict=True):
        tenant = new.common_properties.custom_tags["project_name"].removeprefix("tenant-")
        numbers.add(tenant)
        assert new.common_properties.route_name.split("/")[1] == f"ns-{tenant}"
        assert new.common_properties.start_time.seconds == SECOND
        new.common_properties.start_time.seconds = old.common_properties.start_time.seconds
        new.common_properties.custom_tags["project_name"] = old.common_properties.custom_tags["project_name"]
        new.common_properties.route_name = old.common_properties.route_name
    assert len(numbers) == message.entries
    assert after == before


@pytest.mark.parametrize("peer", [Folds, Upb, Naive])
@pytest.mark.parametrize("kind", ["http", "tcp"])
def test_every_program_adds_up_the_same(peer: Any, kind: str) -> None:
    windows = Windows(60_000)
    taker = peer(windows)
    stream: dict[str, Any] = {}
    taker.take(hello().raw, stream)
    (message,) = messages(kind, 2 * KIB, count=1)
    taker.take(message.raw, stream)
    taker.end()
    windows.close(1 << 62)
    entries, received, sent, ns = windows.closed
    assert (entries, received, sent) == (message.entries, message.amounts.received, message.amounts.sent)
    rounded = 500 * entries if peer is Naive else 0  # its times have no nanoseconds
    assert abs(message.amounts.ns - ns) <= rounded


def test_the_page_shows_what_was_measured() -> None:
    committed = results.read(results.COMMITTED)
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page(text, committed) == text, "run: python -m bench.tables"
    assert "Not measured yet" not in text
    assert {f"<!-- bench: {name} -->" for name in tables.PARTS} <= set(text.splitlines())


def test_the_plots_show_what_was_measured() -> None:
    drawn = plots.drawings(results.read(results.COMMITTED))
    assert {path.name for path in drawn} == {"cost-load.svg", "cost-tenants.svg"}
    for path, drawing in drawn.items():
        assert path.read_text(encoding="utf-8") == drawing, "run: python -m bench.tables"


def test_results_have_five_rounds_and_say_where_they_come_from() -> None:
    committed = results.read(results.COMMITTED)
    for part in committed.values():
        assert part["measured"]["machine"]
        assert part["measured"]["commit"]
    cases = committed["cases"]["figures"]
    assert {case.name for case in CASES if case.quick} <= cases.keys()
    for case in cases.values():
        assert {len(server["us_entry"]) for server in case["servers"].values()} == {5}


def test_the_flush_interval_was_measured_at_one_rate_and_as_often_each() -> None:
    figures = results.read(results.COMMITTED)["flush"]["figures"]
    intervals = figures["intervals"]
    assert [one["interval_ms"] for one in intervals] == list(flushing.INTERVALS_MS)
    for one in intervals:
        rounds = [values for name, values in one.items() if name != "interval_ms"]
        assert {len(values) for values in rounds} == {len(figures["idle_us_s"])} == {flushing.ROUNDS}
        held = figures["rate"] * flushing.SECONDS
        assert one["requests"] == pytest.approx([held] * flushing.ROUNDS, rel=0.1)
        for name in ("envoy_killed", "sink_killed", "sink_restarted"):
            assert min(one[name]) >= 0, "rows of one trial were counted in another"


def test_what_an_idle_sink_takes_is_subtracted_round_by_round() -> None:
    one = {
        "interval_ms": 1_000,
        "requests": [400, 400],
        "messages": [4, 2],
        "bytes": [40_960, 61_440],
        "us_row": [25.0, 45.0],
        "us_request": [90.0, 110.0],
        "envoy_killed": [30, 50],
        "sink_killed": [100, 100],
        "sink_restarted": [0, 0],
    }
    figures = {"rate": 100, "idle_us_s": [2_000, 4_000], "intervals": [one]}
    lines = tables.part_text("flush", {"flush": {"figures": figures}}).splitlines()
    cost = "| 1,000 ms | 150 | 20 | 35.0 (25.0–45.0) | 5.0 (5.0–5.0) | 100.0 (90.0–110.0) |"
    idle = "An idle sink took 3.0 (2.0–4.0) ms of processor time a second meanwhile."
    loss = "| 1,000 ms | 40 (30–50) | 100 (100–100) | 0 (0–0) |"
    assert [line for line in lines if line in {cost, idle, loss}] == [cost, idle, loss]


async def test_trials_are_spread_over_the_interval_and_listed_by_pair() -> None:
    pairs: list[Any] = [100, 1_000]

    async def trial(pair: Any, phase: float) -> int:
        lost: int = round(pair * phase * 2 * flushing.ROUNDS)
        return lost

    expected = [[pair * odd for odd in range(1, 2 * flushing.ROUNDS, 2)] for pair in pairs]
    assert await flushing.trials(pairs, trial) == expected


def test_a_process_time_has_no_steps() -> None:
    before, found, after = time.process_time_ns(), cpu_ns(os.getpid()), time.process_time_ns()
    assert before <= found <= after


def test_a_worse_ratio_is_found() -> None:
    assert not check.Compared("a", 2.0, 2.9).worse
    assert check.Compared("a", 2.0, 3.1).worse
