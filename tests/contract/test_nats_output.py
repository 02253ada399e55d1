"""Publishing to a real NATS server: what the stream acknowledged is delivered, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from money import Store
from nats_server import Authority, NatsServer, Wire
from pki import Authority as Certificates
from program import eventually

from proxy_usage.delivery import Courier, CourierSettings, Policy, RetrySettings, StoredBacklog
from proxy_usage.delivery.jetstream import Link, Peer
from proxy_usage.delivery.nats_sender import NatsSender
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust
from proxy_usage.metrics import Metrics
from proxy_usage.outputs.base import Paused, Retry, Settled, Verdict
from proxy_usage.service.build import clock_ms
from proxy_usage.store import Fate, Queued
from proxy_usage.store.thread import StoreThread

STREAM = "USAGE"
ID = "01K38Z6N5T00000000000000{:02d}"


def events(*tenants: str, body: bytes = b"", start: int = 0) -> list[Queued]:
    """Events with ids of their own."""
    return [
        Queued(number, ID.format(number), tenant, "requests", 1, body or json.dumps({"n": number}).encode())
        for number, tenant in enumerate(tenants, start)
    ]


@contextlib.asynccontextmanager
async def sending(url: str, **changes: Any) -> AsyncIterator[NatsSender]:
    """A sender; ``changes`` are of its arguments, or of its connection's."""
    peer = Peer(url, changes.pop("timeout_ms", 10_000), changes.pop("creds_file", None))
    link = Link(peer, changes.pop("token", None), changes.pop("trust", None) or Trust())
    settings: dict[str, Any] = {
        "stream": STREAM,
        "subject": "billing.usage.{project}.ingest",
        "window": 256,
        "dedup_window_ms": 600_000,
        "remembers": lambda _: None,
    }
    async with NatsSender(link, **(settings | changes)) as sender:
        yield sender


def delivered(verdict: Verdict) -> set[int]:
    """The events that a verdict delivers."""
    assert isinstance(verdict, Settled | Retry | Paused), verdict
    return {seq for seq, fate in verdict.fates.items() if fate.name == "delivered"}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with NatsServer(tmp_path / "nats") as running:
        await running.create(STREAM)
        yield running


async def test_published_with_id_stream_and_bytes(server: NatsServer) -> None:
    batch = events("shop", "blog", "shop")
    async with sending(server.url) as sender:
        assert delivered(await sender.send(batch)) == {0, 1, 2}
    assert [(one.subject, one.headers["Nats-Msg-Id"], one.data) for one in await server.stored(STREAM)] == [
        (f"billing.usage.{event.tenant}.ingest", event.id, event.body) for event in batch
    ]
    assert {one.headers["Nats-Expected-Stream"] for one in await server.stored(STREAM)} == {STREAM}


async def test_what_the_stream_has_already_is_delivered_and_not_stored_twice(server: NatsServer) -> None:
    async with sending(server.url) as sender:
        assert delivered(await sender.send(events("shop", "blog"))) == {0, 1}
    async with sending(server.url) as again:
        assert delivered(await again.send(events("shop", "blog", "shop"))) == {0, 1, 2}
    assert await server.count(STREAM) == 3


async def test_more_events_than_the_window(server: NatsServer) -> None:
    async with sending(server.url, window=3) as sender:
        together = await asyncio.gather(
            sender.send(events(*["shop"] * 40)), sender.send(events(*["shop"] * 40, start=40))
        )
    assert [len(delivered(verdict)) for verdict in together] == [40, 40]
    assert await server.count(STREAM) == 80


async def test_missing_stream_pauses(server: NatsServer) -> None:
    async with sending(server.url, stream="OTHER") as sender:
        verdict = await sender.send(events("shop"))
    assert isinstance(verdict, Paused)
    assert (verdict.reason, verdict.fates) == ("misconfigured", {})
    assert "OTHER" in verdict.answer
    assert await server.count(STREAM) == 0


async def test_subject_of_another_stream_pauses_and_stores_nothing(server: NatsServer) -> None:
    await server.create("OTHER", ["elsewhere.*"])
    async with sending(server.url, subject="elsewhere.{project}") as sender:
        verdict = await sender.send(events("shop"))
    assert isinstance(verdict, Paused)
    assert verdict.reason == "misconfigured"
    assert "expected stream does not match" in verdict.answer
    assert (await server.count(STREAM), await server.count("OTHER")) == (0, 0)


async def test_subject_that_no_stream_takes_pauses_and_names_what_it_takes(server: NatsServer) -> None:
    async with sending(server.url, subject="usage.{project}") as sender:
        verdict = await sender.send(events("shop"))
    assert isinstance(verdict, Paused)
    assert verdict.answer == f"stream {STREAM} takes billing.usage.*.ingest, not usage.{{project}}"


async def test_without_jetstream_it_waits(tmp_path: Path) -> None:
    async with NatsServer(tmp_path) as server:
        server.settings.pop("jetstream")
        await server.kill()
        await server.start()
        async with sending(server.url) as sender:
            verdict = await sender.send(events("shop"))
    assert isinstance(verdict, Retry)  # as while a cluster has no leader: it may pass
    assert verdict.reason == "unavailable"


async def test_too_large_is_a_dead_letter_and_the_others_arrive(server: NatsServer) -> None:
    async with sending(server.url) as sender:
        batch = events("shop", "blog")
        batch.append(Queued(2, ID.format(2), "shop", "requests", 1, b"x" * (1 << 20)))
        verdict = await sender.send(batch)
    assert isinstance(verdict, Settled)
    assert [verdict.fates[seq].name for seq in range(3)] == ["delivered", "delivered", "dead"]
    assert verdict.fates[2].reason == "too_large"
    assert await server.count(STREAM) == 2


async def test_larger_than_the_stream_takes_since_a_moment_ago(server: NatsServer) -> None:
    async with sending(server.url) as sender:
        assert delivered(await sender.send(events("shop"))) == {0}
        info = await server.api(f"STREAM.INFO.{STREAM}")
        assert "error" not in await server.api(
            f"STREAM.UPDATE.{STREAM}", info["config"] | {"max_msg_size": 400}
        )
        verdict = await sender.send([*events("blog", start=1), *events("shop", body=b"x" * 700, start=2)])
    assert isinstance(verdict, Settled)
    assert (verdict.fates[1].name, verdict.fates[2].reason) == ("delivered", "too_large")


async def test_full_stream_takes_what_it_can_and_the_rest_goes_again(server: NatsServer) -> None:
    await server.create("SMALL", ["small.*"], max_msgs=2)
    async with sending(server.url, stream="SMALL", subject="small.{project}") as sender:
        verdict = await sender.send(events("shop", "blog", "shop"))
        assert isinstance(verdict, Retry)
        assert (verdict.reason, delivered(verdict)) == ("stream_full", {0, 1})
        await server.api("STREAM.PURGE.SMALL")
        assert delivered(await sender.send(events("shop", start=2))) == {2}


async def test_tenant_of_several_tokens_reaches_no_subject(server: NatsServer) -> None:
    async with sending(server.url) as sender:
        verdict = await sender.send(events("a.b", "shop", "*", "a b", ">", ""))
    assert isinstance(verdict, Settled)
    assert delivered(verdict) == {1}
    assert {fate.reason for seq, fate in verdict.fates.items() if seq != 1} == {"refused"}
    assert [one.subject for one in await server.stored(STREAM)] == ["billing.usage.shop.ingest"]


async def test_the_streams_own_memory_counts_where_it_is_shorter(server: NatsServer) -> None:
    await server.create("FORGETFUL", ["short.*"], duplicate_window=2 * 10**9)
    heard: list[int] = []
    changes = {"subject": "short.{project}", "remembers": heard.append}
    async with sending(server.url, stream="FORGETFUL", **changes) as sender:
        assert delivered(await sender.send(events("shop"))) == {0}
        assert heard == [2_000]
    policy = Policy(RetrySettings(dedup_window_ms=600_000), below=lambda _: 0)
    policy.remembers(2_000)
    policy.remembers(900_000)  # never more than was configured, nor than was heard
    assert policy._settings.dedup_window_ms == 2_000


async def test_server_away_then_back(server: NatsServer) -> None:
    async with sending(server.url) as sender:
        assert delivered(await sender.send(events("shop"))) == {0}
        await server.kill()
        verdict = await sender.send(events("blog", start=1))
        assert isinstance(verdict, Retry)
        assert (verdict.reason, verdict.fates) == ("connect", {})
        await server.start()
        assert delivered(await sender.send(events("blog", start=1))) == {1}
    assert await server.count(STREAM) == 2


async def test_link_cut_while_answers_are_awaited(server: NatsServer) -> None:
    """What was published and not acknowledged is not delivered; it goes again, and is stored once."""
    async with Wire(server.port) as wire, sending(wire.url) as sender:
        assert delivered(await sender.send(events("shop"))) == {0}
        wire.mute = True  # what is published arrives, and no answer comes back
        under_way = asyncio.create_task(sender.send(events("blog", "shop", start=1)))

        async def arrived() -> bool:
            return await server.count(STREAM) == 3

        await eventually(arrived, "both are stored")
        await wire.cut()
        verdict = await under_way
        assert isinstance(verdict, Retry)
        assert (verdict.reason, verdict.fates) == ("broken_answer", {})
        wire.mute = False
        await wire.heal()
        assert delivered(await sender.send(events("blog", "shop", start=1))) == {1, 2}
    assert await server.count(STREAM) == 3


async def test_no_answer_in_time(server: NatsServer) -> None:
    async with Wire(server.port) as wire, sending(wire.url, timeout_ms=500, window=1) as sender:
        while delivered(await sender.send(events("shop"))) != {0}:
            pass  # a slow disk may take longer, too
        wire.mute = True
        verdict = await sender.send(events("shop", "blog", "shop", start=1))
        assert isinstance(verdict, Retry)
        assert (verdict.reason, verdict.fates) == ("timeout", {})


async def test_token_read_again_and_refused_without(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "nats", {"authorization": {"token": "s3cret"}}) as server:
        server.login = {"token": "s3cret"}
        await server.create(STREAM)
        file = tmp_path / "token"
        file.write_text("wrong")
        async with sending(server.url, token=TokenFile(file)) as sender:
            verdict = await sender.send(events("shop"))
            assert isinstance(verdict, Paused)
            assert verdict.reason == "unauthorized"
            file.write_text("s3cret\n")
            assert delivered(await sender.send(events("shop"))) == {0}


async def test_credentials_file(tmp_path: Path) -> None:
    authority, stranger = Authority(), Authority()
    async with NatsServer(tmp_path / "nats", authority.settings) as server:
        server.login = {"user_credentials": str(authority.creds(tmp_path / "admin.creds"))}
        await server.create(STREAM)
        file = stranger.creds(tmp_path / "sink.creds")
        async with sending(server.url, creds_file=file) as sender:
            verdict = await sender.send(events("shop"))
            assert isinstance(verdict, Paused)
            assert verdict.reason == "unauthorized"
            authority.creds(file)
            assert delivered(await sender.send(events("shop"))) == {0}
            for text in ("", "-----BEGIN NATS USER JWT-----\nabc\n------END NATS USER JWT------\n"):
                file.write_text(text)
                sender.trust(None, Trust())
                verdict = await sender.send(events("shop"))
                assert isinstance(verdict, Paused)
                assert verdict.reason == "credentials"


async def test_permission_to_publish_one_projects_events_alone(tmp_path: Path) -> None:
    """Who may not look at the stream publishes all the same; who may not publish is told so."""
    authority = Authority()
    async with NatsServer(tmp_path / "nats", authority.settings) as server:
        server.login = {"user_credentials": str(authority.creds(tmp_path / "admin.creds"))}
        await server.create(STREAM)
        allowed = {"pub": {"allow": ["billing.usage.shop.ingest"]}}
        file = authority.creds(tmp_path / "sink.creds", allowed)
        async with sending(server.url, creds_file=file, timeout_ms=2_000) as sender:
            verdict = await sender.send(events("shop", "blog", "shop"))
        assert isinstance(verdict, Paused)
        assert (verdict.reason, delivered(verdict)) == ("unauthorized", {0, 2})
        assert "billing.usage.blog.ingest" in verdict.answer


async def test_tls_both_ways(tmp_path: Path) -> None:
    ours = Certificates(tmp_path, "ours")
    of_server = ours.issue("nats", ip=["127.0.0.1"], dns=["localhost"])
    client = ours.issue("sink", dns=["sink.example.org"])
    tls = {"cert_file": str(of_server.cert), "key_file": str(of_server.key)}
    tls |= {"ca_file": str(ours.file), "verify": True}  # type: ignore[dict-item]
    async with NatsServer(tmp_path / "nats", {"tls": tls}) as server:
        context = Trust(ours.file, client.cert, client.key).context()
        server.login = {"tls": context}
        await server.create(STREAM)
        url = f"tls://127.0.0.1:{server.port}"
        async with sending(url, trust=Trust(ours.file, client.cert, client.key)) as sender:
            assert delivered(await sender.send(events("shop"))) == {0}
        async with sending(url, trust=Trust()) as sender:
            verdict = await sender.send(events("shop"))
        assert isinstance(verdict, Paused)
        assert verdict.reason == "tls"


async def test_credentials_never_go_where_tls_is_not_offered(tmp_path: Path) -> None:
    """Whoever sits in between could say that the server wants no TLS."""
    heard = bytearray()

    async def meddler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.11.0","headers":true,"max_payload":1048576}\r\n')
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                heard.extend(data)
        writer.close()

    listening = await asyncio.start_server(meddler, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    (tmp_path / "token").write_text("s3cret")
    async with sending(f"tls://127.0.0.1:{port}", token=TokenFile(tmp_path / "token")) as sender:
        verdict = await sender.send(events("shop"))
    listening.close()
    assert isinstance(verdict, Paused)
    assert verdict.reason == "tls"
    assert heard == b""


async def test_through_the_store(server: NatsServer, tmp_path: Path) -> None:
    """A courier's fates: delivered, again after a restart of the server, and a dead letter."""
    store, thread, metrics = Store(tmp_path), StoreThread(), Metrics()
    ids = store.add("shop", "blog", now_ms=clock_ms())
    async with sending(server.url) as sender:
        courier = Courier(
            CourierSettings("nats", store.output, 100, 0, 2),
            StoredBacklog(store.queue, thread),
            sender,
            Policy(RetrySettings(1, 20, 600_000), below=random.Random(5).randrange),
            metrics,
            clock_ms,
        )
        task = asyncio.create_task(courier.run())
        try:
            await eventually(lambda: thread.run(lambda: store.fates() == {"delivered": 2}), "both delivered")
            await server.kill()
            ids += await thread.run(store.add, "shop", now_ms=clock_ms())
            courier.notify()
            await eventually(lambda: courier.policy.failures > 0, "it is noticed")
            await server.start()
            await eventually(lambda: thread.run(lambda: store.fates() == {"delivered": 3}), "all delivered")
        finally:
            await courier.stop(1.0)
            await task
            thread.close()
    assert [one.headers["Nats-Msg-Id"] for one in await server.stored(STREAM)] == ids
    store.check_tallies()
    store.database.close()


def test_what_is_known_of_single_events_is_settled_while_the_rest_waits() -> None:
    from proxy_usage.store import Batch

    policy = Policy(RetrySettings(500, 60_000, 600_000), below=lambda n: n - 1)
    batch = Batch(1, 1, tuple(events("shop", "blog")), 0, first_attempt_ms=0, confirm=False)
    fates = {0: Fate("delivered")}
    step = policy.decide(batch, Retry("timeout", fates=fates), 1_000)
    assert (step.fates, step.wait_ms, step.unanswered, policy.accepted) == (fates, 500, True, 1)
    late = Batch(1, 1, tuple(events("shop", "blog")), 1, first_attempt_ms=0, confirm=False, resent=True)
    step = policy.decide(late, Paused("misconfigured", "", fates=fates), 700_000)
    assert (step.fates[0].name, step.refused, policy.paused) == ("delivered_ambiguous", True, "misconfigured")
