"""The operator's page as it is served: its files, its headers, and who is told which tenants there are."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator
from html.parser import HTMLParser

import aiohttp
import pytest

from proxy_usage.metrics import Metrics
from proxy_usage.page.assets import FILES, assets
from proxy_usage.web import HEADERS, Health, Web


class Told:
    """A page that says who it takes its reader for."""

    def state(self, *, tenants: bool) -> bytes:
        return b'{"tenants": true}' if tenants else b'{"tenants": false}'


class Token:
    def token(self) -> str:
        return "s3cr:et"


@contextlib.asynccontextmanager
async def serving(*, token: bool = False, tenants: bool = True) -> AsyncIterator[str]:
    web = Web(
        "127.0.0.1",
        0,
        metrics=Metrics(),
        health=lambda: Health(True, {}),
        refresh=lambda: None,
        token=Token() if token else None,
        page=Told(),
        tenants=tenants,
    )
    port = await web.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await web.stop()


async def asked(url: str, **headers: str) -> tuple[int, str, aiohttp.typedefs.LooseHeaders]:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.text(), answer.headers


async def test_every_file_is_served_with_its_type_and_asked_for_again_only_when_it_changed() -> None:
    async with serving() as base:
        for path, asset in assets().items():
            async with aiohttp.ClientSession() as session, session.get(base + path) as answer:
                assert (answer.status, answer.content_type) == (200, asset.type)
                assert await answer.read() == asset.body
                tag = answer.headers["ETag"]
                assert answer.headers["Cache-Control"] == "no-cache"
            assert (await asked(base + path, **{"If-None-Match": tag}))[0] == 304


async def test_every_answer_forbids_what_the_page_does_not_need() -> None:
    async with serving() as base, aiohttp.ClientSession() as session:
        for path in (*FILES, "/api/state", "/metrics", "/readyz", "/healthz"):
            async with session.get(base + path) as answer:
                assert HEADERS.items() <= dict(answer.headers).items(), path
        async with session.get(base + "/api/state") as answer:
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.content_type == "application/json"
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert HEADERS["X-Content-Type-Options"] == "nosniff"


async def test_it_only_reads() -> None:
    async with serving() as base, aiohttp.ClientSession() as session:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            for path in ("/", "/api/state"):
                async with session.request(method, base + path) as answer:
                    assert answer.status == 405


def basic(name: str, word: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{word}".encode()).decode()


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/api/state", "/metrics"])
async def test_a_browser_gives_the_token_as_a_password(path: str) -> None:
    async with serving(token=True) as base:
        status, _, headers = await asked(base + path)
        assert status == 401
        assert [one.split()[0] for one in headers.getall("WWW-Authenticate")] == ["Bearer", "Basic"]  # type: ignore[union-attr]
        for wrong in (
            basic("any", "wrong"),
            basic("s3cr", "et"),
            "Basic s3cr:et",
            "Basic !",
            "Digest s3cr:et",
        ):
            assert (await asked(base + path, Authorization=wrong))[0] == 401
        for right in (basic("", "s3cr:et"), basic("anybody", "s3cr:et"), "Bearer s3cr:et"):
            assert (await asked(base + path, Authorization=right))[0] == 200


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("127.0.0.1:9090", True),
        ("localhost", True),
        ("[::1]:9090", True),
        ("evil.example", False),  # whose name resolves to 127.0.0.1
        ("127.0.0.1.evil.example", False),
        ("192.0.2.7", False),
        ("[", False),
    ],
)
async def test_without_a_token_tenants_are_named_to_this_machine_alone(host: str, named: bool) -> None:
    async with serving() as base:
        assert (await asked(base + "/api/state", Host=host))[1] == f'{{"tenants": {str(named).lower()}}}'


async def test_with_the_token_tenants_are_named_to_whoever_has_it_where_it_is_allowed() -> None:
    async with serving(token=True) as base:
        answer = await asked(base + "/api/state", Host="sink.example", Authorization="Bearer s3cr:et")
        assert answer[1] == '{"tenants": true}'
    async with serving(token=True, tenants=False) as base:
        assert (await asked(base + "/api/state", Authorization="Bearer s3cr:et"))[1] == '{"tenants": false}'
    async with serving(tenants=False) as base:
        assert (await asked(base + "/api/state"))[1] == '{"tenants": false}'


class Written(HTMLParser):
    """What a page refers to, and what of it a strict policy would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.refers: list[str] = []
        self.refused: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.refers += [names[one] or "" for one in ("src", "href") if one in names]
        self.refused += [one for one in names if one == "style" or one.startswith("on")]
        self._script = tag in ("script", "style")
        if tag == "style":
            self.refused.append(tag)

    def handle_data(self, data: str) -> None:
        if self._script and data.strip():
            self.refused.append(data)
        self._script = False


def test_the_page_needs_nothing_but_its_own_files_and_no_line_of_script_in_it() -> None:
    page = Written()
    page.feed(assets()["/"].body.decode())
    assert page.refused == []
    outside = [one for one in page.refers if not one.startswith("#")]
    assert outside
    assert {f"/{one}" for one in outside} <= FILES.keys()


def test_our_scripts_set_text_and_never_markup() -> None:
    ours = [path for path in FILES if path.endswith(".js") and "uPlot" not in path]
    assert len(ours) == 4
    for path in ours:
        text = assets()[path].body.decode()
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "http://",
            "https://",
        ):
            found = text.replace("http://www.w3.org/2000/svg", "")
            assert word not in found, f"{path}: {word}"
        assert len(text.splitlines()) <= 400
