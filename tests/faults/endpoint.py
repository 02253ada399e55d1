"""An endpoint on a real socket that does, request by request, exactly what a behaviour says.

It remembers what it stored, byte by byte, so that an event sent with two contents is found, and what was
taken for delivered and never stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

Behaviour = Callable[["Exchange"], Awaitable[None]]
Greeting = Callable[["Endpoint", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]
"""What happens before a request is read. False: nothing more."""


class Exchange:
    """One request, read whole, and the way to answer it."""

    def __init__(self, endpoint: Endpoint, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.endpoint = endpoint
        self.events = [bytes(raw) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
        self.ids = [str(json.loads(raw)["id"]) for raw in self.events]
        self.tenants = [str(json.loads(raw)["subject"]).removeprefix("projects/") for raw in self.events]
        self.writer = writer
        self.keep = True
        """Whether the connection stays open."""

    def store(self, start: int = 0, end: int | None = None) -> int:
        """Stores events by their places. Returns how many of the request."""
        for id_, raw in list(zip(self.ids, self.events, strict=True))[start:end]:
            if self.endpoint.stored.setdefault(id_, raw) != raw:
                self.endpoint.conflicts.append(id_)
        return len(self.ids[start:end])

    async def raw(self, *pieces: bytes, pause_s: float = 0) -> None:
        """Sends bytes as they are, after which the connection ends."""
        self.keep = False
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            if pause_s:
                await asyncio.sleep(pause_s)

    async def pour(self, piece: bytes, limit: int = 256 << 20) -> None:
        """Sends the same again and again until nobody reads any more."""
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < limit:
                await self.raw(piece)
                sent += len(piece)
                self.endpoint.poured = max(self.endpoint.poured, sent)

    async def answer(
        self, body: Any, status: str = "200 OK", *headers: str, keep: bool = True, version: str = "HTTP/1.1"
    ) -> None:
        """A whole answer; ``body`` as JSON unless it is bytes."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.raw(response(raw, status, *headers, version=version))
        self.keep = keep

    async def accept(self) -> None:
        """What a sane endpoint does."""
        await self.answer({"accepted": self.store()})

    def reset(self) -> None:
        """Ends the connection with a reset."""
        self.keep = False
        peer = self.writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Endpoint:
    """Behaves badly for ``times`` requests (None: always), then well.

    ``greet`` is what happens on each of the first ``times`` connections instead of reading a request.
    """

    def __init__(
        self,
        behave: Behaviour | None = None,
        *,
        times: int | None = 3,
        greet: Greeting | None = None,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        self.stored: dict[str, bytes] = {}
        self.conflicts: list[str] = []
        self.requests = 0
        self.connections = 0
        self.poured = 0
        """Bytes that the longest answer without end came to before nobody read on."""
        self._behave, self._times, self._greet = behave, times, greet
        self._tls = tls
        self.port = port
        self._talks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Endpoint:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for talk in self._talks:
            talk.cancel()
        await asyncio.gather(*self._talks, return_exceptions=True)

    @property
    def url(self) -> str:
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}/v1/usage/events:batchIngest"

    def _bad(self, count: int) -> bool:
        return self._times is None or count <= self._times

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = asyncio.current_task()
        assert talk is not None
        self._talks.add(talk)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                await self._talk(reader, writer)
        finally:
            self._talks.discard(talk)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._greet is not None and self._bad(self.connections):
            if not await self._greet(self, reader, writer):
                return
        elif self._tls is not None:
            await writer.start_tls(self._tls)
        keep = True
        while keep:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            exchange = Exchange(self, await reader.readexactly(length), writer)
            self.requests += 1
            if self._behave is not None and self._bad(self.requests):
                await self._behave(exchange)
            else:
                await exchange.accept()
            keep = exchange.keep


def response(body: bytes, status: str = "200 OK", *headers: str, version: str = "HTTP/1.1") -> bytes:
    """An HTTP answer with its right length, unless a header gives another."""
    lines = [f"{version} {status}", *headers]
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body
