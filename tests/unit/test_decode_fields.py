"""What rows are known by: rules and dimensions from every kind of field, the sender, the operator's skips."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import wire
from folding import COUNTED, LONG, ORIGIN, PROJECT, VHOST, Both, fold, identity_of, only, plan
from wire import NOW_MS, http_row, message, tcp_row

from proxy_usage.decode import EnvoySettings, SkipTest, read_identifier
from proxy_usage.errors import DecodeError
from proxy_usage.model import Field, FieldKind, Origin


def field(number: int, content: bytes) -> bytes:
    return wire.varint(number << 3 | 2) + wire.varint(len(content)) + content


# ── identity ──

READABLE: list[tuple[Field, Mapping[str, Any], bytes]] = [
    (PROJECT, {"tags": {"a": "1", "project_name": "alpha", "z": "2"}}, b"alpha"),
    (
        Field(FieldKind.DYNAMIC_METADATA, ("jwt", "claims", "project")),
        {"metadata": {"other": {"claims": {"project": "no"}}, "jwt": {"claims": {"project": "alpha"}}}},
        b"alpha",
    ),
    (Field(FieldKind.REQUEST_HEADER, ("x-project",)), {"headers": {"x-project": "alpha"}}, b"alpha"),
    (Field(FieldKind.ROUTE_NAME), {"route": "httproute/ns-1/x"}, b"httproute/ns-1/x"),
    (Field(FieldKind.AUTHORITY), {"authority": "alpha.example.com"}, b"alpha.example.com"),
    (Field(FieldKind.SNI), {"sni": "alpha.example.com"}, b"alpha.example.com"),
    (Field(FieldKind.NODE, ("locality", "region")), {}, b"us-east-1"),
    (Field(FieldKind.LITERAL, ("alpha",)), {}, b"alpha"),
]


@pytest.mark.parametrize(("source", "row", "value"), READABLE, ids=lambda part: getattr(part, "kind", None))
def test_rules_and_dimensions_read_every_kind_of_field(
    source: Field, row: Mapping[str, Any], value: bytes
) -> None:
    settings = {
        "origin": ORIGIN._replace(node=("a", "us-east-1")),
        "node_paths": (("id",), ("locality", "region")),
    }
    chosen = identity_of(http_row(**row), rules=(VHOST, source), dimensions=(source,), **settings)
    assert (chosen.rule, chosen.value, chosen.dimensions) == (1, value, (value,))


def test_tcp_rows_have_no_request_to_read() -> None:
    fields = Field(FieldKind.AUTHORITY), Field(FieldKind.REQUEST_HEADER, ("x",)), Field(FieldKind.SNI)
    chosen = identity_of(tcp_row(sni="alpha.example.com"), rules=fields, dimensions=fields)
    assert (chosen.rule, chosen.dimensions) == (2, (b"", b"", b"alpha.example.com"))


def test_only_the_first_rule_that_takes_its_value_counts() -> None:
    tags = {"project_name": "UPPER", "vhost_project": "alpha"}
    asked = []

    def accepts(rule: int, text: str) -> bool:
        asked.append((rule, text))
        return text.islower()

    chosen = identity_of(http_row(tags=tags), http_row(tags=tags), accepts=accepts)
    assert (chosen.rule, chosen.value) == (1, b"alpha")
    assert asked == 2 * [(0, "UPPER"), (1, "alpha")]  # each fold once, not once a row


def test_a_matched_rule_hides_the_fields_behind_it() -> None:
    rows = [http_row(tags={"project_name": "alpha", "vhost_project": f"v{number}"}) for number in range(5)]
    assert only(fold(*rows))[2][0] == 5


@pytest.mark.parametrize(
    ("tags", "rule", "value"),
    [
        ({"project_name": "x", "vhost_project": "y"}, 0, b"x"),
        ({"project_name": "-", "vhost_project": "y"}, 1, b"y"),
        ({"project_name": "", "vhost_project": "y"}, 1, b"y"),
        ({"project_name": "-"}, 0, b""),
        ({}, 0, b""),
    ],
)
def test_without_a_match_the_first_value_is_kept_with_its_rule(
    tags: dict[str, str], rule: int, value: bytes
) -> None:
    chosen = identity_of(http_row(tags=tags), accepts=lambda _rule, _text: False)
    assert (chosen.rule, chosen.value) == (~rule, value)


def test_an_absent_dimension_is_empty() -> None:
    chosen = identity_of(http_row(tags={"a": "-"}), dimensions=(Field(FieldKind.CUSTOM_TAG, ("a",)), PROJECT))
    assert chosen.dimensions == (b"", b"")


@pytest.mark.parametrize(
    ("row", "routed"),
    [
        (http_row(details="route_not_found", status=404), False),
        (http_row(route="r"), True),
        (http_row(cluster="unnamed-route-went-here"), True),
        (tcp_row(), False),
        (tcp_row(cluster="echo"), True),
    ],
)
def test_a_row_is_routed_if_it_names_a_route_or_where_one_led(row: Any, routed: bool) -> None:
    assert identity_of(row).routed is routed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("alpha", b"alpha"),
        ("é", "é".encode()),
        (42, b"42"),
        (-0.0, b"0"),
        (1.5, b"1.5"),
        (1e300, str(int(1e300)).encode()),
        (float("inf"), b"Infinity"),
        (True, b"true"),
        (False, b"false"),
        (None, b""),
        ({"b": 1, "a": ["x", 2.5, None, {}]}, b'{"a":["x",2.5,null,{}],"b":1}'),
        ([], b"[]"),
    ],
)
def test_values_in_metadata_have_one_text(value: Any, text: bytes) -> None:
    row = http_row()
    holder = row.common_properties.metadata.filter_metadata["f"]
    if isinstance(value, float | int) and not isinstance(value, bool):
        holder.fields["k"].number_value = value
    else:
        holder.CopyFrom(wire.struct({"k": value}))
    assert identity_of(row, dimensions=(Field(FieldKind.DYNAMIC_METADATA, ("f", "k")),)).dimensions == (text,)


@pytest.mark.parametrize("path", [("f", "k", "deeper"), ("f", "absent"), ("f", "absent", "x"), ("g", "k")])
def test_paths_that_lead_nowhere_are_absent(path: tuple[str, ...]) -> None:
    row = http_row(metadata={"f": {"k": "text"}})
    assert identity_of(row, dimensions=(Field(FieldKind.DYNAMIC_METADATA, path),)).dimensions == (b"",)


def test_a_value_nested_past_every_limit_costs_only_itself() -> None:
    bomb = field(3, b"beta")  # a Value that is a string, wrapped by hand: no encoder would
    for _ in range(2_000):
        bomb = field(5, field(1, field(1, b"a") + field(2, bomb)))
    entries = field(1, b"bomb") + field(2, bomb), field(1, b"k") + field(2, field(3, b"alpha"))
    struct = b"".join(field(1, entry) for entry in entries)
    metadata = field(1, field(1, b"f") + field(2, struct))
    common = http_row().common_properties.SerializeToString() + field(17, metadata)
    read = Field(FieldKind.DYNAMIC_METADATA, ("f", "k"))
    deep = Field(FieldKind.DYNAMIC_METADATA, ("f", "bomb")), Field(FieldKind.DYNAMIC_METADATA, ("f",))
    settings = plan(rules=(read,), dimensions=deep)
    folder = Both(settings, accepts=lambda _rule, _text: True, envoy=EnvoySettings())
    folder.message(ORIGIN, field(2, field(1, field(1, common))), NOW_MS)
    identity, _, total = only(folder.drain())
    assert (identity.value, identity.dimensions, total[0]) == (b"alpha", (b"", b""), 1)


@pytest.mark.parametrize(
    "entries",
    [
        [field(1, b"project_name") + field(2, b"beta"), field(1, b"project_name") + field(2, b"alpha")],
        [field(2, b"alpha") + field(1, b"project_name")],
        [field(1, b"project_name") + field(2, b"alpha"), field(1, b"project_names") + field(2, b"beta")],
        [field(2, b"beta"), field(1, b"project_name") + field(2, b"alpha"), b""],
    ],
    ids=["twice", "value first", "a longer name", "no name"],
)
def test_maps_are_read_as_protobuf_reads_them(entries: list[bytes]) -> None:
    common = http_row().common_properties.SerializeToString() + b"".join(
        field(22, entry) for entry in entries
    )
    folder = Both(plan(), accepts=lambda _rule, _text: True, envoy=EnvoySettings())
    folder.message(ORIGIN, field(2, field(1, field(1, common))), NOW_MS)
    assert only(folder.drain())[0].value == b"alpha"


def test_a_row_with_very_many_tags_is_read() -> None:
    tags = {f"tag-{number}": "x" for number in range(5_000)} | {"project_name": "alpha"}
    assert identity_of(http_row(tags=tags)).value == b"alpha"


# ── who sends ──


def test_the_identifier_names_the_origin() -> None:
    paths = (
        ("id",),
        ("cluster",),
        ("locality", "region"),
        ("locality", "zone"),
        ("metadata", "pop"),
        ("metadata", "shape", "cores"),
        ("metadata", "shape"),
        ("metadata", "absent"),
        ("locality", "nonsense"),
    )
    shape = {"spot": True, "cores": 8}
    raw = message(
        http_row(), node_id="envoy-1", region="us-east-1", zone="a", metadata={"pop": "iad3", "shape": shape}
    )
    origin = read_identifier(raw, "spiffe://x", paths)
    values = ("envoy-1", "gateway", "us-east-1", "a", "iad3", "8", '{"cores":8,"spot":true}', "", "")
    assert origin == Origin("spiffe://x", "envoy-1", "http", values)


def test_later_messages_have_no_identifier() -> None:
    assert read_identifier(message(http_row()), "", ()) is None
    assert read_identifier(b"", "", ()) is None


def test_an_identifier_comes_through_damage_and_odd_bytes() -> None:
    raw = message(http_row(), node_id="envoy-1")
    assert read_identifier(raw[:-5], "", ()) == Origin("", "envoy-1", "http")
    assert read_identifier(raw.replace(b"envoy-1", b"env\xff\n-1"), "", ()) == Origin(
        "", "env\\xff\n-1", "http"
    )


def test_an_unreadable_identifier_says_so() -> None:
    raw = b"\x0a\x03\x0a\x05x" + message(http_row())
    with pytest.raises(
        DecodeError, match="the identifier of a log stream from peer-7 is malformed"
    ) as caught:
        read_identifier(raw, "peer-7", ())
    assert "listen.grpc" in caught.value.hint


# ── the operator's skip tests ──


@pytest.mark.parametrize(
    ("test", "meets", "misses"),
    [
        ({"flag": "NR"}, {"flags": ["no_route_found"]}, {"flags": ["upstream_overflow"]}),
        (
            {"flag": "DC|UAEX"},
            {"flags": ["rate_limited", "unauthorized_details"]},
            {"flags": ["rate_limited"]},
        ),
        ({"flag": "UH"}, {"flags": ["no_healthy_upstream"]}, {}),
        ({"details": "route_not_found"}, {"details": "route_not_found"}, {"details": "route_not_found_"}),
        ({"status": frozenset({404, 503})}, {"status": 503}, {"status": 200}),
        ({"route": "internal/.*"}, {"route": "internal/health"}, {"route": "x/internal/health"}),
        ({"method": "OPTIONS"}, {"method": "OPTIONS"}, {"method": "GET"}),
        ({"method": ""}, {"method": ""}, {"method": "GET"}),
        ({"log_name": "http"}, {}, {"log_name": "edge-http"}),
        ({"node": "envoy-."}, {}, {"node_id": "envoy-11"}),
        ({"route": "r", "status": frozenset({200})}, {"route": "r"}, {"route": "r", "status": 204}),
        ({"route": "r", "node": "envoy-1"}, {"route": "r"}, {"route": "r", "node_id": "x"}),
    ],
)
def test_a_row_is_skipped_if_it_meets_all_of_a_test(
    test: dict[str, Any], meets: dict[str, Any], misses: dict[str, Any]
) -> None:
    compiled: dict[str, Any] = {
        key: re.compile(value) if isinstance(value, str) else value for key, value in test.items()
    }
    skip = (SkipTest("wanted", **compiled),)
    changes = {key: misses.pop(key) for key in ("log_name", "node_id") if key in misses}
    assert fold(http_row(**meets), skip=skip).fates == {("skipped", "wanted"): 1}
    assert fold(http_row(**misses), skip=skip, origin=ORIGIN._replace(**changes)).fates == {COUNTED: 1}


def test_the_first_test_that_is_met_gives_the_reason() -> None:
    skip = (
        SkipTest("never", route=re.compile("x")),
        SkipTest("first", method=re.compile("GET")),
        SkipTest("second", status=frozenset({200})),
    )
    assert fold(http_row(), http_row(method="PUT"), skip=skip).fates == {
        ("skipped", "first"): 1,
        ("skipped", "second"): 1,
    }


def test_what_never_counts_keeps_its_own_reason() -> None:
    skip = (SkipTest("wanted", status=frozenset({200, 302})),)
    rows = http_row(type=wire.DOWNSTREAM_START), http_row(details="internal_redirect", status=302)
    assert fold(*rows, skip=skip).fates == {("skipped", "start"): 1, ("skipped", "internal_redirect"): 1}


def test_skip_tests_see_tcp_rows_and_long_rows() -> None:
    by_flag = (SkipTest("wanted", flag=re.compile("NR")),)
    row = tcp_row()
    row.common_properties.response_flags.no_route_found = True
    assert fold(row, tcp_row(), skip=by_flag).fates == {("skipped", "wanted"): 1, COUNTED: 1}
    assert fold(
        http_row(type=wire.DOWNSTREAM_PERIODIC, flags=["no_route_found"]), skip=by_flag, envoy=LONG
    ).fates == {("skipped", "wanted"): 1}


def test_a_pattern_meets_bytes_that_are_not_text() -> None:
    raw = message(http_row(route="r?")).replace(b"r?", b"r\xff")
    skip = (SkipTest("wanted", route=re.compile("r.")),)
    folder = Both(plan(), accepts=lambda _rule, _text: True, envoy=EnvoySettings(), skip=skip)
    folder.message(ORIGIN, raw, NOW_MS)
    assert folder.drain().fates == {("skipped", "wanted"): 1}
