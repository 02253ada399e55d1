"""Streams that stay open: each goes one step at a time and counts every byte at its own socket.

    async with WebSocket(address, "alpha.example.com") as stream:
        await stream.step(1000)      # there and back; then both sides have said and read everything
        await stream.end()           # in good order

After a ``step`` or the ``end``, ``written`` and ``read`` are what Envoy's row must say: the socket's bytes,
over HTTP/2 the frames of the one stream (``demo.http2``). Nothing is under way between two steps, so that no
byte is counted by one side alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from abc import ABC, abstractmethod
from base64 import b64encode
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from proxy_usage.demo.http1 import Http1Client, TrafficError
from proxy_usage.demo.http2 import CLIENT_FRAMES, SERVER_FRAMES, FrameCounter

Address = tuple[str, int]
_MASK = b"\x01\x02\x03\x04"
"""What masks WebSocket frames; their size does not depend on it."""
_BINARY, _CLOSE = 0x2, 0x8


class LongStream(ABC):
    """A stream on a connection of its own, with ``tls`` to ``host``; then plaintext is what is counted.

    All methods raise TrafficError when it is broken off.
    """

    def __init__(self, address: Address, host: str, *, tls: ssl.SSLContext | None = None) -> None:
        self._address = address
        self._host = host
        self._tls = tls
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._written = self._read = 0

    async def __aenter__(self) -> Self:
        try:
            self._streams = await asyncio.open_connection(
                *self._address, ssl=self._tls, server_hostname=self._host if self._tls else None
            )
            await self._open()
        except (OSError, EOFError, TrafficError) as error:
            await self.close()
            raise _broken("open", error) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def written(self) -> int:
        """Bytes sent, as Envoy's row counts them."""
        return self._written

    @property
    def read(self) -> int:
        """Bytes received, as Envoy's row counts them."""
        return self._read

    async def step(self, size: int) -> None:
        """Sends ``size`` bytes or more of payload and waits until all of the answer is read."""
        try:
            self._socket()
            await self._step(bytes(size))
        except (OSError, EOFError) as error:
            raise _broken("step", error) from error

    async def end(self) -> None:
        """Ends the stream as its protocol does, and reads to its end."""
        try:
            await self._end()
        except (OSError, EOFError) as error:
            raise _broken("end", error) from error
        await self.close()

    async def close(self) -> None:
        """Closes the socket, whatever there is still to say."""
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    @abstractmethod
    async def _open(self) -> None: ...

    @abstractmethod
    async def _step(self, payload: bytes) -> None: ...

    @abstractmethod
    async def _end(self) -> None: ...

    # --- the socket -------------------------------------------------------------------------------------

    def _socket(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            raise ConnectionError("it is closed")
        return self._streams

    async def _send(self, data: bytes) -> None:
        _, writer = self._socket()
        self._written += len(data)
        writer.write(data)
        await writer.drain()

    async def _exactly(self, size: int) -> bytes:
        reader, _ = self._socket()
        data = await reader.readexactly(size)
        self._read += size
        return data

    async def _until(self, mark: bytes) -> bytes:
        reader, _ = self._socket()
        data = await reader.readuntil(mark)
        self._read += len(data)
        return data

    async def _to_the_end(self) -> None:
        reader, _ = self._socket()
        while data := await reader.read(1 << 16):
            self._read += len(data)

    async def _head(self, head: str, status: int) -> None:
        """Sends a request's head and reads the answer's."""
        await self._send(head.replace("\n", "\r\n").encode("latin-1"))
        answer = await self._until(b"\r\n\r\n")
        if int(answer.split(b" ", 2)[1]) != status:
            raise TrafficError(
                f"not a {status}: {answer.decode('latin-1')[:200]!r}", hint="see the Envoy log"
            )


class Tcp(LongStream):
    """A TCP connection to an echo. ``hello``: what is sent first, e.g. ``client_hello(name)``."""

    def __init__(self, address: Address, *, hello: bytes = b"") -> None:
        super().__init__(address, "")
        self._hello = hello

    async def _open(self) -> None:
        await self._step(self._hello)

    async def _step(self, payload: bytes) -> None:
        await self._send(payload)
        await self._exactly(len(payload))

    async def _end(self) -> None:
        _, writer = self._socket()
        writer.write_eof()
        await self._to_the_end()


class Connect(Tcp):
    """The same through an HTTP/1.1 CONNECT."""

    def __init__(self, address: Address, host: str) -> None:
        super().__init__(address)
        self._host = host

    async def _open(self) -> None:
        await self._head(f"CONNECT {self._host}:443 HTTP/1.1\nhost: {self._host}:443\n\n", 200)


class WebSocket(LongStream):
    """A WebSocket over HTTP/1.1 to an echo at ``/ws``."""

    async def _open(self) -> None:
        key = b64encode(bytes(16)).decode()
        await self._head(
            f"GET /ws HTTP/1.1\nhost: {self._host}\nupgrade: websocket\nconnection: upgrade\n"
            f"sec-websocket-version: 13\nsec-websocket-key: {key}\n\n",
            101,
        )

    async def _step(self, payload: bytes) -> None:
        await self._frame(_BINARY, payload)
        await self._answer()

    async def _end(self) -> None:
        await self._frame(_CLOSE, struct.pack(">H", 1000))
        await self._answer()
        await self._to_the_end()

    async def _frame(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else struct.pack(">BH", 0x80 | 126, size)
        masked = bytes(byte ^ _MASK[index % 4] for index, byte in enumerate(payload))
        await self._send(bytes([0x80 | opcode]) + length + _MASK + masked)

    async def _answer(self) -> None:
        _, length = await self._exactly(2)
        if length == 126:
            (length,) = struct.unpack(">H", await self._exactly(2))
        await self._exactly(length)


class EventStream(LongStream):
    """Server-sent events at ``/events/NAME``: each step has ``publisher``, the upstream itself, send one."""

    def __init__(self, address: Address, host: str, *, publisher: Address) -> None:
        super().__init__(address, host)
        self._publisher = Http1Client(*publisher)

    async def _open(self) -> None:
        await self._head(f"GET /events/{self._host} HTTP/1.1\nhost: {self._host}\n\n", 200)

    async def _step(self, payload: bytes) -> None:
        await self._publish("POST", b"x" * len(payload))
        left = len(b"data: \n\n") + len(payload)
        while left:  # one event, in as many chunks as it pleases the proxy
            left -= await self._chunk()

    async def _end(self) -> None:
        await self._publish("DELETE", b"")
        while await self._chunk():
            continue

    async def close(self) -> None:
        await self._publisher.close()
        await super().close()

    async def _publish(self, method: str, body: bytes) -> None:
        exchange = await self._publisher.request(method, self._host, f"/events/{self._host}", body=body)
        if exchange.status != 204:
            raise TrafficError(f"nobody listens for {self._host}", hint="see the Envoy log")

    async def _chunk(self) -> int:
        size = int(await self._until(b"\r\n"), 16)
        await self._exactly(size + 2)
        return size


class Grpc(LongStream):
    """A bidirectional gRPC call to an echo, over HTTP/2 with prior knowledge."""

    def __init__(self, address: Address, host: str) -> None:
        super().__init__(address, host)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._sent = FrameCounter(CLIENT_FRAMES, preface=True)
        self._received = FrameCounter(SERVER_FRAMES)
        self._stream = 0
        self._echoed = 0
        self._trailers: dict[bytes, bytes] = {}
        self._over = False
        self._failure = ""

    @property
    def written(self) -> int:
        return self._sent.streams.get(self._stream, 0)

    @property
    def read(self) -> int:
        return self._received.streams.get(self._stream, 0)

    async def _open(self) -> None:
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(1 << 24)
        self._stream = self._h2.get_next_available_stream_id()
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", self._host),
            (":path", "/demo.Echo/Both"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        self._h2.send_headers(self._stream, fields)
        await self._step(b"")

    async def _step(self, payload: bytes) -> None:
        message = struct.pack(">BI", 0, len(payload)) + payload
        wanted = self._echoed + len(message)
        while message:
            room = min(self._h2.local_flow_control_window(self._stream), self._h2.max_outbound_frame_size)
            if room <= 0:
                await self._receive()
                continue
            self._h2.send_data(self._stream, message[:room])
            message = message[room:]
        while self._echoed < wanted:
            await self._receive()

    async def _end(self) -> None:
        self._h2.end_stream(self._stream)
        while not self._over:
            await self._receive()
        if self._trailers.get(b"grpc-status") != b"0":
            raise TrafficError(f"not gRPC status 0: {self._trailers}", hint="see the Envoy log")

    async def _receive(self) -> None:
        """Says what there is to say and takes what comes next."""
        reader, writer = self._socket()
        out = self._h2.data_to_send()
        self._sent.feed(out)
        writer.write(out)
        data = await reader.read(1 << 16)
        if not data:
            raise EOFError("the server closed the connection")
        self._received.feed(data)
        try:
            for event in self._h2.receive_data(data):
                self._take(event)
        except h2.exceptions.ProtocolError as error:
            self._failure = repr(error)
        if self._failure:
            raise EOFError(f"the server gave up: {self._failure}")

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.DataReceived):
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            self._echoed += len(event.data)
        elif isinstance(event, h2.events.TrailersReceived):
            self._trailers = dict(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            self._over = True
        elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
            self._failure = repr(event)


def client_hello(server_name: str) -> bytes:
    """The first bytes of a TLS connection to ``server_name``: all of it that a proxy reads."""
    out = ssl.MemoryBIO()
    context = ssl.create_default_context()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=server_name).do_handshake()
    return out.read()


def _broken(what: str, error: Exception) -> TrafficError:
    return TrafficError(f"{what}: the stream broke: {error!r}", hint="see the Envoy log")
