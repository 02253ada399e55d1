"""How much senders may make the process hold: whose turn it is to send, and who has to go.

A message is held by gRPC until it is whole. Two bounds keep that from adding up:

- A stream that has not sent a whole message is read only when it has one of a few places, and only for a
  while. Unread, HTTP/2's flow control holds it at one window.
- What has arrived of unfinished messages is added up over all connections; when it passes the limit, the
  connection that holds most is ended, and so on until it fits.

Health checks wait for no place, or whoever takes all of them would make Envoy believe us dead. A connection
that has brought nothing else is ended when it holds more than one can need.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from proxy_usage.admission import Refusal
from proxy_usage.receiver.arrivals import Connection

# What arrives beside messages: frame and record headers (at most 36 bytes for each piece of a message, and a
# piece has up to 16 KiB), and at each look a little for pings, acknowledgements and header blocks.
_BESIDE = 128
_BESIDE_SHARE = 64
_BESIDE_LOOK = 64
ASKING = 64 << 10
"""Bytes that a connection with nothing but health checks may hold."""

FIRST_MESSAGE = Refusal("first_message", "no whole message came in time", limit=True)
MEMORY = Refusal("memory", "too much of unfinished messages; this connection held most of it", limit=True)


@dataclass(frozen=True, slots=True)
class RoomLimits:
    """Bounds for all ports of the process together, in bytes, counts and milliseconds."""

    memory: int = 2 << 30
    """From seven eighths of it on, connections are ended."""
    new_streams: int = 8
    """Streams that are read before they have sent a whole message."""
    first_message_ms: int = 10_000
    """How long a new stream may take for it, the wait for a place included."""


@dataclass(slots=True)
class _Account:
    streams: int = 0
    logs: int = 0
    """Of these, streams of rows."""
    taken: int = 0
    """Bytes known to be in nobody's way any more."""
    held: int = 0


class Room:
    """The bounds' bookkeeping, shared by all ports."""

    def __init__(self, limits: RoomLimits) -> None:
        self.limits = limits
        self._freed = asyncio.Event()
        self._new: Counter[str] = Counter()
        self._accounts: dict[Connection, _Account] = {}

    @contextlib.asynccontextmanager
    async def place(self, sender: str) -> AsyncIterator[None]:
        """Waits for a place among the streams that are new, and keeps it for the block.

        A sender gets half of the places at most, so that one cannot keep all others out. Raises TimeoutError
        when the block is not over in time.
        """
        most = max(1, self.limits.new_streams // 2)
        async with asyncio.timeout(self.limits.first_message_ms / 1_000):
            while self._new.total() >= self.limits.new_streams or self._new[sender] >= most:
                self._freed.clear()
                await self._freed.wait()
            self._new[sender] += 1
            try:
                yield
            finally:
                self._new[sender] -= 1
                self._new += Counter()  # drops those at zero
                self._freed.set()

    # --- what is held -----------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """Connections with a stream."""
        return len(self._accounts)

    @property
    def held(self) -> int:
        """Bytes of unfinished messages as of the last look."""
        return sum(account.held for account in self._accounts.values())

    @property
    def needs_close_look(self) -> bool:
        """Whether much could arrive by a look at leisure: half is held, or somebody asks without a place."""
        return 2 * self.held > self.limits.memory or any(not one.logs for one in self._accounts.values())

    def opened(
        self, connection: Connection, received: Mapping[Connection, int], *, asks: bool = False
    ) -> None:
        """A stream began. What the connection brought before its first one is nobody's concern any more.

        Args:
            asks: it is a health check.
        """
        account = self._accounts.get(connection)
        if account is None:
            account = self._accounts[connection] = _Account(taken=received.get(connection, 0))
        account.streams += 1
        account.logs += not asks

    def closed(self, connection: Connection, *, asks: bool = False) -> None:
        """A stream ended, and what it held is given back."""
        account = self._accounts[connection]
        account.streams -= 1
        account.logs -= not asks
        if not account.streams:
            del self._accounts[connection]

    def took(self, connection: Connection, size: int) -> None:
        """A whole message was handed over."""
        self._accounts[connection].taken += size + size // _BESIDE_SHARE + _BESIDE

    def look(self, received: Mapping[Connection, int]) -> list[Connection]:
        """Takes note of what has arrived. Returns the connections to be ended, those that hold most first."""
        for connection, account in self._accounts.items():
            if connection in received:
                account.taken = min(account.taken + _BESIDE_LOOK, received[connection])
                account.held = received[connection] - account.taken
        over = self.held - (self.limits.memory - self.limits.memory // 8)  # what arrives meanwhile fits, too
        doomed = [
            connection
            for connection, account in self._accounts.items()
            if not account.logs and account.held > ASKING
        ]
        for connection, account in sorted(self._accounts.items(), key=lambda item: -item[1].held):
            if over <= 0:
                break
            doomed.append(connection)
            over -= account.held
        return doomed
