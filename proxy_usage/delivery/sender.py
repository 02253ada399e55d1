"""What takes a batch somewhere and says what became of it: the courier's only view of an output.

Over HTTP that is a wire format (``outputs``) and a connection pool. An output that speaks no HTTP brings a
sender of its own, and has marking, backoff, splitting and fates from the courier all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from proxy_usage.delivery.transport import TokenFile, Transport
from proxy_usage.delivery.trust import Trust
from proxy_usage.errors import DecodeError
from proxy_usage.outputs.base import Answer, Output, Refused, Verdict
from proxy_usage.store import Queued

UNREADABLE = "unreadable"
"""Why an event is a dead letter whose stored bytes no longer say what it was."""


class Sender(Protocol):
    """Sends batches while it is entered."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def send(self, events: Sequence[Queued]) -> Verdict:
        """Sends the events together, byte for byte as they are stored. Raises only what nobody foresaw."""

    def trust(self, token: TokenFile | None, trust: Trust) -> None:
        """What is sent from now on goes with this token, to whom this trusts."""


class HttpSender:
    """One request a batch."""

    def __init__(self, output: Output, transport: Transport) -> None:
        self._output = output
        self._transport = transport

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.__aexit__(kind, error, trace)

    async def send(self, events: Sequence[Queued]) -> Verdict:
        """Posts the batch and reads the answer."""
        try:
            request = self._output.encode(events)
        except DecodeError as error:  # split until the one is found that says nothing
            return Refused(0, error.message, event_code=UNREADABLE)
        answer = await self._transport.post(request)
        return self._output.read(answer, events) if isinstance(answer, Answer) else answer

    def trust(self, token: TokenFile | None, trust: Trust) -> None:
        """Requests from now on carry this token and believe whom this says."""
        self._transport.trust(token, trust)
