"""A small aiohttp server on a free port, and running one alone until a signal."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections import deque

from aiohttp import web

from proxy_usage.errors import ListenError


class Listener:
    """Serves ``app`` at ``host:port``; port 0 takes a free one, which ``port`` then names."""

    def __init__(self, app: web.Application, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._app = app
        self._tls = tls
        self._runner: web.AppRunner | None = None
        self.host = host
        self.port = port

    @property
    def base(self) -> str:
        """``http://host:port``, or https."""
        return f"{'https' if self._tls else 'http'}://{self.host}:{self.port}"

    async def start(self) -> None:
        """Binds and serves. Raises ListenError naming the address when it is taken."""
        # Keep-alive outlives the proxies' own idle times, so that this side never closes under a request.
        runner = web.AppRunner(self._app, access_log=None, keepalive_timeout=7200, shutdown_timeout=2)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self.host, self.port, ssl_context=self._tls)
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise ListenError(
                f"cannot listen on {self.host}:{self.port}: {error.strerror}",
                hint="choose another port, or 0",
            ) from error
        self._runner = runner
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


MARKS = 64
_leased: deque[int] = deque(maxlen=200)
"""Ports that this process gave away lately."""
_marks: deque[socket.socket] = deque()
"""A UDP socket at the same number for each of the last of them, by which other processes see it."""


def lease_port(preferred: int = 0, host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago, for a child process that must be told one: ``preferred`` if free.

    None that was given lately is given again, here or by another process: who got it may not have bound it
    yet.

    Raises ListenError when none is. Searched below the ephemeral range, so that no outgoing connection
    takes it before the child binds it.
    """
    candidates = [preferred] if preferred else []
    start = 20_000 + (_next_offset() * 7) % 12_000
    candidates += [20_000 + (start + step) % 12_000 for step in range(500)]
    for port in candidates:
        if port != preferred and port in _leased:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        if port in _leased or _mark(host, port):
            _leased.append(port)
            return port
    raise ListenError("no free port found", hint="end programs that listen on ports 20000-31999")


def _mark(host: str, port: int) -> bool:
    """Tells other processes that a port is given away. False: one of them has done so."""
    mark = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        mark.bind((host, port))
    except OSError:
        mark.close()
        return False
    _marks.append(mark)
    if len(_marks) > MARKS:
        _marks.popleft().close()
    return True


def _next_offset() -> int:
    """Different for each call in any process: the kernel's own choice of an ephemeral port moves on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def serve_alone(banner: str) -> None:
    """Prints where the server is and waits for SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    print(banner, flush=True)
    await stop.wait()
