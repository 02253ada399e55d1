"""A little traffic that never ends, for docker-compose.yml: requests with and without bodies, WebSockets.

``python -m proxy_usage.demo.steady --to http://127.0.0.1:10000 --host alpha.example.com``. Needs nothing that
the image does not have. What is to be counted exactly is sent by ``demo.traffic``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from collections.abc import Sequence

import aiohttp

PAUSE_S = 0.2
AGAIN_S = 1.0
REQUESTS = (
    ("GET", "/size/200", 0),
    ("POST", "/echo", 2_000),
    ("GET", "/size/5000", 0),
    ("GET", "/status/503", 0),
)


async def steady(to: str, hosts: Sequence[str], *, pause_s: float = PAUSE_S) -> None:
    """Sends until it is cancelled. What fails is tried again: parts of the demo are meant to be stopped."""
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for host in hosts:
            group.create_task(_requests(session, to, host, pause_s))
            group.create_task(_socket(session, to, host, pause_s))


async def _requests(session: aiohttp.ClientSession, to: str, host: str, pause_s: float) -> None:
    while True:
        for method, path, size in REQUESTS:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.request(
                    method, to + path, headers={"Host": host}, data=bytes(size) or None
                ) as answer:
                    await answer.read()
            await asyncio.sleep(pause_s)


async def _socket(session: aiohttp.ClientSession, to: str, host: str, pause_s: float) -> None:
    """A WebSocket that stays open: its usage is billed as it goes."""
    while True:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with session.ws_connect(f"{to}/ws", headers={"Host": host}) as socket:
                while not socket.closed:
                    await socket.send_bytes(bytes(500))
                    await socket.receive(timeout=30)
                    await asyncio.sleep(pause_s)
        await asyncio.sleep(AGAIN_S)


def main() -> None:
    """Sends until a signal."""
    parser = argparse.ArgumentParser(prog="proxy_usage.demo.steady", description="Traffic that never ends.")
    parser.add_argument("--to", default="http://127.0.0.1:10000", metavar="URL")
    parser.add_argument("--host", action="append", required=True, metavar="NAME", help="may be repeated")
    given = parser.parse_args()

    async def run() -> None:
        task = asyncio.create_task(steady(given.to, given.host))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    print(f"sending to {given.to}: {', '.join(given.host)}", flush=True)
    asyncio.run(run())


if __name__ == "__main__":
    main()
