"""The HTTP port: what it says to whom, and how long it waits for anybody."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest

from proxy_usage.errors import ListenError
from proxy_usage.metrics import Metrics
from proxy_usage.web import MAX_CONNECTIONS, Health, Web


class Fixed:
    """A token that can be changed."""

    def __init__(self, text: str) -> None:
        self.text = text

    def token(self) -> str:
        return self.text


async def _late() -> object:
    await asyncio.sleep(0)
    return [1, 2]


@contextlib.asynccontextmanager
async def serving(
    token: Fixed | None = None, *, reasons: dict[str, str] | None = None, request_s: float = 10
) -> AsyncIterator[Web]:
    web = Web(
        "127.0.0.1",
        0,
        metrics=Metrics(),
        health=lambda: Health(True, reasons or {}),
        refresh=lambda: None,
        token=token,
        api={"/api/x": lambda: {"rows": 7}, "/api/late": _late, "/api/away": lambda: None},
        request_s=request_s,
        answer_s=request_s,
    )
    await web.start()
    try:
        yield web
    finally:
        await web.stop()


async def get(web: Web, path: str, **headers: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{web.port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What was still said until the other end closed."""
    async with asyncio.timeout(30):
        return await reader.read()


@pytest.mark.parametrize(
    ("host", "said", "hint"),
    [
        ("127.0.0.1", "Address already in use", "another process has the port"),
        ("192.0.2.7", "Cannot assign requested address", "listen.http must name an address of this machine"),
        ("nope.invalid", "", "listen.http must name an address of this machine"),
    ],
)
async def test_why_it_cannot_listen_and_what_to_do(host: str, said: str, hint: str) -> None:
    async with serving() as taken:
        web = Web(
            host,
            taken.port,
            metrics=Metrics(),
            health=lambda: Health(True, {}),
            refresh=lambda: None,
        )
        with pytest.raises(ListenError) as caught:
            await web.start()
    assert said in caught.value.message
    assert "Unknown error" not in caught.value.message
    assert hint in (caught.value.hint or "")


async def test_probes_need_no_token_and_everything_else_does() -> None:
    token = Fixed("s3cret")
    async with serving(token) as web:
        assert (await get(web, "/healthz"))[0] == 200
        assert (await get(web, "/readyz"))[0] == 200
        for path in ("/metrics", "/", "/api/x", "/healthz/"):
            for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
                assert (await get(web, path, **given))[0] == 401
        assert (await get(web, "/metrics", Authorization="Bearer s3cret"))[0] == 200
        token.text = "renewed"
        assert (await get(web, "/metrics", Authorization="Bearer s3cret"))[0] == 401
        assert (await get(web, "/metrics", Authorization="Bearer renewed"))[0] == 200
        token.text = ""  # its file cannot be read
        assert (await get(web, "/metrics", Authorization="Bearer "))[0] == 401


async def test_what_the_api_says_is_json_behind_the_token() -> None:
    async with serving(Fixed("s3cret")) as web:
        assert await get(web, "/api/x", Authorization="Bearer s3cret") == (200, '{"rows":7}')
        assert (await get(web, "/api/y", Authorization="Bearer s3cret"))[0] == 404


async def test_it_only_reads() -> None:
    async with serving() as web, aiohttp.ClientSession() as session:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            async with session.request(method, f"http://127.0.0.1:{web.port}/metrics", data=b"x") as answer:
                assert answer.status == 405


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 20_000 + b"\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_oversize_and_garbage_are_refused(request_bytes: bytes) -> None:
    async with serving() as web:
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
        writer.write(request_bytes)
        async with asyncio.timeout(30):
            assert (await reader.readline()).startswith(b"HTTP/1.") or reader.at_eof()
        writer.close()
        assert (await get(web, "/healthz"))[0] == 200


@pytest.mark.parametrize(
    "said", [b"", b"GET /metrics HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\nhost: x\r\nx: "]
)
async def test_who_does_not_finish_a_request_is_closed(said: bytes) -> None:
    async with serving(request_s=0.1) as web:
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
        writer.write(said)
        assert await closed(reader) == b""
        writer.close()


async def test_a_trickle_does_not_buy_time() -> None:
    async with serving(request_s=0.3) as web:
        reader, writer = await asyncio.open_connection("127.0.0.1", web.port)
        ended = asyncio.create_task(closed(reader))
        with contextlib.suppress(OSError):
            for byte in b"GET /metrics HTTP/1.1\r\nx-slow: " + b"a" * 10_000:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.02)
                if ended.done():
                    break
        assert ended.done()
        writer.close()


async def test_who_does_not_read_the_answer_is_closed() -> None:
    async with serving(request_s=0.3) as web:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, ("127.0.0.1", web.port))

            async def ask() -> None:
                while True:  # answers pile up until nothing moves any more; then it is closed
                    await loop.sock_sendall(deaf, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 50)

            with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
                await asyncio.wait_for(ask(), 60)
        assert (await get(web, "/healthz"))[0] == 200


async def test_too_many_connections_leave_room_for_the_first() -> None:
    async with serving(request_s=60) as web:  # the first says nothing until all others are there
        opened = [await asyncio.open_connection("127.0.0.1", web.port) for _ in range(MAX_CONNECTIONS + 20)]
        late = [closed(reader) for reader, _ in opened[MAX_CONNECTIONS:]]
        assert await asyncio.gather(*late) == [b""] * 20
        reader, writer = opened[0]
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        for _, writer in opened:
            writer.close()


async def test_what_takes_time_to_say_is_waited_for_and_what_nobody_can_say_is_no_answer() -> None:
    async with serving() as web:
        assert await get(web, "/api/late") == (200, "[1,2]")
        assert await get(web, "/api/away") == (503, '{"error": "a worker does not answer"}')


async def test_reasons_are_json_and_nothing_else() -> None:
    async with serving(reasons={"output x": "<script>alert(1)</script>"}) as web:
        url = f"http://127.0.0.1:{web.port}/readyz"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert answer.status == 503
            assert answer.content_type == "application/json"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
