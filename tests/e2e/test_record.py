"""Recording what arrives, and what the recording adds up to."""

import asyncio
import json
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from harness import AlsClient
from program import Sink, eventually, intake_rows
from wire import captured

from proxy_usage.config.workers import worker_path
from proxy_usage.control import call, socket_path

pytestmark = pytest.mark.e2e

AT = "2026-11-21T12:00:00Z"


async def _send(sink: Sink, name: str) -> int:
    """A capture, each of its streams on a stream of its own. Returns how many messages that were."""
    streams: dict[int, list[bytes]] = defaultdict(list)
    for stream, raw in captured(name):
        streams[stream].append(raw)
    async with AlsClient(sink.grpc_port) as client:
        for messages in streams.values():
            await client.send(*messages)
    return sum(map(len, streams.values()))


async def _recorded(sink: Sink, path: Path, *options: str, name: str) -> int:
    """Records while a capture is sent, until it is all in the file."""
    recording = asyncio.create_task(
        sink.cli("record", str(path), "--seconds", "600", "--json", *options), name="record"
    )
    while not path.exists():
        assert not recording.done(), (await recording).said
        await asyncio.sleep(0.05)
    sent = await _send(sink, name)
    await _stop(sink.store)
    ended = await recording
    assert ended.status == 0, ended.said
    answer = json.loads(ended.said[ended.said.index("{") :])
    assert (answer["messages"], answer["ended"]) == (sent, "stopped")
    return sent


async def _stop(store: Path) -> None:
    """Ends the recording of the process with this store, as Ctrl-C does."""
    await asyncio.to_thread(call, socket_path(store), "record.stop")


async def _totals(sink: Sink, path: Path) -> Any:
    ended = await sink.cli("explain", str(path), "--replay", "--at", AT, "--json")
    assert ended.status == 0, ended.said
    return json.loads(ended.said)


async def test_a_recording_adds_up_to_what_was_sent(tmp_path: Path) -> None:
    async with Sink(
        tmp_path, url="http://127.0.0.1:1/", settings={"envoy": {"flush_interval": "1s"}}
    ) as sink:
        plain, hashed = tmp_path / "plain.binpb", tmp_path / "hashed.binpb"
        messages = await _recorded(sink, plain, name="h1_basic")
        await _recorded(sink, hashed, "--hash", name="h1_basic")
        original = Path(__file__).parent.parent / "data" / "captures" / "h1_basic.binpb"
        totals = await _totals(sink, plain)
        assert totals == await _totals(sink, original) == await _totals(sink, hashed)
        assert totals["tenants"]["alpha"]["requests"] > 0

        for name in ("long_lived", "websocket_periodic"):  # running totals, on streams that are told apart
            recorded = tmp_path / f"{name}.binpb"
            await _recorded(sink, recorded, name=name)
            assert await _totals(sink, recorded) == await _totals(sink, original.with_name(f"{name}.binpb"))

        received = json.loads(plain.with_suffix(".received.json").read_text())
        assert len(received) == messages == len(json.loads(plain.with_suffix(".streams.json").read_text()))
        assert plain.stat().st_mode & 0o777 == hashed.stat().st_mode & 0o777 == 0o600
        assert b"/size/1000" in plain.read_bytes()
        assert b"/size/1000" not in hashed.read_bytes()
        assert b"127.0.0.1" not in hashed.read_bytes()

        timed = await sink.cli("record", str(tmp_path / "timed.binpb"), "--seconds", "1", "--json")
        answer = json.loads(timed.said[timed.said.index("{") :])
        assert (timed.status, answer["messages"], answer["ended"]) == (0, 0, "time")

        again = await sink.cli("record", str(plain))
        assert again.status == 2
        assert "File exists" in again.said


async def test_a_recording_is_bounded(tmp_path: Path) -> None:
    async with Sink(tmp_path, url="http://127.0.0.1:1/") as sink:
        path = tmp_path / "small.binpb"
        recording = asyncio.create_task(
            sink.cli("record", str(path), "--size", "100KiB", "--seconds", "60", "--print")
        )
        while not path.exists():
            assert not recording.done(), (await recording).said
            await asyncio.sleep(0.05)
        await _send(sink, "h1_basic")  # its first message alone is larger, with the node in it
        ended = await recording
        assert ended.status == 0
        assert "as large as it may be" in ended.said
        assert path.stat().st_size <= 100 << 10
        printed = [json.loads(line) for line in ended.said.splitlines() if line.startswith("{")]
        assert printed
        assert all(line["typed"]["request"]["path"] for line in printed if "request" in line["typed"])


async def test_without_a_service_nothing_is_recorded(tmp_path: Path) -> None:
    sink = Sink(tmp_path, url="http://127.0.0.1:1/")
    async with sink:
        assert await sink.stop() == 0
    ended = await sink.cli("record", str(tmp_path / "none.binpb"))
    assert ended.status == 1
    assert "no service runs here" in ended.said
    assert not (tmp_path / "none.binpb").exists()


async def test_a_recording_is_of_all_workers(tmp_path: Path) -> None:
    async with Sink(tmp_path, url="http://127.0.0.1:1/", settings={"workers": 2}) as sink:
        path = tmp_path / "both.binpb"
        recording = asyncio.create_task(
            sink.cli("record", str(path), "--seconds", "600", "--json"), name="record"
        )
        parts = [tmp_path / f"both.worker-{worker}.binpb" for worker in range(2)]
        await eventually(lambda: all(part.exists() for part in parts), "all record", why=sink.said)
        sent = 0
        while not all(sum(intake_rows(worker_path(sink.store, worker)).values()) for worker in range(2)):
            assert sent < 1_000, "some worker gets no connection"
            sent += await _send(sink, "h1_basic")
        await _stop(worker_path(sink.store, 1))  # where one ends, all do
        ended = await recording
        assert ended.status == 0, ended.said
        assert json.loads(ended.said[ended.said.index("{") :])["messages"] == sent

        assert not any(part.exists() for part in parts)
        received = json.loads(path.with_suffix(".received.json").read_text())
        assert received == sorted(received)
        assert len(received) == sent
        assert path.stat().st_mode & 0o777 == 0o600
        totals = await _totals(sink, path)
        original = await _totals(sink, Path(__file__).parent.parent / "data" / "captures" / "h1_basic.binpb")
        times, rest = divmod(totals["tenants"]["alpha"]["requests"], original["tenants"]["alpha"]["requests"])
        assert (times, rest) == (sent // _messages("h1_basic"), 0)

        again = await sink.cli("record", str(path))
        assert again.status == 2
        assert "File exists" in again.said
        assert not any(part.exists() for part in parts)


def _messages(name: str) -> int:
    return len(list(captured(name)))


async def test_a_worker_that_dies_ends_the_recording_and_its_part_is_kept(tmp_path: Path) -> None:
    async with Sink(tmp_path, url="http://127.0.0.1:1/", settings={"workers": 2}) as sink:
        path = tmp_path / "both.binpb"
        recording = asyncio.create_task(sink.cli("record", str(path), "--seconds", "60"), name="record")
        parts = [tmp_path / f"both.worker-{worker}.binpb" for worker in range(2)]
        await eventually(lambda: all(part.exists() for part in parts), "all record", why=sink.said)
        lock = worker_path(sink.store, 1)
        os.kill(int(lock.with_name(lock.name + ".lock").read_text().split()[1]), signal.SIGKILL)
        ended = await recording
        assert ended.status == 0, ended.said
        assert "(worker 1 died)" in ended.said
        assert f"{parts[1]} is of a worker that died" in ended.said
        assert [part.exists() for part in parts] == [False, True]
