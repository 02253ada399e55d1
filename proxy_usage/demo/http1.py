"""An HTTP/1.1 client that counts every byte it writes to and reads from its socket.

One request at a time: Envoy over-counts what is received when requests are pipelined
(measured), and an exact truth must not depend on that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from proxy_usage.demo.truth import Exchange
from proxy_usage.errors import ProxyUsageError

Header = tuple[str, str]


class TrafficError(ProxyUsageError):
    """The connection broke under a request, so nobody can say what it cost."""


class Http1Client:
    """A keep-alive connection, opened again when the server says that it closes it.

    ``written`` and ``read`` are the bytes of all connections so far.
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.written = 0
        self.read = 0
        self.connections = 0

    async def __aenter__(self) -> Http1Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            try:
                await writer.wait_closed()
            except ConnectionError:
                return  # the server was first

    async def request(
        self,
        method: str,
        authority: str,
        path: str,
        *,
        headers: Sequence[Header] = (),
        body: bytes = b"",
        chunk: int | None = None,
    ) -> Exchange:
        """Sends one request and reads its answer to the end. ``chunk``: send the body in chunks of that size.

        Raises TrafficError when the connection breaks or the answer cannot be read.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address, limit=1 << 20)
            self.connections += 1
        reader, writer = self._streams
        sent = _head(method, authority, path, headers, body, chunk) + _framed(body, chunk)
        before = self.read
        try:
            writer.write(sent)
            await writer.drain()
            self.written += len(sent)
            status, fields = await self._read_head(reader)
            while status in (100, 102, 103):
                status, fields = await self._read_head(reader)
            received = await self._read_body(reader, method, status, fields)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise TrafficError(
                f"{method} {authority}{path}: the connection broke: {error!r}", hint="see the Envoy log"
            ) from error
        if fields.get("connection", "").lower() == "close":
            await self.close()
        return Exchange(status, len(sent), self.read - before, len(body), received)

    async def _line(self, reader: asyncio.StreamReader) -> bytes:
        line = await reader.readuntil(b"\r\n")
        self.read += len(line)
        return line[:-2]

    async def _exactly(self, reader: asyncio.StreamReader, size: int) -> bytes:
        data = await reader.readexactly(size)
        self.read += size
        return data

    async def _read_head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        _, status, *_ = (await self._line(reader)).split(b" ", 2)
        return int(status), await self._read_fields(reader)

    async def _read_fields(self, reader: asyncio.StreamReader) -> dict[str, str]:
        fields = {}
        while line := await self._line(reader):
            name, _, value = line.partition(b":")
            fields[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        return fields

    async def _read_body(
        self, reader: asyncio.StreamReader, method: str, status: int, fields: dict[str, str]
    ) -> int:
        if method == "HEAD" or status in (204, 304):
            return 0
        if fields.get("transfer-encoding", "").lower() == "chunked":
            return await self._read_chunks(reader)
        size = left = int(fields.get("content-length", "0"))
        while left:
            left -= len(await self._exactly(reader, min(left, 1 << 16)))
        return size

    async def _read_chunks(self, reader: asyncio.StreamReader) -> int:
        total = 0
        while size := int((await self._line(reader)).partition(b";")[0], 16):
            await self._exactly(reader, size)
            if await self._line(reader):
                raise ValueError("a chunk is longer than it says")
            total += size
        await self._read_fields(reader)  # trailers
        return total


def _head(
    method: str, authority: str, path: str, headers: Sequence[Header], body: bytes, chunk: int | None
) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        f"host: {authority}",
        *(f"{name}: {text}" for name, text in headers),
    ]
    if chunk is not None:
        lines.append("transfer-encoding: chunked")
    elif body or method in ("POST", "PUT"):
        lines.append(f"content-length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _framed(body: bytes, chunk: int | None) -> bytes:
    if chunk is None:
        return body
    parts = [body[start : start + chunk] for start in range(0, len(body), chunk)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
