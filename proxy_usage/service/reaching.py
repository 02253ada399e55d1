"""Keeps a control socket where verbs look for it: beside the store, also after its disk was mounted anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from proxy_usage.control import ControlServer
from proxy_usage.errors import ProxyUsageError

log = structlog.get_logger()

LOOK_S = 5.0


class Reach:
    """One control socket. ``keep`` it beside what it serves.

    Args:
        there: whether the store lies where it belongs. Elsewhere nothing is made: it may be the place where
            its disk will be mounted.
    """

    def __init__(self, control: ControlServer, there: Callable[[], bool]) -> None:
        self._control = control
        self._there = there
        self._said = ""

    async def keep(self) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.renew()

    async def renew(self) -> None:
        """Makes the socket again, if its path leads elsewhere. What keeps it from that is said once."""
        if not self._there():
            return
        try:
            await self._control.renew()
            self._said = ""
        except ProxyUsageError as error:
            if error.message != self._said:
                log.warning("verbs do not reach the service", error=error.message, hint=error.hint)
            self._said = error.message
