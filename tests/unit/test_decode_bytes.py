"""What an Envoy really sent, and what nobody should: captures, damage, noise, and the bounds of a fold."""

from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import wire
from folding import (
    COMPILED,
    COUNTED,
    EVERYTHING,
    LONG,
    ORIGIN,
    PROJECT,
    VHOST,
    Both,
    needs_extension,
    only,
    plan,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import NOW_MS, captured, http_row, message, tcp_row, truth

from proxy_usage.decode import (
    SLICE_BYTES,
    WHOLE_BYTES,
    Drained,
    EnvoySettings,
    Split,
    parts,
    read_identifier,
    slices,
    split,
)
from proxy_usage.decode.compiled import CompiledFold
from proxy_usage.decode.fold import ProtobufFold
from proxy_usage.decode.folding import new_fold
from proxy_usage.errors import DecodeError
from proxy_usage.model import Field, FieldKind, Origin


def folder(**changes: Any) -> Both:
    settings: dict[str, Any] = {"accepts": lambda _rule, _text: True, "envoy": EnvoySettings()}
    return Both(plan(), **settings | changes)


# ── captures ──

LISTENER = Field(FieldKind.CUSTOM_TAG, ("listener_project",))
TENANT_HEADER = Field(FieldKind.CUSTOM_TAG, ("h",))


def replay(name: str, envoy: EnvoySettings) -> tuple[Drained, list[tuple[int, Origin]]]:
    """A capture folded, received at once when its last row was written."""
    now_ms = 1_795_304_000_000
    fold = Both(plan(rules=(PROJECT, VHOST, LISTENER)), accepts=lambda _rule, _text: True, envoy=envoy)
    origins: dict[int, Origin] = {}
    for stream, raw in captured(name):
        if origin := read_identifier(raw, "", ()):
            origins[stream] = origin
        fold.message(origins[stream], raw, now_ms)
    return fold.drain(), sorted(origins.items())


def per_project(drained: Drained) -> dict[str, list[int]]:
    """Requests, wire in, wire out."""
    sums: dict[str, list[int]] = {}
    for (identity, _), (_, *amounts) in drained.totals.items():
        have = sums.setdefault(identity.value.decode(), [0, 0, 0])
        for column, amount in enumerate(amounts[:3]):
            have[column] += amount
    return {project: amounts for project, amounts in sums.items() if any(amounts)}


def driven(name: str) -> dict[str, list[int]]:
    """The same as the clients counted it. A run without a project could not be attributed."""
    sums: dict[str, list[int]] = {}
    for run in truth(name)["driven"]:
        if "tx_wire" in run:
            have = sums.setdefault(run["project"] or "", [0, 0, 0])
            requests = 0 if run["kind"] == "tcp" else run.get("requests", 1)
            for column, amount in enumerate((requests, run["tx_wire"], run["rx_wire"])):
                have[column] += amount
    return sums


@pytest.mark.parametrize(
    "name",
    [
        "h1_basic",
        "internal_redirect",
        "websocket_periodic",
        "tcp_proxy_final_only",
        "h1_keepalive_conn_seconds",
    ],
)
def test_captures_fold_to_what_the_clients_counted(name: str) -> None:
    drained, origins = replay(name, EnvoySettings())
    assert per_project(drained) == driven(name)
    assert drained.rows_read == sum(drained.fates.values()) == truth(name)["entries"]
    assert {origin.node_id for _, origin in origins} == {"envoy-1"}
    assert not drained.notes
    assert not drained.complaints


def test_errors_are_counted_to_whom_the_route_or_the_host_belongs() -> None:
    drained, _ = replay("local_replies_errors", EnvoySettings())
    counted = driven("local_replies_errors")
    # No route and no virtual host knows gamma: its 404 stays with the codec errors.
    nobody = [left + right for left, right in zip(counted.pop("gamma"), counted.pop(""), strict=True)]
    assert per_project(drained) == counted | {"": nobody}
    routed = {identity.value: identity.routed for identity, _ in drained.totals}
    assert routed == {b"alpha": False, b"beta": True, b"": False}


def test_pipelining_is_counted_as_envoy_reports_it() -> None:
    drained, _ = replay("h1_pipelined", EnvoySettings())
    assert per_project(drained) == {"alpha": [2, 204, 504]}  # 136 bytes were sent: Envoy reports too many


def test_a_websocket_with_periodic_rows_leaves_as_running_totals() -> None:
    drained, _ = replay("websocket_periodic", EnvoySettings(flush_interval_ms=1_000))
    alpha = [row for row in drained.long_rows if row.identity.value == b"alpha"]
    assert [row.amounts[:3] for row in alpha] == [
        (0, 2191, 2189),
        (0, 4207, 4197),
        (0, 6223, 6205),
        (1, 7231, 7209),
    ]
    assert [row.amounts[5] // 1_000_000 for row in alpha] == [1000, 2001, 2999, 3507]
    assert [row.end for row in alpha] == [False, False, False, True]
    assert len({(row.conn_id, row.start_ns, row.stream_id) for row in alpha}) == 1
    assert [row.identity.value for row in drained.long_rows if row not in alpha] == [b"beta"]  # 902 ms of 900
    assert drained.fates == {("stream", ""): 5, ("skipped", "listener"): 2}


def test_invalid_utf8_costs_no_row() -> None:
    seen: list[str] = []

    def accepts(_rule: int, text: str) -> bool:
        seen.append(text)
        return False

    ((_, raw),) = captured("invalid_utf8")
    fold = Both(plan(rules=(TENANT_HEADER,)), accepts=accepts, envoy=EnvoySettings())
    assert fold.message(ORIGIN, raw, NOW_MS) == truth("invalid_utf8")["requests"]
    drained = fold.drain()
    assert sum(total[0] for total in drained.totals.values()) == drained.fates[COUNTED] == 4
    assert b"t\xe9n\xff" in {identity.value for identity, _ in drained.totals}
    assert "t\udce9n\udcff" in seen


# ── damage ──


def test_a_malformed_row_costs_itself() -> None:
    good = http_row(wire=(1, 1)).SerializeToString()
    raw = framed([good, b"\x0a\x05x", good])
    fold = folder()
    assert fold.message(ORIGIN, raw, NOW_MS) == 3
    drained = fold.drain()
    assert drained.fates == {COUNTED: 2, ("invalid", "malformed"): 1}
    assert drained.complaints == [
        "invalid row (malformed): row 1 of its part, 3 bytes; from node 'envoy-1', log 'http'"
    ]


def test_a_torn_message_keeps_the_rows_before_the_damage() -> None:
    raw = message(http_row(), http_row(), http_row())
    fold = folder()
    assert fold.message(ORIGIN, raw[:-3], NOW_MS) == 2
    drained = fold.drain()
    assert drained.fates == {COUNTED: 2}
    assert drained.notes == {"malformed_message": 1}
    assert len(drained.complaints) == 1
    assert "runs past the end" in drained.complaints[0]


@pytest.mark.parametrize(
    ("raw", "damage"),
    [
        (b"\xff" * 20, "a number at byte 0 does not end"),
        (b"\x12", "a number at byte 1 does not end"),
        (b"\x12\x05", "a field of 5 bytes at byte 0 runs past the end"),
        (b"\x00\x00", "field number 0 at byte 0"),
        (b"\x0f", "wire type 7 at byte 0 does not exist"),
        (b"\x22\x09x", "a field of 9 bytes at byte 0 runs past the end"),
        (b"\x25\x00", "runs past the end"),
        (b"\x23", "a group is still open at byte 1"),
        (b"\x24", "a group that did not begin ends at byte 0"),
        (b"\x23\x2c", "a group that did not begin ends at byte 1"),
        (b"\x23\x00\x01\x24\x00\x01", "field number 0 at byte 4"),
        (b"<html><body>", "a group that did not begin ends at byte 0"),
    ],
)
def test_damage_is_named_with_its_byte(raw: bytes, damage: str) -> None:
    assert damage in (split(raw).damaged or "")
    fold = folder()
    assert fold.message(ORIGIN, raw, NOW_MS) == 0
    assert fold.drain().notes == {"malformed_message": 1}


@pytest.mark.parametrize(
    "unknown",
    [
        b"\x20\xff\x01",
        b"\x21" + b"x" * 8,
        b"\x25" + b"x" * 4,
        b"\x22\x02\x12\x00",
        b"\x23\x12\x01a\x2b\x2c\x24",
    ],
    ids=["number", "fixed64", "fixed32", "bytes", "groups"],
)
def test_fields_we_do_not_know_are_stepped_over(unknown: bytes) -> None:
    raw = unknown + message(http_row()) + unknown + message(http_row(), node_id="envoy-1") + unknown
    for pieces in ([split(raw)], list(slices(raw, 1))):
        assert sum(len(piece.entries) for piece in pieces) == 2
        assert not any(piece.damaged for piece in pieces)
    assert read_identifier(raw, "", ()) == ORIGIN._replace(peer="")


def test_complaints_are_bounded() -> None:
    fold = folder()
    fold.message(ORIGIN._replace(node_id="n" * 10_000), framed([b"\xff"] * 1_000), NOW_MS)
    drained = fold.drain()
    assert drained.fates == {("invalid", "malformed"): 1_000}
    assert len(drained.complaints) == 20
    assert max(map(len, drained.complaints)) < 300


def framed(rows: list[bytes], field: int = 2) -> bytes:
    inner = b"".join(b"\x0a" + wire.varint(len(row)) + row for row in rows)
    return bytes([field << 3 | 2]) + wire.varint(len(inner)) + inner


# ── slices ──


def merged(pieces: list[Split]) -> tuple[Counter[bytes], Counter[bytes], str | None]:
    http = Counter(entry for piece in pieces for entry in piece.entries[: piece.http])
    tcp = Counter(entry for piece in pieces for entry in piece.entries[piece.http :])
    return http, tcp, pieces[-1].damaged if pieces else None


def test_a_large_message_comes_in_slices() -> None:
    row = http_row(tags={"t": "x" * 500}, wire=(1, 1))
    raw = message(*[row] * 1_000, node_id="envoy-1")
    assert len(raw) > WHOLE_BYTES
    pieces = list(parts(raw))
    assert len(pieces) > 5
    assert max(sum(map(len, piece.entries)) for piece in pieces) <= SLICE_BYTES + row.ByteSize()
    fold = folder()
    assert fold.message(ORIGIN, raw, NOW_MS) == 1_000
    assert [total[:3] for total in fold.drain().totals.values()] == [[1_000, 1_000, 1_000]]


def test_very_small_rows_and_no_rows_are_sliced_too() -> None:
    empty_rows = b"\x12" + wire.varint(400_000) + b"\x0a\x00" * 200_000
    pieces = list(parts(empty_rows))
    assert sum(len(piece.entries) for piece in pieces) == 200_000
    assert max(len(piece.entries) for piece in pieces) <= 1_000
    assert len(list(parts(b"\x20\x01" * 200_000))) > 5
    assert len(list(parts(b"\x12\x00" * 200_000))) > 5


ROWS = st.one_of(
    st.builds(lambda size: http_row(wire=(size, 1)), st.integers(0, 2**64 - 1)),
    st.builds(lambda name: http_row(tags={"project_name": name}), st.text(max_size=5)),
    st.builds(lambda type_: http_row(type=type_, tags={"dur_ms": "7"}), st.integers(-1, 15)),
).map(lambda row: row.SerializeToString())
MESSAGES = st.lists(
    st.one_of(
        st.builds(framed, st.lists(ROWS | st.binary(max_size=8), max_size=6), st.sampled_from([2, 3])),
        st.just(message(node_id="envoy-1")),
        st.binary(max_size=6),
        st.just(b"\x23\x08\x01\x24"),
    ),
    max_size=4,
).map(b"".join)


@given(raw=MESSAGES, cut=st.integers(0, 40), size=st.integers(1, 400))
@settings(max_examples=300)
def test_slices_hold_what_the_whole_holds(raw: bytes, cut: int, size: int) -> None:
    raw = raw[: len(raw) - cut] if cut < 20 else raw
    assert merged(list(slices(raw, size))) == merged([split(raw)])
    in_one, in_slices = folder(envoy=LONG), folder(envoy=LONG)
    in_one.entries(ORIGIN, split(raw), NOW_MS)
    for piece in slices(raw, size):
        in_slices.entries(ORIGIN, piece, NOW_MS)
    one, other = in_one.drain(), in_slices.drain()
    assert (one.rows_read, one.totals, one.fates, one.notes) == (
        other.rows_read,
        other.totals,
        other.fates,
        other.notes,
    )
    assert Counter(one.long_rows) == Counter(other.long_rows)


@given(raw=st.one_of(MESSAGES, st.binary(max_size=200)), data=st.data())
@settings(max_examples=300)
def test_no_bytes_raise_and_every_row_has_a_fate(raw: bytes, data: st.DataObject) -> None:
    spoilt = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 4)) if spoilt else 0):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    raw = bytes(spoilt)
    fold = folder(envoy=LONG)
    read = fold.message(ORIGIN, raw, NOW_MS)
    drained = fold.drain()
    assert drained.rows_read == read == sum(drained.fates.values())
    assert sum(total[0] for total in drained.totals.values()) == drained.fates.get(COUNTED, 0)
    assert len(drained.long_rows) == drained.fates.get(("stream", ""), 0)
    assert all(amount >= 0 for total in drained.totals.values() for amount in total)
    with suppress(DecodeError):
        read_identifier(raw, "", (("metadata", "a", "b"),))


# ── drain and full ──


def test_a_drained_fold_begins_anew() -> None:
    fold = folder()
    fold.message(
        ORIGIN, message(http_row(), http_row(type=wire.UPSTREAM_END), http_row(wire=(2**62, 0))), NOW_MS
    )
    assert len(fold.drain().totals) == 1
    assert fold.drain() == Drained()
    fold.message(ORIGIN, message(http_row(wire=(3, 4))), NOW_MS)
    assert [total[:4] for total in fold.drain().totals.values()] == [[1, 1, 3, 4]]


def test_a_drain_lets_go_of_sums_piece_by_piece() -> None:
    fold = ProtobufFold(plan(), accepts=lambda *_: True, envoy=EnvoySettings(), identity_limit=1_000)
    rows = [http_row(tags={"project_name": str(number)}).SerializeToString() for number in range(120)]
    fold.message(ORIGIN, framed(rows), NOW_MS)
    (source,) = fold._sums.sources.values()
    assert (len(source.cells), sum(map(len, source.seen.values()))) == (120, 120)
    pieces = fold.drains(50)
    left = []
    totals: dict[Any, Any] = {}
    for piece in pieces:
        totals |= piece.totals
        left.append((len(source.cells), sum(map(len, source.seen.values()))))
    assert left == [(69, 69), (19, 19), (0, 0)]  # the one behind a piece was looked at, too
    assert [identity.value for identity, _ in totals] == [str(number).encode() for number in range(120)]


def test_origins_are_kept_apart() -> None:
    fold = folder()
    for node in ("a", "b", "a"):
        fold.message(ORIGIN._replace(node_id=node), message(http_row()), NOW_MS)
    assert {identity.origin.node_id: total[0] for (identity, _), total in fold.drain().totals.items()} == {
        "a": 2,
        "b": 1,
    }


@pytest.mark.parametrize(
    "envoy", [EnvoySettings(), EnvoySettings(flush_interval_ms=1)], ids=["sums", "long rows"]
)
def test_full_at_the_limit_until_drained(envoy: EnvoySettings) -> None:
    fold = folder(identity_limit=3, envoy=envoy)
    for number in range(3):
        assert not fold.full
        fold.message(ORIGIN, message(http_row(tags={"project_name": f"p{number}"})), NOW_MS)
    assert fold.full
    fold.drain()
    assert not fold.full


def test_known_identities_never_fill_a_fold() -> None:
    fold = folder(identity_limit=2)
    fold.message(ORIGIN, message(*[http_row()] * 500), NOW_MS)
    assert not fold.full


def test_a_fold_is_full_of_bytes_too() -> None:
    fold = folder()
    for number in range(40):
        fold.message(ORIGIN, message(http_row(tags={"project_name": f"{number}" + "x" * 1_000_000})), NOW_MS)
        if fold.full:
            break
    assert 30 < number < 39
    assert len(EVERYTHING) == len(next(iter(fold.drain().totals.values()))) - 1


def test_remembered_verdicts_are_bounded() -> None:
    asked = Counter[str]()

    def accepts(_rule: int, text: str) -> bool:
        asked[text] += 1
        return True

    fold = ProtobufFold(plan(), accepts=accepts, envoy=EnvoySettings(), identity_limit=200_000)
    rows = [http_row(tags={"project_name": str(number)}).SerializeToString() for number in range(66_000)]
    fold.message(ORIGIN, framed(rows), NOW_MS)
    assert set(asked.values()) == {1}
    fold.drain()  # with the sums, what is remembered of them
    fold.message(ORIGIN, framed([rows[0], rows[-1]]), NOW_MS)
    assert (asked["0"], asked["65999"]) == (2, 1)
    long = http_row(tags={"project_name": "y" * 300})
    fold.message(ORIGIN, message(long, long), NOW_MS)
    assert asked["y" * 300] == 2


@needs_extension
def test_answers_that_the_walker_remembers_are_bounded() -> None:
    asked = Counter[str]()

    def accepts(_rule: int, text: str) -> bool:
        asked[text] += 1
        return text != "000000"

    fold = new_fold(plan(), accepts=accepts, envoy=EnvoySettings(), identity_limit=1_000, choice=COMPILED)
    assert isinstance(fold, CompiledFold)
    row = http_row(tags={"project_name": "000000"}).SerializeToString()
    most = 0
    for first in range(0, 300_000, 20_000):
        rows = [row.replace(b"000000", b"%06d" % number) for number in range(first, first + 20_000)]
        fold.message(ORIGIN, framed(rows), NOW_MS)
        most = max(most, fold.answers)
        fold.drain()
    assert set(asked.values()) == {1}
    assert 100_000 < most <= 1 << 17
    fold.message(ORIGIN, framed([row, row]), NOW_MS)  # its answer was forgotten
    assert asked["000000"] == 2
    assert only(fold.drain())[0].rule == -1


def test_tcp_messages_in_slices_stay_tcp() -> None:
    raw = message(*[tcp_row(sizes=(1, 2), tags={"t": "x" * 400})] * 800)
    fold = folder()
    assert fold.message(ORIGIN, raw, NOW_MS) == 800
    assert [total[:4] for total in fold.drain().totals.values()] == [[800, 0, 800, 1_600]]


@pytest.mark.parametrize("rows", [1, 50, 51, 120, 3_000])
def test_no_piece_of_a_message_holds_more_rows_than_may_hold_up_the_event_loop(rows: int) -> None:
    raw = message(*(http_row(stream_id=f"s-{number}") for number in range(rows)), node_id="envoy-1")
    pieces = list(parts(raw))
    assert max(len(piece.entries) for piece in pieces) <= 50
    assert all(piece.http == len(piece.entries) for piece in pieces)
    assert b"".join(entry for piece in pieces for entry in piece.entries) == b"".join(
        entry for piece in slices(raw) for entry in piece.entries
    )
    assert sum(len(piece.entries) for piece in pieces) == rows


def test_a_cut_message_says_once_and_last_that_it_is_damaged() -> None:
    raw = message(*(http_row() for _ in range(120)), node_id="envoy-1") + b"\x13"
    pieces = list(parts(raw))
    assert [bool(piece.damaged) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
