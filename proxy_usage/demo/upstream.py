"""The application behind the demo's Envoy: bodies of any size, errors, slow answers, streams, WebSocket.

    GET  /size/N        N bytes, with a length          GET  /chunked/N   N bytes, chunked
    POST /echo          the request's body              POST /sink        204
    *    /status/CODE   a small answer with that code   GET  /slow/MS     after MS milliseconds
    GET  /sse/N         N server-sent events, ``?every=MS`` apart (10)
    GET  /ws            WebSocket echo
    GET  /events/NAME   server-sent events for as long as somebody wants: POST there sends its body as one,
                        DELETE ends the stream

Alone: ``python -m proxy_usage.demo.upstream --listen 127.0.0.1:8081``.
"""

from __future__ import annotations

import argparse
import asyncio

from aiohttp import WSMsgType, web

from proxy_usage.demo.listener import Listener, serve_alone

MAX_SIZE = 1 << 30
_BLOCK = bytes(range(256)) * 256
_EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}


class Upstream:
    """``async with Upstream() as upstream: … upstream.port``."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        app = web.Application(client_max_size=MAX_SIZE)
        app.router.add_get("/size/{size:[0-9]{1,10}}", _size)
        app.router.add_get("/chunked/{size:[0-9]{1,10}}", _size)
        app.router.add_post("/echo", _echo)
        app.router.add_post("/sink", _sink)
        app.router.add_route("*", "/status/{code:[2-5][0-9][0-9]}", _status)
        app.router.add_get("/sse/{count:[0-9]{1,6}}", _sse)
        app.router.add_get("/slow/{ms:[0-9]{1,6}}", _slow)
        app.router.add_get("/ws", _ws)
        app.router.add_get("/events/{name}", self._events)
        app.router.add_post("/events/{name}", self._publish)
        app.router.add_delete("/events/{name}", self._publish)
        self._subscribers: dict[str, asyncio.Queue[bytes | None]] = {}
        self._listener = Listener(app, host, port)

    async def __aenter__(self) -> Upstream:
        await self._listener.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._listener.stop()

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def base(self) -> str:
        return self._listener.base

    async def _events(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name in self._subscribers:
            return web.Response(status=409)
        queue = self._subscribers[name] = asyncio.Queue()
        response = web.StreamResponse(headers=_EVENT_STREAM)
        try:
            await response.prepare(request)
            while (data := await queue.get()) is not None:
                await response.write(b"data: %b\n\n" % data)
            await response.write_eof()
        except ConnectionError:
            return response  # the client is gone
        finally:
            del self._subscribers[name]
        return response

    async def _publish(self, request: web.Request) -> web.Response:
        queue = self._subscribers.get(request.match_info["name"])
        if queue is None:
            return web.Response(status=404)
        queue.put_nowait(await request.read() if request.method == "POST" else None)
        return web.Response(status=204)


async def _size(request: web.Request) -> web.StreamResponse:
    size = int(request.match_info["size"])
    if size > MAX_SIZE:
        return web.Response(status=413)
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    if request.path.startswith("/size/"):
        response.content_length = size
    else:
        response.enable_chunked_encoding()
    await response.prepare(request)
    if request.method != "HEAD":
        for start in range(0, size, len(_BLOCK)):
            await response.write(_BLOCK[: size - start])
    await response.write_eof()
    return response


async def _echo(request: web.Request) -> web.Response:
    return web.Response(body=await request.read(), content_type="application/octet-stream")


async def _sink(request: web.Request) -> web.Response:
    async for _ in request.content.iter_any():
        pass
    return web.Response(status=204)


async def _status(request: web.Request) -> web.Response:
    # The body is read first: an answer before the end of an upload would make Envoy close the connection.
    await request.read()
    code = int(request.match_info["code"])
    return web.Response(status=code, text=None if code in (204, 304) else f"status {code}\n")


async def _slow(request: web.Request) -> web.Response:
    await asyncio.sleep(int(request.match_info["ms"]) / 1000)
    return web.Response(text="slow\n")


async def _sse(request: web.Request) -> web.StreamResponse:
    every = int(request.query.get("every", "10"))
    response = web.StreamResponse(headers=_EVENT_STREAM)
    await response.prepare(request)
    for number in range(int(request.match_info["count"])):
        await response.write(f"id: {number}\ndata: tick\n\n".encode())
        await asyncio.sleep(every / 1000)
    await response.write_eof()
    return response


async def _ws(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


def main() -> None:
    """Runs the upstream alone, until a signal."""
    parser = argparse.ArgumentParser(prog="proxy_usage.demo.upstream", description="The demo's application.")
    parser.add_argument("--listen", default="127.0.0.1:8081", metavar="HOST:PORT")
    host, _, port = parser.parse_args().listen.rpartition(":")

    async def run() -> None:
        async with Upstream(host=host, port=int(port)) as upstream:
            await serve_alone(f"upstream at {upstream.base}")

    asyncio.run(run())


if __name__ == "__main__":
    main()
