"""What a courier sends through, where a test is the endpoint."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust


class PlainSender:
    """A sender without a connection; whoever derives from it says how it sends."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def trust(self, token: TokenFile | None, trust: Trust) -> None:
        raise AssertionError("nobody renews anything")
