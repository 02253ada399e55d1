"""Pipelined HTTP/1.1: where Envoy's wire bytes are wrong, and its body bytes right.

README states these figures under "What is not guaranteed"; they are Envoy 1.40's.
"""

import asyncio
from pathlib import Path

import pytest
from harness import World
from program import eventually

pytestmark = pytest.mark.e2e

BODIES = (1_000, 2_000, 3_000)


def _post(host: str, body: int, *, last: bool) -> bytes:
    close = "Connection: close\r\n" if last else ""
    head = f"POST /sink HTTP/1.1\r\nHost: {host}\r\nContent-Length: {body}\r\n{close}\r\n"
    return head.encode() + b"x" * body


async def test_bodies_are_exact_where_wire_bytes_are_counted_twice(tmp_path: Path) -> None:
    async with World(tmp_path, tenants=1, record=True) as world:
        host = world.tenants[0].host
        requests = [_post(host, body, last=body == BODIES[-1]) for body in BODIES]
        reader, writer = await asyncio.open_connection("127.0.0.1", world.envoy.port)
        writer.write(b"".join(requests))  # in one piece, before any answer
        received = await reader.read(-1)
        writer.close()

        recorder = world.recorder
        assert recorder is not None
        await eventually(
            lambda: len(list(recorder.rows())) == len(BODIES) + 1, "three rows and their listener row"
        )
        rows = [row.entry for row in recorder.rows() if row.log_name != "conn"]
        assert [row.request.request_body_bytes for row in rows] == list(BODIES)
        # Each row has what was read from the socket and not yet used: its own bytes and all that follow.
        left = [sum(map(len, requests[place:])) for place in range(len(requests))]
        assert [row.common_properties.downstream_wire_bytes_received for row in rows] == left
        assert sum(row.common_properties.downstream_wire_bytes_sent for row in rows) == len(received)
        (listener,) = (row.entry for row in recorder.rows() if row.log_name == "conn")
        assert listener.connection_properties.received_bytes == sum(left)
