"""The operator's page of several workers: how often they are asked, and what is said of one that is silent.

The workers are stand-ins that answer as a file tells them to; real ones are in tests/e2e/test_workers.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from test_children import Kept, keeping
from test_page_document import NOW, WELL

from proxy_usage.config import Config
from proxy_usage.service.children import Patience
from proxy_usage.service.overlooking import STALE_MS, Overlook


class Seen:
    """One worker that serves, another that was never started, and the page over both at a time of ours."""

    def __init__(self, place: Path) -> None:
        self.now_ms = NOW
        self.draining = False
        (place / "other").mkdir()
        self.kept = Kept(place, "serve", Patience(page=0.5))
        store = {"path": f"{place}/usage.db", "max_bytes": "8GiB"}
        self.page = Overlook(
            Config.model_validate({"store": store, "workers": 2}),
            place / "proxy-usage.yaml",
            [Kept(place / "other", "serve", number=0).child, self.kept.child],
            lambda: self.draining,
            lambda: self.now_ms,
        )
        self.say(WELL)

    def say(self, what: object) -> None:
        (self.kept.place / "said").write_bytes(msgspec.json.encode(what))

    def asked(self) -> int:
        return len((self.kept.place / "asked").read_text())

    async def told(self, *, after_ms: int = 0) -> dict[str, Any]:
        self.now_ms += after_ms
        document: dict[str, Any] = json.loads(await self.page.state(tenants=False))
        return document


@contextlib.asynccontextmanager
async def serving(place: Path) -> AsyncIterator[Seen]:
    seen = Seen(place)
    async with keeping(seen.kept):
        await seen.kept.until(seen.kept.child.serving.is_set)
        yield seen


async def test_workers_are_asked_once_a_second_however_many_look(tmp_path: Path) -> None:
    async with serving(tmp_path) as seen:
        told = await asyncio.gather(*(seen.page.state(tenants=number % 2 == 0) for number in range(40)))
        assert len({*told}) == 2, "one for each kind of reader"
        await seen.told(after_ms=999)
        assert seen.asked() == 1
        await seen.told(after_ms=1)
        assert seen.asked() == 2


async def test_what_is_said_is_of_the_whole_with_the_settings_of_the_whole(tmp_path: Path) -> None:
    async with serving(tmp_path) as seen:
        told = await seen.told()
        assert [one["title"] for one in told["problems"]] == ["Worker 0 is starting"]
        assert told["intake"]["read"] == WELL.nodes[0].read
        settings = dict(told["settings"])
        assert (settings["workers"], settings["listen.grpc"]) == ("2", "127.0.0.1:9001")
        assert settings["store"] == f"{tmp_path}/usage.db, at most 8GiB with those beside it"
        seen.draining = True
        assert (await seen.told(after_ms=1_000))["state"]["word"] == "draining"


async def test_before_any_answers_the_sink_is_starting(tmp_path: Path) -> None:
    told = await Seen(tmp_path).told()
    assert told["state"]["word"] == "starting"
    assert told["history"]["columns"]["entries"] == []


async def test_figures_stay_for_a_while_and_then_the_worker_is_named(tmp_path: Path) -> None:
    async with serving(tmp_path) as seen:
        await seen.told()
        seen.kept.tell("hang")
        said = await seen.told(after_ms=STALE_MS)
        assert "does not answer" not in said["state"]["text"], "one answer that is late is nothing"
        said = await seen.told(after_ms=1_000)
        assert said["state"]["text"] == "Worker 1 does not answer"
        assert said["problems"][0]["detail"] == "its figures are 11 s old"
        assert said["intake"]["read"] == WELL.nodes[0].read
        seen.kept.tell("serve")
        seen.say(replace(WELL, now_ms=seen.now_ms))
        assert "does not answer" not in json.dumps(await seen.told(after_ms=1_000))


async def test_an_answer_that_is_not_understood_is_none(tmp_path: Path) -> None:
    async with serving(tmp_path) as seen:
        await seen.told()
        seen.say({"of": "another version"})
        said = await seen.told(after_ms=STALE_MS + 1_000)
        assert said["state"]["text"] == "Worker 1 does not answer"


async def test_one_that_died_is_named_at_once_since_its_last_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as seen:
        await seen.told()
        seen.kept.tell("exit 1")
        seen.kept.child.kill()
        await seen.kept.until(lambda: bool(seen.kept.ended))
        (first, *_) = (await seen.told(after_ms=1_000))["problems"]
        assert (first["title"], first["level"]) == ("Worker 1 does not answer", "failing")
        assert first["since_ms"] == seen.kept.child.answered_ms
