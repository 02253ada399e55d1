"""A message folded in one call, with a plan that meters everything, for tests of decode and what follows.

Every test that folds with ``Both`` is one of both folds: they must drain to the same.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from wire import NOW_MS, message

from proxy_usage.decode import DRAIN_ROWS, Drained, EnvoySettings, Fold, SkipTest, Split, StreamRow
from proxy_usage.decode.choice import Choice, choose
from proxy_usage.decode.folding import new_fold
from proxy_usage.decode.framing import parts, protobuf_parts
from proxy_usage.model import Field, FieldKind, FoldPlan, Identity, Origin, Quantity

ORIGIN = Origin("peer", "envoy-1", "http")
PROJECT = Field(FieldKind.CUSTOM_TAG, ("project_name",))
VHOST = Field(FieldKind.CUSTOM_TAG, ("vhost_project",))
EVERYTHING = (
    Quantity.REQUESTS,
    Quantity.WIRE_IN,
    Quantity.WIRE_OUT,
    Quantity.BODY_IN,
    Quantity.BODY_OUT,
    Quantity.OPEN_NS,
)
MINUTE_MS = 60_000
DAY_MS = 86_400_000
PRESENT_MS = NOW_MS - NOW_MS % MINUTE_MS
LONG = EnvoySettings(flush_interval_ms=60_000)

COUNTED = ("counted", "")
STREAM = ("stream", "")


def plan(**changes: Any) -> FoldPlan:
    settings: dict[str, Any] = {
        "rules": (PROJECT, VHOST),
        "dimensions": (),
        "node_paths": (),
        "quantities": EVERYTHING,
        "window_ms": MINUTE_MS,
        "max_skew_ms": 300_000,
        "late_horizon_ms": 29 * DAY_MS,
    }
    return FoldPlan(**settings | changes)


COMPILED = choose({})
needs_extension = pytest.mark.skipif(COMPILED.native is None, reason=f"no extension: {COMPILED.reason}")
PROTOBUF = Choice(None, "the reference")


class Both(Fold):
    """The compiled fold and the reference, given the same: what one drains to the other must, too.

    Where the extension could not be built it is the reference twice; ``needs_extension`` marks what then
    says nothing.
    """

    def __init__(self, plan: FoldPlan, **settings: Any) -> None:
        self.compiled = new_fold(plan, choice=COMPILED, **settings)
        self.reference = new_fold(plan, choice=PROTOBUF, **settings)

    @property
    def full(self) -> bool:
        return self.reference.full

    def entries(self, origin: Origin, split: Split, now_ms: int) -> int:
        bytes_alone = Split(list(split.entries), split.http, split.damaged)
        assert self.reference.entries(origin, bytes_alone, now_ms) == len(split.entries)
        return self.compiled.entries(origin, split, now_ms)

    def message(self, origin: Origin, raw: bytes, now_ms: int) -> int:
        read = sum(self.reference.entries(origin, part, now_ms) for part in protobuf_parts(raw))
        assert read == sum(self.compiled.entries(origin, part, now_ms) for part in parts(raw))
        return read

    def drains(self, limit: int = DRAIN_ROWS) -> Iterator[Drained]:
        pieces = list(self.compiled.drains(limit))
        assert all(len(piece.totals) <= limit for piece in pieces)
        expected, drained = whole(list(self.reference.drains(limit))), whole(pieces)
        assert drained == expected
        yield expected


def whole(pieces: list[Drained]) -> Drained:
    """Pieces of one drain put together. All but the first hold totals alone."""
    first, *rest = pieces
    for piece in rest:
        assert piece == Drained(totals=piece.totals)
        for (identity, window_ms), totals in piece.totals.items():
            first.add(identity, window_ms, totals)
    return first


def fold(
    *rows: Any,
    envoy: EnvoySettings | None = None,
    origin: Origin = ORIGIN,
    accepts: Callable[[int, str], bool] = lambda _rule, _text: True,
    skip: tuple[SkipTest, ...] = (),
    now_ms: int = NOW_MS,
    **changes: Any,
) -> Drained:
    """What a message of these rows drains to. Each row must have one fate."""
    folder = Both(plan(**changes), accepts=accepts, envoy=envoy or EnvoySettings(), skip=skip)
    read = folder.message(origin, message(*rows), now_ms)
    drained = folder.drain()
    assert drained.rows_read == read == len(rows) == sum(drained.fates.values())
    return drained


def only(drained: Drained) -> tuple[Identity, int, list[int]]:
    assert len(drained.totals) == 1
    ((identity, window_ms), total), *_ = drained.totals.items()
    return identity, window_ms, total


def identity_of(*rows: Any, **settings: Any) -> Identity:
    return only(fold(*rows, **settings))[0]


def stream_of(*rows: Any, **settings: Any) -> StreamRow:
    drained = fold(*rows, **settings)
    assert drained.fates == {STREAM: 1}
    assert not drained.totals
    return drained.long_rows[0]
