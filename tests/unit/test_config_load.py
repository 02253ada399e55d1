"""Loading: the environment inside scalars, files beside the configuration, map files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy_usage.config import Config, load, load_text
from proxy_usage.config.tree import escape, expand
from proxy_usage.errors import ConfigError

OUTPUT = "outputs: [{name: b, format: none}]\n"


def read(text: str, base: Path, env: dict[str, str] | None = None) -> Config:
    return load_text(OUTPUT + text, origin="c.yaml", base=base, env=env or {})


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("${A}", "one"),
        ("x${A}y${A}", "xoneyone"),
        ("${A:-two}", "one"),
        ("${NONE:-two}", "two"),
        ("${EMPTY:-two}", "two"),
        ("${EMPTY}", ""),
        ("${NONE:-}", ""),
        ("${A:?say}", "one"),
        ("$${A}", "${A}"),
        ("$$$${A}", "$${A}"),
        ("^a$", "^a$"),
        ("$A $1", "$A $1"),
        ("${NESTED}", "${A}"),
    ],
)
def test_expansion(text: str, expanded: str) -> None:
    assert expand(text, {"A": "one", "EMPTY": "", "NESTED": "${A}"}) == expanded


@given(st.text(alphabet="$${}A:-?", max_size=12))
def test_escaped_text_expands_to_itself(text: str) -> None:
    assert expand(escape(text), {}) == text


def test_values_cannot_add_structure(tmp_path: Path) -> None:
    hostile = "x\nworkers: 9\n- {literal: y}  # '\""
    config = read("tenant: {rules: [{custom_tag: '${TAG}'}]}", tmp_path, {"TAG": hostile})
    assert config.tenant.rules[0].custom_tag == hostile
    assert config.workers == 1


def test_expanded_scalars_get_the_type_of_their_key(tmp_path: Path) -> None:
    config = read(
        """\
listen: {insecure: "${YES}", token_file: "${NONE:-}"}
windows:
  max_keys: ${NUMBER}
  grace: ${NUMBER}s
envoy: {flush_interval: "${OFF}"}
store: {max_bytes: "${NUMBER}GiB", ledger_max_bytes: "${NUMBER}"}
dimensions: {region: {literal: "${NUMBER}"}, zone: {sni: "${YES}"}}
tenant: {no_route: "${CHOICE}"}
""",
        tmp_path,
        {"YES": "true", "NUMBER": "12", "OFF": "off", "CHOICE": "hold"},
    )
    assert config.listen.insecure is True
    assert config.listen.token_file is None
    assert config.windows.max_keys == 12
    assert config.windows.grace == 12_000
    assert config.envoy.flush_interval is None
    assert config.store.max_bytes == 12 << 30
    assert config.store.ledger_max_bytes == 12
    assert config.dimensions["region"].literal == "12"
    assert config.dimensions["zone"].sni is True
    assert config.tenant.no_route == "hold"


def test_scalars_mean_what_they_look_like(tmp_path: Path) -> None:
    config = read(
        "envoy: {flush_interval: off, connection_logs: [NO, off, 12:30, 0x1f, 007, !!str 8]}\n"
        "dimensions: {a: {literal: ~, node: id}, b: {literal: '5', default: 'null'}}",
        tmp_path,
    )
    assert config.envoy.flush_interval is None
    assert config.envoy.connection_logs == ("NO", "off", "12:30", "0x1f", "007", "8")
    assert config.dimensions["a"].literal is None
    assert config.dimensions["b"].literal == "5"
    assert config.dimensions["b"].default == "null"


def test_sections_without_keys_and_aliases(tmp_path: Path) -> None:
    config = read("listen:\nwindows: {length: &l 10s, max_skew: *l}\nmeters: {requests: }", tmp_path)
    assert config.listen == Config().listen
    assert config.windows.max_skew == config.windows.length == 10_000
    assert [meter.type for meter in config.meter_list()] == ["networking.datumapis.com/gateway/requests"]


def test_reopen_follows_the_length(tmp_path: Path) -> None:
    assert read("windows: {length: 5m}", tmp_path).windows.reopen == 300_000
    assert read("windows: {length: 5m, reopen: 1s}", tmp_path).windows.reopen == 1_000


def test_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "etc" / "secrets").mkdir(parents=True)
    (tmp_path / "etc" / "secrets" / "token").write_text("t")
    path = tmp_path / "etc" / "c.yaml"
    path.write_text("\ufeff" + OUTPUT + "listen: {token_file: secrets/token}\nstore: {path: ../usage.db}")
    config = load(path, {})
    assert config.listen.token_file == tmp_path / "etc" / "secrets" / "token"
    assert config.store.path == tmp_path / "usage.db"
    path.write_text(OUTPUT)
    assert load(path, {}).store.path == tmp_path / "etc" / "var" / "usage.db"


def test_tls_makes_an_open_address_acceptable(tmp_path: Path) -> None:
    (tmp_path / "pem").touch()
    tls = "tls: {cert_file: pem, key_file: pem, client_ca_file: pem, allow_san: [envoy]}"
    config = read(f"listen: {{grpc: '0.0.0.0:9001', {tls}}}", tmp_path)
    assert config.listen.tls is not None
    assert config.listen.tls.allow_san == ("envoy",)
    assert config.listen.tls.key_file == tmp_path / "pem"


def test_plaintext_where_the_operator_says_so(tmp_path: Path) -> None:
    text = "listen: {grpc: '[::]:9001', http: '0.0.0.0:0', insecure: true}"
    assert read(text, tmp_path).listen.grpc == "[::]:9001"
    assert read("listen: {grpc: '[::1]:9001', http: 'localhost:9001'}", tmp_path).listen.insecure is False


def test_times_are_milliseconds_of_any_zone(tmp_path: Path) -> None:
    times = "from: 2026-09-01T02:00:00.250+02:00, until: '2026-09-02T00:00:00Z'"
    text = f"outputs: [{{name: a, format: none, {times}}}]"
    output = load_text(text, origin="c.yaml", base=tmp_path, env={}).outputs[0]
    assert output.from_ == 1_788_220_800_250
    assert output.until == 1_788_307_200_000


REFERENCE = (Path(__file__).parents[2] / "config" / "proxy-usage.yaml").read_text().splitlines()
SCALARS = st.sampled_from(
    ["5", "-1", "1.5", "true", "", "~", "[]", "{}", "[a]", "{a: b}", "x", "'('", "${X}", "5s"]
)


@given(st.integers(0, len(REFERENCE) - 1), SCALARS | st.text(max_size=6))
@settings(deadline=None)
def test_whatever_a_value_is_it_loads_or_is_named(number: int, value: str) -> None:
    key, colon, _ = REFERENCE[number].partition(":")
    text = "\n".join([*REFERENCE[:number], f"{key}{colon} {value}", *REFERENCE[number + 1 :]])
    try:
        load_text(text, origin="c.yaml", base=Path(__file__).parent, env={})
    except ConfigError as error:
        assert error.mistakes  # noqa: PT017 - one of two right outcomes
        assert all(mistake.startswith("c.yaml:") for mistake in error.mistakes)  # noqa: PT017 - as above


MAPS = {
    "map.yaml": "# namespaces\nns-1: project-a\n'*.example.com': project-b\n12: 34\nno: yes\n",
    "map.json": '{\n\t"ns-1": "project-a",\n\t"*.example.com": "project-b", "12": 34, "no": "yes"\n}',
}


@pytest.mark.parametrize("name", MAPS)
def test_map_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(MAPS[name])
    rule = read(
        f"tenant: {{rules: [{{route_name: '^(?P<key>.)', map_file: {name}}}]}}", tmp_path
    ).tenant.rules[0]
    assert rule.mapping == {"ns-1": "project-a", "*.example.com": "project-b", "12": "34", "no": "yes"}
    assert rule.map_file == tmp_path / name


def test_a_map_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").touch()
    assert read("dimensions: {a: {sni: true, map_file: map.yaml}}", tmp_path).dimensions["a"].mapping == {}


BAD_MAPS = {
    "list": ("- a", ":1", "is not a mapping"),
    "nested": ("a: b\nc: {d: e}", ":2", "is not `text: text`"),
    "duplicate": ("a: b\n\na: c", ":3", "'a' is already on line 1"),
    "empty value": ("a: b\nc:", ":2", "key or value is empty"),
    "wildcard": ("a: b\nx.*.y: c", ":2", "wildcard 'x.*.y'"),
    "no label": ("a: b\nc: d.e", ":2", "tenant 'd.e' is not a DNS label"),
    "syntax": ("a: b\nc: [\n", ":3", "is not valid YAML"),
    "bytes": (b"a: \xff", "", "is not UTF-8: byte 3"),
    "control": ("a: \x01", "", "is not valid YAML"),
}


@pytest.mark.parametrize(("text", "line", "what"), BAD_MAPS.values(), ids=BAD_MAPS)
def test_bad_map_files_are_named_with_their_line(
    tmp_path: Path, text: str | bytes, line: str, what: str
) -> None:
    path = tmp_path / "map.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        read("tenant: {rules: [{sni: true, map_file: map.yaml}]}", tmp_path)
    (found,) = caught.value.mistakes
    assert f"{path}{line}" in found
    assert "tenant.rules[0]" in found
    assert what in found


def test_every_mistake_of_a_map_up_to_a_bound(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("".join(f"k{n}: A\n" for n in range(30)))
    with pytest.raises(ConfigError) as caught:
        read("tenant: {rules: [{sni: true, map_file: map.yaml}]}", tmp_path)
    assert len(caught.value.mistakes) == 21
    assert "has 10 more mistakes" in caught.value.mistakes[-1]


def test_a_dimension_may_be_mapped_to_any_text(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("a: Some Text\n")
    config = read("dimensions: {a: {sni: true, map_file: map.yaml}}", tmp_path)
    assert config.dimensions["a"].mapping == {"a": "Some Text"}


UNENTERABLE = {
    "store.path": "store: {{path: {closed}/usage.db}}",
    "listen.token_file": "listen: {{token_file: {closed}/token}}",
    "tenant.rules[0].map_file": "tenant: {{rules: [{{authority: true, map_file: {closed}/map.yaml}}]}}",
}


@pytest.mark.parametrize("key", UNENTERABLE)
def test_a_directory_that_may_not_be_entered_is_named(tmp_path: Path, key: str) -> None:
    closed = tmp_path / "closed" / "below"
    closed.mkdir(parents=True)
    closed.parent.chmod(0o700 if os.geteuid() == 0 else 0)
    try:
        with unprivileged(), pytest.raises(ConfigError) as caught:
            read(UNENTERABLE[key].format(closed=closed), tmp_path)
    finally:
        closed.parent.chmod(0o700)
    said = "\n".join(caught.value.mistakes)
    assert key in said
    assert "cannot be reached: Permission denied" in said
    assert "let this user enter" in said


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may enter everything: as somebody else then."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)
