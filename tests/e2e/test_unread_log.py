"""A log that nobody takes, its disk being full or its reader gone or asleep: usage is billed as ever."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from harness import AlsClient
from program import Sink, eventually
from wire import http_row, message

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.checks import METERS

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio]

REQUESTS = METERS[0]
BAD = b"\x12" * 50  # a message that broke off: a line of log each


async def bills(sink: Sink, billing: BillingStandIn) -> None:
    """Rows come in and are delivered, while there is something to log."""
    row = http_row(start_ns=time.time_ns(), tags={"project_name": "alpha"}, wire=(10, 100))
    before = billing.sums().get(("alpha", REQUESTS), 0)
    async with AlsClient(sink.grpc_port) as client:
        await client.send(BAD, message(*5 * [row]))
    await eventually(
        lambda: billing.sums().get(("alpha", REQUESTS), 0) == before + 5, "the rows are billed", why=sink.said
    )


async def lost(sink: Sink) -> int:
    return (await sink.metrics())["log_lines_lost_total"]


async def drops_a_line(sink: Sink, billing: BillingStandIn) -> None:
    """Usage comes in and is billed until one more line has nowhere to go."""
    before = await lost(sink)

    async def more() -> bool:
        await bills(sink, billing)
        return await lost(sink) > before

    await eventually(more, "a line is dropped", why=sink.said)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
async def test_no_place_for_a_log(tmp_path: Path, where: str, workers: int) -> None:
    async with BillingStandIn() as billing:
        sink = Sink(tmp_path, url=billing.url, settings={"workers": workers})
        sink.wrapper = ("sh", "-c", f'exec "$@" {where}', "sh")
        async with sink:
            await bills(sink, billing)

            async def all_lost() -> bool:
                return await lost(sink) >= workers + (workers > 1)  # each says that it serves

            await eventually(all_lost, "what each says is lost, and counted")
            assert await sink.stop() == 0
        assert "Traceback" not in sink.said(), sink.said()


async def test_a_reader_that_stops_reading_and_one_that_goes_away(tmp_path: Path) -> None:
    fifo = tmp_path / "log.fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    async with BillingStandIn() as billing:
        sink = Sink(tmp_path, url=billing.url, settings={"log": {"level": "debug"}})
        sink.wrapper = ("sh", "-c", f'exec "$@" >{fifo}', "sh")
        async with sink:
            filler = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            try:
                while True:
                    os.write(filler, b"x" * 4096)
            except BlockingIOError:
                os.close(filler)
            await drops_a_line(sink, billing)
            os.set_blocking(reader, True)
            found = await asyncio.to_thread(os.read, reader, 1 << 20)
            os.set_blocking(reader, False)

            async def says() -> bool:
                nonlocal found
                await bills(sink, billing)
                try:
                    found += os.read(reader, 1 << 20)
                except BlockingIOError:
                    return False
                return b'"event": "log lines were lost"' in found

            await eventually(says, "the log says what is missing", why=sink.said)
            os.close(reader)
            await drops_a_line(sink, billing)
            assert await sink.stop() == 0
