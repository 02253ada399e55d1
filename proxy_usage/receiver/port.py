"""What a listening port is opened with."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from proxy_usage.errors import ListenError

_HANDSHAKE_MS = 10_000
_IDLE_MS = 300_000
"""A connection without a stream is closed after so long."""
_PROBE_MS = 30_000
"""A silent connection is asked for a sign of life so often, and has as long to give it. Much shorter, and a
pause of Envoy's would pass for its death."""


@dataclass(frozen=True, slots=True)
class ReceiverLimits:
    """Bounds of one port, in bytes, counts and milliseconds."""

    message: int = 64 << 20
    window: int = 1 << 20
    headers: int = 16 << 10
    connections: int = 256
    streams_per_connection: int = 16
    connection_age_ms: int = 3_600_000
    shared: bool = False
    """Other workers of the same service listen on the port, too."""


def options(limits: ReceiverLimits) -> list[tuple[str, int]]:
    """gRPC's options of a server."""
    return [
        # By default a second process on the port silently takes half of the connections.
        ("grpc.so_reuseport", int(limits.shared)),
        # Probing lets every busy sender park megabytes here; a fixed window bounds memory.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", limits.window),
        ("grpc.http2.max_frame_size", min(max(limits.window, 16_384), 16_777_215)),
        ("grpc.max_receive_message_length", limits.message),
        # Between the two gRPC would refuse at random, so that few senders notice at once.
        ("grpc.max_metadata_size", limits.headers),
        ("grpc.absolute_max_metadata_size", limits.headers),
        ("grpc.max_concurrent_streams", limits.streams_per_connection),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.max_connection_age_ms", limits.connection_age_ms),
        # Streams are ended from here, so that none is cut off in a message; this is for those that resist.
        ("grpc.max_connection_age_grace_ms", limits.connection_age_ms // 2 + _PROBE_MS),
        ("grpc.keepalive_time_ms", _PROBE_MS),
        ("grpc.keepalive_timeout_ms", _PROBE_MS),
        # By default three pings of Envoy's keepalive within minutes, to a server that never answers on its
        # streams, count as abuse and end the connection.
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ]


def check_free(host: str, port: int, *, shared: bool = False) -> None:
    """Raises ListenError, which says why a port cannot be had; gRPC itself only says that it cannot.

    Args:
        shared: others that share it may have it.
    """
    _bound(host, port, shared=shared).close()


def reserve(host: str, port: int) -> socket.socket:
    """A free port that from now on is taken, but for those who share it. It lasts until the socket is closed.

    The socket does not listen, so the kernel gives it no connections; but nobody else who wants the port for
    himself, a second service among them, gets it.

    Raises:
        ListenError: somebody has it, whether he would share it or not.
    """
    check_free(host, port)
    try:
        # Not as one whose address may be used again: whoever asks for that would get it beside this one.
        return _bound(host, port, again=False, shared=True)
    except ListenError:  # connections of a former process are still being forgotten
        return _bound(host, port, shared=True)


def _bound(host: str, port: int, *, again: bool = True, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(again))
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ListenError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint="listen.grpc must name an address of this machine"
            if error.errno == errno.EADDRNOTAVAIL
            else "a second proxy-usage may have the port: stop it or change listen.grpc",
        ) from None
    return bound
