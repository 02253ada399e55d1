"""A message folded in one call, with a plan that meters everything, for tests of decode and what follows."""

from collections.abc import Callable
from typing import Any

from wire import NOW_MS, message

from proxy_usage.decode import Drained, EnvoySettings, Fold, SkipTest, StreamRow
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
    folder = Fold(plan(**changes), accepts=accepts, envoy=envoy or EnvoySettings(), skip=skip)
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
