"""Samples over real sockets: what Ceilometer would lose is sent again, and what is refused is found."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web
from couriers import PATIENCE_S, running
from samples_peer import Post, SamplesPeer
from ulid import ULID

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.service.build import clock_ms


def output(peer: SamplesPeer, **settings: Any) -> OutputConfig:
    fast = {"retry": {"initial": 1, "max": 8}}
    return OutputConfig.model_validate(
        {"name": "telemetry", "format": "ceilometer", "url": peer.url, **fast, **settings}
    )


def uuids(ids: list[str]) -> set[str]:
    return {str(ULID.from_str(id_).to_uuid()) for id_ in ids}


async def test_what_ceilometer_would_lose_is_sent_again_as_it_was(tmp_path: Path) -> None:
    trouble = [408, 429, 500, 503, 401, 404]

    def answer(post: Post) -> web.Response:
        return web.Response(status=trouble.pop(0) if trouble else 201)

    async with SamplesPeer(answer=answer) as peer:
        async with running(tmp_path, [output(peer)]) as one:
            ids = one.store.add("alpha", "bravo", now_ms=clock_ms())
            await one.until("telemetry", delivered=2)
        assert len(peer.posts) == 7
        assert len({post.raw for post in peer.posts}) == 1
        assert set(peer.volumes) == uuids(ids)
        assert peer.wrong == []


async def test_a_batch_may_be_larger_than_the_billing_endpoints(tmp_path: Path) -> None:
    async with SamplesPeer() as peer:
        async with running(tmp_path, [output(peer, batch={"events": 500})]) as one:
            ids = one.store.add(*(f"t{n}" for n in range(450)), now_ms=clock_ms())
            await one.until("telemetry", delivered=450)
        assert [len(post.body) for post in peer.posts] == [450]
        assert set(peer.volumes) == uuids(ids)


async def test_without_batches_each_request_is_one_sample(tmp_path: Path) -> None:
    async with SamplesPeer() as peer:
        bare = output(peer, ceilometer={"batch": False}, batch={"events": 1})
        async with running(tmp_path, [bare]) as one:
            ids = one.store.add("alpha", "bravo", "charlie", now_ms=clock_ms())
            await one.until("telemetry", delivered=3)
        assert [post.body["project_id"] for post in peer.posts] == ["alpha", "bravo", "charlie"]
        assert set(peer.volumes) == uuids(ids)
        assert peer.wrong == []


async def test_a_bearer_token_is_sent_and_its_401_pauses_until_it_is_renewed(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")

    def answer(post: Post) -> web.Response:
        return web.Response(status=200 if post.headers.get("authorization") == "Bearer new" else 401)

    async with SamplesPeer(answer=answer) as peer:
        async with running(tmp_path, [output(peer, token_file=token)]) as one:
            one.store.add("alpha", now_ms=clock_ms())
            async with asyncio.timeout(PATIENCE_S):
                while one.couriers[0].policy.paused != "unauthorized":
                    await asyncio.sleep(0.005)
            token.write_text("new\n")
            await one.until("telemetry", delivered=1)
        assert peer.wrong == []


async def test_a_refused_sample_and_one_that_cannot_be_made_are_found_by_splitting(tmp_path: Path) -> None:
    def answer(post: Post) -> web.Response:
        refused = any(sample["project_id"] == "t3" for sample in post.body)
        return web.Response(status=422 if refused else 204, text=None if not refused else "no t3")

    async with SamplesPeer(answer=answer) as peer:
        async with running(tmp_path, [output(peer)]) as one:
            ids = one.store.add(*(f"t{n}" for n in range(16)), now_ms=clock_ms())
            one.store.db.execute("UPDATE events SET body=? WHERE id=?", (b"{spoiled", ids[9]))
            await one.until("telemetry", delivered=14, dead=2)
            letters = await one.thread.run(one.store.rows, "SELECT reason FROM dead ORDER BY seq")
        assert letters == [("refused",), ("unreadable",)]
        assert set(peer.volumes) == uuids(ids) - uuids([ids[3], ids[9]])
