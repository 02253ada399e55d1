"""A disk that is full or read-only: said clearly at the start, outlived while running, counted at a stop.

The small disks are file systems of their own, which only root may mount; elsewhere those tests are skipped.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import AlsClient, World
from program import Sink, eventually
from wire import http_row, message

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.faults import Fault, Faults

pytestmark = pytest.mark.e2e

STRANGERS = 20_000
NOWHERE = "http://127.0.0.1:9/v1/usage/events:batchIngest"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def fill(place: Path) -> Path:
    """Takes all the room there is."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    continue
            except OSError:
                continue
    return filler


async def test_a_store_on_a_read_only_disk(tmp_path: Path, disk: Path) -> None:
    remount(disk, "ro")
    ended = await Sink(tmp_path, url=NOWHERE, settings={"store": {"path": str(disk / "usage.db")}}).run()
    assert ended.status == 78
    assert str(disk) in ended.said
    assert "hint: " in ended.said
    assert "Traceback" not in ended.said


async def test_a_store_on_a_full_disk(tmp_path: Path, disk: Path) -> None:
    fill(disk)
    ended = await Sink(tmp_path, url=NOWHERE, settings={"store": {"path": str(disk / "usage.db")}}).run()
    assert ended.status == 1
    assert str(disk) in ended.said
    assert "No space left" in ended.said or "full" in ended.said
    assert "Traceback" not in ended.said


async def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path: Path, disk: Path) -> None:
    async with World(tmp_path, settings={"store": {"path": str(disk / "usage.db")}}) as world:
        sink = world.sink
        await world.send(100)
        await world.equal()
        filler = fill(disk)
        await send_until_full(world)
        await eventually(lambda: _counted(sink, world.truth.requests), "rows are read on", why=sink.said)

        async def gave_way() -> bool:
            """The reserve was given up, so that the ledger can make room. Both come after the refusal."""
            metrics = await sink.metrics()
            return metrics["store_reserve"] == 0 and metrics["ledger_rolled_rows_total"] >= 1

        await eventually(gave_way, "the reserve and the ledger give way", why=sink.said)
        assert (await sink.metrics())["store_refused_turns_total"] >= 1
        filler.unlink()
        await world.equal()
        await eventually(sink.is_ready, "it is ready again", why=sink.said)
        await eventually(lambda: _has_reserve(sink), "the reserve is made again", why=sink.said)
        with sink.reader() as reader:
            assert reader.conservation(deep=True).balanced
        assert await sink.stop() == 0


async def send_until_full(world: World) -> None:
    """Sends until readiness names the store: pages that SQLite already has are room for a while."""

    async def says_so() -> bool:
        return "store" in await world.sink.reasons()

    for _ in range(50):
        await world.send(100)
        if await says_so():
            break
    await eventually(says_so, "readiness names the store", why=world.sink.said)


async def test_stopped_while_the_disk_is_full(tmp_path: Path, disk: Path) -> None:
    async with World(tmp_path, settings={"store": {"path": str(disk / "usage.db")}}) as world:
        sink = world.sink
        await world.send(100)
        await world.equal()
        filler = fill(disk)
        await send_until_full(world)
        # More than the pages that SQLite already has can take, now or when the end makes room.
        async with AlsClient(sink.grpc_port) as client:
            for first in range(0, STRANGERS, 500):
                tenants = range(first, first + 500)
                rows = [http_row(tags={"project_name": f"stranger-{number}"}) for number in tenants]
                await client.send(message(*rows, node_id="envoy-1"))
        everything = world.truth.requests + STRANGERS
        await eventually(lambda: _counted(sink, everything), "rows are read on", why=sink.said)
        await sink.stop()
        assert sink.events("stopping with usage that the store does not take")
        gone = sink.read() - sink.saved()
        assert gone >= STRANGERS
        filler.unlink()
        await sink.start()
        assert sink.lost() == gone
        await eventually(sink.idle, "everything is settled", why=sink.said)
        assert sink.read() == sink.with_a_fate() + gone
        with sink.reader() as reader:
            assert reader.conservation(deep=True).balanced
            assert _requests(world.billing) == reader.status().rows["counted"][""]
        assert world.billing.arrived.violations == []


SMALL = {"max_bytes": "1MiB", "ledger_max_bytes": "100KiB"}


async def test_a_store_near_its_limit_merges_and_goes_on(tmp_path: Path) -> None:
    """Few tenants, many windows: merged within their hour they fit for as long as the endpoint is away."""
    async with (
        BillingStandIn() as billing,
        Sink(tmp_path, url=billing.url, settings={"store": SMALL}) as sink,
        AlsClient(sink.grpc_port) as client,
    ):
        billing.faults = Faults(always=Fault.UNAVAILABLE)
        sent: Counter[str] = Counter()

        async def merged() -> bool:
            """One tenant's rows, each of a second of its own of the last half hour."""
            first = sent.total()
            tenant = f"t-{first // 10 % 3}"
            rows = [_row(tenant, 1 + (first + number) % 1_800) for number in range(10)]
            await client.send(message(*rows, node_id="envoy-1"))
            sent[tenant] += len(rows)
            return (await sink.metrics())["events_merged_total"] >= 100

        await eventually(merged, "events are merged", why=sink.said, poll_s=0.2)
        billing.faults = Faults()
        due = {
            (tenant, meter): value
            for tenant, rows in sent.items()
            # Whole seconds are billed, and what is left over is carried from window to window.
            for meter, value in zip(
                METERS, (rows, rows * 10, rows * 100, rows * OPEN_NS // 10**9), strict=True
            )
        }
        await eventually(lambda: billing.sums() == due, "all is delivered", why=lambda: (billing.sums(), due))
        await eventually(sink.idle, "everything is settled", why=sink.said)
        await eventually(sink.is_ready, "it is ready", why=sink.said)
        assert billing.sums() == due
        assert billing.arrived.violations == []
        assert sink.events("checkpoint failed") == []
        with sink.reader() as reader:
            assert reader.conservation(deep=True).balanced


async def test_a_store_at_its_limit_refuses_and_loses_nothing(tmp_path: Path) -> None:
    """Each row of a tenant of its own: there is nothing to merge, and usage waits in memory."""
    async with (
        BillingStandIn() as billing,
        Sink(tmp_path, url=billing.url, settings={"store": SMALL}) as sink,
    ):
        billing.faults = Faults(always=Fault.UNAVAILABLE)
        sent = 0
        async with AlsClient(sink.grpc_port) as client:

            async def says_so() -> bool:
                nonlocal sent
                rows = [_row(f"t-{sent + number}") for number in range(50)]
                await client.send(message(*rows, node_id="envoy-1"))
                sent += len(rows)
                return "store full: " in (await sink.reasons()).get("store", "")

            await eventually(says_so, "readiness names the store", why=sink.said, poll_s=0.3)
        assert "raise store.max_bytes" in sink.log.read_text()
        assert (await sink.metrics())["store_refused_turns_total"] >= 1
        assert (
            sum(path.stat().st_size for path in tmp_path.glob("usage.db*") if path.suffix != ".intake")
            <= 1 << 20
        )
        billing.faults = Faults()
        await eventually(lambda: _requests(billing) == sent, "everything is delivered", why=sink.said)
        await eventually(sink.idle, "everything is settled", why=sink.said)
        await eventually(sink.is_ready, "it is ready again", why=sink.said)
        with sink.reader() as reader:
            assert reader.conservation(deep=True).balanced


async def _has_reserve(sink: Sink) -> bool:
    return (await sink.metrics())["store_reserve"] == 1


OPEN_NS = 333_333_333


def _row(tenant: str, age_s: int = 0) -> Any:
    """A finished request of just now, or so long ago."""
    return http_row(
        start_ns=time.time_ns() - OPEN_NS - age_s * 1_000_000_000,
        tags={"project_name": tenant},
        duration_ns=OPEN_NS,
        wire=(10, 100),
        route="httproute/ns-a/web/rule/0/match/0/a",
    )


def _requests(billing: BillingStandIn) -> int:
    return sum(value for (_, meter), value in billing.sums().items() if meter == METERS[0])


async def _counted(sink: Sink, rows: int) -> bool:
    """By /metrics, which know of rows that the store does not take."""
    return (await sink.metrics())["entries_counted_total"] == rows
