"""How much has arrived on each connection, asked of the kernel.

gRPC hands over whole messages and says nothing of the part of one that it holds. Linux counts the bytes of
each TCP connection (``tcpi_bytes_received`` of ``struct tcp_info``, linux/tcp.h, since 4.1): what arrived and
was not handed over is what is held. Elsewhere nobody can be asked, and ``received`` knows nothing.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

_DESCRIPTORS = Path("/proc/self/fd")
_RECEIVED = struct.Struct("<Q")
_RECEIVED_AT = 128  # offset of tcpi_bytes_received
_NEEDED = _RECEIVED_AT + _RECEIVED.size


class Connection(NamedTuple):
    """A TCP connection to us, by the far end."""

    host: str
    port: int


def connection(peer: str) -> Connection | None:
    """gRPC's name for a peer, ``ipv4:10.0.0.1:5000`` or ``ipv6:%5B::1%5D:5000``; None for any other."""
    family, _, rest = peer.partition(":")
    host, colon, port = rest.rpartition(":")
    if family not in {"ipv4", "ipv6"} or not colon or not port.isdecimal():
        return None
    return Connection(host.replace("%5B", "").replace("%5D", "").strip("[]"), int(port))


class Arrivals:
    """Bytes received per connection of one listening port. Holds no descriptor: gRPC's are looked at."""

    def __init__(self, port: int) -> None:
        self.known = sys.platform == "linux" and _DESCRIPTORS.is_dir()
        """Whether this system can tell."""
        self._port = port
        self._descriptors: dict[Connection, int] = {}

    def received(self, connections: Collection[Connection]) -> dict[Connection, int]:
        """Bytes received so far on those of ``connections`` that are open."""
        if not self.known:
            return {}
        found = {one: size for one in connections if (size := self._look(one)) is not None}
        if len(found) < len(connections):
            self._find()
            found.update(
                (one, size)
                for one in connections
                if one not in found and (size := self._look(one)) is not None
            )
        self._descriptors = {one: self._descriptors[one] for one in found}
        return found

    def _look(self, wanted: Connection) -> int | None:
        descriptor = self._descriptors.get(wanted)
        if descriptor is None:
            return None
        seen = self._ask(descriptor)
        return seen[1] if seen is not None and seen[0] == wanted else None

    def _find(self) -> None:
        """Looks through the process's descriptors for connections to the port."""
        self._descriptors.clear()
        for name in _DESCRIPTORS.iterdir():
            seen = self._ask(int(name.name))
            if seen is not None:
                self._descriptors[seen[0]] = int(name.name)

    def _ask(self, descriptor: int) -> tuple[Connection, int] | None:
        """Far end and bytes received, if the descriptor is a connection to the port."""
        try:
            # The family does not matter to what is asked; given, it saves the constructor three calls.
            looked_at = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, fileno=descriptor)
        except OSError:
            return None
        try:
            if looked_at.getsockname()[1:2] != (self._port,):
                return None
            host, port = looked_at.getpeername()[:2]
            info = looked_at.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _NEEDED)
        except OSError:  # no socket, no connection, or closed between two questions
            return None
        finally:
            looked_at.detach()
        if len(info) < _NEEDED:
            return None
        (received,) = _RECEIVED.unpack_from(info, _RECEIVED_AT)
        return Connection(host.removeprefix("::ffff:"), port), received
