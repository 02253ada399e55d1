"""Files of others that are kept here: unchanged, with their licence, and no more of them than is said."""

import hashlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("proxy_usage/page/static/uplot", "tests/data/axe")


@pytest.mark.parametrize("place", PLACES)
def test_they_are_as_released_and_all_are_named(place: str) -> None:
    notes = (ROOT / place / "VENDORED.txt").read_text()
    sums = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", notes, re.MULTILINE)}
    found = {path.name: path for path in (ROOT / place).iterdir() if path.name != "VENDORED.txt"}
    assert found.keys() == sums.keys()
    assert "LICENSE" in sums
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[name], f"{place}/{name} was changed"
    assert re.match(r"[\w-]+ \d+\.\d+\.\d+, by .+, under the ", notes), "name, version and licence come first"


def test_the_notice_names_what_is_shipped() -> None:
    notice = (ROOT / "NOTICE").read_text()
    version = (ROOT / PLACES[0] / "VENDORED.txt").read_text().split(",")[0]
    assert version in notice
    assert PLACES[0] in notice


def test_every_file_of_the_page_is_installed_with_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["proxy_usage.page"]
    package = ROOT / "proxy_usage" / "page"
    matched = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    assert matched == {path for path in (package / "static").rglob("*") if path.is_file()}
    for name in ("NOTICE", "LICENSE"):
        assert f"!{name}\n" in (ROOT / ".dockerignore").read_text(), "the image is built with it"
