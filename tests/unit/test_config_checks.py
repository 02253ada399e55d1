"""Mistakes between keys, and in the outputs, are named with their line, key and a remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxy_usage.config import load_text
from proxy_usage.config.checks import MIN_STORE
from proxy_usage.config.place_checks import store_findings
from proxy_usage.errors import ConfigError
from proxy_usage.store.space import MIN_LIMIT

OUTPUT = "outputs: [{name: b, url: 'http://localhost:8080/x'}]\n"


def mistakes(text: str, base: Path, env: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_text(text, origin="c.yaml", base=base, env=env or {})
    assert caught.value.exit_code == 78
    return caught.value.mistakes


# Text behind OUTPUT (which is line 1), expected line, key, part of what is said to be wrong, of the remedy.
ONE_MISTAKE = {
    "one port twice": (
        "listen: {http: 127.0.0.1:9001}",
        2,
        "listen.http",
        "listen.grpc already",
        "its own port",
    ),
    "plaintext for all": ("listen: {grpc: 0.0.0.0:9001}", 2, "listen.grpc", "plaintext", "insecure: true"),
    "plaintext by name": ("listen: {http: metrics:9001}", 2, "listen.http", "plaintext", "insecure: true"),
    "tenants for everybody": (
        "listen: {http: 0.0.0.0:9090, insecure: true, http_tenants: true}",
        2,
        "listen.http_tenants",
        "named to everybody who reaches 0.0.0.0:9090",
        "http_token_file",
    ),
    "half of TLS": ("listen: {tls: {cert_file: there}}", 2, "listen.tls.key_file", "is missing", "cert_file"),
    "the other half": (
        "listen: {tls: {key_file: there}}",
        2,
        "listen.tls.cert_file",
        "is missing",
        "key_file",
    ),
    "names without certificates": (
        "listen: {tls: {cert_file: there, key_file: there, allow_san: [a]}}",
        2,
        "listen.tls.allow_san",
        "none are asked for",
        "client_ca_file",
    ),
    "certificates that nobody is asked for": (
        "listen: {grpc: 0.0.0.0:9001, tls: {cert_file: there, key_file: there}}",
        2,
        "listen.tls.client_ca_file",
        "anybody who reaches listen.grpc may send rows, and bill",
        "give client_ca_file (or listen.token_file)",
    ),
    "long streams nowhere": (
        "envoy: {long_streams: elsewhere}",
        2,
        "envoy.long_streams",
        "flush_interval is off",
        "access_log_flush_interval",
    ),
    "long streams twice": (
        "listen: {streams: 127.0.0.1:9002}\nenvoy: {flush_interval: 60s, long_streams: elsewhere}",
        3,
        "envoy.long_streams",
        "listen.streams is their port here",
        "exactly one",
    ),
    "message beyond gRPC": (
        "listen: {limits: {message: 2GiB}}",
        2,
        "listen.limits.message",
        "gRPC",
        "2047MiB",
    ),
    "frames beyond HTTP/2": ("listen: {limits: {window: 8kB}}", 2, "listen.limits.window", "HTTP/2", "1MiB"),
    "streams without interval": (
        "listen: {streams: 127.0.0.1:9002}",
        2,
        "listen.streams",
        "envoy.flush_interval is off",
        "access_log_flush_interval",
    ),
    "no rules": ("tenant: {rules: []}", 2, "tenant.rules", "nobody would be billed", "add a rule"),
    "no source": (
        "tenant: {rules: [{trusted: false}]}",
        2,
        "tenant.rules[0]",
        "names no source",
        "exactly one",
    ),
    "two sources": (
        "tenant:\n  rules:\n    - custom_tag: a\n      sni: true",
        4,
        "tenant.rules[0]",
        "2 sources: custom_tag, sni",
        "keep one",
    ),
    "two patterns": (
        "dimensions: {a: {route_name: x, pattern: y}}",
        2,
        "dimensions.a.pattern",
        "already is a regular expression",
        "route_name: true",
    ),
    "pattern of a literal": (
        "dimensions: {a: {literal: x, pattern: y}}",
        2,
        "dimensions.a.pattern",
        "does nothing",
        "remove",
    ),
    "header anyone can send": (
        "tenant: {rules: [{request_header: x-t}]}",
        2,
        "tenant.rules[0].request_header",
        "clients can send x-t",
        "trusted: true",
    ),
    "trust in a tag": (
        "tenant: {rules: [{custom_tag: t, trusted: true}]}",
        2,
        "tenant.rules[0].trusted",
        "only a request_header",
        "remove",
    ),
    "literal no endpoint takes": (
        "tenant: {rules: [{literal: a.b}]}",
        2,
        "tenant.rules[0].literal",
        "not a DNS label",
        "lower-case",
    ),
    "behind a literal": (
        "tenant:\n  rules:\n  - literal: a\n  - custom_tag: b",
        5,
        "tenant.rules[1]",
        "never reached: the literal of tenant.rules[0]",
        "put this one first",
    ),
    "rule repeated": (
        "tenant:\n  rules:\n  - {custom_tag: a, pattern: b}\n  - {custom_tag: a, pattern: b}",
        5,
        "tenant.rules[1]",
        "repeats tenant.rules[0]",
        "remove",
    ),
    "rule behind a wider one": (
        "tenant:\n  rules:\n  - custom_tag: a\n  - {custom_tag: a, pattern: b}",
        5,
        "tenant.rules[1]",
        "tenant.rules[0] takes every value",
        "put this one first",
    ),
    "dimension name": (
        "dimensions: {a-b: {node: id}}",
        2,
        "dimensions.a-b",
        "cannot name a dimension",
        "letters",
    ),
    "dimensions beyond the catalog": (
        "dimensions: {" + ", ".join(f"d{n}: {{node: id}}" for n in range(33)) + "}",
        2,
        "dimensions",
        "33 dimensions",
        "32",
    ),
    "skip everything": ("skip: [{if: {}, reason: x}]", 2, "skip[0].if", "every row", "status"),
    "no meters": ("meters: {}", 2, "meters", "nothing would be metered", "requests"),
    "two meters of a type": (
        "meters:\n  requests: {type: t}\n  egress_bytes: {type: t}",
        4,
        "meters.egress_bytes.type",
        "meters.requests has this type already",
        "its own type",
    ),
    "bytes of requests": (
        "meters: {requests: {bytes: body}}",
        2,
        "meters.requests.bytes",
        "nothing",
        "remove",
    ),
    "unit of another meter": (
        "meters: {egress_bytes: {unit: s}}",
        2,
        "meters.egress_bytes.unit",
        "'s'",
        "By",
    ),
    "window that straddles an hour": (
        "windows: {length: 7s}",
        2,
        "windows.length",
        "does not divide an hour",
        "1m",
    ),
    "window of a fraction": (
        "windows: {length: 500ms}",
        2,
        "windows.length",
        "500ms does not divide",
        "10s",
    ),
    "checkpoint longer than a window": (
        "windows:\n  length: 1s\n  checkpoint: 2s",
        4,
        "windows.checkpoint",
        "longer than a window",
        "at most 1s",
    ),
    "later than the endpoint": ("windows: {late_horizon: 30d}", 2, "windows.late_horizon", "30 days", "29d"),
    "too late at once": (
        "windows:\n  length: 10s\n  grace: 1s\n  late_horizon: 1s",
        5,
        "windows.late_horizon",
        "1s is too short: a window's events are made up to 23s500ms after it began",
        "at least 10m23s500ms",
    ),
    "too late when a late row reopened it": (
        "windows: {length: 1h, late_horizon: 2h}",
        2,
        "windows.late_horizon",
        "2h15m5s after it began",
        "2h25m5s",
    ),
    "forgotten before expiry": (
        "envoy: {flush_interval: 1h}\nstreams: {remember: 1h}",
        3,
        "streams.remember",
        "shorter than the silence",
        "3h",
    ),
    "store in no directory": ("store: {path: a/b/c.db}", 2, "store.path", "does not exist", "mkdir -p"),
    "store in a file": (
        "store: {path: there/usage.db}",
        2,
        "store.path",
        "is not a directory",
        "name a file",
    ),
    "store is a directory": ("store: {path: .}", 2, "store.path", "is a directory", "usage.db"),
    "ledger larger than the store": (
        "store: {max_bytes: 1MiB}",
        2,
        "store.ledger_max_bytes",
        "more than the whole store",
        "store.max_bytes",
    ),
    "store without room": (
        "store:\n  max_bytes: 1\n  ledger_max_bytes: 1",
        3,
        "store.max_bytes",
        "no more than empty tables",
        "at least 1MiB",
    ),
    "store without room for its workers": (
        "store: {max_bytes: 3MiB, ledger_max_bytes: 1MiB}\nworkers: 4",
        2,
        "store.max_bytes",
        "3MiB holds no more than empty tables",
        "at least 4MiB, 1MiB for each worker",
    ),
    "memory too small for senders": (
        "listen:\n  limits:\n    memory: 512MiB",
        4,
        "listen.limits.memory",
        (
            "512MiB is less than the 832MiB that senders may need at once:"
            " (8 new_streams + 1) × 64MiB message + 256 connections × 1MiB window"
        ),
        "raise memory",
    ),
    "headers beyond reason": (
        "listen: {limits: {headers: 2MiB}}",
        2,
        "listen.limits.headers",
        "more than any sender needs",
        "16KiB",
    ),
    "long streams at several workers": (
        "workers: 2\nenvoy: {flush_interval: 60s}",
        2,
        "workers",
        "2 workers share listen.grpc, but rows of a long stream must meet at one",
        "set listen.streams",
    ),
    "connections at several workers": (
        "workers: 2\nmeters: {connection_seconds: {count: connections}}",
        2,
        "workers",
        "2 workers share listen.grpc, but rows of a connection must meet at one",
        "write 1",
    ),
    "memory for several workers": (
        "workers: 8\nlisten: {limits: {memory: 2GiB}}",
        3,
        "listen.limits.memory",
        (
            "256MiB of each of 8 workers is less than the 384MiB that senders may need at once:"
            " (1 new_streams + 1) × 64MiB message + 256 connections × 1MiB window"
        ),
        "raise memory",
    ),
    "too many workers": ("workers: 65", 2, "workers", "65 is too large", "at most 64"),
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


FORWARD = "forward: {url: 'nats://b:4222', stream: S}"
OUTPUTS = {
    "no outputs": ("log: {}", 1, "outputs", "nothing would be delivered", "format: none"),
    "outputs empty": ("outputs: []", 1, "outputs", "nothing would be delivered", "format: none"),
    "no name": ("outputs:\n- format: none", 2, "outputs[0].name", "is missing", "add it"),
    "bad name": (
        "outputs:\n- {name: 'A b', format: none}",
        2,
        "outputs[0].name",
        "'A b' is not a name",
        "lower",
    ),
    "name twice": (
        "outputs:\n- {name: a, format: none}\n- {name: a, format: none}",
        3,
        "outputs[1].name",
        "name of outputs[0] already",
        "its own name",
    ),
    "no url": ("outputs:\n- name: a", 2, "outputs[0]", "needs a url", "format: none"),
    "no such format": (
        "outputs:\n- {name: a, format: kafka}",
        2,
        "outputs[0].format",
        "'kafka'",
        "nats",
    ),
    "nats without its section": (
        "outputs:\n- {name: a, format: nats, url: 'nats://b:4222'}",
        2,
        "outputs[0]",
        "needs a section nats",
        "stream",
    ),
    "section of nats elsewhere": (
        "outputs:\n- name: a\n  url: http://b/\n  nats: {stream: S}",
        4,
        "outputs[0].nats",
        "nats says nothing about format billing",
        "format: nats",
    ),
    "nats over http": (
        "outputs:\n- {name: a, format: nats, url: 'http://b/', nats: {stream: S}}",
        2,
        "outputs[0].url",
        "neither tls nor nats",
        "tls://",
    ),
    "billing over nats": (
        "outputs:\n- {name: a, url: 'nats://b:4222'}",
        2,
        "outputs[0].url",
        "neither http nor https",
        "format: nats",
    ),
    "user in a NATS address": (
        "outputs:\n- {name: a, format: nats, url: 'nats://u:p@b:4222', nats: {stream: S}}",
        2,
        "outputs[0].url",
        "must not hold a user",
        "creds_file",
    ),
    "path in a NATS address": (
        "outputs:\n- {name: a, format: nats, url: 'nats://b:4222/x', nats: {stream: S}}",
        2,
        "outputs[0].url",
        "not just a host and a port",
        "commas",
    ),
    "half a cluster encrypted": (
        "outputs:\n- {name: a, format: nats, url: 'tls://a:4222,nats://b:4222', nats: {stream: S}}",
        2,
        "outputs[0].url",
        "some addresses are encrypted",
        "tls:// everywhere",
    ),
    "authorities of plaintext NATS": (
        "outputs:\n- {name: a, format: nats, url: 'nats://b:4222', ca_file: there, nats: {stream: S}}",
        2,
        "outputs[0].ca_file",
        "no use with nats",
        "tls",
    ),
    "gzip over NATS": (
        "outputs:\n- {name: a, format: nats, url: 'nats://b:4222', gzip: true, nats: {stream: S}}",
        2,
        "outputs[0].gzip",
        "compresses nothing",
        "remove gzip",
    ),
    "subject with a wildcard": (
        "outputs:\n- {name: a, format: nats, url: 'nats://b:4222', nats: {stream: S, subject: 'a.*'}}",
        2,
        "outputs[0].nats.subject",
        "'*' is no token",
        "tokens with dots",
    ),
    "subject of the server": (
        "outputs:\n- {name: a, format: nats, url: 'nats://b:4222', nats: {stream: S, subject: '$JS.a'}}",
        2,
        "outputs[0].nats.subject",
        "the server's own",
        "tokens with dots",
    ),
    "name of a stream": (
        "outputs:\n- {name: a, format: nats, url: 'nats://b:4222', nats: {stream: S.T}}",
        2,
        "outputs[0].nats.stream",
        "is not a name",
        "letters",
    ),
    "forward to NATS": (
        "outputs:\n- {name: a, format: nats, url: 'nats://b:4222', nats: {stream: S}}\n" + FORWARD,
        2,
        "outputs[0].format",
        "nothing that a forwarder can deliver to",
        "over HTTP",
    ),
    "forward to two": (
        "outputs:\n- {name: a, url: 'http://b/'}\n- {name: c, url: 'http://b/'}\n" + FORWARD,
        3,
        "outputs[1]",
        "one too many",
        "durable",
    ),
    "forward beyond the endpoint's memory": (
        "forward: {url: 'nats://b:4222', stream: S, ack_wait: 5m}\noutputs:\n- {name: a, url: 'http://b/'}",
        1,
        "forward.ack_wait",
        "more than a quarter of outputs[0].dedup_window",
        "lower it",
    ),
    "forward in a hurry": (
        "outputs:\n- {name: a, url: 'http://b/'}\nforward: {url: 'nats://b:4222', stream: S, ack_wait: 10ms}",
        3,
        "forward.ack_wait",
        "too short",
        "60s",
    ),
    "filter that filters nothing": (
        "outputs:\n- {name: a, url: 'http://b/'}\nforward: {url: 'nats://b', stream: S, subject: 'a.>.b'}",
        3,
        "forward.subject",
        "'>' is no token",
        "> at the end",
    ),
    "unknown format": (
        "outputs:\n- {name: a, format: biling}",
        2,
        "outputs[0].format",
        "'biling'",
        "mean billing?",
    ),
    "no scheme": (
        "outputs:\n- {name: a, url: 'b:80/x'}",
        2,
        "outputs[0].url",
        "neither http nor https",
        "https://",
    ),
    "no host": ("outputs:\n- {name: a, url: 'http:///x'}", 2, "outputs[0].url", "names no host", "http://"),
    "bad port": ("outputs:\n- {name: a, url: 'http://b:x/'}", 2, "outputs[0].url", "is not a URL", "http://"),
    "fragment": ("outputs:\n- {name: a, url: 'http://b/#x'}", 2, "outputs[0].url", "fragment", "http://"),
    "source": (
        "outputs:\n- {name: a, format: none, source: gateway}",
        2,
        "outputs[0].source",
        "neither scheme nor host",
        "//host/path",
    ),
    "batch too large": (
        "outputs:\n- {name: a, format: none, batch: {events: 101}}",
        2,
        "outputs[0].batch.events",
        "101 is too large",
        "at most 100",
    ),
    "backoff upside down": (
        "outputs:\n- {name: a, format: none, retry: {initial: 2m}}",
        2,
        "outputs[0].retry.initial",
        "longer than max",
        "lower initial",
    ),
    "authorities of plaintext": (
        "outputs:\n- {name: a, url: 'http://b/', ca_file: there}",
        2,
        "outputs[0].ca_file",
        "no use with http",
        "https",
    ),
    "time without zone": (
        "outputs:\n- {name: a, format: none, from: 2026-09-01T00:00:00}",
        2,
        "outputs[0].from",
        "has no zone",
        "2026-09-01T00:00:00Z",
    ),
    "not a time": (
        "outputs:\n- {name: a, format: none, until: soon}",
        2,
        "outputs[0].until",
        "'soon'",
        "RFC 3339",
    ),
    "time as a number": (
        "outputs:\n- {name: a, format: none, from: 1788220800}",
        2,
        "outputs[0].from",
        "1788220800 is not a time",
        "RFC 3339",
    ),
    "the program's own name": (
        "outputs:\n- {name: a, format: none, from_: 2026-09-01T00:00:00Z}",
        2,
        "outputs[0].from_",
        "unknown key",
        "did you mean from?",
    ),
    "until before from": (
        "outputs:\n- name: a\n  format: none\n  from: 2026-09-01T00:00:00Z\n  until: 2026-09-01T00:00:00Z",
        5,
        "outputs[0].until",
        "not after from",
        "later until",
    ),
    "not a mapping": ("- a", 1, "", "is not a mapping", "sections"),
    "two documents": (OUTPUT + "---\nlog: {}", 2, "", "not valid YAML", "correct the syntax"),
}


@pytest.mark.parametrize(("text", "line", "key", "what", "remedy"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_named_with_place_and_remedy(
    tmp_path: Path, text: str, line: int, key: str, what: str, remedy: str
) -> None:
    (tmp_path / "there").touch()
    found = mistakes(text, tmp_path)[0]
    place = f"c.yaml:{line}: {key}: " if key else f"c.yaml:{line}: "
    assert found.startswith(place)
    said, _, told = found.removeprefix(place).partition("; ")
    assert what in said
    assert remedy in told


@pytest.mark.parametrize("length", ["1s", "10s", "1h"])
def test_the_shortest_horizon_is_taken(tmp_path: Path, length: str) -> None:
    found = mistakes(OUTPUT + f"windows: {{length: {length}, late_horizon: 1s}}", tmp_path)[0]
    least = found.partition("use at least ")[2].partition(";")[0]
    text = OUTPUT + f"windows: {{length: {length}, late_horizon: {least}}}"
    load_text(text, origin="c.yaml", base=tmp_path, env={})


def test_the_least_store_is_what_a_store_may_exceed_its_bound_by() -> None:
    assert MIN_STORE == MIN_LIMIT


def test_store_directory_that_cannot_be_written(tmp_path: Path) -> None:
    asked = []

    def refuse(path: Path, mode: int) -> bool:
        asked.append((path, mode))
        return False

    (found,) = store_findings(tmp_path / "usage.db", access=refuse)
    assert "cannot be written" in found.what
    assert "chown" in found.remedy
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    (found,) = store_findings(tmp_path / "var" / "usage.db", access=refuse)
    assert str(tmp_path) in found.what
    assert asked[-1][0] == tmp_path  # where the directory would be made
