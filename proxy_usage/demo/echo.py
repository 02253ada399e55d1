"""Peers that send back what they get: over plain TCP, and as a gRPC service over HTTP/2 without TLS.

Both serve the long streams of ``demo.longlived``; a stream ends when its client says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions


class TcpEcho:
    """``async with TcpEcho() as echo: … echo.port``."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host = host
        self.port = port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, h2.exceptions.ProtocolError):  # the client is gone
                await self._serve(reader, writer)
        except asyncio.CancelledError:
            return  # asyncio would log the end of a server's task
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


class GrpcEcho(TcpEcho):
    """A gRPC server, prior knowledge, for any method: each message comes back, then status 0."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers = _Answers()
        writer.write(answers.start())
        while data := await reader.read(1 << 16):
            writer.write(answers.receive(data))
            await writer.drain()


class _Answers:
    """One connection of the gRPC server: bytes in, bytes out."""

    def __init__(self) -> None:
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self._unsent: dict[int, bytearray] = {}
        """Per stream, what waits for room in its window."""
        self._finished: set[int] = set()
        """Streams whose client has said everything."""

    def start(self) -> bytes:
        self._h2.initiate_connection()
        return self._h2.data_to_send()

    def receive(self, data: bytes) -> bytes:
        for event in self._h2.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                self._unsent[event.stream_id] = bytearray()
                fields = [(":status", "200"), ("content-type", "application/grpc")]
                self._h2.send_headers(event.stream_id, fields)
            elif isinstance(event, h2.events.DataReceived):
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self._unsent[event.stream_id] += event.data
            elif isinstance(event, h2.events.StreamEnded):
                self._finished.add(event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self._forget(event.stream_id)
        for stream in tuple(self._unsent):
            self._answer(stream)
        return self._h2.data_to_send()

    def _answer(self, stream: int) -> None:
        unsent = self._unsent[stream]
        while unsent:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if room <= 0:
                return
            self._h2.send_data(stream, bytes(unsent[:room]))
            del unsent[:room]
        if stream in self._finished:
            self._h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
            self._forget(stream)

    def _forget(self, stream: int) -> None:
        self._unsent.pop(stream, None)
        self._finished.discard(stream)
