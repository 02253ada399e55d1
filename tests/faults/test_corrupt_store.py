"""The store rots under a running sink, or lies broken where one starts: everything is accounted for.

What was minted is delivered, a dead letter to be decided on, or missing by number; what was read and is
nowhere is reported as unknown.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from damage import leaves, overwrite
from harness import AlsClient
from program import Sink, eventually
from wire import http_row, message

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.faults import Fault, Faults

TENANTS = 2_500
AT_ONCE = 500
NODE = "envoy-1"


async def send(sink: Sink, tenants: range) -> None:
    """One request of each tenant, and waits until all are events."""
    async with AlsClient(sink.grpc_port) as client:
        for first in range(tenants.start, tenants.stop, AT_ONCE):
            rows = [
                http_row(
                    tags={"project_name": f"tenant-{number}"},
                    start_ns=time.time_ns() - 2_000_000,
                    duration_ns=1_000_000,
                    wire=(10 + number, 100),
                )
                for number in tenants[first - tenants.start :][:AT_ONCE]
            ]
            await client.send(message(*rows, node_id=NODE))
    await eventually(lambda: sink.read() == sink.saved(), "all that was read is durable", why=sink.said)
    await eventually(lambda: closed(sink), "every window is closed", why=sink.said)


def closed(sink: Sink) -> bool:
    with sink.reader() as reader:
        return reader.status().open_windows == 0


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(path, timeout=10)
    found = db.execute(sql).fetchall()
    db.close()
    return found


def bodies(path: Path) -> dict[str, bytes]:
    """Events that some output has not settled, or refused: bytes by id."""
    return dict(rows(path, "SELECT id, body FROM events"))


def counted(path: Path) -> int:
    """Events in a store; none in one that is being made."""
    tables = {name for (name,) in rows(path, "SELECT name FROM sqlite_master")}
    return len(bodies(path)) if "events" in tables else 0


def into_the_file(path: Path) -> None:
    """Everything is in the database itself, nothing in its log: that is what a disk loses."""
    for _ in range(100):
        ((busy, _, _),) = rows(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        if not busy:
            return
        time.sleep(0.05)
    raise AssertionError("the log was never free")


def salvage_ended(sink: Sink) -> bool:
    return bool(sink.events("store salvaged"))


def lies_aside(directory: Path) -> list[Path]:
    """Stores that were set aside."""
    return [path for path in directory.iterdir() if path.name.endswith("Z") and ".aside-" in path.name]


async def salvaged(sink: Sink) -> dict[str, Any]:
    """Waits until the file is brought over; gives what the log says of it."""
    await eventually(lambda: sink.events("store salvaged"), "the store is salvaged", why=sink.said)
    return sink.events("store salvaged")[-1]


async def test_pages_are_lost_under_a_running_sink(tmp_path: Path) -> None:
    async with BillingStandIn() as billing, Sink(tmp_path, url=billing.url) as sink:
        store, stored = sink.store, billing.arrived.stored
        await send(sink, range(50))
        await eventually(sink.idle, "the first events are delivered", why=sink.said)
        first = len(stored)
        assert first == 50 * 3
        billing.faults = Faults(always=Fault.UNAVAILABLE)
        await send(sink, range(50, TENANTS))
        made = bodies(store)
        assert len(made) == (TENANTS - 50) * 3

        # Far more than a cache holds: whoever delivers them must read what is no longer there.
        into_the_file(store)
        pages = leaves(store, "events")
        overwrite(store, pages[len(pages) // 3 :: 5])
        billing.faults = Faults()
        assert await sink.wait() == 1
        said = sink.log.read_text()
        assert "error: the stage 'output billing' ended: store" in said
        assert "hint: start the service again: it sets the file aside and keeps what can be read" in said
        assert "Traceback" not in said

        # The endpoint is away once more, so that nothing blurs what the next start finds.
        billing.faults = Faults(always=Fault.UNAVAILABLE)
        delivered = len(stored) - first
        assert 0 < delivered < len(made)
        await sink.start()
        report = await salvaged(sink)
        (lies,) = lies_aside(tmp_path)
        (told,) = sink.events("store set aside")
        assert told["file"] == lies.name
        assert "damaged" in told["reason"]
        (crash,) = sink.events("a crash lost entries")
        assert (crash["rows"], crash["unknown_nodes"]) == ({}, [NODE])
        assert (await sink.metrics())["stores_set_aside"] == 1

        with sink.reader() as reader:
            letters = reader.dead_letters(limit=100_000)
            status, sums = reader.status(), reader.conservation(deep=True)
        assert sums.balanced, sums
        assert {one.reason for one in letters} == {"salvaged"}
        kept = bodies(store)
        assert kept.keys() == {one.id for one in letters}
        assert kept.items() <= made.items()
        # To the event: settled before, kept, or missing by number and value.
        settled = sum(
            events for (events,) in rows(lies, "SELECT events FROM tallies WHERE fate LIKE 'delivered%'")
        )
        missing = sum(events for events, _ in report["missing"].values())
        assert missing > 0
        assert first + len(made) == settled + len(kept) + missing
        assert settled <= len(stored)
        assert len(made.keys() - kept.keys() - stored.keys()) <= missing
        assert status.crash_unknown == {NODE: 1}
        assert status.crash_lost == {}
        said = (await sink.cli("status")).said
        assert lies.name in said
        assert f"salvaged {len(kept)} events" in said
        assert f"missing: {missing}" in said
        checked = await sink.cli("store", "check", str(lies))
        assert checked.status == 1
        assert f"{len(kept)} events" in checked.said

        # It meters on, and what was kept can be sent: nothing is billed twice by it.
        billing.faults = Faults()
        await send(sink, range(TENANTS, TENANTS + 20))
        replayed = await sink.cli("deadletters", "replay", "--reason", "salvaged")
        assert replayed.status == 0
        await eventually(sink.idle, "everything is settled", why=sink.said)
        assert kept.keys() <= stored.keys()
        assert len(made.keys() - stored.keys()) <= missing
        assert billing.arrived.violations == []
        with sink.reader() as reader:
            assert reader.conservation(deep=True).balanced
            assert reader.dead_letters() == ()
        assert await sink.stop() == 0


@pytest.mark.parametrize("broken", ["no database", "half of it", "another program's"])
async def test_a_broken_file_lies_where_the_sink_starts(tmp_path: Path, broken: str) -> None:
    async with BillingStandIn(faults=Faults(always=Fault.UNAVAILABLE)) as billing:
        sink = Sink(tmp_path, url=billing.url)
        await sink.start()
        try:
            await send(sink, range(200))
            assert await sink.stop() == 0
            made = bodies(sink.store)
            content = sink.store.read_bytes()
            if broken == "no database":
                sink.store.write_bytes(b"\x5a" * len(content))
            elif broken == "half of it":
                sink.store.write_bytes(content[: len(content) // 2])
            else:
                sink.store.unlink()
                rows(sink.store, "CREATE TABLE precious(x)")
            await sink.start()
            await eventually(lambda: sink.events("store set aside"), "it is said", why=sink.said)
            if broken == "half of it":
                report = await salvaged(sink)
                kept = bodies(sink.store)
                assert kept.items() <= made.items()
                assert report["missing"] is None or sum(n for n, _ in report["missing"].values()) == len(
                    made
                ) - len(kept)
            else:
                await eventually(lambda: sink.events("nothing could be salvaged"), "that, too", why=sink.said)
            billing.faults = Faults()
            await send(sink, range(200, 210))
            await eventually(sink.idle, "it meters on", why=sink.said)
            assert await sink.stop() == 0
            await sink.start()  # once is enough
            assert len(sink.events("store set aside")) == 1
            assert len(sink.events("a crash lost entries")) == 1
        finally:
            await sink.kill()


async def test_a_salvage_that_is_killed_goes_on_at_the_next_start(tmp_path: Path) -> None:
    async with BillingStandIn(faults=Faults(always=Fault.UNAVAILABLE)) as billing:
        sink = Sink(tmp_path, url=billing.url)
        await sink.start()
        try:
            await send(sink, range(TENANTS))
            assert await sink.stop() == 0
            made = bodies(sink.store)
            overwrite(sink.store, leaves(sink.store, "ledger"))
            overwrite(sink.store, leaves(sink.store, "events")[-1:])
            reached = 0
            for _ in range(3):
                await sink._spawn()  # it begins before it serves

                def further(seen: int = reached) -> bool:
                    there = lies_aside(tmp_path) and sink.store.exists()
                    return (bool(there) and counted(sink.store) > seen) or salvage_ended(sink)

                await eventually(further, "some of it is brought over", why=sink.said, poll_s=0.002)
                await sink.kill()
                reached = len(bodies(sink.store))
            await sink.start(ready=False)
            await salvaged(sink)
            kept = bodies(sink.store)
            assert kept.items() <= made.items()
            with sink.reader() as reader:
                (aside,) = reader.status().asides
                assert reader.conservation(deep=True).balanced
                assert Counter(one.id for one in reader.dead_letters(limit=100_000)) == Counter([*kept])
            assert aside.report.state == "done"
            assert aside.report.events == len(kept)
            assert aside.report.missing is not None
            assert sum(n for n, _ in aside.report.missing.values()) == len(made) - len(kept)
            assert len(sink.events("store set aside")) == 1
        finally:
            await sink.kill()


async def test_a_volume_from_a_backup_sends_nothing_by_itself(tmp_path: Path) -> None:
    async with BillingStandIn(faults=Faults(always=Fault.UNAVAILABLE)) as billing:
        sink = Sink(tmp_path / "live", url=billing.url)
        await sink.start()
        try:
            await send(sink, range(100))
            assert await sink.stop() == 0
            made = bodies(sink.store)
            shutil.copytree(tmp_path / "live", tmp_path / "backup")
            billing.faults = Faults()
            await sink.start()
            await eventually(sink.idle, "everything is delivered", why=sink.said)
            assert await sink.stop() == 0
            assert billing.arrived.stored.keys() == made.keys()

            shutil.rmtree(tmp_path / "live")
            shutil.copytree(tmp_path / "backup", tmp_path / "live")
            sink.arguments = ("--restored",)
            await sink.start()
            (told,) = sink.events("store restored from a backup")
            assert told["dead_letters"] == len(made)
            await send(sink, range(100, 110))
            await eventually(sink.idle, "what is new is delivered", why=sink.said)
            assert billing.arrived.duplicates == 0
            with sink.reader() as reader:
                letters = reader.dead_letters(limit=100_000)
                status = reader.status()
                assert reader.conservation(deep=True).balanced
            assert {one.id for one in letters} == made.keys()
            assert {one.reason for one in letters} == {"restored"}
            assert status.crash_lost == {}
            assert status.crash_unknown == {NODE: 1}
            assert "from a backup, 300 dead letters" in (await sink.cli("status")).said
            assert await sink.stop() == 0
            sink.arguments = ()
            await sink.start()
            assert len(sink.events("store restored from a backup")) == 1
            assert await sink.stop() == 0
            assert billing.arrived.duplicates == 0
        finally:
            await sink.kill()
