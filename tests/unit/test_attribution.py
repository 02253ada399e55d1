"""Attribution: each kind of rule, each reason, and that nothing a client sends gets around them."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_usage.attribution import MAX_CACHED, MAX_DIMENSION, MAX_TEXT, Attributor, Reason, Unattributed
from proxy_usage.config import Config, load_text
from proxy_usage.model import FieldKind, Identity, Key, Origin

UUID = "0190d8c2-6f1a-7c3e-9a54-0d6f2b8c1e77"
UUIDS = [start + text for start in ("", "ns-") for text in (UUID, UUID.upper(), UUID.replace("-", ""))]
ORIGIN = Origin(peer="", node_id="edge-1", log_name="http")

MAPS = {
    "namespaces.yaml": "ns-1f0c: acme\nns-2: globex\n",
    "hosts.yaml": dedent("""\
        shop.example.com: exact
        "*.example.com": wide
        "*.eu.example.com": narrow
        "*.Example.ORG.": org
        """),
    "regions.yaml": "us-east-1: Virginia\n",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("config")
    for name, text in MAPS.items():
        (directory / name).write_text(text, "utf-8")
    return directory


def config(rules: str, dimensions: str = "{}", more: str = "", base: Path = Path()) -> Config:
    tenant_section = f"tenant: {{rules: [{rules}]{more}}}"
    text = f"{tenant_section}\ndimensions: {dimensions}\noutputs: [{{name: o, format: none}}]\n"
    return load_text(text, origin="test", base=base, env={})


def attributor(rules: str, dimensions: str = "{}", more: str = "", base: Path = Path()) -> Attributor:
    loaded = config(rules, dimensions, more, base)
    return Attributor(loaded.tenant, loaded.dimensions)


def identity(
    value: bytes = b"acme",
    *,
    rule: int = 0,
    origin: Origin = ORIGIN,
    routed: bool = True,
    dims: tuple[bytes, ...] = (),
) -> Identity:
    return Identity(origin, rule, value, dims, routed)


def tenant(outcome: Key | Unattributed) -> str | Reason:
    return outcome.tenant if isinstance(outcome, Key) else outcome.reason


ROUTE = b"httproute/ns-1f0c/web/rule/0/match/0/shop_example_com"


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("custom_tag: project_name", b"acme", "acme"),
        ("dynamic_metadata: {filter: datum-gateway, path: [project_name]}", b"acme", "acme"),
        ("request_header: X-Project, trusted: true", b"acme", "acme"),
        ("route_name: true", b"acme", "acme"),
        ("route_name: '^httproute/ns-(?P<tenant>[^/]+)/'", ROUTE, "1f0c"),
        ("route_name: '^httproute/(?P<key>ns-[^/]+)/', map_file: namespaces.yaml", ROUTE, "acme"),
        ("authority: true, map_file: hosts.yaml", b"shop.example.com", "exact"),
        (r"authority: true, pattern: '^(?P<tenant>[^.]+)\.example\.com$'", b"Acme.EXAMPLE.com.:8443", "acme"),
        ("sni: true, map_file: hosts.yaml", b"SHOP.example.com", "exact"),
        ("literal: house", b"", "house"),
    ],
)
def test_each_kind_of_rule_gives_a_tenant(rule: str, value: bytes, expected: str, base: Path) -> None:
    assert attributor(f"{{{rule}}}", base=base).attribute(identity(value)) == Key(expected, ())


def test_a_node_rule_reads_the_origin_and_not_the_row() -> None:
    subject = attributor(
        "{node: cluster}, {node: metadata.project, pattern: '^cluster-(?P<tenant>.*)'}",
        "{region: {node: locality.region}, again: {node: cluster}}",
    )
    origin = Origin("", "edge-1", "http", node=("edge", "cluster-acme", "us-east-1"))
    assert subject.attribute(identity(b"ignored", rule=1, origin=origin)) == Key(
        "acme", ("us-east-1", "edge")
    )


def test_node_paths_and_dimensions_are_numbered_as_the_fold_plan_numbers_them() -> None:
    loaded = config(
        "{node: metadata.b}, {custom_tag: t}",
        "{a: {node: locality.zone}, b: {custom_tag: x}, c: {literal: fixed}, d: {sni: true},"
        " e: {custom_tag: x, pattern: '^.'}, f: {node: metadata.b}}",
    )
    plan = loaded.fold_plan()
    row = {FieldKind.CUSTOM_TAG: b"xylo", FieldKind.SNI: b"a.example.com"}
    origin = Origin("", "n", "l", node=tuple(".".join(path) for path in plan.node_paths))
    subject = Attributor(loaded.tenant, loaded.dimensions)
    outcome = subject.attribute(
        identity(rule=1, origin=origin, dims=tuple(row[field.kind] for field in plan.dimensions))
    )
    assert outcome == Key("acme", ("locality.zone", "xylo", "fixed", "a.example.com", "x", "metadata.b"))


def test_the_rule_that_decode_chose_is_the_one_applied(base: Path) -> None:
    subject = attributor(
        "{custom_tag: a, pattern: '^a-(?P<tenant>.+)'}, {custom_tag: b, pattern: '^b-(?P<tenant>.+)'}",
        base=base,
    )
    assert subject.attribute(identity(b"a-x", rule=0)) == Key("x", ())
    assert subject.attribute(identity(b"b-x", rule=1)) == Key("x", ())
    assert [subject.accepts(rule, "b-x") for rule in (0, 1)] == [False, True]


@pytest.mark.parametrize(
    ("source", "text", "accepted"),
    [
        ("custom_tag: t", "", False),
        ("custom_tag: t, pattern: '^p-'", "q-1", False),
        ("custom_tag: t, pattern: '^p-(?P<tenant>.*)'", "p-", False),
        ("custom_tag: t, map_file: namespaces.yaml", "ns-2", True),
        ("custom_tag: t, map_file: namespaces.yaml", "ns-3", False),
        ("custom_tag: t, pattern: '.'", "x" * MAX_TEXT, True),
        ("custom_tag: t, pattern: '.'", "x" * (MAX_TEXT + 1), False),
        ("custom_tag: t", "x" * (MAX_TEXT + 1), True),
        ("authority: true, map_file: hosts.yaml", "a.example.com:443", True),
        ("authority: true, map_file: hosts.yaml", "a.example.net", False),
        ("custom_tag: t, map_file: hosts.yaml", "a.example.com", False),
    ],
)
def test_accepts_looks_at_pattern_and_map_alone(source: str, text: str, accepted: bool, base: Path) -> None:
    assert attributor(f"{{{source}}}", base=base).accepts(0, text) is accepted


SELECTED = {"^(?P<x>a)(?P<tenant>b)": "b", "^(?P<first>a)(?P<second>b)": "a", "^a(b)": "ab", "^..": "ab"}


@pytest.mark.parametrize(("pattern", "selected"), SELECTED.items())
def test_which_group_of_a_pattern_names_the_tenant(pattern: str, selected: str) -> None:
    assert attributor(f"{{custom_tag: t, pattern: '{pattern}'}}").attribute(identity(b"abc")) == Key(
        selected, ()
    )


def test_with_a_map_file_the_group_key_is_looked_up(base: Path) -> None:
    pattern = "^(?P<tenant>[^/]+)/(?P<key>[^/]+)"
    subject = attributor(f"{{custom_tag: t, pattern: '{pattern}', map_file: namespaces.yaml}}", base=base)
    assert subject.attribute(identity(b"ns-2/ns-1f0c")) == Key("acme", ())


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("shop.example.com", "exact"),
        ("SHOP.Example.Com.:443", "exact"),
        ("other.example.com", "wide"),
        ("a.b.example.com", "wide"),
        ("a.eu.example.com", "narrow"),
        ("eu.example.com", "wide"),
        ("deep.example.org", "org"),
        ("example.com", None),
        (".example.com", None),
        ("[::1]:443", None),
        ("a" * 254 + ".example.com", None),
        ("*.example.com", "wide"),
    ],
)
@pytest.mark.parametrize("field", ["authority", "sni"])
def test_hosts_match_exactly_and_then_by_the_longest_suffix(
    field: str, host: str, expected: str | None, base: Path
) -> None:
    subject = attributor(f"{{{field}: true, map_file: hosts.yaml}}", base=base)
    assert subject.accepts(0, host) is (expected is not None)
    if expected:
        assert subject.attribute(identity(host.encode())) == Key(expected, ())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *(
            (value, Reason.INVALID_TENANT)
            for value in (b"Acme", b"a.b", b"a b", b"*", b"a>", b"-", b"-a", b"a-")
        ),
        (b"a\n", Reason.INVALID_TENANT),
        ("a\u0661".encode(), Reason.INVALID_TENANT),
        (b"a" * 64, Reason.TOO_LONG),
        (b"a" * (MAX_TEXT + 1), Reason.TOO_LONG),
        (b"t\xe9n\xff", Reason.INVALID_UTF8),
        *((value.encode(), Reason.UUID_TENANT) for value in UUIDS),
    ],
)
def test_a_value_that_is_no_project_name_is_held_with_its_reason(value: bytes, reason: Reason) -> None:
    assert attributor("{custom_tag: t}").attribute(identity(value)) == Unattributed(reason, skip=False)


@pytest.mark.parametrize("name", ["a", "0", "a" * 63, "a-b", UUID[:-1], f"x{UUID}", UUID.replace("-", "", 1)])
def test_names_that_only_resemble_something_wrong_pass(name: str) -> None:
    assert attributor("{custom_tag: t}").attribute(identity(name.encode())) == Key(name, ())


def test_allow_uuid_lets_a_uuid_pass_that_is_a_name() -> None:
    subject = attributor("{custom_tag: t}", more=", allow_uuid: true")
    for name in (UUID, f"ns-{UUID}"):
        assert subject.attribute(identity(name.encode())) == Key(name, ())
    assert tenant(subject.attribute(identity(UUID.upper().encode()))) is Reason.INVALID_TENANT


@pytest.mark.parametrize(("no_route", "skip"), [("skip", True), ("hold", False)])
@pytest.mark.parametrize("value", [b"", b"198.51.100.7", b"\xff"])
def test_a_row_without_route_is_skipped_or_held_as_configured(
    no_route: str, skip: bool, value: bytes
) -> None:
    subject = attributor("{custom_tag: t, pattern: '^p-'}", more=f", no_route: {no_route}")
    expected = Unattributed(Reason.NO_ROUTE, skip=skip)
    assert subject.attribute(identity(value, rule=-1, routed=False)) == expected


def test_a_row_without_route_that_a_rule_took_is_billed() -> None:
    assert attributor("{custom_tag: t}").attribute(identity(b"acme", routed=False)) == Key("acme", ())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", Reason.NO_TENANT),
        (b"q-1", Reason.NO_MATCH),
        (b"p-ns-9", Reason.UNMAPPED),
        (b"\xff", Reason.INVALID_UTF8),
        (b"p" * (MAX_TEXT + 1), Reason.TOO_LONG),
    ],
)
def test_why_no_rule_took_a_routed_row(value: bytes, reason: Reason, base: Path) -> None:
    rule = "{custom_tag: t, pattern: '^p-(?P<key>.+)', map_file: namespaces.yaml}"
    subject = attributor(rule, base=base)
    assert subject.attribute(identity(value, rule=-1)) == Unattributed(reason, skip=False)


def test_a_node_rule_is_blamed_for_its_own_value_alone(base: Path) -> None:
    subject = attributor("{node: cluster, pattern: '^p-'}, {sni: true, map_file: hosts.yaml}", base=base)
    other = Origin("", "n", "l", node=("",))
    assert tenant(subject.attribute(identity(b"x.net", rule=-1, origin=other))) is Reason.UNMAPPED
    blamed = Origin("", "n", "l", node=("x.net",))
    assert tenant(subject.attribute(identity(b"x.net", rule=-1, origin=blamed))) is Reason.NO_MATCH


def test_every_reason_has_words_and_a_stable_name() -> None:
    names = (
        "no_route no_tenant no_match unmapped invalid_tenant uuid_tenant invalid_utf8 too_long tenant_limit"
        " no_owner identity_limit"
    )
    assert [reason.value for reason in Reason] == names.split()
    assert len({reason.meaning for reason in Reason}) == len(Reason)


ROUTE_DIMENSIONS = """{
  httproute_name: {route_name: '^httproute/[^/]+/(?P<value>[^/]+)', default: none},
  httproute_namespace: {route_name: '^httproute/(?P<value>[^/]+)/'},
  region: {custom_tag: region, map_file: regions.yaml, default: elsewhere},
  project_name: {custom_tag: project, default: "bad\\x07default"}}"""


@pytest.mark.parametrize(
    ("route", "region", "project", "expected"),
    [
        (ROUTE, b"us-east-1", b"acme", ("web", "ns-1f0c", "Virginia", "acme")),
        (b"", b"", b"", ("none", "", "elsewhere", "bad\ufffddefault")),
        (b"other", b"mars", b"\xff\x00x\x9b", ("none", "", "elsewhere", "\ufffd\ufffdx\ufffd")),
        (b"httproute/\xff/w", b"", "ü\x7f\u0085".encode(), ("w", "\ufffd", "elsewhere", "ü\ufffd\ufffd")),
        (b"", b"", b"y" * 300, ("none", "", "elsewhere", "y" * MAX_DIMENSION)),
        (b"", b"", "ü".encode() * 5000, ("none", "", "elsewhere", "ü" * MAX_DIMENSION)),
    ],
)
def test_dimensions_have_a_value_or_their_default_and_are_always_printable(
    route: bytes, region: bytes, project: bytes, expected: tuple[str, ...], base: Path
) -> None:
    # The two dimensions of the route name share one field: the fold carries it once.
    subject = attributor("{custom_tag: t}", ROUTE_DIMENSIONS, base=base)
    assert subject.attribute(identity(dims=(route, region, project))) == Key("acme", expected)


def test_explain_tells_each_step_of_a_key(base: Path) -> None:
    subject = attributor(
        "{custom_tag: t}, {authority: true, pattern: '^[^:]+$', map_file: hosts.yaml}",
        ROUTE_DIMENSIONS,
        base=base,
    )
    explanation = subject.explain(identity(b"Shop.example.com:80", rule=1, dims=(ROUTE, b"mars", b"")))
    assert explanation.result == Key("exact", ("web", "ns-1f0c", "elsewhere", "bad\ufffddefault"))
    assert explanation.result == Key("exact", explanation.values)
    assert explanation.rule == 1
    steps = (
        "as a host name: 'shop.example.com'",
        "the pattern '^[^:]+$' selects 'shop.example.com'",
        "the map file, asked for 'shop.example.com', says 'exact'",
    )
    assert explanation.tenant == ("tenant", "authority", "Shop.example.com:80", steps)
    absent = ("the map file, asked for 'mars', does not have it", "the default 'elsewhere'")
    assert explanation.dimensions[2] == ("region", "custom_tag:region", "mars", absent)
    assert explanation.dimensions[3].steps == ("absent", "the default 'bad\ufffddefault'")


def test_explain_tells_why_there_is_no_tenant_and_knows_the_dimensions_all_the_same() -> None:
    subject = attributor("{custom_tag: t, pattern: '^p-'}", "{name: {custom_tag: n}}")
    explanation = subject.explain(identity(b"q", rule=-1, dims=(b"web",)))
    assert explanation.result == Unattributed(Reason.NO_MATCH)
    assert explanation.values == ("web",)
    assert explanation.tenant.steps == (
        "the pattern '^p-' does not match",
        f"no_match: {Reason.NO_MATCH.meaning}",
    )
    skipped = subject.explain(identity(b"", rule=-1, routed=False, dims=(b"",)))
    assert skipped.tenant.field == ""
    assert skipped.tenant.steps == (f"no_route: {Reason.NO_ROUTE.meaning}",)


def test_the_cache_is_bounded_in_entries_and_in_bytes() -> None:
    loaded = config("{custom_tag: t}")
    subject = Attributor(loaded.tenant, loaded.dimensions, cache=10)
    for number in range(95):
        assert subject.attribute(identity(f"t-{number}".encode())) == Key(f"t-{number}", ())
        assert len(subject._cache) <= 10
    first = subject.attribute(identity(b"t-94"))
    assert subject.attribute(identity(b"t-94")) is first
    before = len(subject._cache)
    assert tenant(subject.attribute(identity(b"x" * (MAX_CACHED + 1)))) is Reason.TOO_LONG
    assert len(subject._cache) == before == 10
    uncached = Attributor(loaded.tenant, loaded.dimensions, cache=0)
    assert uncached.attribute(identity()) == Key("acme", ())
    assert not uncached._cache


def test_no_expression_sees_more_of_a_value_than_is_looked_at() -> None:
    subject = attributor(
        "{custom_tag: t, pattern: 'end$'}", "{tail: {custom_tag: n, pattern: '.end$', default: none}}"
    )
    value = b"x" * MAX_TEXT + b"end"
    assert tenant(subject.attribute(identity(value, dims=(value,)))) is Reason.TOO_LONG
    assert subject.attribute(identity(b"the-end", dims=(value,))) == Key("end", ("none",))


LABEL = re.compile(r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
names = st.from_regex(re.compile(rb"\A[a-zA-Z0-9./:*-]{0,80}\Z"))
raw = st.one_of(st.binary(max_size=80), names, st.text(max_size=300).map(str.encode), st.just(b"z" * 5000))
hostile = st.one_of(st.text(max_size=40), st.text(st.characters(categories=["Cs", "Cc"]), max_size=5))


@pytest.fixture(scope="module")
def every_kind(base: Path) -> Attributor:
    return attributor(
        r"""{custom_tag: a}, {dynamic_metadata: {filter: f, path: [k]}, pattern: '^(?P<tenant>\S*)'},
        {request_header: h, trusted: true, pattern: '.$'}, {route_name: '^httproute/(?P<key>[^/]+)/',
        map_file: namespaces.yaml}, {authority: true, pattern: '[^.]+'},
        {authority: true, map_file: hosts.yaml}, {sni: true}, {node: metadata.p}, {literal: house}""",
        "{r: {route_name: '/(?P<value>.*)', default: d}, a: {authority: true}, n: {node: locality.zone}}",
        base=base,
    )


@given(
    value=raw, rule=st.integers(-2, 10), routed=st.booleans(), dims=st.lists(raw, max_size=3), node=hostile
)
def test_any_bytes_give_a_valid_key_or_a_reason(
    every_kind: Attributor, value: bytes, rule: int, routed: bool, dims: list[bytes], node: str
) -> None:
    given_ = Identity(Origin("", "n", "l", (node, node)), rule, value, tuple(dims), routed)
    outcome = every_kind.attribute(given_)
    assert every_kind.attribute(given_) == outcome == every_kind.explain(given_).result
    if isinstance(outcome, Key):
        assert LABEL.match(outcome.tenant)
        assert len(outcome.dimensions) == 3
        for text in outcome.dimensions:
            assert len(text) <= MAX_DIMENSION
            assert not re.search(r"[\x00-\x1f\x7f-\x9f]", text)
            text.encode("utf-8")
    else:
        assert isinstance(outcome.reason, Reason)
        assert outcome.skip is (outcome.reason is Reason.NO_ROUTE)


@given(text=st.one_of(hostile, st.text(max_size=5000)), rule=st.integers(0, 8))
def test_a_rule_that_accepts_never_ends_in_no_match(every_kind: Attributor, text: str, rule: int) -> None:
    accepted = every_kind.accepts(rule, text)
    try:
        value = text.encode()
    except UnicodeEncodeError:
        return
    reason = tenant(every_kind.attribute(identity(value, rule=rule, origin=Origin("", "", "", (text, "")))))
    if rule != 8 and len(text) <= MAX_TEXT:  # a literal needs no text
        assert (reason in {Reason.NO_MATCH, Reason.UNMAPPED, Reason.NO_TENANT}) is not accepted
