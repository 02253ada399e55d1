"""An HTTP/2 client with prior knowledge that counts the frames of each stream.

Envoy's wire bytes of an HTTP/2 request are its HEADERS and DATA frames with their nine-byte headers, a
RST_STREAM that the client sends, and the WINDOW_UPDATEs that Envoy itself sends on the request's stream
(13 bytes each; mostly for an upload that begins before the client knows Envoy's SETTINGS). The preface,
SETTINGS, PING, the connection's WINDOW_UPDATEs and those of the client are in no row (measured). So
frames are counted here as they pass the socket, not as an HTTP library reports them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from proxy_usage.demo.http1 import Header, TrafficError
from proxy_usage.demo.truth import Exchange

_DATA, _HEADERS, _RST_STREAM, _WINDOW_UPDATE, _CONTINUATION = 0x0, 0x1, 0x3, 0x8, 0x9
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER = 9
CLIENT_FRAMES = frozenset({_DATA, _HEADERS, _CONTINUATION, _RST_STREAM})
"""What counts of what a client sends."""
SERVER_FRAMES = frozenset({_DATA, _HEADERS, _CONTINUATION, _WINDOW_UPDATE})
"""What counts of what Envoy sends."""


class FrameCounter:
    """Adds up the sizes of frames per stream, from bytes in whatever pieces they come."""

    def __init__(self, kinds: frozenset[int], *, preface: bool = False) -> None:
        self._kinds = kinds
        self._preface_left = len(_PREFACE) if preface else 0
        self._pending = bytearray()
        self.total = 0
        """All bytes, of every kind."""
        self.streams: dict[int, int] = {}

    def feed(self, data: bytes) -> None:
        self.total += len(data)
        skipped = min(self._preface_left, len(data))
        self._preface_left -= skipped
        self._pending += data[skipped:]
        while len(self._pending) >= _FRAME_HEADER:
            size = _FRAME_HEADER + int.from_bytes(self._pending[:3])
            if len(self._pending) < size:
                return
            stream = int.from_bytes(self._pending[5:9]) & 0x7FFF_FFFF
            if self._pending[3] in self._kinds:
                self.streams[stream] = self.streams.get(stream, 0) + size
            del self._pending[:size]


class _Answer:
    """What has come back on one stream."""

    def __init__(self) -> None:
        self.status = 0
        self.body = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Http2Client:
    """One connection with many streams at a time. ``async with Http2Client(host, port) as client``."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._sent = FrameCounter(CLIENT_FRAMES, preface=True)
        self._received = FrameCounter(SERVER_FRAMES)
        self._answers: dict[int, _Answer] = {}
        self._window = asyncio.Event()
        self._failure: str | None = None

    @property
    def written(self) -> int:
        """All bytes written to the socket, of any kind of frame."""
        return self._sent.total

    @property
    def read(self) -> int:
        """All bytes read from the socket, of any kind of frame."""
        return self._received.total

    async def __aenter__(self) -> Http2Client:
        self._reader, self._writer = await asyncio.open_connection(*self._address)
        self._h2.initiate_connection()
        # Wide windows: the demo is not about flow control, and 64 KiB would only add WINDOW_UPDATEs.
        self._h2.increment_flow_control_window(1 << 24)
        self._flush()
        self._pump = asyncio.create_task(self._read_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pump.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._pump
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def request(
        self, method: str, authority: str, path: str, *, headers: Sequence[Header] = (), body: bytes = b""
    ) -> Exchange:
        """Sends one request on a stream of its own and waits for the end of its answer.

        Raises TrafficError when the stream is reset or the connection breaks.
        """
        self._check()
        stream = self._h2.get_next_available_stream_id()
        answer = self._answers[stream] = _Answer()
        fields = [
            (":method", method),
            (":scheme", "http"),
            (":authority", authority),
            (":path", path),
            *headers,
        ]
        if body:
            fields.append(("content-length", str(len(body))))
        self._h2.send_headers(stream, fields, end_stream=not body)
        self._flush()
        if body:
            await self._send_body(stream, body)
        try:
            await answer.done
        finally:
            self._answers.pop(stream, None)
        wire_in, wire_out = self._sent.streams.pop(stream), self._received.streams.pop(stream)
        return Exchange(answer.status, wire_in, wire_out, len(body), answer.body)

    async def _send_body(self, stream: int, body: bytes) -> None:
        offset = 0
        while offset < len(body):
            self._check()
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if room <= 0:
                self._window.clear()
                await self._window.wait()
                continue
            part = body[offset : offset + room]
            offset += len(part)
            self._h2.send_data(stream, part, end_stream=offset == len(body))
            self._flush()
            await self._writer.drain()

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._sent.feed(data)
            self._writer.write(data)

    async def _read_loop(self) -> None:
        try:
            while data := await self._reader.read(1 << 16):
                self._received.feed(data)
                for event in self._h2.receive_data(data):
                    self._take(event)
                self._flush()
            self._fail("the server closed the connection")
        except (OSError, h2.exceptions.ProtocolError) as error:
            self._fail(repr(error))

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            self._window.set()
        elif isinstance(event, h2.events.ConnectionTerminated):
            self._fail(f"GOAWAY, code {event.error_code}")
        elif isinstance(event, h2.events.DataReceived):
            # Acknowledged also when nobody waits any more, or the connection's window would dry up.
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if event.stream_id in self._answers:
                self._answers[event.stream_id].body += len(event.data)
        elif isinstance(
            event, h2.events.ResponseReceived | h2.events.StreamEnded | h2.events.StreamReset
        ) and (answer := self._answers.get(event.stream_id)):
            self._progress(event, answer)

    def _progress(
        self,
        event: h2.events.ResponseReceived | h2.events.StreamEnded | h2.events.StreamReset,
        answer: _Answer,
    ) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            answer.status = int(dict(event.headers)[b":status"])
        elif answer.done.done():
            return
        elif isinstance(event, h2.events.StreamEnded):
            answer.done.set_result(None)
        else:
            answer.done.set_exception(_broken(f"stream reset, code {event.error_code}"))

    def _fail(self, why: str) -> None:
        self._failure = why
        self._window.set()
        for answer in self._answers.values():
            if not answer.done.done():
                answer.done.set_exception(_broken(why))

    def _check(self) -> None:
        if self._failure is not None:
            raise _broken(self._failure)


def _broken(why: str) -> TrafficError:
    return TrafficError(f"the HTTP/2 connection broke: {why}", hint="see the Envoy log")
