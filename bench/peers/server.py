"""Sinks in Python to compare with. One process, one of these kinds:

    python -m bench.peers.server KIND PORT WINDOW_MS

- ``receive``: grpc.aio with our receiver's options; reads and discards.
- ``receive-defaults``: ``receive`` with gRPC's own options, whose memory grows with the senders.
- ``receive-giving-way``: ``receive`` in a process like ours: its event loop, heap and scheduling of threads.
- ``fold``: the latter, and our decode and fold behind it, drained into windows; no store, no delivery.
- ``naive``: what one writes first: grpc.aio, envoy-data-plane, a dict for each window.

Prints "ready" when it listens and, after SIGTERM, one JSON object with what it counted.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

METHOD = ("envoy.service.accesslog.v3.AccessLogService", "StreamAccessLogs")
GRACE_MS = 5_000
DRAIN_MS = 250
"""How often folded sums are drained, as a checkpoint does."""


class Windows:
    """Sums per window and key; a window that is over for ``GRACE_MS`` is given up and only its sums kept."""

    def __init__(self, length_ms: int) -> None:
        self._length_ms = length_ms
        self._open: dict[int, dict[Any, list[int]]] = {}
        self._newest = 0
        self.closed = [0, 0, 0, 0]
        self.keys = 0

    def row(self, ended_ms: int, key: Any) -> list[int]:
        """Entries, bytes in, bytes out and ns of a key, to be added to."""
        window = ended_ms - ended_ms % self._length_ms
        if window > self._newest:
            self._newest = window
            self.close(window - GRACE_MS - self._length_ms)
        rows = self._open.setdefault(window, {})
        row = rows.get(key)
        if row is None:
            row = rows[key] = [0, 0, 0, 0]
        return row

    def close(self, before: int) -> None:
        """Gives up windows that began before."""
        for window in [window for window in self._open if window < before]:
            rows = self._open.pop(window)
            self.keys = max(self.keys, len(rows))
            for row in rows.values():
                self.closed = [a + b for a, b in zip(self.closed, row, strict=True)]


class Peer(Protocol):
    """What becomes of the messages of one stream."""

    def take(self, raw: bytes, stream: dict[str, Any]) -> None: ...

    def end(self) -> None: ...


class Discards:
    """Counts bytes and nothing else."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def take(self, raw: bytes, stream: dict[str, Any]) -> None:
        stream["bytes"] = stream.get("bytes", 0) + len(raw)

    def end(self) -> None:
        """Nothing is open."""


class Naive:
    """Typed messages, and a dict."""

    def __init__(self, windows: Windows) -> None:
        from envoy_data_plane.envoy.service.accesslog.v3 import StreamAccessLogsMessage

        self._parse = StreamAccessLogsMessage.parse
        self._windows = windows

    def take(self, raw: bytes, stream: dict[str, Any]) -> None:
        message = self._parse(raw)
        if message.identifier is not None:
            stream["region"] = message.identifier.node.locality.region
        region = stream.get("region", "")
        if message.http_logs is not None:
            for entry in message.http_logs.log_entry:
                common = entry.common_properties
                sizes = common.downstream_wire_bytes_received, common.downstream_wire_bytes_sent
                self._add(common, region, *sizes)
        if message.tcp_logs is not None:
            for entry in message.tcp_logs.log_entry:
                connection = entry.connection_properties
                self._add(entry.common_properties, region, connection.received_bytes, connection.sent_bytes)

    def _add(self, common: Any, region: str, received: int, sent: int) -> None:
        tags = common.custom_tags
        # betterproto makes a timedelta, which has no nanoseconds: what is lost is part of being naive.
        took_us = (common.duration.days * 86_400 + common.duration.seconds) * 10**6
        took_us += common.duration.microseconds
        ended_ms = int(common.start_time.timestamp() * 1_000) + took_us // 1_000
        key = tags.get("project_name", ""), region, tags.get("gateway", ""), common.route_name
        row = self._windows.row(ended_ms, key)
        row[0] += 1
        row[1] += received
        row[2] += sent
        row[3] += took_us * 1_000

    def end(self) -> None:
        """Nothing is open."""


class Folds:
    """Our decode and fold, as the service builds them from a configuration without settings."""

    def __init__(self, windows: Windows) -> None:
        from proxy_usage.config import load_text
        from proxy_usage.decode import parts, read_identifier
        from proxy_usage.pipeline import Port
        from proxy_usage.service.build import build_attributor, build_folds

        config = load_text("outputs: [{name: none, format: none}]\n", origin="bench", base=Path(), env={})
        self._fold = build_folds(config, build_attributor(config))[Port.ALL]
        self._parts, self._identify = parts, read_identifier
        self._paths = config.fold_plan().node_paths
        self._windows = windows
        self._drained_ms = 0

    def take(self, raw: bytes, stream: dict[str, Any]) -> None:
        origin = stream.get("origin")
        if origin is None:
            origin = self._identify(raw, "", self._paths)
            assert origin is not None, "the first message of a stream says who sends it"
            stream["origin"] = origin
        now_ms = time.time_ns() // 1_000_000
        for part in self._parts(raw):
            self._fold.entries(origin, part, now_ms)
            if self._fold.full:
                self._drain()
        if now_ms - self._drained_ms >= DRAIN_MS:
            self._drained_ms = now_ms
            self._drain()

    def pieces(self, raw: bytes) -> list[int]:
        """Folds a message. Returns ns of processor time for each piece that is folded without a pause."""
        origin = self._identify(raw, "", self._paths)
        assert origin is not None, "the message says who sends it"
        now_ms = time.time_ns() // 1_000_000
        taken = []
        began = time.thread_time_ns()
        for part in self._parts(raw):
            self._fold.entries(origin, part, now_ms)
            if self._fold.full:
                self._drain()
            taken.append(time.thread_time_ns() - began)
            began = time.thread_time_ns()
        return taken

    def _drain(self) -> None:
        for (identity, window_ms), (rows, _, received, sent, ns) in self._fold.drain().totals.items():
            row = self._windows.row(window_ms, (identity.value, identity.dimensions))
            row[0] += rows
            row[1] += received
            row[2] += sent
            row[3] += ns

    def end(self) -> None:
        self._drain()


KINDS: dict[str, Callable[[Windows], Peer]] = {
    "receive": Discards,
    "receive-giving-way": Discards,
    "receive-defaults": Discards,
    "fold": Folds,
    "naive": Naive,
}


async def serve(kind: str, port: int, window_ms: int) -> None:
    """Serves until SIGTERM."""
    windows = Windows(window_ms)
    peer = KINDS[kind](windows)
    options: list[tuple[str, int]] = [("grpc.max_receive_message_length", 64 << 20)]
    scheduling: AbstractContextManager[None] = nullcontext()
    if kind != "naive" and kind != "receive-defaults":
        from proxy_usage.receiver.port import ReceiverLimits
        from proxy_usage.receiver.port import options as ours

        options = ours(ReceiverLimits())
    if kind in ("receive-giving-way", "fold"):
        from proxy_usage.receiver.scheduling import giving_way

        scheduling = giving_way()
    if kind == "fold":
        gc.collect()
        gc.freeze()  # as the service does

    async def stream(requests: AsyncIterator[bytes], _: Any) -> bytes:
        state: dict[str, Any] = {}
        async for raw in requests:
            peer.take(raw, state)
        return b""

    with scheduling:
        server = grpc.aio.server(options=options)
    handler: Any = grpc.stream_unary_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METHOD[0], {METHOD[1]: handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("ready", flush=True)
    await ended.wait()
    await server.stop(None)
    peer.end()
    windows.close(1 << 62)
    entries, received, sent, ns = windows.closed
    counted = {
        "entries": entries,
        "bytes_in": received,
        "bytes_out": sent,
        "ns": ns,
        "keys": windows.keys,
        "fold": fold_name(),
    }
    print(json.dumps(counted), flush=True)


def fold_name() -> str:
    """Which implementation of the fold this process runs."""
    try:
        from proxy_usage import decode
    except ImportError:
        return "none"
    choice = getattr(decode, "CHOICE", None)  # of builds with a compiled fold
    return "protobuf" if choice is None else str(choice.reason).partition(":")[0]


def main(kind: str, port: int, window_ms: int) -> None:
    """Serves; the kinds that have our receiver run in a process like its."""
    if kind in ("receive-giving-way", "fold"):
        from proxy_usage.service.process import run_sink

        run_sink(serve(kind, port, window_ms))
    else:
        asyncio.run(serve(kind, port, window_ms))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
