"""What the rest of the program reads out of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from proxy_usage.config import Config, load_text
from proxy_usage.config.models import METER_TYPES
from proxy_usage.model import Field, FieldKind, Quantity

OUTPUT = "outputs: [{name: b, format: none}]\n"


def read(text: str) -> Config:
    return load_text(OUTPUT + text, origin="c.yaml", base=Path(), env={})


SOURCES = {
    "{custom_tag: Tag}": Field(FieldKind.CUSTOM_TAG, ("Tag",)),
    "{dynamic_metadata: {filter: f.g, path: [a, b.c]}}": Field(
        FieldKind.DYNAMIC_METADATA, ("f.g", "a", "b.c")
    ),
    "{dynamic_metadata: {filter: f, path: a}}": Field(FieldKind.DYNAMIC_METADATA, ("f", "a")),
    "{request_header: X-Tenant}": Field(FieldKind.REQUEST_HEADER, ("x-tenant",)),
    "{route_name: '^(a)'}": Field(FieldKind.ROUTE_NAME),
    "{route_name: true}": Field(FieldKind.ROUTE_NAME),
    "{authority: true}": Field(FieldKind.AUTHORITY),
    "{sni: true}": Field(FieldKind.SNI),
    "{node: id}": Field(FieldKind.NODE, ("id",)),
    "{node: locality.sub_zone}": Field(FieldKind.NODE, ("locality", "sub_zone")),
    "{node: metadata.a.b}": Field(FieldKind.NODE, ("metadata", "a", "b")),
    "{literal: some text}": Field(FieldKind.LITERAL, ("some text",)),
    "{literal: ''}": Field(FieldKind.LITERAL, ("",)),
}


@pytest.mark.parametrize(("text", "field"), SOURCES.items())
def test_sources(text: str, field: Field) -> None:
    assert read(f"dimensions: {{a: {text}}}").dimensions["a"].field == field


def test_a_route_name_expression_is_the_pattern() -> None:
    dimensions = read(
        "dimensions:\n"
        "  a: {route_name: '^a/(?P<value>.)'}\n"
        "  b: {route_name: true, pattern: 'x(.)'}\n"
        "  c: {sni: true}\n"
    ).dimensions
    assert dimensions["a"].regex is not None
    assert dimensions["a"].regex.search("a/bc")["value"] == "b"  # type: ignore[index]
    assert dimensions["b"].regex is not None
    assert dimensions["b"].regex.pattern == "x(.)"
    assert dimensions["c"].regex is None
    assert dimensions["c"].mapping is None


def test_two_rules_of_one_source_may_differ_in_pattern() -> None:
    rules = read(
        "tenant: {rules: [{sni: true, pattern: '^a-(.*)'}, {sni: true}, {literal: rest}]}"
    ).tenant.rules
    assert [rule.field.kind for rule in rules] == [FieldKind.SNI, FieldKind.SNI, FieldKind.LITERAL]


def test_a_header_the_operator_vouches_for() -> None:
    (rule,) = read("tenant: {rules: [{request_header: X-T, trusted: true}]}").tenant.rules
    assert rule.trusted is True


def test_fold_plan_reads_each_field_once() -> None:
    plan = read("""\
tenant:
  rules:
    - node: metadata.project
    - custom_tag: project_name
    - literal: rest
dimensions:
  region: {node: locality.region}
  zone: {node: locality.region, pattern: '.$'}
  project: {custom_tag: project_name}
  name: {route_name: 'a'}
  namespace: {route_name: 'b'}
  fixed: {literal: x}
meters: {egress_bytes: {bytes: body}, requests: {}}
windows: {length: 10s, max_skew: 1m, late_horizon: 1d}
""").fold_plan()
    assert plan.rules == (
        Field(FieldKind.NODE, ("metadata", "project")),
        Field(FieldKind.CUSTOM_TAG, ("project_name",)),
        Field(FieldKind.LITERAL, ("rest",)),
    )
    assert plan.dimensions == (Field(FieldKind.CUSTOM_TAG, ("project_name",)), Field(FieldKind.ROUTE_NAME))
    assert plan.node_paths == (("metadata", "project"), ("locality", "region"))
    assert plan.quantities == (Quantity.BODY_OUT, Quantity.REQUESTS)
    assert (plan.window_ms, plan.max_skew_ms, plan.late_horizon_ms) == (10_000, 60_000, 86_400_000)


def test_meters_by_default() -> None:
    meters = read("").meter_list()
    assert [(meter.name, meter.unit, meter.quantity, meter.divisor) for meter in meters] == [
        ("requests", "{request}", Quantity.REQUESTS, 1),
        ("ingress_bytes", "By", Quantity.WIRE_IN, 1),
        ("egress_bytes", "By", Quantity.WIRE_OUT, 1),
        ("connection_seconds", "s", Quantity.OPEN_NS, 1_000_000_000),
    ]
    assert [meter.type for meter in meters] == list(METER_TYPES.values())


def test_meters_as_written() -> None:
    meters = read(
        "meters: {connection_seconds: {count: connections}, ingress_bytes: {bytes: body, type: t},"
        " requests: {unit: '1'}}"
    )
    assert [meter.quantity for meter in meters.meter_list()] == [
        Quantity.CONNECTION_NS,
        Quantity.BODY_IN,
        Quantity.REQUESTS,
    ]
    assert meters.meter_list()[1].type == "t"
    assert meters.meter_list()[2].unit == "1"
    assert meters.meters["connection_seconds"].count == "connections"


def test_skip_conditions() -> None:
    first, second = read(
        "skip: [{if: {flag: 'NR|UF', status: [404, 5xx], node: 'a.*'}, reason: no_route},"
        " {if: {status: 200}, reason: fine}]"
    ).skip
    assert first.reason == "no_route"
    assert first.if_.statuses == frozenset((404, *range(500, 600)))
    assert set(first.if_.regexes) == {"flag", "node"}
    assert first.if_.regexes["flag"].fullmatch("UF")
    assert second.if_.statuses == frozenset({200})
    assert second.if_.regexes == {}
    assert read("skip: [{if: {method: OPTIONS}, reason: cors}]").skip[0].if_.statuses is None


def test_what_senders_may_need_and_take_follows_from_the_limits() -> None:
    limits = "connections: 3, streams_per_connection: 5, message: 2MiB, new_streams: 4, memory: 96MiB"
    config = read(f"listen: {{limits: {{{limits}}}}}")
    assert config.listen.limits.needed() == (5 * 2 + 3) << 20
    assert config.worst_case_memory() == 110 << 20
    assert config.listen.limits.unbounded() == 30 << 20
    assert Config().listen.limits.needed() == 832 << 20
    assert Config().listen.limits.unbounded() == 256 << 30


def test_frozen() -> None:
    config = read("")
    with pytest.raises(ValidationError):
        config.workers = 2
    with pytest.raises(ValidationError):
        config.tenant.rules[0].custom_tag = "x"
