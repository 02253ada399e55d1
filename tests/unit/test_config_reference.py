"""The commented reference, the schema, what ``config show`` prints and what a reload may change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from proxy_usage.config import Config, changed, json_schema, load, load_text, needs_restart, show
from proxy_usage.config.tree import parse

REFERENCE = Path(__file__).parents[2] / "config" / "proxy-usage.yaml"
OUTPUT = "outputs: [{name: billing, url: 'http://127.0.0.1:8080/v1/usage/events:batchIngest'}]\n"
FULL = """\
listen:
  streams: 127.0.0.1:9002
  tls: {cert_file: pem, key_file: pem, client_ca_file: pem, node_from_san: 'node-(.*)$'}
  token_file: pem
envoy: {flush_interval: 1h30m, connection_logs: []}
tenant:
  rules:
    - dynamic_metadata: {filter: f, path: [a, b]}
    - {request_header: X-Tenant, trusted: true, pattern: '^$${x}$'}
    - {authority: true, map_file: map.yaml}
    - literal: rest
dimensions:
  region: {route_name: true, default: 'null'}
  price: {literal: '$${HOME} $$$$ 007'}
skip: [{if: {flag: NR, status: [404, 5xx]}, reason: no_route}]
meters: {connection_seconds: {count: connections}, egress_bytes: {bytes: body}}
windows: {length: 5m}
outputs:
  - {name: a, url: 'https://h/x', token_file: pem, ca_file: pem, from: 2026-09-01T00:00:00Z, timeout: 1s500ms}
  - {name: b, format: none, until: 2026-09-01T00:00:00.001Z}
store: {max_bytes: 1234567890123}
"""


def read(text: str, base: Path) -> Config:
    return load_text(text, origin="c.yaml", base=base, env={})


@pytest.fixture
def full(tmp_path: Path) -> Config:
    (tmp_path / "pem").write_text("SECRET")
    (tmp_path / "map.yaml").write_text("'*.example.com': project-a\n")
    return read(FULL, tmp_path)


def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def keys(value: object) -> object:
    """The keys of nested mappings, without what they hold."""
    if isinstance(value, dict):
        return {key: keys(item) for key, item in value.items()}
    return [keys(item) for item in value] if isinstance(value, list) else None


def test_reference_says_what_the_defaults_are() -> None:
    assert load(REFERENCE, {}) == read(OUTPUT, REFERENCE.parent)


def test_reference_has_every_key() -> None:
    written = yaml.safe_load(REFERENCE.read_text())
    shown = yaml.safe_load(show(load(REFERENCE, {})))
    for rule in shown["tenant"]["rules"]:
        assert rule.pop("trusted") is False  # said in a comment, for it goes with request_header alone
    assert keys(written) == keys(shown)


def test_examples_in_the_comments_of_the_reference_load(tmp_path: Path) -> None:
    before, rules, after = re.split(r"(?m)^  (?=rules:|allow_uuid:)", REFERENCE.read_text())
    rules = rules.replace("\n  #   ", "\n    ")
    after = after.replace("\nskip: []", "\nskip:").replace("\n#  - {if", "\n  - {if")
    text = f"{before}  {rules}  {after}"
    (tmp_path / "namespaces.yaml").write_text("ns-1: project-a\n")
    (tmp_path / "hosts.yaml").write_text("'*.example.com': project-a\n")
    config = read(text, tmp_path)
    assert len(config.tenant.rules) == 8
    assert [rule.reason for rule in config.skip] == [
        "no_route",
        "health_check",
        "local_reply",
        "waf_block",
    ]


def test_show_round_trips(full: Config, tmp_path: Path) -> None:
    assert read(show(full), tmp_path / "elsewhere") == full
    default = load(REFERENCE, {})
    assert read(show(default), tmp_path) == default


def test_show_names_secrets_by_file_only(full: Config, tmp_path: Path) -> None:
    text = show(full)
    assert "SECRET" not in text
    assert yaml.safe_load(text)["outputs"][0]["token_file"] == str(tmp_path / "pem")


def test_show_is_written_as_people_write(full: Config) -> None:
    shown = yaml.safe_load(show(full))
    assert shown["envoy"]["flush_interval"] == "1h30m"
    assert shown["store"]["keep_sums"] == "400d"
    assert shown["store"]["ledger_max_bytes"] == "1GiB"
    assert shown["outputs"][0]["timeout"] == "1s500ms"
    assert shown["outputs"][0]["from"] == "2026-09-01T00:00:00.000Z"
    assert shown["tenant"]["rules"][3] == {"literal": "rest", "trusted": False}
    assert shown["meters"]["connection_seconds"] == {
        "type": "networking.datumapis.com/gateway/connection-seconds",
        "unit": "s",
        "count": "connections",
    }


def test_schema_accepts_what_loads(full: Config) -> None:
    for text in (REFERENCE.read_text(), FULL, show(full), OUTPUT, "meters: {requests: {}}\n" + OUTPUT):
        document = parse(text, {})[0].plain()
        assert [error.message for error in validator().iter_errors(document)] == []


@pytest.mark.parametrize(
    "text",
    [
        "windos: {}",
        "windows: {lenght: 60s}",
        "tenant: {rules: [{custom_tag: a, patern: b}]}",
        "outputs: [{name: a, format: none, form: 2026-09-01T00:00:00Z}]",
        "outputs: [{format: none}]",
        "outputs: [{name: a, from_: '2026-09-01T00:00:00Z'}]",
        "windows: {grace: 5}",
        "store: {max_bytes: 8G}",
        "log: {level: loud}",
        "meters: {requests: {type: 5}}",
        "meters: {request: {}}",
        "skip: [{if: {status: 6xx}, reason: x}]",
        "skip: [{if: {status: 99}, reason: x}]",
        "dimensions: {a: {sni: false}}",
    ],
)
def test_schema_refuses_mistakes(text: str) -> None:
    assert list(validator().iter_errors(yaml.safe_load(text)))


def test_nothing_changed(full: Config, tmp_path: Path) -> None:
    assert changed(full, read(FULL, tmp_path)) == ()


CHANGES = {
    ("literal: rest", "literal: other"): (("tenant.rules",), ()),
    ("default: 'null'", "default: x"): (("dimensions.region.default",), ()),
    ("  price: {", "  cost: {"): (("dimensions",), ("dimensions",)),
    ("status: [404, 5xx]", "status: 404"): (("skip",), ()),
    ("node_from_san: 'node-(.*)$'", "allow_san: [a]"): (
        ("listen.tls.allow_san", "listen.tls.node_from_san"),
        (),
    ),
    ("length: 5m", "length: 10m"): (
        ("windows.length", "windows.reopen"),
        ("windows.length", "windows.reopen"),
    ),
    (" ca_file: pem,", ""): (("outputs.a.ca_file",), ()),
    ("https://h/x", "https://h/y"): (("outputs.a.url",), ("outputs.a.url",)),
    ("name: b", "name: c"): (("outputs",), ("outputs",)),
    ("bytes: body", "bytes: wire"): (("meters.egress_bytes.bytes",), ("meters.egress_bytes.bytes",)),
    ("store:", "log: {level: debug}\nstore:"): (("log.level",), ()),
}


@pytest.mark.parametrize(("edit", "expected"), CHANGES.items(), ids=lambda value: str(value[0]).strip())
def test_changed(
    full: Config,
    tmp_path: Path,
    edit: tuple[str, str],
    expected: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    keys = changed(full, read(FULL.replace(*edit), tmp_path))
    assert sorted(keys) == sorted(expected[0])
    assert sorted(needs_restart(keys)) == sorted(expected[1])


def test_order_of_dimensions_is_a_change(tmp_path: Path) -> None:
    first = "dimensions: {a: {node: id}, b: {sni: true}}\n"
    swapped = "dimensions: {b: {sni: true}, a: {node: id}}\n"
    keys = changed(read(OUTPUT + first, tmp_path), read(OUTPUT + swapped, tmp_path))
    assert keys == needs_restart(keys) == ("dimensions",)


def test_contents_of_a_map_file_are_a_change(full: Config, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("'*.example.com': project-b\n")
    assert changed(full, read(FULL, tmp_path)) == ("tenant.rules",)
    text = OUTPUT + "dimensions: {a: {sni: true, map_file: map.yaml}}"
    before = read(text, tmp_path)
    (tmp_path / "map.yaml").write_text("x: y\n")
    assert changed(before, read(text, tmp_path)) == ("dimensions.a",)
