"""A receiver on a real port, and clients whose certificate, token and every byte are chosen.

async with Listening(tmp_path) as port:
    async with Client(port.port) as client:
        await client.send(message(http_row(), node_id="a"))
    assert port.rows == [("", "a", 1)]
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
from pki import Pair

from proxy_usage.admission import Admission
from proxy_usage.decode import Split
from proxy_usage.metrics import Metrics
from proxy_usage.model import Origin
from proxy_usage.nodes import Nodes
from proxy_usage.receiver import SERVICE, Receiver, ReceiverLimits, Room, RoomLimits, TlsFiles
from proxy_usage.service.build import clock_ms

DEADLINE_S = 120
"""Nothing that is right takes so long, on a slow machine either."""
METHOD = f"/{SERVICE}/StreamAccessLogs"


class Listening:
    """A receiver that keeps what it is sent."""

    def __init__(
        self,
        *,
        admission: Admission | None = None,
        tls: TlsFiles | None = None,
        limits: ReceiverLimits | None = None,
        room: RoomLimits | None = None,
        clock_ms: Callable[[], int] = clock_ms,
    ) -> None:
        self.metrics = Metrics()
        self.origins: list[Origin] = []
        self.read = 0
        """Rows."""
        self.room = Room(room or RoomLimits())
        self.receiver = Receiver(
            "127.0.0.1",
            0,
            sink=self._take,
            tap=lambda *_: None,
            node_paths=(),
            limits=limits or ReceiverLimits(),
            metrics=self.metrics,
            nodes=Nodes(self.metrics),
            room=self.room,
            clock_ms=clock_ms,
            admission=admission,
            tls=tls,
        )
        self.port = 0

    async def __aenter__(self) -> Self:
        self.port = await self.receiver.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.receiver.drain(0.5)

    def _take(self, origin: Origin, part: Split, now_ms: int) -> None:
        self.origins.append(origin)
        self.read += len(part.entries)

    @property
    def peers(self) -> set[str]:
        """Who sent what was read."""
        return {origin.peer for origin in self.origins}

    def counted(self, name: str, **labels: str) -> int:
        """A metric's value; 0 where it was never touched."""
        return int(self.metrics.registry.get_sample_value(f"proxy_usage_{name}", labels) or 0)

    def refused(self, reason: str) -> int:
        return self.counted("receiver_refused_streams_total", reason=reason)


class Client:
    """A connection of its own. With ``ca`` it speaks TLS, and shows ``pair``."""

    def __init__(
        self, port: int, *, ca: Path | None = None, pair: Pair | None = None, token: str | None = None
    ) -> None:
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        self._metadata = [("authorization", f"Bearer {token}")] if token is not None else []
        if ca is None:
            self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
            return
        credentials = grpc.ssl_channel_credentials(
            ca.read_bytes(),
            pair.key.read_bytes() if pair else None,
            pair.cert.read_bytes() if pair else None,
        )
        options.append(("grpc.ssl_target_name_override", "sink.example.org"))
        self.channel = grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    def stream(self, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        """A stream to write to."""
        call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = self.channel.stream_unary(METHOD)
        return call(metadata=(*self._metadata, *metadata))

    async def send(self, *messages: bytes) -> None:
        """Sends messages on one stream; when this returns they were read. Raises AioRpcError if not."""
        stream = self.stream()
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.UsageError):  # its answer says why
            for message in messages:
                await stream.write(message)
            await stream.done_writing()
        async with soon():
            assert await stream == b""

    async def refused(self, *messages: bytes) -> grpc.StatusCode:
        """How the stream ends that sends these messages.

        A refusal that crosses a write is INTERNAL to this client, which did not hear it: then once more.
        """
        code = grpc.StatusCode.INTERNAL
        while code is grpc.StatusCode.INTERNAL:
            try:
                await self.send(*messages)
            except grpc.aio.AioRpcError as error:
                code = error.code()
            else:
                code = grpc.StatusCode.OK
        return code


@contextlib.asynccontextmanager
async def soon(seconds: float = DEADLINE_S) -> AsyncIterator[None]:
    """A deadline for what must happen by itself."""
    async with asyncio.timeout(seconds):
        yield
