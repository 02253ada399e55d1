"""The sender of an archive under a courier: what a crash leaves in doubt, and files finished in time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from money import Store

from proxy_usage.config import Config, load_text
from proxy_usage.config.outputs import FileConfig
from proxy_usage.delivery.archive import Archive
from proxy_usage.delivery.filing import FileSender
from proxy_usage.metrics import Metrics
from proxy_usage.outputs.base import Paused, Settled
from proxy_usage.service.build import clock_ms, open_storage
from proxy_usage.service.couriers import build_couriers
from proxy_usage.store import OutputSlot, Queued
from proxy_usage.store.thread import StoreThread

PATIENCE_S = 60.0
HOUR_MS = 3_600_000


def configured(directory: Path) -> Config:
    text = """\
store: {path: usage.db}
outputs:
- {name: archive, format: file, file: {path: archive/usage.ndjson}, dedup_window: 10m, batch: {linger: 0ms}}
"""
    return load_text(text, origin="c.yaml", base=directory, env={})


def ids(directory: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (directory / "usage.ndjson").read_bytes().splitlines()]


async def test_what_was_written_and_not_settled_is_settled_and_not_written_again(tmp_path: Path) -> None:
    """A crash between the archive's sync and the store's, found a day later: there is no doubt about it."""
    config = configured(tmp_path)
    day_ago_ms = clock_ms() - 24 * HOUR_MS
    with Store(tmp_path, outputs=[OutputSlot(0, "archive")]) as store:
        store.add("alpha", "bravo", "charlie", now_ms=day_ago_ms)
        store.db.execute("UPDATE events SET window_ms=?", (day_ago_ms,))
        batch = store.batch(now_ms=day_ago_ms, events=2)
        assert config.outputs[0].file is not None
        archive = Archive(config.outputs[0].file)
        assert isinstance(archive.append(batch.events, day_ago_ms), Settled)
        archive.close()
    storage, thread = open_storage(config), StoreThread()
    (courier,) = build_couriers(config, storage, thread, Metrics())
    running = asyncio.create_task(courier.run())
    async with asyncio.timeout(PATIENCE_S):
        while True:
            tallies = await thread.run(storage.queue.tallies)
            if not tallies.get((1, "pending")):
                break
            await asyncio.sleep(0.005)
    await courier.stop(1)
    await running
    thread.close()
    storage.close()
    assert tallies[1, "delivered"] == 3
    assert "delivered_ambiguous" not in {fate for _, fate in tallies}
    found = ids(tmp_path / "archive")
    assert len(found) == len(set(found)) == 3


async def test_a_file_is_finished_in_time_though_nothing_comes(tmp_path: Path) -> None:
    now_ms = [HOUR_MS - 1]
    sender = FileSender(FileConfig(path=tmp_path / "usage.ndjson", rotate_every=60), lambda: now_ms[0])
    event = Queued(1, "E1", "a", "requests", 1, b'{"specversion":"1.0","id":"E1"}')
    async with sender:
        assert isinstance(await sender.send([event]), Settled)
        assert not list(tmp_path.glob("usage-*"))
        now_ms[0] = HOUR_MS
        async with asyncio.timeout(PATIENCE_S):
            while not list(tmp_path.glob("usage-19700101T010000.000Z.ndjson")):
                await asyncio.sleep(0.005)
    assert ids(tmp_path) == []


async def test_the_archive_is_given_up_when_the_sender_ends(tmp_path: Path) -> None:
    config = FileConfig(path=tmp_path / "usage.ndjson")
    event = Queued(1, "E1", "a", "requests", 1, b'{"specversion":"1.0","id":"E1"}')
    first, second = FileSender(config, clock_ms), FileSender(config, clock_ms)
    async with second:
        async with first:
            assert isinstance(await first.send([event]), Settled)
            assert isinstance(await second.send([event]), Paused)
        assert isinstance(await second.send([event]), Settled)
    assert ids(tmp_path) == ["E1"]
