"""The program with several receivers of different formats at once: each event reaches each of them, once."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from listening import Client
from program import FAST_OUTPUT, Sink, eventually
from samples_peer import SamplesPeer
from ulid import ULID
from wire import http_row, message

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.listener import lease_port

pytestmark = pytest.mark.e2e

TENANTS = ("alpha", "bravo", "charlie")


async def send(sink: Sink, rows: int) -> None:
    """So many finished requests of each tenant."""
    messages = [
        message(
            *(http_row(tags={"project_name": tenant}, wire=(80, 1_176)) for _ in range(rows)),
            node_id="edge-1",
        )
        for tenant in TENANTS
    ]
    async with Client(sink.grpc_port) as client:
        await client.send(*messages)


def delivered(sink: Sink) -> dict[str, tuple[int, int]]:
    """Delivered and pending events, by output."""
    with sink.reader() as reader:
        return {one.name: (one.delivered, one.pending) for one in reader.status().outputs}


def with_outputs(sink: Sink, *outputs: dict[str, Any]) -> Sink:
    sink.document["outputs"] += [{**FAST_OUTPUT, **output} for output in outputs]
    return sink


async def test_each_event_reaches_each_receiver_once_though_one_is_down_and_the_sink_is_killed(
    tmp_path: Path,
) -> None:
    archive = tmp_path / "archive" / "usage.ndjson"
    # A port outside the range from which others' connections get theirs: it is free while nobody listens.
    async with BillingStandIn() as billing, SamplesPeer(port=lease_port()) as telemetry:
        sink = with_outputs(
            Sink(tmp_path / "sink", url=billing.url),
            {"name": "telemetry", "format": "ceilometer", "url": telemetry.url},
            {"name": "archive", "format": "file", "file": {"path": str(archive), "rotate_every": "1s"}},
        )
        await telemetry.stop()
        async with sink:
            await send(sink, 5)

            async def others_have_it() -> bool:
                found = delivered(sink)
                return found["billing"][0] == found["archive"][0] == 3 * len(TENANTS)

            await eventually(others_have_it, "billing and archive have all", why=sink.said)
            assert delivered(sink)["telemetry"] == (0, 9)
            assert telemetry.posts == []
            await sink.kill()
            await sink.start()
            await send(sink, 7)
            await eventually(
                lambda: delivered(sink)["archive"][0] == 18, "the archive goes on", why=sink.said
            )
            assert delivered(sink)["telemetry"] == (0, 18)
            await telemetry.start()
            await eventually(sink.idle, "all have all", why=lambda: (delivered(sink), sink.said()))
            assert await sink.stop() == 0
        assert set(delivered(sink).values()) == {(18, 0)}

    stored = billing.arrived.stored
    assert len(stored) == 18
    assert billing.arrived.violations == []
    # The samples: the same 128 bits, the same value, tenant and meter.
    assert telemetry.wrong == []
    samples = [sample for post in telemetry.posts for sample in post.body]
    assert Counter(sample["id"] for sample in samples) == Counter(
        str(ULID.from_str(id_).to_uuid()) for id_ in stored
    )
    by_id = {sample["id"]: sample for sample in samples}
    for id_, event in stored.items():
        sample = by_id[str(ULID.from_str(id_).to_uuid())]
        assert (sample["project_id"], sample["volume"]) == (event.tenant, event.value)
        assert sample["resource_metadata"]["meter"] == event.type
    # The archive: the same bytes.
    finished = sorted(archive.parent.glob("usage-*.ndjson"))
    lines = [line for path in (*finished, archive) for line in path.read_bytes().splitlines()]
    assert Counter(lines) == Counter(event.raw for event in stored.values())
    # And all of it is what was sent.
    requests = dict.fromkeys(TENANTS, 0)
    for line in lines:
        event_ = json.loads(line)
        if event_["type"].endswith("/requests"):
            requests[event_["subject"].removeprefix("projects/")] += int(event_["data"]["value"])
    assert requests == dict.fromkeys(TENANTS, 12)


async def test_an_archive_that_cannot_be_written_pauses_alone_and_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    place = tmp_path / "archive"
    async with BillingStandIn() as billing:
        archive = {"path": str(place / "usage.ndjson"), "max_bytes": "1KiB", "rotate_bytes": "1KiB"}
        sink = with_outputs(
            Sink(tmp_path / "sink", url=billing.url),
            {"name": "archive", "format": "file", "file": archive, "batch": {"events": 1, "linger": "0ms"}},
        )
        async with sink:
            await send(sink, 1)

            sink.send_signal(signal.SIGHUP)  # a reload finds nothing to renew in a file
            await eventually(lambda: sink.events("reloaded"), "it is reloaded", why=sink.said)

            async def paused() -> bool:
                return await sink.reasons() == {"output archive paused": "archive_full"}

            await eventually(paused, "readiness says why", why=sink.said)
            assert "move files away" in (await sink.cli("status")).said
            await eventually(
                lambda: delivered(sink)["billing"] == (9, 0), "the bill is not held up", why=sink.said
            )
            assert (await sink.metrics())['output_paused{output="archive"}'] == 1
            assert 0 < delivered(sink)["archive"][0] < 9

            async def taken_away() -> bool:
                for path in place.glob("usage-*.ndjson"):
                    path.rename(tmp_path / path.name)
                return delivered(sink)["archive"] == (9, 0)

            await eventually(taken_away, "it goes on as files are taken away", why=sink.said)

            await eventually(sink.is_ready, "it is ready again", why=sink.said)
        files = [*tmp_path.glob("*.ndjson"), *place.glob("*.ndjson")]
        ids = [json.loads(line)["id"] for path in files for line in path.read_bytes().splitlines()]
        assert sorted(ids) == sorted(billing.arrived.stored)
