"""Outputs in the configuration: what belongs to which format, and what is said where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_call import Caller

from proxy_usage.config import Config, load_text
from proxy_usage.config.outputs import FileConfig
from proxy_usage.errors import ConfigError
from proxy_usage.model import MAX_EVENT_VALUE
from proxy_usage.outputs import FORMATS, Output
from proxy_usage.outputs.base import Answer, Request, Verdict
from proxy_usage.samples import check_formats
from proxy_usage.service.build import build_mint, open_storage
from proxy_usage.store import Queued

URL = "url: http://127.0.0.1:1/x"


def read(text: str, base: Path, rest: str = "") -> Config:
    return load_text(f"outputs:\n- {{name: a, {text}}}\n{rest}", origin="c.yaml", base=base, env={})


SOUND = {
    "samples": f"format: ceilometer, {URL}",
    "samples one by one": f"format: ceilometer, {URL}, ceilometer: {{batch: false}}, batch: {{events: 1}}",
    "many at once": f"format: cloudevents, {URL}, batch: {{events: 10000}}",
    "another type": f"format: cloudevents, {URL}, content_type: application/json",
    "an archive": "format: file, file: {path: archive/usage.ndjson}",
    "a password": f"{URL}, user: me, password_file: there",
    "a shadow of what is to come": f"format: none, {URL}, ceilometer: {{source: x}}, file: {{path: x}}",
}


@pytest.mark.parametrize("text", SOUND.values(), ids=SOUND)
def test_sound(text: str, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    config = read(text, tmp_path)
    check_formats(config.outputs, build_mint(config), [""] * len(config.dimensions))


def test_an_archives_defaults_have_bounds(tmp_path: Path) -> None:
    config = read("format: file, file: {path: usage.ndjson}", tmp_path)
    expected = FileConfig(
        path=tmp_path / "usage.ndjson", rotate_bytes=1 << 26, rotate_every=3_600_000, max_bytes=1 << 33
    )
    assert config.outputs[0].file == expected


WRONG = {
    "samples of billing": (
        f"{URL}, ceilometer: {{}}",
        "ceilometer: ceilometer says nothing about format billing; remove it, or write format: ceilometer",
    ),
    "an archive posted": (f"{URL}, file: {{path: x}}", "file: file says nothing about format billing"),
    "a type of samples": (
        f"format: ceilometer, {URL}, content_type: application/json",
        "content_type: content_type says nothing about format ceilometer",
    ),
    "a type with parameters": (
        f"format: cloudevents, {URL}, content_type: application/json; charset=utf-8",
        "content_type: 'application/json; charset=utf-8' is not a bare media type",
    ),
    "samples to nowhere": ("format: ceilometer", "format ceilometer needs a url"),
    "an archive without a file": ("format: file", "format file needs a file; give file: {path: …}"),
    "an archive with a url": (f"format: file, file: {{path: x}}, {URL}", "url: url has no use with a file"),
    "an archive with a token": (
        "format: file, file: {path: x}, token_file: there",
        "token_file: token_file has no use with a file",
    ),
    "files larger than all of them": (
        "format: file, file: {path: x, rotate_bytes: 2GiB, max_bytes: 1GiB}",
        "file.rotate_bytes: is more than max_bytes",
    ),
    "no directory": ("format: file, file: {path: a/b/c}", "file.path: directory"),
    "a directory": ("format: file, file: {path: .}", "file.path: "),
    "many samples without an array": (
        f"format: ceilometer, {URL}, ceilometer: {{batch: false}}",
        "batch.events: 100 is too large; at most 1",
    ),
    "many events without an array": (
        f"format: cloudevents, {URL}, content_type: application/cloudevents+json",
        "batch.events: 100 is too large; at most 1",
    ),
    "more than the billing endpoint takes": (
        f"{URL}, batch: {{events: 101}}",
        "101 is too large; at most 100",
    ),
    "more than anybody takes": (
        f"format: cloudevents, {URL}, batch: {{events: 10001}}",
        "10001 is too large; at most 10000",
    ),
    "a resource of no dimension": (
        f"format: ceilometer, {URL}, ceilometer: {{resource_id: 'x/{{zone}}'}}",
        "ceilometer.resource_id: {zone} is no dimension; known are tenant, meter, region",
    ),
    "a brace too many": (
        f"format: ceilometer, {URL}, ceilometer: {{resource_id: 'x/{{region'}}",
        "has a brace that names nothing",
    ),
    "two meters of one name": (
        f"format: ceilometer, {URL}, ceilometer: {{names: {{requests: a, egress_bytes: a}}}}",
        "ceilometer.names.egress_bytes: 'a' is the name of requests already",
    ),
    "a meter there is not": (
        f"format: ceilometer, {URL}, ceilometer: {{names: {{request: a}}}}",
        "ceilometer.names.request: unknown key; did you mean requests?",
    ),
    "a user without a password": (f"{URL}, user: me", "password_file is missing"),
    "a password without a user": (f"{URL}, password_file: there", "user is missing"),
    "two kinds of credentials": (
        f"{URL}, user: me, password_file: there, token_file: there",
        "user: cannot be sent",
    ),
    "a user that Basic cannot carry": (f"{URL}, user: 'a:b', password_file: there", "user: cannot be sent"),
    "a password in the url": (
        "url: 'http://me:secret@127.0.0.1/x'",
        "use token_file, or user and password_file",
    ),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_wrong(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(ConfigError) as caught:
        read(text, tmp_path)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_dimension_that_a_samples_metadata_would_hide(tmp_path: Path) -> None:
    rest = "dimensions: {meter: {literal: x}}"
    with pytest.raises(ConfigError, match="dimension 'meter' would be lost by"):
        read(f"format: ceilometer, {URL}, ceilometer: {{resource_id: x}}", tmp_path, rest)
    read(URL, tmp_path, rest)


def test_without_the_routes_dimensions_the_default_resource_is_the_tenant(tmp_path: Path) -> None:
    read(f"format: ceilometer, {URL}", tmp_path, "dimensions: {region: {literal: x}}")


def test_openmeters_source_is_the_one_that_is_sent(tmp_path: Path) -> None:
    meter = "name: b, format: cloudevents, url: 'http://127.0.0.1:1/y'"
    with pytest.raises(
        ConfigError, match=r"outputs\[1\].source: is not what would be sent.*of outputs\[0\];"
    ):
        read(f"{URL}, source: //a.example/x}}\n- {{{meter}, source: //b.example/x", tmp_path)
    for source in ("", ", source: //a.example/x"):
        read(f"{URL}, source: //a.example/x}}\n- {{{meter}{source}", tmp_path)


def test_an_archive_is_its_own(tmp_path: Path) -> None:
    archive = "format: file, file: {path: usage.ndjson}"
    with pytest.raises(ConfigError, match=r"is the archive of outputs\[0\] already"):
        read(archive + f"}}\n- {{name: b, {archive}", tmp_path)
    with pytest.raises(ConfigError, match="is named like a part of the store"):
        read("format: file, file: {path: usage.db}", tmp_path, "store: {path: usage.db}")


class Halving:
    """A format that sends half of what was used."""

    def __init__(self, honest: Output) -> None:
        self._honest = honest

    def encode(self, events: Sequence[Queued]) -> Request:
        request = self._honest.encode(events)
        whole, half = str(MAX_EVENT_VALUE).encode(), str(MAX_EVENT_VALUE // 2).encode()
        return Request(request.body.replace(whole, half), request.headers)

    def read(self, answer: Answer, events: Sequence[Queued]) -> Verdict:
        raise AssertionError("it is asked at the start alone: nothing was sent, so nothing is answered")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_says_something_else_than_was_meant_does_not_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read(f"format: {name}, {URL}", tmp_path, f"store: {{path: {tmp_path}/usage.db}}")
    honest = FORMATS[name](config.outputs[0], 60_000)
    monkeypatch.setitem(FORMATS, name, lambda _output, _window_ms: Halving(honest))
    with pytest.raises(ConfigError, match="would be sent as"):
        open_storage(config)
    assert not (tmp_path / "usage.db").exists()
    call = Caller(tmp_path, capsys)
    call.configure(outputs=[{"name": "a", "format": name, "url": "http://127.0.0.1:1/x"}])
    said = call("validate")
    assert said.code == 78
    assert "would be sent as" in said.err
