"""The pieces of the demo that need no Envoy: plans, frame counting, comparing, parts of the story."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
from pathlib import Path

import aiohttp
import pytest
import yaml
from rich.console import Console

from proxy_usage.config import load
from proxy_usage.demo.account import Account
from proxy_usage.demo.arrived import Arrived
from proxy_usage.demo.checks import DIMENSIONS, METERS
from proxy_usage.demo.compare import AccessLog, Spent, differences, lines, plain, table
from proxy_usage.demo.http1 import Http1Client, TrafficError
from proxy_usage.demo.http2 import FrameCounter, Http2Client
from proxy_usage.demo.listener import lease_port
from proxy_usage.demo.sink import SinkError, SinkProcess, sink_config
from proxy_usage.demo.story import Story, StoryOptions
from proxy_usage.demo.traffic import plan
from proxy_usage.demo.truth import NO_ROUTE, Exchange, Truth, tenants
from proxy_usage.demo.upstream import Upstream
from proxy_usage.errors import ListenError, UsageError

TENANTS = tenants(3)


def test_tenants() -> None:
    many = tenants(12)
    assert [tenant.host for tenant in many[:2]] == ["alpha.example.com", "bravo.example.com"]
    assert len({tenant.name for tenant in many}) == 12
    assert many[0].route("web") == "httproute/ns-alpha/web/rule/0/match/0/alpha.example.com"


def test_a_plan_is_repeatable_and_complete() -> None:
    calls = plan(TENANTS, 500, seed=3, strays=5)
    assert calls == plan(TENANTS, 500, seed=3, strays=5)
    assert calls != plan(TENANTS, 500, seed=4, strays=5)
    assert len(calls) == 505
    assert [call.key for call in calls].count(NO_ROUTE) == 5
    assert {call.key[0] for call in plan(TENANTS, 3, seed=3)} == {"alpha", "bravo", "charlie"}
    assert {call.method for call in calls} == {"GET", "HEAD", "POST"}
    assert {call.h2 for call in calls} == {True, False}
    assert any(call.chunk for call in calls)
    assert not any(call.chunk for call in calls if call.h2)
    assert all(call.h2 for call in plan(TENANTS, 50, seed=3, h2_per_mille=1000))


def frame(kind: int, stream: int, size: int) -> bytes:
    return size.to_bytes(3) + bytes([kind, 0]) + stream.to_bytes(4) + b"x" * size


@pytest.mark.parametrize("step", [1, 2, 7, 10_000])
def test_frames_are_counted_in_whatever_pieces_they_come(step: int) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    data = preface + frame(4, 0, 12) + frame(1, 1, 30) + frame(0, 1, 300) + frame(8, 1, 4) + frame(0, 3, 0)
    data += frame(3, 3, 4) + frame(0, 0x8000_0001, 5)  # the reserved bit is no part of the stream's number
    counter = FrameCounter(frozenset({0, 1, 3}), preface=True)
    for start in range(0, len(data), step):
        counter.feed(data[start : start + step])
    assert counter.total == len(data)
    assert counter.streams == {1: 39 + 309 + 14, 3: 9 + 13}


# ── broken connections are errors, never a guess ──


async def serve_once(answer: bytes) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-len",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabXX\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"nonsense\r\n\r\n",
    ],
)
async def test_http1_broken_answer(answer: bytes) -> None:
    async with await serve_once(answer) as server:
        port = server.sockets[0].getsockname()[1]
        async with Http1Client("127.0.0.1", port) as client:
            with pytest.raises(TrafficError, match="the connection broke"):
                await client.request("GET", "alpha.example.com", "/")


async def test_http1_interim_answers_trailers_and_chunk_extensions_are_counted() -> None:
    answer = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        b"3;note=x\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n"
    )
    async with await serve_once(answer) as server:
        port = server.sockets[0].getsockname()[1]
        async with Http1Client("127.0.0.1", port) as client:
            exchange = await client.request("GET", "alpha.example.com", "/")
    sent = b"GET / HTTP/1.1\r\nhost: alpha.example.com\r\n\r\n"
    assert exchange == Exchange(200, len(sent), len(answer), 0, 3)


async def test_http2_connection_closed_under_a_request() -> None:
    async with await serve_once(b"") as server:
        port = server.sockets[0].getsockname()[1]
        async with Http2Client("127.0.0.1", port) as client:
            with pytest.raises(TrafficError, match="connection broke"):
                await client.request("GET", "alpha.example.com", "/")
            with pytest.raises(TrafficError, match="connection broke"):
                await client.request("GET", "alpha.example.com", "/")


async def test_http2_answered_in_http1() -> None:
    async with await serve_once(b"HTTP/1.1 400 Bad Request\r\n\r\n") as server:
        port = server.sockets[0].getsockname()[1]
        async with Http2Client("127.0.0.1", port) as client:
            with pytest.raises(TrafficError, match="connection broke"):
                await client.request("POST", "alpha.example.com", "/", body=b"x" * 200_000)


# ── the upstream, and ports ──


async def test_upstream() -> None:
    async with Upstream() as upstream, aiohttp.ClientSession(upstream.base) as session:
        async with session.get("/size/70000") as answer:
            assert (answer.content_length, len(await answer.read())) == (70_000, 70_000)
        async with session.get("/chunked/70000") as answer:
            assert (answer.content_length, len(await answer.read())) == (None, 70_000)
        async with session.get("/size/9999999999") as answer:
            assert answer.status == 413
        async with session.post("/echo", data=b"abc") as answer:
            assert await answer.read() == b"abc"
        async with session.post("/sink", data=b"abc") as answer:
            assert answer.status == 204
        async with session.put("/status/418", data=b"abc") as answer:
            assert (answer.status, await answer.text()) == (418, "status 418\n")
        async with session.get("/sse/2?every=1") as answer:
            assert await answer.text() == "id: 0\ndata: tick\n\nid: 1\ndata: tick\n\n"
        async with session.ws_connect("/ws") as websocket:
            await websocket.send_str("text")
            assert await websocket.receive_str() == "text"
            await websocket.send_bytes(b"\x00")
            assert await websocket.receive_bytes() == b"\x00"


async def test_a_port_in_use_names_the_address() -> None:
    async with Upstream() as upstream:
        with pytest.raises(ListenError, match=f"127.0.0.1:{upstream.port}"):
            async with Upstream(port=upstream.port):
                pass


@pytest.mark.parametrize(("module", "path"), [("billing", "/healthz"), ("upstream", "/size/3")])
async def test_runs_alone_until_a_signal(module: str, path: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"proxy_usage.demo.{module}", "--listen", "127.0.0.1:0"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    base = (await process.stdout.readline()).decode().split()[-1]
    async with aiohttp.ClientSession() as session, session.get(base + path) as answer:
        assert answer.status == 200
    process.terminate()
    assert await process.wait() == 0


def test_leased_ports_are_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        leased = lease_port(port)
        assert 20_000 <= leased < 32_000
    assert lease_port(port) == port


def test_ports_that_nobody_has_bound_yet_are_not_given_again() -> None:
    """Two listeners of one process had the same one, once in some thousand starts."""
    ports = [lease_port() for _ in range(150)]
    assert len(set(ports)) == 150


# ── sent against delivered ──


def delivered(arrived: Arrived, number: int, tenant: str, route: str, meter: str, value: int) -> None:
    dimensions = {**dict.fromkeys(DIMENSIONS, ""), "httproute_name": route}
    event = {
        "specversion": "1.0",
        "id": f"01K38Z6N5T{number:016d}",
        "type": meter,
        "source": "//networking.datumapis.com/gateway",
        "subject": f"projects/{tenant}",
        "time": "2026-08-22T10:14:59.999Z",
        "datacontenttype": "application/json",
        "data": {"value": str(value), "dimensions": dimensions},
    }
    arrived.add(json.dumps(event).encode(), event, 0)


def sent_and_delivered() -> tuple[Truth, Arrived, dict[str, Spent]]:
    """Two requests of alpha on two routes, delivered faultlessly."""
    truth, arrived, number = Truth(), Arrived(), 0
    for route, exchange in (
        ("web", Exchange(200, 80, 1176, 0, 1000)),
        ("api", Exchange(204, 500, 90, 400, 0)),
    ):
        truth.add("alpha", TENANTS[0].route(route), exchange)
        for meter, value in zip(METERS, (1, exchange.wire_in, exchange.wire_out, 1), strict=True):
            delivered(arrived, number, "alpha", route, meter, value)
            number += 1
    truth.add(*NO_ROUTE, Exchange(404, 60, 70, 0, 0))
    return truth, arrived, {"alpha": Spent(rows=2, ms=2500, routes={"web", "api"})}


def test_no_difference() -> None:
    truth, arrived, spent = sent_and_delivered()
    assert differences(truth, arrived, spent) == []
    (line,) = lines(truth, arrived.sums(), spent)
    assert line.equal
    assert plain(line) == (
        "alpha: sent/delivered requests 2/2, bytes in 580/580, bytes out 1266/1266, seconds 2/2: equal"
    )


@pytest.mark.parametrize(
    ("tenant", "route", "meter", "value", "said"),
    [
        ("alpha", "web", METERS[1], 1, "alpha, route web, ingress-bytes: sent 80, delivered 81"),
        ("alpha", "", METERS[0], 1, "alpha, route , requests: sent 0, delivered 1"),
        ("bravo", "web", METERS[2], 5, "bravo, route web, egress-bytes: sent 0, delivered 5"),
        ("alpha", "web", METERS[3], 1, "alpha: Envoy logged 2500 ms, delivered 3 s"),
        ("", "", METERS[0], 1, "event 01K38Z6N5T0000000000000099: subject"),
    ],
)
def test_a_difference_of_one_is_seen(tenant: str, route: str, meter: str, value: int, said: str) -> None:
    truth, arrived, spent = sent_and_delivered()
    delivered(arrived, 99, tenant, route, meter, value)
    assert any(sentence.startswith(said) for sentence in differences(truth, arrived, spent))
    assert not all(line.equal for line in lines(truth, arrived.sums(), spent))


def test_errors_that_cancel_out_over_routes_are_seen() -> None:
    truth, arrived, spent = sent_and_delivered()
    delivered(arrived, 50, "alpha", "web", METERS[1], 7)
    truth.add("alpha", TENANTS[0].route("api"), Exchange(200, 7, 0, 0, 0))
    delivered(arrived, 51, "alpha", "api", METERS[0], 1)
    assert len(differences(truth, arrived, spent)) == 2


@pytest.mark.parametrize(
    ("ms", "rows", "routes", "allowed"),
    [
        (0, 0, set(), {0}),
        (0, 1, {"web"}, {0}),
        (999, 1, {"web"}, {0}),  # at most 1 s less 1 ns
        (999, 2, {"web"}, {0, 1}),
        (2500, 2, {"web"}, {2}),
        (2500, 2, {"web", "api"}, {1, 2}),
        (2000, 1, {"web"}, {2}),
    ],
)
def test_seconds_that_are_possible(ms: int, rows: int, routes: set[str], allowed: set[int]) -> None:
    spent = Spent(rows, ms, routes)
    assert {seconds for seconds in range(10) if spent.allows(seconds)} == allowed


def test_a_line_that_is_still_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    log = AccessLog(path, Truth())
    log.follow()
    row = {"route": "r", "project": "alpha", "status": 200, "duration_ms": 7}
    text = json.dumps(row) + "\n"
    path.write_text(text + text[:20])
    log.follow()
    assert log.spent["alpha"].rows == 1
    path.write_text(text + text)
    log.follow()
    assert (log.spent["alpha"].rows, log.spent["alpha"].ms) == (2, 14)


def test_the_table_shows_both_numbers() -> None:
    truth, arrived, spent = sent_and_delivered()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(lines(truth, arrived.sums(), spent), "now"))
    shown = console.export_text()
    assert "1,266 / 1,266" in shown
    assert "equal" in shown


@pytest.mark.parametrize(
    ("meter", "value", "said"),
    [
        (METERS[0], -1, "short"),
        (METERS[1], -1, "short"),
        (METERS[2], 1, "differs"),
        (METERS[3], 9, "differs"),
    ],
)
def test_in_the_end_nothing_is_on_its_way(meter: str, value: int, said: str) -> None:
    truth, arrived, spent = sent_and_delivered()
    sums = arrived.sums()
    sums["alpha", meter] += value
    for final, words in ((False, "on its way"), (True, said)):
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(table(lines(truth, sums, spent), "now", final=final))
        assert words in (shown := console.export_text())
        assert "equal" not in shown


def test_strays_are_not_among_the_equal() -> None:
    said = Account(606, 6, {}, {}, 600).conclusion(8)
    assert said == (
        "equal: 600 requests are 8 events; 6 more were for a host that nobody owns, so nobody is billed"
    )
    assert Account(100, 0, {}, {}, 100).conclusion(8) == "equal: 100 requests are 8 events"


def test_lost_requests_are_accounted_for_and_not_called_equal() -> None:
    way, crash = {"received": 1_093, "missing": 7, "missing_http": 7}, {"received": 1_100, "crash_lost": 7}
    for kind in (way, crash):
        fates = {"counted": {"": 1_092}, "skipped": {"no_route": 1}}
        one = Account(1_100, 1, {"written": 1_100, **kind}, fates, 1_092)
        assert one.differences() == []
        assert one.conclusion(8) == (
            "accounted for: 1,092 of 1,100 requests billed, 1 skipped, 7 lost on the way"
        )


def test_the_sinks_configuration_is_one(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    document = sink_config(
        tmp_path,
        grpc_port=9001,
        http_port=9090,
        url="http://127.0.0.1:1/v1",
        token_file=token,
        window_ms=2000,
    )
    path = tmp_path / "proxy-usage.yaml"
    path.write_text(yaml.safe_dump(document))
    config = load(path, {})
    assert (config.listen.grpc, config.windows.length, config.windows.grace) == ("127.0.0.1:9001", 2000, 1000)
    assert set(config.dimensions) == set(DIMENSIONS)
    assert {meter.type for meter in config.meter_list()} == set(METERS)


async def test_a_sink_that_does_not_start_shows_what_it_said(tmp_path: Path) -> None:
    sink = SinkProcess(tmp_path, url="ftp://nowhere")
    with pytest.raises(SinkError, match=r"the sink ended with status [1-9]") as caught:
        await sink.start()
    assert "sink: " in caught.value.message
    assert str(sink.log) in caught.value.hint
    assert await sink.stop() is None


async def test_a_directory_of_an_earlier_demo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "usage.db").touch()
    story = Story(StoryOptions(directory=tmp_path), Console(file=io.StringIO()))
    with pytest.raises(UsageError, match="is not empty"):
        await story.run()
