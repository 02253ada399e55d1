"""From the log-tailing collector to this sink and back, as docs/migration.md says: billed once, to the byte.

One Envoy with both logs. The commands and configurations are the page's own; only its moments, its address
and the name of its file are replaced.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import old_collector
import pytest
import pytest_asyncio
import yaml
from harness import World
from old_collector import Line, end_ms
from program import Ended, Sink, eventually

from proxy_usage.demo.checks import METERS
from proxy_usage.demo.http1 import Http1Client
from proxy_usage.events import rfc3339
from proxy_usage.store.views import OutputStatus

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]  # the first of them makes the whole run

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
REQUESTS, INGRESS, EGRESS, SECONDS = METERS
SECOND = 1_000
AHEAD_MS = 8_000
"""A restart takes less, on a machine that has nothing else to do."""
QUIET_MS = 1_500
"""Before a hand-over, so that only the requests that are meant to straddle it do."""
STRADDLING = 9
Sums = Mapping[tuple[str, str], int]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands(block: str, replaced: Mapping[str, str]) -> list[list[str]]:
    """The commands of a shell block, without the program's name, with the page's names and times replaced."""
    found = [[replaced.get(word, word) for word in shlex.split(line)] for line in block.splitlines()]
    assert all(words[0] == "proxy-usage" for words in found)
    return [words[1:] for words in found]


SHADOW, CUT_OVER, ROLL_BACK = blocks("yaml")
START, COMPARE, LOOK, LOOK_AGAIN = blocks("sh")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def next_second(ahead_ms: int = 0) -> int:
    at_ms = now_ms() + ahead_ms
    return at_ms + SECOND - at_ms % SECOND


async def until(at_ms: int) -> None:
    await asyncio.sleep(max(0, at_ms - now_ms()) / 1000)


@dataclass(slots=True)
class Run:
    """What is left of it all."""

    truth: dict[tuple[str, str], int] = field(default_factory=dict)
    billed: Sums = field(default_factory=dict)
    lines: Sequence[Line] = ()
    begin_ms: int = 0
    shadow_ms: int = 0
    cut_ms: int = 0
    back_ms: int = 0
    shadow: list[Ended] = field(default_factory=list)
    looks: list[Ended] = field(default_factory=list)
    whole: Ended | None = None
    outputs: Mapping[str, OutputStatus] = field(default_factory=dict)
    times: set[str] = field(default_factory=set)
    violations: Sequence[Any] = ()

    def old(self, *, by_end: bool = True) -> list[Line]:
        """The lines that the old collector bills: before the cut-over and after the roll-back."""

        def at(line: Line) -> int:
            return end_ms(line) if by_end else end_ms(line) - int(line["duration"])

        return [line for line in self.lines if at(line) < self.cut_ms or at(line) >= self.back_ms]

    def straddling(self, at_ms: int) -> list[Line]:
        return [line for line in self.lines if end_ms(line) - int(line["duration"]) < at_ms <= end_ms(line)]


def _page(block: str, run: Run, url: str) -> dict[str, Any]:
    """A configuration of the page with this run's moments and address."""
    text = block.replace("2026-09-01T12:00:00Z", rfc3339(run.cut_ms))
    text = text.replace("2026-09-02T12:00:00Z", rfc3339(run.back_ms))
    document: dict[str, Any] = yaml.safe_load(text)
    for output in document["outputs"]:
        if "url" in output:
            output |= {"url": url, "batch": {"linger": "50ms"}}
        for bound in {"from", "until"} & output.keys():  # YAML makes times of them
            output[bound] = output[bound].isoformat() if not isinstance(output[bound], str) else output[bound]
    return document


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    directory = tmp_path_factory.mktemp("cutover")
    log = directory / "old.log"

    def both_logs(document: dict[str, Any]) -> None:
        (listener,) = document["static_resources"]["listeners"]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        manager["access_log"].append(old_collector.logger(log))

    run = Run()
    shadow = yaml.safe_load(SHADOW)
    (ledger,) = shadow.pop(
        "outputs"
    )  # at the first start it also has the stand-in's url, which must not matter
    async with World(directory, settings=shadow, output=ledger, amend=both_logs) as world:
        world.sink.document["outputs"] = [ledger]
        await _shadow_run(world, run, log)

        await _hand_over(world, run, "cut_ms", CUT_OVER, LOOK)
        await _hand_over(world, run, "back_ms", ROLL_BACK, LOOK_AGAIN)
        end = next_second()
        await until(end)

        await world.stop_envoy()
        sent = world.truth.requests
        await eventually(lambda: len(old_collector.lines(log)) == sent, "Envoy wrote its file")
        await eventually(lambda: world.sink.counted() == sent, "every row is durable", why=world.sink.said)
        await eventually(world.sink.idle, "everything is settled", why=world.sink.said)
        run.lines = old_collector.lines(log)
        old_collector.write_events(run.lines, directory / "all.jsonl")
        replaced = _names(run, directory / "all.jsonl", run.begin_ms, end)
        run.whole = await world.sink.cli(*commands(COMPARE, replaced)[1])
        run.truth = {
            (tenant, meter): value
            for tenant, count in world.truth.tenants().items()
            for meter, value in (
                (REQUESTS, count.requests),
                (INGRESS, count.body_in),
                (EGRESS, count.body_out),
            )
        }
        run.billed = world.billing.arrived.sums()
        run.times = {stored.time for stored in world.billing.arrived.stored.values()}
        run.violations = world.billing.arrived.violations
        with world.sink.reader() as reader:
            run.outputs = {one.name: one for one in reader.status().outputs}
        yield run


def _names(run: Run, events: Path, from_ms: int, to_ms: int) -> dict[str, str]:
    """What stands for the page's words in a comparison."""
    return {
        "old.jsonl": str(events),
        "old.csv": str(events.with_suffix(".csv")),
        "2026-09-01T10:00:00Z": rfc3339(from_ms),
        "2026-09-01T11:00:00Z": rfc3339(to_ms),
    }


async def _shadow_run(world: World, run: Run, log: Path) -> None:
    """Steps 1 and 2 of the page."""
    validate, started = commands(START, {})
    assert started == ["run"]
    run.looks.append(await world.sink.cli(*validate))
    run.begin_ms = next_second()
    await until(run.begin_ms)
    await world.send(400)
    await _long(world, 1_200)
    run.shadow_ms = next_second(QUIET_MS)
    await until(run.shadow_ms)
    sent = world.truth.requests
    await eventually(lambda: len(old_collector.lines(log)) == sent, "Envoy wrote its file")
    await eventually(lambda: world.sink.counted() == sent and world.sink.idle(), "all is in the ledger")
    events = world.directory / "old.jsonl"
    old_collector.write_events(old_collector.lines(log), events)
    sums = old_collector.sums(old_collector.lines(log))
    events.with_suffix(".csv").write_text(
        "".join(f"{tenant},{meter},{value}\n" for (tenant, meter), value in sums.items())
    )
    for command in commands(COMPARE, _names(run, events, run.begin_ms, run.shadow_ms)):
        run.shadow.append(await world.sink.cli(*command))


async def _hand_over(world: World, run: Run, moment: str, configuration: str, look: str) -> None:
    """Steps 3 and 4: restart before the moment, load on both sides of it, some requests across it."""
    ahead_ms, at_ms = AHEAD_MS, 0
    while now_ms() > at_ms - 2 * QUIET_MS:  # nothing is under way: a moment that was missed is chosen anew
        begun_ms, at_ms = now_ms(), next_second(ahead_ms)
        setattr(run, moment, at_ms)
        await _restart(world.sink, _page(configuration, run, world.billing.url))
        looks = [await world.sink.cli(*command) for command in commands(look, {})]
        ahead_ms = 2 * (now_ms() - begun_ms) + 2 * QUIET_MS
    run.looks += looks
    await world.send(5_000, stop=lambda: now_ms() > at_ms - 2 * QUIET_MS)
    await until(at_ms - QUIET_MS)
    await _long(world, 2 * QUIET_MS, STRADDLING // len(world.tenants))
    assert now_ms() > at_ms
    await world.send(400)


async def _restart(sink: Sink, document: Mapping[str, Any]) -> None:
    assert await sink.stop() == 0
    sink.document["outputs"] = document["outputs"]
    await sink.start()


async def _long(world: World, open_ms: int, each: int = 1) -> None:
    """Requests of every tenant that are open for a while, with bodies both ways."""

    async def one(host: str, key: tuple[str, str]) -> None:
        async with Http1Client("127.0.0.1", world.envoy.port) as client:
            world.truth.add(*key, await client.request("GET", host, f"/slow/{open_ms}"))

    async with asyncio.TaskGroup() as group:
        for tenant in world.tenants:
            for _ in range(each):
                group.create_task(one(tenant.host, (tenant.name, tenant.route("web"))))


def added(*sums: Sums) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for one in sums:
        total.update(one)
    return total


def without_seconds(sums: Sums) -> dict[tuple[str, str], int]:
    return {key: value for key, value in sums.items() if key[1] != SECONDS}


def in_doubt(lines: Iterable[Line], *moments: int) -> list[Line]:
    """Lines that end within the 2 ms before a moment, as far as milliseconds tell: perhaps just after it."""
    return [line for line in lines if any(at_ms - 2 <= end_ms(line) < at_ms for at_ms in moments)]


# --- the shadow run ---------------------------------------------------------------------------------


def test_the_shadow_run_differs_in_floored_seconds_alone(run: Run) -> None:
    everything, bodies, sums = run.shadow
    assert everything.status == 1, everything.said
    assert re.findall(r"^- (\w+):", everything.said, re.MULTILINE) == ["connection_seconds"]
    assert "whole seconds of each request lose less than one" in everything.said
    assert sums.status == 1
    data = json.loads(sums.said)
    assert {line["meter"] for line in data["lines"] if line["difference"]} == {"connection_seconds"}
    assert {hint["kind"] for hint in data["hints"]} == {"floored_seconds"}
    assert bodies.status == 0, bodies.said
    assert bodies.said.endswith("\nequal\n")


def test_the_page_s_commands_and_configurations_work(run: Run) -> None:
    assert [look.status for look in run.looks] == [0] * 5, run.looks
    assert "no output sends anything: the ledger alone is kept" in run.looks[0].said
    assert "within a window" not in "".join(look.said for look in run.looks)


def test_nothing_was_sent_before_the_moment_or_after_the_other(run: Run) -> None:
    assert run.times
    assert rfc3339(run.cut_ms) < min(run.times)
    assert max(run.times) < rfc3339(run.back_ms)
    assert run.violations == []


# --- the hand-over ----------------------------------------------------------------------------------


def test_requests_were_open_at_both_moments(run: Run) -> None:
    assert len(run.straddling(run.cut_ms)) >= STRADDLING
    assert len(run.straddling(run.back_ms)) >= STRADDLING


def test_old_and_new_together_are_what_the_clients_did_once(run: Run) -> None:
    total = without_seconds(added(old_collector.sums(run.old()), run.billed))
    sent = {key: value for key, value in run.truth.items() if value}
    doubtful = in_doubt(run.lines, run.cut_ms, run.back_ms)
    if not doubtful:  # nearly always
        assert total == sent
    allowed = old_collector.sums(doubtful)
    assert total.keys() == sent.keys()
    assert all(abs(total[key] - sent[key]) <= allowed[key] for key in sent)
    assert set(run.billed) >= {(tenant, REQUESTS) for tenant, _ in run.truth}


def test_the_old_log_alone_is_what_the_clients_did(run: Run) -> None:
    """So the statement of the old collector's rules is one, and a hand-over by it means something."""
    sent = {key: value for key, value in run.truth.items() if value}
    assert without_seconds(old_collector.sums(run.lines)) == sent


def test_an_old_collector_that_stops_by_event_time_bills_straddling_requests_twice(run: Run) -> None:
    by_start, by_end = run.old(by_end=False), run.old()
    twice = [line for line in by_start if line not in by_end]
    assert twice == run.straddling(run.cut_ms)
    # And going back by event time loses those that are open then.
    assert [line for line in by_end if line not in by_start] == run.straddling(run.back_ms)


def test_every_event_has_one_fate_at_each_output(run: Run) -> None:
    ledger, billing = run.outputs["ledger"], run.outputs["billing"]
    assert (ledger.pending, ledger.delivered, ledger.dead) == (0, 0, 0)
    assert billing.outside > 0
    assert (billing.pending, billing.dead, billing.unconfirmed) == (0, 0, 0)
    assert ledger.recorded > billing.delivered > 0


def test_the_ledger_has_it_all_whoever_billed(run: Run) -> None:
    assert run.whole is not None
    assert run.whole.status == 0, run.whole.said
