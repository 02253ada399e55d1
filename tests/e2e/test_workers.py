"""Several workers on one port: killed, restarted, fewer of them, more of them. Sums stay exact to the unit.

Rows go straight to the port over connections of their own, which the kernel spreads; `send` returns when its
rows were read. Beside them runs a plain sum of what was sent.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import aiohttp
import grpc.aio
import pytest
import yaml
from harness import STREAM_ACCESS_LOGS, AlsClient
from program import DEADLINE_S, PROGRAM, Sink, eventually, intake_rows
from wire import DOWNSTREAM_END, DOWNSTREAM_PERIODIC, http_row, message

from proxy_usage.config.workers import worker_path, worker_stores
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.faults import Fault, Faults
from proxy_usage.demo.listener import lease_port
from proxy_usage.model import NS_PER_SECOND
from proxy_usage.store.reader import Reader
from proxy_usage.web import HEADERS

pytestmark = pytest.mark.e2e

REQUESTS, INGRESS, EGRESS, SECONDS = METERS
TENANTS = ("alpha", "beta", "gamma")
LOSSY = "delta"
"""Whose rows may be lost by a kill."""
DURATION_NS = 400_000_007
CONNECTIONS = 16
WINDOWS = {"windows": {"length": "1s", "grace": "3s", "checkpoint": "1s"}}


class Connection(AlsClient):
    """A connection of its own: channels of one process would share one."""

    def __init__(self, port: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)


class Fleet:
    """The workers of one sink, what was sent to them, and what they hold."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.rows = 0
        self.sums: Counter[tuple[str, str]] = Counter()
        self.duration_ns = 0

    def batch(self, *tenants: str) -> bytes:
        """A message with a row of each tenant, noted as sent."""
        rows = []
        for tenant in tenants:
            wire = (100 + self.rows % 7, 1_000 + self.rows % 11)
            rows.append(http_row(tags={"project_name": tenant}, wire=wire, duration_ns=DURATION_NS))
            self.rows += 1
            self.duration_ns += DURATION_NS
            self.sums.update({(tenant, REQUESTS): 1, (tenant, INGRESS): wire[0], (tenant, EGRESS): wire[1]})
        return message(*rows, node_id="envoy-1")

    async def send(self, *tenants: str, connections: int = CONNECTIONS, messages: int = 5) -> None:
        """So many messages over each of so many new connections; all of them are read when it returns."""

        async def one() -> None:
            async with Connection(self.sink.grpc_port) as connection:
                await connection.send(*(self.batch(*tenants) for _ in range(messages)))

        await asyncio.gather(*(one() for _ in range(connections)))

    async def send_to_all(self) -> None:
        """Until every worker has read some."""
        while not all(sum(intake_rows(store).values()) for store in self.stores):
            assert self.rows < 50_000, "some worker gets no connection"
            await self.send(*TENANTS)

    @property
    def stores(self) -> list[Path]:
        return [worker_path(self.sink.store, number) for number in range(self.sink.document["workers"])]

    def read(self) -> int:
        return sum(sum(intake_rows(store).values()) for store in self.stores)

    def readers(self) -> Iterator[Reader]:
        for store in self.stores:
            with Reader(store) as reader:
                yield reader

    async def told_all(self) -> bool:
        return (await self.sink.metrics())["entries_read_total"] == self.rows

    def lost(self) -> int:
        return sum(sum(reader.status().crash_lost.values()) for reader in self.readers())

    def with_a_fate(self) -> int:
        fates = (reader.status().rows for reader in self.readers())
        return sum(rows for found in fates for reasons in found.values() for rows in reasons.values())

    def idle(self) -> bool:
        """Whether everything is durable, closed and settled."""
        if self.with_a_fate() + self.lost() != self.rows:
            return False
        states = [reader.status() for reader in self.readers()]
        return all(
            status.open_windows == 0 and all(one.pending == 0 for one in status.outputs) for status in states
        )

    def check(self) -> None:
        """Every row has a fate or is known as lost, and each store adds up, table by table."""
        assert self.read() == self.rows == self.with_a_fate() + self.lost()
        for reader in self.readers():
            sums = reader.conservation(deep=True)
            assert sums.balanced, (reader.path, sums)

    def pids(self) -> list[int]:
        """Of the workers, as their locks name them; 0 while one is being written."""
        texts = [store.with_name(store.name + ".lock").read_text() for store in self.stores]
        return [int(text.split()[1]) if text.endswith("\n") else 0 for text in texts]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def take_lock(store: Path) -> int:
    """Waits until nobody has the store's lock, and takes it. The descriptor holds it."""
    descriptor = os.open(store.with_name(store.name + ".lock"), os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


async def page_says(fleet: Fleet, *, dead: int | None = None) -> None:
    """/api/state of the supervisor adds up all workers; of one that is dead, with what it said last."""
    sink = fleet.sink
    here = [store for number, store in enumerate(fleet.stores) if number != dead]
    least = sum(sum(intake_rows(store).values()) for store in here) + (dead is not None)
    silent = [] if dead is None else [f"Worker {dead} does not answer"]
    said: dict[str, Any] = {}

    async def whole() -> bool:
        said.update(json.loads((await sink.get("/api/state"))[1]))
        named = [one["title"] for one in said["problems"] if "does not answer" in one["title"]]
        return least <= said["intake"]["read"] <= fleet.read() and named == silent

    await eventually(whole, f"the page says {fleet.read()} and {silent}", why=lambda: (said, sink.said()))
    assert [one["node"] for one in said["intake"]["nodes"]] == ["envoy-1"]
    assert dict(said["settings"])["workers"] == str(len(fleet.stores))
    assert dead is None or said["state"]["text"].startswith(silent[0])


async def look_at_page(fleet: Fleet) -> None:
    """The page of all workers in a browser, and in a terminal."""
    await page_says(fleet)
    url = f"http://127.0.0.1:{fleet.sink.http_port}/"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert (answer.status, answer.content_type) == (200, "text/html")
        assert HEADERS.items() <= dict(answer.headers).items()
    words = ("status", "--config", str(fleet.sink.config), "--watch", "--json")
    watching = await asyncio.create_subprocess_exec(*PROGRAM, *words, stdout=PIPE, limit=1 << 20)
    try:
        assert watching.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            # A worker that is slow to answer is left out, and is in the next line.
            while json.loads(await watching.stdout.readline())["intake"]["read"] != fleet.read():
                continue
    finally:
        watching.kill()
        await watching.wait()


async def kill_one(fleet: Fleet, number: int) -> None:
    """Kills a worker while its store is kept from the next one, and looks at what is said of it."""
    sink = fleet.sink
    before = (await sink.metrics())["entries_read_total"]
    waiting = asyncio.get_running_loop().run_in_executor(None, take_lock, fleet.stores[number])
    os.kill(fleet.pids()[number], signal.SIGKILL)
    lock = await waiting
    reasons: dict[str, str] = {}

    async def named() -> bool:
        nonlocal reasons
        reasons = await sink.reasons()
        return {name[:8] for name in reasons} == {f"worker {number}"}

    try:
        await eventually(named, "readiness names the dead worker alone", why=lambda: (reasons, sink.said()))
        assert (await sink.get("/healthz"))[0] == 200
        metrics = await sink.metrics()
        assert metrics["ready"] == 0
        assert metrics['workers{state="down"}'] in (0, 1)  # it is started again and again
        assert metrics["entries_read_total"] >= before > 0
        await page_says(fleet, dead=number)
        await fleet.send(LOSSY)  # the others go on
    finally:
        os.close(lock)

    await eventually(sink.is_ready, "the worker is there again", why=sink.said)
    assert (await sink.metrics())[f'worker_restarts_total{{worker="{number}"}}'] >= 1
    await page_says(fleet)


async def drained_under_load(fleet: Fleet) -> None:
    """SIGTERM while streams are open: what was written on them is read, they end with OK, nobody is left."""
    pids = fleet.pids()
    connections = [Connection(fleet.sink.grpc_port) for _ in range(CONNECTIONS)]
    streams: list[Any] = [one.channel.stream_unary(STREAM_ACCESS_LOGS)() for one in connections]
    for stream in streams:
        await stream.write(fleet.batch(*TENANTS))
    await eventually(lambda: fleet.read() == fleet.rows, "what was written is read", why=fleet.sink.said)
    assert await fleet.sink.stop() == 0
    async with asyncio.timeout(DEADLINE_S):
        assert {await stream for stream in streams} == {b""}
    for one in connections:
        await one.channel.close()
    assert not any(map(running, pids))
    fleet.check()


def unfinished(fleet: Fleet) -> Counter[str]:
    """Events that wait and base units in open windows and remainders, over all stores."""
    found: Counter[str] = Counter()
    for reader in fleet.readers():
        status = reader.status()
        found["pending"] += sum(output.pending for output in status.outputs)
        for terms in status.meters:
            found[f"{terms.meter} counted"] += terms.counted
            found[f"{terms.meter} not billed"] += terms.open + terms.remainders
            found[f"{terms.meter} minted"] += terms.minted.value
    return found


def check_bill(fleet: Fleet, billing: BillingStandIn) -> None:
    """The endpoint was told what was sent, to the unit; of a killed worker's tenant, less what was lost."""
    sums = billing.arrived.sums()
    for tenant in TENANTS:
        for meter in (REQUESTS, INGRESS, EGRESS):
            assert sums[tenant, meter] == fleet.sums[tenant, meter], (tenant, meter)
    assert sums[LOSSY, REQUESTS] == fleet.sums[LOSSY, REQUESTS] - fleet.lost()
    terms = [one for r in fleet.readers() for one in r.status().meters if one.meter == "connection_seconds"]
    assert sum(one.counted for one in terms) == fleet.duration_ns - fleet.lost() * DURATION_NS
    billed = sum(value for (_, meter), value in sums.items() if meter == SECONDS)
    assert billed * NS_PER_SECOND + sum(one.remainders for one in terms) == sum(one.counted for one in terms)
    assert billing.arrived.violations == []  # no id with other bytes, among others


async def test_workers_killed_fewer_and_more_with_exact_sums(tmp_path: Path) -> None:
    async with BillingStandIn() as billing:
        sink = Sink(tmp_path, url=billing.url, settings=WINDOWS | {"workers": 3})
        fleet = Fleet(sink)
        async with sink:
            await fleet.send_to_all()
            assert fleet.read() == fleet.rows
            await eventually(fleet.told_all, "/metrics says what was read, of all together", why=sink.said)
            assert (await sink.metrics())['workers{state="up"}'] == 3
            await look_at_page(fleet)

            # A second service on this port is refused, though the workers share it among themselves.
            stranger = Sink(tmp_path / "stranger", url=billing.url, settings={"workers": 2})
            stranger.document["listen"]["grpc"] = f"127.0.0.1:{sink.grpc_port}"
            ended = await stranger.run()
            assert ended.status == 1
            assert "cannot listen on" in ended.said

            await fleet.send(LOSSY)
            await kill_one(fleet, 1)

            billing.faults = Faults(always=Fault.UNAVAILABLE)
            await fleet.send(*TENANTS)
            await drained_under_load(fleet)
            assert list(worker_stores(sink.store)) == [1, 2]
            before = unfinished(fleet)
            assert before["pending"] or before["requests not billed"]

            sink.document["workers"] = 1
            await sink.start()
            assert worker_stores(sink.store) == {}
            assert {event["file"] for event in sink.events("store adopted")} == {
                "usage.worker-1.db",
                "usage.worker-2.db",
            }
            fleet.check()
            counted = {name: amount for name, amount in before.items() if name.endswith("counted")}
            assert {name: unfinished(fleet)[name] for name in counted} == counted
            await fleet.send(*TENANTS, connections=2)
            assert await sink.stop() == 0

            sink.document["workers"] = 2
            await sink.start()
            await fleet.send_to_all()
            billing.faults = Faults()
            await eventually(fleet.idle, "everything is settled", why=sink.said)
            assert await sink.stop() == 0
        fleet.check()
        check_bill(fleet, billing)


async def test_workers_end_with_their_supervisor_and_mistakes_end_all(tmp_path: Path) -> None:
    async with BillingStandIn() as billing:
        sink = Sink(tmp_path, url=billing.url, settings=WINDOWS | {"workers": 2})
        fleet = Fleet(sink)
        async with sink:
            await fleet.send_to_all()
            pids = fleet.pids()
            await sink.kill()
            await eventually(lambda: not any(map(running, pids)), "its workers ended", why=sink.said)
            fleet.check()
            assert fleet.lost() == 0  # they drained

            await sink.start()
            sink.config.write_text("nonsense: true\n", encoding="utf-8")
            os.kill(fleet.pids()[1], signal.SIGKILL)
            assert await sink.wait() == 78
            assert not any(map(running, pids))
        fleet.check()

        lock = take_lock(fleet.stores[1])
        ended = await sink.run()
        os.close(lock)
        assert ended.status == 1
        assert "usage.worker-1.db is in use by" in ended.said  # one that cannot start at first ends all


def long_row(total: int, *, end: bool = False) -> bytes:
    """A row of one long stream whose running totals are these; short rows have nothing of it."""
    tags = {"project_name": LOSSY, "conn_id": "7", "dur_ms": "5000", "emit_us": "1795300000000000"}
    kind = DOWNSTREAM_END if end else DOWNSTREAM_PERIODIC
    row = http_row(type=kind, tags=tags, wire=(total, 2 * total), duration_ns=5 * NS_PER_SECOND)
    return message(row, node_id="envoy-1")


async def test_long_streams_meet_at_worker_0_and_signals_reach_all(tmp_path: Path) -> None:
    async with BillingStandIn() as billing:
        sink = Sink(tmp_path, url=billing.url, settings=WINDOWS | {"workers": 2})
        streams = lease_port()
        sink.document["listen"]["streams"] = f"127.0.0.1:{streams}"
        sink.document["envoy"] = {"flush_interval": "1s"}
        sink.document["listen"]["http_tenants"] = True
        fleet = Fleet(sink)
        async with sink:
            await fleet.send_to_all()
            for total in (100, 250, 250, 400):
                async with Connection(streams) as connection:
                    await connection.send(long_row(total, end=total == 400))
            misrouted = 8
            for _ in range(misrouted):
                async with Connection(sink.grpc_port) as connection:
                    await connection.send(long_row(1_000))
            fleet.rows += 4 + misrouted

            # Rules and the like reach both; another number of workers is for the next start.
            sink.document["tenant"] = {"allow_uuid": True}
            sink.config.write_text(yaml.safe_dump(sink.document), encoding="utf-8")
            sink.send_signal(signal.SIGHUP)
            await eventually(
                lambda: workers_that(sink, "reloaded") == {0, 1}, "both took it over", why=sink.said
            )
            sink.config.write_text(yaml.safe_dump(sink.document | {"workers": 3}), encoding="utf-8")
            sink.send_signal(signal.SIGHUP)
            refused = "reload refused, the former configuration goes on"
            await eventually(lambda: workers_that(sink, refused) == {0, 1}, "both refuse it", why=sink.said)
            assert (await sink.metrics())["config_reload_refused"] == 1
            sink.config.write_text(yaml.safe_dump(sink.document), encoding="utf-8")

            said = json.loads((await sink.cli("status", "--json")).said)
            assert [(one["worker"], one["service"]["alive"]) for one in said["workers"]] == [
                (0, True),
                (1, True),
            ]
            assert said["balanced"] is True
            assert "no dead letter was meant" in (await sink.cli("deadletters", "replay")).said

            # One worker drains, and comes back.
            former = fleet.pids()[1]
            os.kill(former, signal.SIGTERM)

            async def back() -> bool:
                return fleet.pids()[1] not in (0, former) and not await sink.reasons()

            await eventually(back, "the worker came back", why=sink.said)
            assert workers_that(sink, "drained") == {1}
            await fleet.send(*TENANTS)
            await eventually(fleet.idle, "everything is settled", why=sink.said)
            await page_names(fleet)
            assert await sink.stop() == 0
        fleet.check()
        assert fleet.lost() == 0
        sums = billing.arrived.sums()
        assert (sums[LOSSY, REQUESTS], sums[LOSSY, INGRESS], sums[LOSSY, EGRESS]) == (1, 400, 800)
        for tenant in TENANTS:
            assert sums[tenant, INGRESS] == fleet.sums[tenant, INGRESS]
        skipped = [reader.status().rows.get("skipped", {}).get("misrouted", 0) for reader in fleet.readers()]
        assert sum(skipped) == misrouted


async def page_names(fleet: Fleet) -> None:
    """Tenants, to a reader on this machine alone."""
    url = f"http://127.0.0.1:{fleet.sink.http_port}/api/state"
    async with aiohttp.ClientSession() as session:
        async with session.get(url, headers={"Host": "elsewhere.example"}) as answer:
            assert (await answer.json())["tenants"] is None
        async with session.get(url) as answer:
            (requests, *_) = (await answer.json())["tenants"]["meters"]
    named = dict(requests["first"])
    assert set(TENANTS) <= set(named)
    assert all(0 < named[tenant] <= fleet.sums[tenant, REQUESTS] for tenant in TENANTS)


def workers_that(sink: Sink, text: str) -> set[int]:
    """Which workers logged it."""
    return {event["worker"] for event in sink.events(text) if "worker" in event}
