"""The compiled fold against the protobuf fold: whatever arrives, both drain to the same.

``Both`` compares all of it: totals per identity and window, fates, stream rows, notes, complaints.
"""

import random

import pytest
from folding import Both, needs_extension
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from odd_rows import Writer
from plans import KINDS, ORIGINS, fold_of
from wire import CAPTURES, NOW_MS, captured

from proxy_usage.decode import Split, read_identifier, slices
from proxy_usage.decode.compiled import CompiledFold
from proxy_usage.decode.framing import WHOLE_BYTES, parts, protobuf_parts
from proxy_usage.model import Origin

NAMES = sorted(path.name.split(".")[0] for path in CAPTURES.glob("*.binpb*"))
seeds = st.integers(0, 1 << 32)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(seed=seeds, oddity=st.sampled_from([0.0, 0.01, 0.05, 0.3]))
def test_both_drain_to_the_same(kind: str, seed: int, oddity: float) -> None:
    fold = fold_of(kind)
    dice, writer = random.Random(seed), Writer(seed, oddity)
    for number in range(4):
        fold.message(dice.choice(ORIGINS), writer.message(8), NOW_MS + number * 30_000)
        if dice.random() < 0.2:
            fold.drain()
    fold.drain()


@settings(max_examples=100)
@given(raw=st.lists(st.binary(max_size=60), max_size=8), http=st.integers(0, 8), kind=st.sampled_from(KINDS))
def test_both_drain_to_the_same_whatever_the_bytes_are(raw: list[bytes], http: int, kind: str) -> None:
    fold = fold_of(kind)
    fold.entries(ORIGINS[0], Split(raw, http), NOW_MS)
    fold.message(ORIGINS[1], b"".join(raw), NOW_MS)
    fold.drain()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_both_read_alike_what_real_envoys_sent(name: str, kind: str) -> None:
    fold = fold_of(kind)
    origins: dict[int, Origin] = {}
    for stream, raw in captured(name):
        origins[stream] = read_identifier(raw, "", (("cluster",),)) or origins[stream]
        fold.message(origins[stream], raw, NOW_MS)
    assert fold.drain().rows_read


@settings(max_examples=60)
@given(seed=seeds, oddity=st.sampled_from([0.0, 0.02, 0.3]), rows=st.integers(0, 40))
def test_a_message_has_the_same_rows_for_both(seed: int, oddity: float, rows: int) -> None:
    raw = Writer(seed, oddity).message(rows)
    assume(len(raw) <= WHOLE_BYTES)
    scanned, opened = list(parts(raw)), list(protobuf_parts(raw))
    assert [(list(part.entries), part.http, part.damaged) for part in scanned] == [
        (list(part.entries), part.http, part.damaged) for part in opened
    ]


@settings(max_examples=12)
@given(seed=seeds, oddity=st.sampled_from([0.0, 0.0005]))
def test_a_large_message_has_the_same_rows_for_both(seed: int, oddity: float) -> None:
    writer = Writer(seed, oddity)
    raw = b""
    while len(raw) <= WHOLE_BYTES:
        raw += writer.message(200)
    scanned, opened = list(parts(raw)), list(slices(raw))
    for http in (True, False):
        assert [row for part in scanned for row in rows_of(part, http=http)] == [
            row for part in opened for row in rows_of(part, http=http)
        ]
    assert [part.damaged for part in scanned if part.damaged] == [
        part.damaged for part in opened if part.damaged
    ]
    assert max(len(part.entries) for part in scanned) <= 50


def rows_of(part: Split, *, http: bool) -> list[bytes]:
    return list(part.entries[: part.http] if http else part.entries[part.http :])


@needs_extension
def test_the_comparison_can_fail() -> None:
    fold = fold_of("everything")
    raw = Writer(1, 0.0).message(30)
    fold.message(ORIGINS[0], raw, NOW_MS)
    fold.reference.message(ORIGINS[0], raw, NOW_MS)
    with pytest.raises(AssertionError):
        fold.drain()


def careful_rows(fold: Both) -> int:
    assert isinstance(fold.compiled, CompiledFold)
    return next(fold.compiled._careful.drains()).rows_read


@needs_extension
@pytest.mark.parametrize("name", NAMES)
def test_what_real_envoys_send_goes_the_fast_way(name: str) -> None:
    """Only rows of streams that were or may be open for long are left to the careful path."""
    fold = fold_of("skipping")
    origins: dict[int, Origin] = {}
    for stream, raw in captured(name):
        origins[stream] = read_identifier(raw, "", (("cluster",),)) or origins[stream]
        fold.message(origins[stream], raw, NOW_MS)
    expected = next(fold.reference.drains())
    stateful = len(expected.long_rows) + expected.fates.get(("skipped", "early_periodic"), 0)
    assert careful_rows(fold) == stateful


@needs_extension
def test_generated_rows_go_both_ways() -> None:
    """Or the tests above would compare the reference with itself."""
    fold = fold_of("everything")
    writer = Writer(7, 0.01)
    read = sum(fold.message(ORIGINS[0], writer.message(20), NOW_MS) for _ in range(20))
    assert read / 10 < careful_rows(fold) < read * 9 / 10
