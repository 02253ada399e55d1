"""Held usage and later rules: whose it becomes, when it is dated, and that every unit stays counted once."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inner_sink import InnerSink, settings
from money import DAY_MS, HOUR_MS, MINUTE_MS
from test_attribution import attributor
from wire import http_row

from proxy_usage.attribution import Reason, Unattributed
from proxy_usage.errors import UsageError
from proxy_usage.model import NS_PER_MS, Field, FieldKind, Identity, Key, Origin
from proxy_usage.reattribution import Fact, attribute_again, facts
from proxy_usage.service.build import build_attributor, build_folds, build_mint
from proxy_usage.service.repairs import Repairs, carry_out
from proxy_usage.store.reader import Reader

ORIGIN = Origin("peer", "node-1", "http")
NODED = ORIGIN._replace(node=("eu", "gold"))
TAG, HEADER = "{custom_tag: project}", "{request_header: x-project, trusted: true}"
ROUTE = "httproute/ns-1/web/rule/0"
HOUR = 1_795_298_400_000
"""The UTC hour in which the sink's time lies: 20 s and 26 minutes after its begin."""

# --- facts ----------------------------------------------------------------------------------------


def again(
    old: str, identity: Identity, new: str, *, dimensions: tuple[str, str] = ("{}", "{}")
) -> Key | Unattributed:
    """Usage held under one set of rules, by another."""
    known = facts(attributor(old, dimensions[0]), identity)
    return attribute_again(attributor(new, dimensions[1]), known, identity.origin, routed=identity.routed)


def test_facts_name_the_fields_that_an_identity_has_by_position() -> None:
    subject = attributor(
        f"{HEADER}, {{node: locality.region, pattern: '^us'}}",
        "{a: {custom_tag: size}, b: {node: metadata.tier}, c: {custom_tag: absent}}",
    )
    identity = Identity(NODED, ~0, b"x", (b"big", b""), routed=True)
    assert set(facts(subject, identity)) == {
        Fact("request_header", ("x-project",), b"x"),
        Fact("custom_tag", ("size",), b"big"),
        Fact("node", ("locality", "region"), b"eu"),
        Fact("node", ("metadata", "tier"), b"gold"),
    }
    assert facts(subject, Identity(ORIGIN, -1, b"", (), routed=False)) == ()


def test_a_mended_rule_takes_what_it_refused() -> None:
    held = Identity(ORIGIN, ~1, b"p_acme", (), routed=True)
    old = f"{TAG}, {{request_header: x-project, trusted: true, pattern: '^q'}}"
    assert again(old, held, old) == Unattributed(Reason.NO_MATCH)
    mended = f"{TAG}, {{request_header: x-project, trusted: true, pattern: '^p_(?P<tenant>.+)'}}"
    assert again(old, held, mended) == Key("acme", ())


def test_a_value_is_never_taken_for_that_of_another_field() -> None:
    """A client that chose a header must not become a tenant because a rule on a tag takes every value."""
    held = Identity(ORIGIN, ~0, b"victim", (), routed=True)
    outcome = again(f"{{request_header: x-project, trusted: true, pattern: '^q'}}, {TAG}", held, TAG)
    assert outcome == Unattributed(Reason.NO_TENANT)


def test_rules_that_moved_are_found_by_their_field() -> None:
    held = Identity(ORIGIN, 1, b"No Project", (), routed=True)
    moved = "{request_header: x-project, trusted: true, pattern: '(?P<tenant>[a-z]+)$'}"
    assert again(f"{TAG}, {HEADER}", held, f"{{sni: true}}, {moved}, {TAG}") == Key("roject", ())


def test_dimensions_and_nodes_are_read_where_they_stand_now() -> None:
    held = Identity(NODED, ~0, b"", (b"big", b"red"), routed=True)
    tier, region = "{node: metadata.tier}", "{node: locality.region}"
    old = f"{{a: {{custom_tag: size}}, b: {{custom_tag: colour}}, c: {region}, d: {tier}}}"
    new = f"{{n: {tier}, b: {{custom_tag: colour, default: none}}, z: {{custom_tag: new, default: none}}}}"
    outcome = again(TAG, held, "{node: locality.region}", dimensions=(old, new))
    assert outcome == Key("eu", ("gold", "red", "none"))


def test_a_literal_takes_whatever_is_left_and_no_route_stays_no_route() -> None:
    held = Identity(ORIGIN, -1, b"", (), routed=True)
    assert again(TAG, held, f"{TAG}, {{literal: rest}}") == Key("rest", ())
    assert again(TAG, held._replace(routed=False), TAG) == Unattributed(Reason.NO_ROUTE, skip=True)


@given(st.binary(max_size=20), st.integers(-2, 1), st.lists(st.binary(max_size=4), min_size=1, max_size=1))
def test_under_the_same_rules_it_is_as_it_was(value: bytes, rule: int, dims: list[bytes]) -> None:
    """Whatever a row says, what attribution said of it is what it says again."""
    rules = f"{{custom_tag: project, pattern: '^[a-m]'}}, {HEADER}"
    subject = attributor(rules, "{d: {custom_tag: size, default: none}}")
    accepted = [subject.accepts(index, value.decode("utf-8", "surrogateescape")) for index in (0, 1)]
    index = rule if rule >= 0 else ~rule
    if accepted[index]:
        rule = index
    elif rule >= 0:
        rule = ~index
    identity = Identity(ORIGIN, rule, value, tuple(dims), routed=True)
    known = facts(subject, identity)
    assert attribute_again(subject, known, ORIGIN, routed=True) == subject.attribute(identity)


def test_facts_survive_the_store() -> None:
    fact = Fact(str(Field(FieldKind.NODE).kind), ("a", "b"), b"\xff")
    packed = msgspec.msgpack.encode((fact,))
    assert msgspec.msgpack.decode(packed, type=tuple[Fact, ...]) == (fact,)


# --- through the store ----------------------------------------------------------------------------


def held(
    tmp_path: Path, *, ago_ms: int = 0, refused: str = "No Project", rows: int = 1, **changes: Any
) -> InnerSink:
    """A sink that holds rows of a name that is none; each took 700 ms."""
    sink = InnerSink(tmp_path, **changes)
    for number in range(rows):
        start_ns = (sink.now_ms - ago_ms - 700) * NS_PER_MS
        tags = {"project_name": f"{refused} {number}"}
        sink.read(
            http_row(tags=tags, wire=(10, 20), route=ROUTE, start_ns=start_ns, duration_ns=700 * NS_PER_MS)
        )
    sink.turn()
    return sink


def release(
    sink: InnerSink,
    *,
    pattern: str = "^(?P<tenant>nobody)$",
    ids: tuple[str, ...] = (),
    reason: str | None = None,
    redate: bool = False,
) -> dict[str, int]:
    """Held usage through another rule for the same tag."""
    later = settings(
        sink.config.store.path.parent,
        tenant={"rules": [{"custom_tag": "project_name", "pattern": pattern}]},
    )
    repairs = Repairs(
        later,
        sink.storage.database,
        sink.storage.checkpoints,
        build_mint(later),
        lambda: build_attributor(later),
        lambda: sink.now_ms,
    )
    return carry_out(repairs.release(ids, reason, redate=redate))


LOWER = "(?P<tenant>[a-z]+) "


def check(sink: InnerSink) -> None:
    sink.check_books()
    with Reader(sink.config.store.path) as reader:
        sums = reader.conservation(deep=True)
    assert sums.balanced, sums


def test_held_usage_becomes_events_of_its_own_hour(tmp_path: Path) -> None:
    with held(tmp_path, ago_ms=2 * HOUR_MS) as sink:
        assert release(sink, pattern=LOWER) == {
            "released": 1,
            "minted": 3,
            "unattributed": 0,
            "too_late": 0,
            "lost": 0,
        }
        hour_ms = HOUR - 2 * HOUR_MS
        assert sink.books.rows("SELECT DISTINCT window_ms FROM events") == [(hour_ms + 59 * MINUTE_MS,)]
        assert sink.books.rows("SELECT tenant, dimensions FROM keys") == [
            ("o", '{"httproute_name":"web","region":""}')
        ]
        assert sink.books.rows("SELECT count(*) FROM held") == [(0,)]
        assert sink.books.remainders()["connection_seconds"] == 700 * NS_PER_MS
        check(sink)


def test_of_the_hour_that_is_not_over_the_present_window_is_the_last(tmp_path: Path) -> None:
    with held(tmp_path) as sink:
        release(sink, pattern=LOWER)
        present_ms = sink.now_ms - sink.now_ms % MINUTE_MS
        assert HOUR <= present_ms < HOUR + 59 * MINUTE_MS
        assert sink.books.rows("SELECT DISTINCT window_ms FROM events") == [(present_ms,)]
        check(sink)


def test_a_remainder_of_the_key_is_taken_into_account_and_left_exact(tmp_path: Path) -> None:
    with held(tmp_path, rows=3) as sink:
        release(sink, pattern=LOWER)
        assert sink.fates() == {"pending": 3 * 3 + 2}  # 2,100 ms: after the second and the third, one second
        assert sink.books.remainders()["connection_seconds"] == 100 * NS_PER_MS
        assert sink.check_usage()["connection_seconds"]["minted"] == 2_000 * NS_PER_MS
        check(sink)


def test_what_still_has_no_tenant_stays_held(tmp_path: Path) -> None:
    with held(tmp_path, rows=4) as sink:
        assert release(sink, pattern="^(?P<tenant>nobody)") == {
            "released": 0,
            "minted": 0,
            "unattributed": 4,
            "too_late": 0,
            "lost": 0,
        }
        counts = release(sink, pattern="(?P<tenant>[a-z]+) [12]$")
        assert (counts["released"], counts["unattributed"]) == (2, 2)
        assert sink.books.held()["requests"] == 2
        check(sink)


def test_a_reason_or_an_id_says_what_is_meant(tmp_path: Path) -> None:
    with held(tmp_path, rows=2) as sink:
        sink.read(http_row(route=ROUTE))
        sink.turn()
        with Reader(sink.config.store.path) as reader:
            shown = {one.identity.value: one for one in reader.unattributed() if one.identity is not None}
        assert release(sink, pattern=LOWER, reason="no_tenant")["released"] == 0
        one = shown[b"No Project 1"]
        assert release(sink, pattern=LOWER, reason="no_tenant", ids=(one.id,))["unattributed"] == 0
        assert release(sink, pattern=LOWER, ids=(one.id.upper(),))["released"] == 1
        for name in (one.id, "no id", "00ff"):
            with pytest.raises(UsageError, match="nothing is held under"):
                release(sink, ids=(name,))
        assert release(sink, pattern=LOWER, reason=one.reason)["released"] == 1
        assert sink.books.held()["requests"] == 1
        check(sink)


def test_past_the_horizon_it_stays_unless_it_is_redated(tmp_path: Path) -> None:
    with held(tmp_path, ago_ms=0) as sink:
        sink.now_ms += 29 * DAY_MS + 2 * HOUR_MS
        counts = release(sink, pattern=LOWER)
        assert (counts["released"], counts["too_late"]) == (0, 1)
        check(sink)
        assert release(sink, pattern=LOWER, redate=True)["released"] == 1
        present_ms = sink.now_ms - sink.now_ms % MINUTE_MS
        assert sink.books.rows("SELECT DISTINCT window_ms FROM events") == [(present_ms,)]
        check(sink)


def test_identities_past_their_bound_cannot_be_released(tmp_path: Path) -> None:
    with held(tmp_path, rows=9, tenant={"unattributed": {"max_identities": 3}}) as sink:
        counts = release(sink, pattern=LOWER)
        assert counts["lost"] == 1
        left = sink.books.held()["requests"]
        assert 0 < left < 9
        check(sink)
        sink.read(http_row(tags={"project_name": "Others"}, route=ROUTE))  # there is room again
        sink.turn()
        assert sink.books.rows("SELECT count(*) FROM held WHERE identity != x''") == [(1,)]
        check(sink)


def test_more_than_one_transaction_takes(tmp_path: Path) -> None:
    with held(tmp_path, rows=1_201) as sink:
        assert release(sink, pattern=LOWER) == {
            "released": 1_201,
            "minted": 3 * 1_201 + 1_201 * 700 // 1_000,
            "unattributed": 0,
            "too_late": 0,
            "lost": 0,
        }
        check(sink)


def test_a_meter_that_is_gone_leaves_its_amount_behind(tmp_path: Path) -> None:
    with held(tmp_path) as sink:
        sink.storage.database.db.execute("UPDATE held SET amounts=json_set(amounts, '$.former', 7)")
        assert release(sink, pattern=LOWER)["released"] == 1
        assert sink.books.rows("SELECT rows, amounts FROM held") == [(0, '{"former":7}')]


def test_rules_that_change_between_two_rows_do_not_mix_what_they_mean(tmp_path: Path) -> None:
    """The same place in an identity is another field after a reload."""
    with InnerSink(tmp_path) as sink:
        sink.read(http_row(tags={"project_name": "No Project"}, route=ROUTE))
        other = settings(tmp_path, tenant={"rules": [{"custom_tag": "another"}]})
        changed = build_attributor(other)
        sink.pipeline.replace(build_folds(other, changed), changed, sink.now_ms)
        sink.read(http_row(tags={"another": "No Project"}, route=ROUTE))
        sink.turn()
        assert sink.books.rows("SELECT count(*) FROM held") == [(2,)]
        assert release(sink, pattern="(?P<tenant>[a-z]+)$")["released"] == 1
        assert sink.books.held()["requests"] == 1
        check(sink)
