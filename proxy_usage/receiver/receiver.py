"""The gRPC AccessLogService: reads always, answers never, forgets nothing it has read.

Envoy answers backpressure with silent loss, so a stream is read as fast as it comes and never waits for a
disk. The service path is registered by a generic handler and messages stay bytes; nothing of gRPC and nothing
of protobuf's generated code goes further than this package and ``decode``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
import structlog

from proxy_usage.admission import Admission, Refusal, refuse_identifier
from proxy_usage.decode import Split, parts, read_identifier
from proxy_usage.errors import DecodeError, ListenError
from proxy_usage.metrics import Metrics
from proxy_usage.model import Origin
from proxy_usage.nodes import Nodes
from proxy_usage.receiver.arrivals import Arrivals, Connection, connection
from proxy_usage.receiver.credentials import Credentials, TlsFiles
from proxy_usage.receiver.health import PortHealth
from proxy_usage.receiver.port import ReceiverLimits, check_free, options
from proxy_usage.receiver.room import FIRST_MESSAGE, MEMORY, Room
from proxy_usage.receiver.scheduling import giving_way
from proxy_usage.receiver.stream import Stream

log = structlog.get_logger()

SERVICE = "envoy.service.accesslog.v3.AccessLogService"
LOOK_S, CLOSE_LOOK_S = 0.1, 0.02
"""How often it is looked whether streams have to end; the latter where ``Room.needs_close_look``."""
NOTICE_MS = 600
"""Envoy's health checks, every 250 ms as recommended, notice within that a port is closed. An Envoy that
believes in it opens its next stream at once when one ends, and loses what it sends; one that knows better
keeps it. (At a flush interval of 100 ms, 10 of 12 restarts of a lone sink lost a flush or two.)"""
_BROKEN_OFF_S = 0.05
"""A stream that broke off reads like one that ended; so soon afterwards gRPC tells them apart."""


T = TypeVar("T")

_stream_numbers = itertools.count(1)


class Sink(Protocol):
    """Where rows go: called on the event loop, must not block."""

    def __call__(self, origin: Origin, part: Split, now_ms: int) -> None: ...


class Tap(Protocol):
    """Sees every message before its rows are taken: a recording."""

    def __call__(self, stream: int, origin: Origin, raw: bytes, now_ms: int) -> None: ...


class Receiver:
    """One listening port.

    Args:
        node_paths: ``FoldPlan.node_paths``.
        nodes, room: shared by all ports of a process.
        clock_ms: the wall clock in milliseconds.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        sink: Sink,
        tap: Tap,
        node_paths: tuple[tuple[str, ...], ...],
        limits: ReceiverLimits,
        metrics: Metrics,
        nodes: Nodes,
        room: Room,
        clock_ms: Callable[[], int],
        admission: Admission | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self.port = port
        self._host = host
        self._sink = sink
        self._tap = tap
        self._node_paths = node_paths
        self._limits = limits
        self._metrics = metrics
        self._nodes = nodes
        self._room = room
        self._clock_ms = clock_ms
        self._admission = admission or Admission()
        self._credentials = Credentials(tls) if tls is not None else None
        self._draining = False
        self._noticed_ms = 0  # when Envoy knows that the port is closed
        self._streams: set[Stream] = set()
        self._since_ms: dict[Connection, int] = {}  # when a connection's first stream began
        self._arrivals = Arrivals(port)
        self._messages = self._bytes = 0  # read since the metrics were told
        self.guard: asyncio.Task[None] | None = None
        """Holds senders to their bounds while the port is open."""
        self._health = PortHealth(self._asked)
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listens and reports itself as serving. Returns the port, also where 0 was asked for.

        Raises:
            ListenError: the address cannot be bound; says why.
        """
        with giving_way():  # gRPC starts its threads here
            server = grpc.aio.server(options=options(self._limits))
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(self._stream)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, {"StreamAccessLogs": handler}),
                self._health.handler(),
            )
        )
        check_free(self._host, self.port, shared=self._limits.shared)
        address = f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"
        try:
            if self._credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, self._credentials.server())
        except RuntimeError as error:
            raise ListenError(
                f"cannot listen on {address}: {error}", hint="listen.grpc names an address of this machine"
            ) from None
        await server.start()
        self._server = server
        self._arrivals = Arrivals(self.port)
        self.guard = asyncio.create_task(self._look_on(), name=f"port {self.port}")
        await self._health.serving("", SERVICE)
        return self.port

    def admit(self, admission: Admission, tls: TlsFiles | None) -> None:
        """Lets others in from now on. Open streams whose senders may not send any more are ended.

        TLS itself cannot be switched on or off, nor whether clients must show a certificate.
        """
        self._admission = admission
        if self._credentials is not None and tls is not None:
            self._credentials.files = tls
        for stream in self._streams:
            if stream.asks:
                continue
            peer, refusal = admission.admit(stream.auth, stream.metadata)
            if refusal is None and stream.origin is not None:
                refusal = admission.refuse_node(peer, stream.origin.node_id)
            if refusal is not None:
                self._end(stream, refusal)

    async def drain(self, timeout_s: float) -> None:
        """Ends all streams without losing what was sent on them.

        Health says NOT_SERVING, the port is closed, GOAWAY goes out; each stream is read on and ended with OK
        after the first message whose successor Envoy sends when it has noticed, or when it is quiet. (Waiting
        for quiet alone never ends under load.)
        """
        if self._server is None:
            return
        self._draining = True
        self._noticed_ms = self._clock_ms() + NOTICE_MS
        await self._health.drain()
        stopping = asyncio.create_task(self._server.stop(timeout_s))
        while not stopping.done():
            self._end_quiet()
            await asyncio.wait([stopping], timeout=0.05)
        await stopping
        if self.guard is not None:
            self.guard.cancel()

    # --- which streams have to end ----------------------------------------------------------------------

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(CLOSE_LOOK_S if self._room.needs_close_look else LOOK_S)
            self._tell()
            self._metrics.connections.set(self._room.connections)
            received = self._arrivals.received(self._since_ms.keys())
            for doomed in self._room.look(received):
                for stream in [one for one in self._streams if one.connection == doomed]:
                    self._end(stream, MEMORY)
            # gRPC's GOAWAY has gone out by now: it comes at the age, give or take a tenth.
            before_ms = self._clock_ms() - self._limits.connection_age_ms * 11 // 10
            for stream in self._streams:
                if self._since_ms[stream.connection] < before_ms:
                    stream.end_soon(self._clock_ms())
            self._end_quiet()

    def _tell(self) -> None:
        """Tells the metrics what was read. Theirs is a lock for each figure: too dear for every message."""
        self._metrics.messages.inc(self._messages)
        self._metrics.received_bytes.inc(self._bytes)
        self._messages = self._bytes = 0

    def _end_quiet(self) -> None:
        now_ms = self._clock_ms()
        for stream in self._streams:
            if self._draining:
                stream.end_soon(now_ms)
            if stream.is_quiet(now_ms) and now_ms >= self._noticed_ms:
                stream.task.cancel()

    def _end(self, stream: Stream, refusal: Refusal) -> None:
        if stream.refusal is None:
            stream.refusal = refusal
            stream.task.cancel()

    # --- one stream -------------------------------------------------------------------------------------

    async def _stream(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> bytes:
        """One access-log stream, until the client ends it. The answer is an empty message."""
        task = asyncio.current_task()
        assert task is not None
        metadata = {name.lower(): str(value) for name, value in context.invocation_metadata() or ()}
        far_end = connection(context.peer()) or Connection(context.peer(), 0)
        stream = Stream(task, far_end, _auth(context), metadata, self._clock_ms())
        stream.peer, refusal = self._admission.admit(stream.auth, metadata)
        if refusal is not None:
            await self._refuse(context, refusal)
        self._opened(stream)
        try:
            await self._read(requests, context, stream)
            if stream.ending_ms is None and not self._draining:
                await asyncio.sleep(_BROKEN_OFF_S)
        except asyncio.CancelledError:
            if stream.refusal is not None:
                await self._refuse(context, stream.refusal)
            # Ended by us: the client hears OK. Ended by the client: nobody listens any more.
            if stream.ending_ms is None and not self._draining:
                self._metrics.broken_streams.inc()
                raise
        finally:
            self._closed(stream)
        return b""

    def _opened(self, stream: Stream) -> None:
        self._streams.add(stream)
        self._metrics.streams.inc(not stream.asks)
        if stream.connection not in self._since_ms:
            self._since_ms[stream.connection] = stream.read_ms
        received = self._arrivals.received([stream.connection])
        self._room.opened(stream.connection, received, asks=stream.asks)

    def _closed(self, stream: Stream) -> None:
        self._tell()
        self._streams.discard(stream)
        self._metrics.streams.dec(not stream.asks)
        self._room.closed(stream.connection, asks=stream.asks)
        if all(other.connection != stream.connection for other in self._streams):
            del self._since_ms[stream.connection]

    async def _read(
        self,
        requests: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[Any, Any],
        stream: Stream,
    ) -> None:
        number = next(_stream_numbers)
        host = stream.connection.host
        raw = await self._first(requests, context, stream)
        if raw is None:
            return
        origin = self._introduce(raw, stream.peer)._replace(host=host)
        refusal = refuse_identifier(origin) or self._admission.refuse_node(stream.peer, origin.node_id)
        if refusal is not None:
            await self._refuse(context, refusal)
        stream.origin = origin
        self._nodes.joined(origin.node_id, host)
        try:
            while True:
                now_ms = self._clock_ms()
                if stream.messages:
                    stream.gap_ms = now_ms - stream.read_ms
                stream.messages += 1
                stream.read_ms = now_ms
                self._messages += 1
                self._bytes += len(raw)
                self._room.took(stream.connection, len(raw))
                self._tap(number, origin, raw, now_ms)
                rest = parts(raw)
                if (first := next(rest, None)) is not None:
                    self._sink(origin, first, now_ms)
                if (second := next(rest, None)) is not None:
                    await self._take(origin, itertools.chain((second,), rest), stream)
                ending = stream.ending_ms is not None or self._draining
                if ending and stream.read_ms + stream.gap_ms >= self._noticed_ms:
                    return
                raw = b""  # or it would be held until the next one is whole
                raw = await anext(requests)
        except StopAsyncIteration:
            return
        finally:
            self._nodes.left(origin.node_id, host)

    async def _asked(
        self, requests: AsyncIterator[T], context: grpc.aio.ServicerContext[Any, Any]
    ) -> T | None:
        """The one message of a health check."""
        task = asyncio.current_task()
        assert task is not None
        far_end = connection(context.peer()) or Connection(context.peer(), 0)
        stream = Stream(task, far_end, {}, {}, self._clock_ms(), asks=True)
        self._opened(stream)
        try:
            async with asyncio.timeout(self._room.limits.first_message_ms / 1_000):
                return await anext(requests, None)
        except TimeoutError:
            await self._refuse(context, FIRST_MESSAGE)
        except asyncio.CancelledError:
            if stream.refusal is None:
                raise
            await self._refuse(context, stream.refusal)
        finally:
            self._closed(stream)
        return None

    async def _first(
        self,
        requests: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[Any, Any],
        stream: Stream,
    ) -> bytes | None:
        """The first message, for which a stream is read only in its turn; None if there is none."""
        try:
            async with self._room.place(stream.peer or stream.connection.host):
                return await anext(requests)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            await self._refuse(context, FIRST_MESSAGE)
            return None

    async def _take(self, origin: Origin, rest: Iterator[Split], stream: Stream) -> None:
        """The rest of a message, piece by piece: before each, the other streams are read."""
        try:
            for part in rest:
                await asyncio.sleep(0)
                stream.read_ms = self._clock_ms()
                self._sink(origin, part, stream.read_ms)
        except asyncio.CancelledError:
            self._sink(origin, part, self._clock_ms())
            for part in rest:  # the client is gone, its message is not
                self._sink(origin, part, self._clock_ms())
            raise

    def _introduce(self, raw: bytes, peer: str) -> Origin:
        """Who sends a stream, from its first message. A stream that does not say is read all the same."""
        try:
            found = read_identifier(raw, peer, self._node_paths)
        except DecodeError as error:
            self._metrics.bad_messages.inc()
            log.warning("identifier unreadable", peer=peer, error=error.message)
            found = None
        return found or Origin(peer, "", "", ("",) * len(self._node_paths))

    async def _refuse(self, context: grpc.aio.ServicerContext[Any, Any], refusal: Refusal) -> None:
        self._metrics.refused_streams.labels(reason=refusal.reason).inc()
        status = grpc.StatusCode.RESOURCE_EXHAUSTED if refusal.limit else grpc.StatusCode.PERMISSION_DENIED
        await context.abort(status, refusal.text)


def _auth(context: grpc.aio.ServicerContext[Any, Any]) -> Mapping[str, tuple[bytes, ...]]:
    return {name: tuple(values) for name, values in context.auth_context().items()}
