"""``explain --replay``: a whole capture through the service's own pipeline, to its totals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from proxy_usage.attribution import Attributor
from proxy_usage.cli.capture import Message
from proxy_usage.config import Config
from proxy_usage.decode import parts, read_identifier
from proxy_usage.errors import DecodeError
from proxy_usage.model import Origin
from proxy_usage.pipeline import Pipeline, Port
from proxy_usage.service.build import build_connections, build_folds, build_streams, build_windows
from proxy_usage.turn import Turn

SETTLED_MS = 60_000
"""Connections that wait for who used them have waited long enough by then."""


@dataclass(slots=True)
class Totals:
    """What a capture adds up to, in base units per meter, in the meters' order."""

    tenants: dict[str, list[int]] = field(default_factory=dict)
    held: dict[str, list[int]] = field(default_factory=dict)
    """By reason."""
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By fate and reason."""


def replay(config: Config, messages: list[Message], now_ms: int) -> Totals:
    """Folds, attributes and sums every message, as the service would at the moment ``now_ms``."""
    meters = len(config.meters)
    attributor = Attributor(config.tenant, config.dimensions)
    folds = build_folds(config, attributor)
    plan = config.fold_plan()
    pipeline = Pipeline(
        folds,
        attributor,
        build_windows(config),
        quantities=plan.quantities,
        counts=dict,
        max_held=config.tenant.unattributed.max_identities,
        streams=build_streams(config),
        connections=build_connections(config),
    )
    # The owner's port takes every row; where there is one port, that does.
    port = Port.STREAMS if Port.STREAMS in folds else Port.ALL
    origins: dict[int, Origin] = {}
    for message in messages:
        try:
            origin = read_identifier(message.raw, "", plan.node_paths)
        except DecodeError:
            origin = None
        if origin is not None:  # also where a recording goes on with streams that are numbered from 1 again
            origins[message.stream] = origin
        elif message.stream not in origins:
            origins[message.stream] = Origin("", "", "", ("",) * len(plan.node_paths))
        for part in parts(message.raw):
            pipeline.take(port, origins[message.stream], part, now_ms)
    totals = Totals()
    for at_ms in (now_ms, now_ms + SETTLED_MS):
        turn = pipeline.begin(at_ms, everything=True, limit=1 << 31)
        while not turn.is_empty:  # a turn settles a bounded number of connections and of streams
            _add(totals, turn, meters)
            turn = pipeline.begin(at_ms, everything=True, limit=1 << 31)
    return totals


def _add(totals: Totals, turn: Turn, meters: int) -> None:
    totals.rows.update(turn.fates)
    for cell in turn.windows.closing:
        sums = totals.tenants.setdefault(cell.key.tenant, [0] * meters)
        for index, amount in enumerate(cell.amounts):
            sums[index] += amount
    for held in turn.held:
        sums = totals.held.setdefault(held.reason, [0] * meters)
        for index, amount in enumerate(held.amounts):
            sums[index] += amount
