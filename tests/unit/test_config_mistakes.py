"""Every mistake a person can make is named with its line, its key and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy_usage.config import load, load_text
from proxy_usage.errors import ConfigError

OUTPUT = "outputs: [{name: b, url: 'http://localhost:8080/x'}]\n"


def mistakes(text: str, base: Path, env: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_text(text, origin="c.yaml", base=base, env=env or {})
    assert caught.value.exit_code == 78
    return caught.value.mistakes


# Text behind OUTPUT (which is line 1), expected line, key, part of what is said to be wrong, of the remedy.
ONE_MISTAKE = {
    "unknown section": ("windos: {}", 2, "windos", "unknown key", "did you mean windows?"),
    "unknown key": ("windows:\n  lenght: 60s", 3, "windows.lenght", "unknown key", "did you mean length?"),
    "unknown key in a list": (
        "tenant:\n  rules:\n    - custom_tag: a\n      patern: b",
        5,
        "tenant.rules[0].patern",
        "unknown key",
        "did you mean pattern?",
    ),
    "unknown key in a mapping": (
        "dimensions:\n  region: {node: id, defalt: x}",
        3,
        "dimensions.region.defalt",
        "unknown key",
        "did you mean default?",
    ),
    "reserved names are keys": (
        "skip:\n- {iff: {flag: NR}, if: {flag: NR}, reason: x}",
        3,
        "skip[0].iff",
        "unknown key",
        "did you mean if?",
    ),
    "key of another section": (
        "checkpoint: 1s",
        2,
        "checkpoint",
        "unknown key",
        "belongs under windows.checkpoint",
    ),
    "key like no other": ("log: {qqq: 1}", 2, "log.qqq", "unknown key", "valid are level, format"),
    "duplicate key": ("workers: 1\nworkers: 1", 3, "workers", "already on line 2", "keep one"),
    "merge key": ("log:\n  <<: {level: info}", 3, "log.<<", "merge keys", "write the keys out"),
    "section is text": (
        "windows: fast",
        2,
        "windows",
        "must be a mapping, not the text 'fast'",
        "key: value",
    ),
    "list is text": ("tenant: {rules: a}", 2, "tenant.rules", "must be a list", "- item"),
    "mapping is a list": ("dimensions: [a]", 2, "dimensions", "must be a mapping", "key: value"),
    "text is a number": (
        "envoy: {tags: {emit_us: 5}}",
        2,
        "envoy.tags.emit_us",
        "must be text, not 5",
        "quotes",
    ),
    "number is text": ("workers: one", 2, "workers", "must be a whole number", "digits"),
    "number is a fraction": ("workers: 1.0", 2, "workers", "must be a whole number", "digits"),
    "number is a flag": (
        "streams: {max: true}",
        2,
        "streams.max",
        "must be a whole number, not true",
        "digits",
    ),
    "flag is text": (
        "listen: {insecure: yes}",
        2,
        "listen.insecure",
        "must be true or false",
        "true or false",
    ),
    "number too small": ("streams: {max: 0}", 2, "streams.max", "too small", "at least 1"),
    "empty text": (
        "envoy: {tags: {emit_us: ''}}",
        2,
        "envoy.tags.emit_us",
        "must not be empty",
        "remove the key",
    ),
    "not a choice": (
        "log: {level: inof}",
        2,
        "log.level",
        "'inof' is not a valid value",
        "did you mean info?",
    ),
    "not a choice at all": ("tenant: {no_route: x}", 2, "tenant.no_route", "'x'", "valid are skip, hold"),
    "duration without unit": ("windows: {grace: 5}", 2, "windows.grace", "no unit", "30s"),
    "duration as a fraction": ("windows: {grace: 1.5s}", 2, "windows.grace", "not a whole number", "1h30m"),
    "negative duration": ("windows: {grace: -5s}", 2, "windows.grace", "negative durations", "30s"),
    "duration of nothing": ("windows: {checkpoint: 0s}", 2, "windows.checkpoint", "longer than 0", "250ms"),
    "duration of a wrong unit": ("store: {keep_sums: 1y}", 2, "store.keep_sums", "not a duration", "29d"),
    "interval without unit": ("envoy: {flush_interval: 60}", 2, "envoy.flush_interval", "no unit", "30s"),
    "size of a wrong unit": ("store: {max_bytes: 8G}", 2, "store.max_bytes", "unit 'G'", "8GiB"),
    "size as a fraction": ("store: {max_bytes: 1.5}", 2, "store.max_bytes", "not a whole number", "64MiB"),
    "negative size": ("store: {max_bytes: -1}", 2, "store.max_bytes", "negative sizes", "64MiB"),
    "size of nothing": ("store: {max_bytes: 0}", 2, "store.max_bytes", "more than 0", "64MiB"),
    "no port": (
        "listen: {grpc: localhost}",
        2,
        "listen.grpc",
        "not an address with a port",
        "127.0.0.1:9001",
    ),
    "port too large": ("listen: {grpc: 'localhost:70000'}", 2, "listen.grpc", "not a port", "host:port"),
    "bad IPv6": ("listen: {grpc: '[::g]:1'}", 2, "listen.grpc", "not an IPv6 address", "[::1]:9001"),
    "bad IPv4": ("listen: {grpc: 127.0.0.256:1}", 2, "listen.grpc", "not an IPv4 address", "host:port"),
    "bad host": ("listen: {grpc: 'a b:1'}", 2, "listen.grpc", "not a host name", "host:port"),
    "missing file": ("listen: {token_file: none}", 2, "listen.token_file", "does not exist", "create it"),
    "file is a directory": (
        "listen: {token_file: .}",
        2,
        "listen.token_file",
        "is not a file",
        "name a file",
    ),
    "file name missing": (
        "listen: {token_file: ''}",
        2,
        "listen.token_file",
        "name of a file",
        "relative names",
    ),
    "bad regular expression": (
        "tenant: {rules: [{custom_tag: a, pattern: 'a(b'}]}",
        2,
        "tenant.rules[0].pattern",
        "unterminated subpattern at character 2",
        "single quotes",
    ),
    "bad route expression": (
        "dimensions: {a: {route_name: '*x'}}",
        2,
        "dimensions.a.route_name",
        "nothing to repeat at character 1",
        "single quotes",
    ),
    "route name is a number": (
        "dimensions: {a: {route_name: 5}}",
        2,
        "dimensions.a.route_name",
        "true",
        "e.g.",
    ),
    "source switched off": ("dimensions: {a: {sni: false}}", 2, "dimensions.a.sni", "must be true", "remove"),
    "unknown node path": (
        "dimensions: {a: {node: region}}",
        2,
        "dimensions.a.node",
        "no 'region'",
        "locality.region",
    ),
    "node metadata without key": (
        "dimensions: {a: {node: metadata.}}",
        2,
        "dimensions.a.node",
        "no",
        "metadata.KEY",
    ),
    "metadata without path": (
        "dimensions: {a: {dynamic_metadata: {filter: f}}}",
        2,
        "dimensions.a.dynamic_metadata.path",
        "is missing",
        "add it",
    ),
    "skip without reason": ("skip:\n- if: {flag: NR}", 3, "skip[0].reason", "is missing", "add it"),
    "skip reason": (
        "skip: [{if: {flag: NR}, reason: 'No route'}]",
        2,
        "skip[0].reason",
        "not a name",
        "lower-case",
    ),
    "skip status": ("skip: [{if: {status: 6xx}, reason: x}]", 2, "skip[0].if.status", "not a status", "5xx"),
    "skip status list": (
        "skip: [{if: {status: [404, 4]}, reason: x}]",
        2,
        "skip[0].if.status",
        "status",
        "5xx",
    ),
    "skip expression": (
        "skip: [{if: {flag: '['}, reason: x}]",
        2,
        "skip[0].if.flag",
        "at character 1",
        "quotes",
    ),
    "unknown meter": (
        "meters: {egress: {}}",
        2,
        "meters.egress",
        "no meter is called 'egress'",
        "egress_bytes",
    ),
    "audit of no URL": (
        "audit: {envoys: [localhost]}",
        2,
        "audit.envoys[0].url",
        "neither http nor https",
        "http://",
    ),
    "unset variable": ("log: {level: '${LEVEL}'}", 2, "log.level", "LEVEL is not set", "${NAME:-default}"),
    "empty variable": (
        "log: {level: '${LEVEL:?say how much}'}",
        2,
        "log.level",
        "LEVEL: say how much",
        "set it",
    ),
    "variable without name": ("log: {level: '${}'}", 2, "log.level", "not a reference", "$$"),
    "variable without end": ("log: {level: '${LEVEL'}", 2, "log.level", "not a reference", "$$"),
    "variable in braces": ("log: {level: ${LEVEL}}", 2, "", "not valid YAML", 'quotes around "${NAME}"'),
    "tabs": ("log:\n\tlevel: info", 3, "", "not valid YAML", "spaces, not tabs"),
    "unbalanced bracket": ("skip: [", 2, "", "not valid YAML", "brackets"),
    "colon in text": ("log: level: info", 2, "", "not valid YAML", "in quotes"),
    "control character": ("log: {level: \x01}", 2, "", "not valid YAML", "remove the character"),
    "alias of itself": ("skip: &a [*a]", 2, "skip[0]", "contains itself", "write the value out"),
    "unknown tag": (
        "log: {level: !!python/name:os.system ''}",
        2,
        "log.level",
        "python/name",
        "remove the tag",
    ),
    "brackets without end": ("skip: " + "[" * 2000, 1, "", "nested too deeply", "left open"),
    "home of nobody": (
        "store: {path: '~no-such-user/x'}",
        2,
        "store.path",
        "home directory",
        "write the path",
    ),
    "key is a list": ("? [a]\n: b", 2, "", "key must be text", "key: value"),
}


@pytest.mark.parametrize(("text", "line", "key", "what", "remedy"), ONE_MISTAKE.values(), ids=ONE_MISTAKE)
def test_named_with_place_and_remedy(
    tmp_path: Path, text: str, line: int, key: str, what: str, remedy: str
) -> None:
    (tmp_path / "there").touch()
    (found,) = mistakes(OUTPUT + text, tmp_path)
    place = f"c.yaml:{line}: {key}: " if key else f"c.yaml:{line}: "
    assert found.startswith(place)
    said, _, told = found.removeprefix(place).partition("; ")
    assert what in said
    assert remedy in told


def test_password_in_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for port in ("80", "x"):
        text = f"outputs: [{{name: b, url: 'http://me:hunter2@host:{port}/'}}]"
        (found,) = mistakes(text, tmp_path)
        assert "outputs[0].url" in found
        assert "hunter2" not in found


def test_all_mistakes_at_once_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = """\
listen: {grpc: 0.0.0.0:1, http: 127.0.0.1}
windows:
  length: 7s
  grace: 5
tenant:
  rules:
    - custom_tag: 5
    - literal: a
    - sni: true
log: {level: loud}
outputs:
  - {name: a, url: ftp://x}
  - {name: a, format: none}
  - {name: a, format: none}
"""
    found = [one.removeprefix("c.yaml:").split(": ")[:2] for one in mistakes(text, tmp_path)]
    assert found == [
        ["1", "listen.http"],
        ["1", "listen.grpc"],
        ["3", "windows.length"],
        ["4", "windows.grace"],
        ["7", "tenant.rules[0].custom_tag"],
        ["9", "tenant.rules[2]"],
        ["10", "log.level"],
        ["12", "outputs[0].url"],
        ["14", "outputs[2].name"],
    ]


def test_other_items_keep_their_number_when_one_is_mistaken(tmp_path: Path) -> None:
    text = OUTPUT + "tenant: {rules: [{custom_tag: 5}, {literal: a}, {sni: true}]}"
    assert "the literal of tenant.rules[1] always matches" in mistakes(text, tmp_path)[1]


@pytest.mark.parametrize(
    "text",
    [
        "outputs: [{name: a, url: '${URL}'}]",  # says nothing of a missing url
        OUTPUT + "listen: {grpc: 0.0.0.0:1, insecure: maybe}",  # nor of plaintext
        OUTPUT + "envoy: {flush_interval: 5}\nlisten: {streams: 127.0.0.1:1}",  # nor of a missing interval
        OUTPUT + "tenant: {rules: [{custom_tag: 5}]}",  # nor of missing rules
    ],
)
def test_nothing_is_concluded_from_what_is_mistaken(tmp_path: Path, text: str) -> None:
    assert len(mistakes(text, tmp_path)) == 1


def test_error_reads_as_a_list_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(OUTPUT + "workers: 0\nlog: {leve: info}", origin="c.yaml", base=tmp_path, env={})
    assert str(caught.value).splitlines() == [
        "c.yaml: 2 mistakes in the configuration",
        "  - c.yaml:2: workers: 0 is too small; at least 1",
        "  - c.yaml:3: log.leve: unknown key; did you mean level?",
        "  hint: config/proxy-usage.yaml lists every key; `proxy-usage config schema` helps an editor",
    ]


def test_aliases_of_aliases_end(tmp_path: Path) -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10)]
    text = "\n".join(["l0: &l0 [x, x]", *levels, OUTPUT])
    found = mistakes(text, tmp_path)
    assert any("has more than" in one and "fewer aliases" in one for one in found)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load(tmp_path / "none.yaml", {})
    assert "PROXY_USAGE_CONFIG" in caught.value.hint
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, {})
    (tmp_path / "latin.yaml").write_bytes(b"log: \xe9")
    with pytest.raises(ConfigError, match=r"not UTF-8 \(byte 5\)"):
        load(tmp_path / "latin.yaml", {})
