"""When a drained port ends its streams: not before Envoy can know that it is closed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from listening import Client, Listening, soon
from wire import http_row, message

from proxy_usage.receiver.receiver import NOTICE_MS
from proxy_usage.receiver.stream import QUIET_MS

START_MS = 1_795_300_000_000


class Clock:
    """Told what time it is."""

    def __init__(self) -> None:
        self.ms = START_MS

    def __call__(self) -> int:
        return self.ms


async def _sends(stream: Any, port: Listening, clock: Clock, gap_ms: int) -> None:
    """Three messages, so far apart; the last of them just now."""
    for number in range(1, 4):
        clock.ms += gap_ms
        await stream.write(message(http_row(), node_id="a"))
        await _read(port, number)


async def _read(port: Listening, rows: int) -> None:
    async with soon():
        while port.read < rows:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("gap_ms", "messages"),
    [(1_000, 1), (NOTICE_MS // 2, 1), (NOTICE_MS // 2 - 50, 2), (100, NOTICE_MS // 100 - 1)],
)
async def test_a_stream_ends_when_its_sender_knows_at_its_next_message(gap_ms: int, messages: int) -> None:
    clock = Clock()
    async with Listening(clock_ms=clock) as port, Client(port.port) as client:
        stream = client.stream()
        await _sends(stream, port, clock, gap_ms)
        draining = asyncio.create_task(port.receiver.drain(30))
        with pytest.raises(OSError):  # noqa: PT012 (until nobody listens)
            while True:
                _, writer = await asyncio.open_connection("127.0.0.1", port.port)
                writer.close()
        for number in range(1, messages + 1):
            assert not stream.done(), f"ended after {number - 1} of {messages}"
            clock.ms += gap_ms
            await stream.write(message(http_row(), node_id="a"))
            await _read(port, 3 + number)
        async with soon():
            assert await stream == b""
            await draining
        assert port.read == 3 + messages


async def test_a_quiet_stream_goes_on_until_its_sender_knows() -> None:
    clock = Clock()
    async with Listening(clock_ms=clock) as port, Client(port.port) as client:
        stream = client.stream()
        await _sends(stream, port, clock, 50)
        draining = asyncio.create_task(port.receiver.drain(30))
        await asyncio.sleep(0.2)
        clock.ms += NOTICE_MS - 100
        await asyncio.sleep(0.2)
        assert not stream.done()
        clock.ms += 100 + QUIET_MS
        async with soon():
            assert await stream == b""
            await draining
