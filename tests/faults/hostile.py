"""A client that does what it likes: HTTP/2 frame by frame, over plain TCP.

async with Raw(port) as raw:
    stream = raw.open()                       # headers of a log stream
    await raw.write_message(stream, size=64 << 20, sent=60 << 20)
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions

PATH = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"


class Raw:
    """One connection. Everything the server says is read; ``ended`` has how streams ended."""

    def __init__(self, port: int) -> None:
        self.ended: dict[int, str] = {}
        """grpc-status, or ``reset``, by stream."""
        self.closed = asyncio.Event()
        self.goaway = asyncio.Event()
        self.settled = asyncio.Event()
        """The server's settings have come."""
        self._port = port
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True, header_encoding="utf-8", validate_outbound_headers=False
            )
        )
        self._moved = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._h2.initiate_connection()
        self._flush()
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listening.cancel()
        self._writer.transport.abort()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listening

    async def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._reader.read(1 << 16):
                try:
                    events = self._h2.receive_data(data)
                except h2.exceptions.ProtocolError:
                    break
                for event in events:
                    self._note(event)
                self._flush()
                self._moved.set()
        self.closed.set()
        self._moved.set()

    def _note(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            for name, value in event.headers or ():
                if str(name) == "grpc-status" and event.stream_id is not None:
                    self.ended[event.stream_id] = str(value)
        elif isinstance(event, h2.events.StreamReset) and event.stream_id is not None:
            self.ended.setdefault(event.stream_id, "reset")
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            self.settled.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaway.set()

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())

    def open(self, *extra: tuple[str, str], path: str = PATH) -> int:
        """Begins a stream, of rows unless said otherwise."""
        stream = self._h2.get_next_available_stream_id()
        self._h2.send_headers(
            stream,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", "sink"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                *extra,
            ],
        )
        self._flush()
        return stream

    def reset(self, stream: int) -> None:
        self._h2.reset_stream(stream)
        self._flush()

    def ping(self) -> None:
        self._h2.ping(bytes(8))
        self._flush()

    async def drained(self) -> None:
        """Waits until the kernel took what was written."""
        await self._writer.drain()

    async def write_message(self, stream: int, payload: bytes) -> bool:
        """A whole message."""
        return await self.write(stream, struct.pack(">BI", 0, len(payload)) + payload)

    async def begin_message(self, stream: int, size: int, sent: int) -> bool:
        """The first ``sent`` bytes of a message of ``size``."""
        piece = bytes(1 << 16)
        if not await self.write(stream, struct.pack(">BI", 0, size)):
            return False
        for _ in range(sent // len(piece)):
            if not await self.write(stream, piece):
                return False
        return True

    async def write(self, stream: int, data: bytes, *, patience_s: float = 30) -> bool:
        """Sends bytes as flow control lets them go; False when the stream ended or nothing moves."""
        view = memoryview(data)
        try:
            while view:
                room = min(
                    self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size, len(view)
                )
                if room > 0:
                    self._h2.send_data(stream, bytes(view[:room]))
                    self._flush()
                    await self._writer.drain()
                    view = view[room:]
                    continue
                self._moved.clear()
                async with asyncio.timeout(patience_s):
                    await self._moved.wait()
                if stream in self.ended or self.closed.is_set():
                    return False
        except (h2.exceptions.ProtocolError, OSError, TimeoutError):
            return False
        return stream not in self.ended
