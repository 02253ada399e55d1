"""Keeps what the operator's page shows: looks at the parts now and then, and remembers an hour."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from proxy_usage import __version__
from proxy_usage.config import Config
from proxy_usage.config.fields import split_address
from proxy_usage.config.units import format_duration, format_size
from proxy_usage.delivery import Courier
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.errors import StoreError
from proxy_usage.intake import by_node
from proxy_usage.metrics import Metrics, by_label, total
from proxy_usage.model import Cell
from proxy_usage.page.document import TENANTS, document
from proxy_usage.page.problems import problems
from proxy_usage.page.ring import STEP_MS, Ring
from proxy_usage.page.snapshot import (
    NodeAudit,
    NodeFigures,
    OutputFigures,
    Snapshot,
    StoreFigures,
    TenantFigures,
    TopFigures,
    WeekFigures,
)
from proxy_usage.page.tops import Tops
from proxy_usage.pipeline import Pipeline
from proxy_usage.service.build import Storage
from proxy_usage.service.housekeeping import Housekeeping
from proxy_usage.service.turns import Turns
from proxy_usage.store.aside import files as set_aside_files
from proxy_usage.store.glance import Glance, glance
from proxy_usage.web import Health, Page, Web

NO_FILE = Path("proxy-usage.yaml")
"""What a service that was made of no file calls it."""
TICK_S = 1.0
MINUTE_POINTS = 12
"""So many points of five seconds are the last minute."""
FRESH_MS = 1_000
"""A document is made once in so long, however many ask for it."""
TO_BE_ADDED_UP = 200
"""Tenants of each meter that one of several workers names: who is among the first of all is among these."""

Audit = Callable[[], Sequence[NodeAudit] | None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What is looked at."""

    config: Callable[[], Config]
    storage: Storage
    metrics: Metrics
    pipeline: Pipeline
    turns: Turns
    couriers: Sequence[Courier]
    housekeeping: Housekeeping
    health: Callable[[], Health]
    config_error: Callable[[], str]
    audit: Audit = lambda: None
    """None as its answer: no audit is set up."""


class Lookout:
    """What the page knows. ``run`` it beside the parts.

    Args:
        config_file: the configuration's path, for commands that people copy.
    """

    def __init__(self, parts: Parts, config_file: Path | None, clock_ms: Callable[[], int]) -> None:
        config = parts.config()
        self._parts = parts
        self._config_file = str((config_file or NO_FILE).absolute())
        # Usage is kept by tenant only where it may be shown by tenant.
        self._tops = Tops(len(config.meter_list())) if config.listen.http_tenants else None
        self._clock_ms = clock_ms
        self._started_ms = clock_ms()
        self._ring = Ring()
        self._counts: deque[tuple[int, dict[str, int]]] = deque(maxlen=MINUTE_POINTS + 1)
        self._glance: Glance | None = None
        self._figures_ms: int | None = None
        self._asides = 0
        self._store_error = ""
        self._since: dict[str, int] = {}
        self._made: dict[bool, tuple[int, bytes]] = {}
        self._point = -1

    # --- what comes by itself ---------------------------------------------------------------------------

    def closed(self, cells: Iterable[Cell], now_ms: int) -> None:
        """Windows were closed and are durable."""
        if self._tops is not None:
            self._tops.add(cells, now_ms)

    async def run(self) -> None:
        """Looks until it is cancelled: at the process each second, into the store each five."""
        while True:
            now_ms = self._clock_ms()
            if now_ms // STEP_MS != self._point:
                self._point = now_ms // STEP_MS
                await self._look(now_ms)
            self._notice(self._snapshot(self._clock_ms()))
            await asyncio.sleep(TICK_S)

    async def _look(self, now_ms: int) -> None:
        parts = self._parts
        path = parts.storage.database.path
        try:
            self._glance = await asyncio.to_thread(glance, path, now_ms)
            self._asides = await asyncio.to_thread(set_aside_files, path)
            self._figures_ms, self._store_error = now_ms, ""
        except StoreError as error:  # its owner decides what follows from it
            self._store_error = error.message
        counts = by_node(parts.storage.intake.counts())
        self._counts.append((now_ms, counts))
        found = self._glance
        if found is None:
            return
        settled = by_label(parts.metrics.events, "fate")
        oldest = [one.oldest_ms for one in found.outputs if one.oldest_ms is not None]
        self._ring.add(
            now_ms,
            {
                "entries": sum(counts.values()),
                "minted": total(parts.metrics.minted),
                "delivered": settled.get("delivered", 0)
                + settled.get("delivered_ambiguous", 0)
                + sum(one.fates.get("recorded", 0) for one in found.outputs),
                "undelivered": settled.get("dead", 0) + settled.get("unconfirmed", 0),
            },
            {
                "queued": sum(one.fates.get("pending", 0) for one in found.outputs),
                "oldest_ms": max(0, now_ms - min(oldest)) if oldest else 0,
                "windows": len(parts.pipeline.windows),
            },
        )

    def _notice(self, now: Snapshot) -> None:
        """Remembers when each problem was first seen, for as long as it lasts."""
        keys = [problem.key for problem in problems(now)]
        self._since = {key: self._since.get(key, now.now_ms) for key in keys}

    # --- what is asked for ------------------------------------------------------------------------------

    def state(self, *, tenants: bool) -> bytes:
        """The document as JSON; made anew when the last one is older than a second."""
        now_ms = self._clock_ms()
        made_ms, made = self._made.get(tenants, (0, b""))
        if not made or not 0 <= now_ms - made_ms < FRESH_MS:
            made = msgspec.json.encode(self.document(tenants=tenants))
            self._made[tenants] = (now_ms, made)
        return made

    def document(self, *, tenants: bool) -> dict[str, object]:
        """The document of this moment."""
        return document(self.snapshot(TENANTS if tenants else 0), tenants=tenants)

    def snapshot(self, tenants: int = TO_BE_ADDED_UP) -> Snapshot:
        """This moment, with so many tenants of each meter where tenants may be named."""
        now = self._snapshot(self._clock_ms())
        self._notice(now)
        named = self._named(now.now_ms, tenants) if tenants else None
        return replace(now, history=self._ring.history(), tenants=named, since=self._since)

    def _snapshot(self, now_ms: int) -> Snapshot:
        """All but history and tenants, which take a while."""
        parts, found = self._parts, self._glance
        config, windows = parts.config(), parts.pipeline.windows
        loss = parts.storage.loss
        return Snapshot(
            now_ms=now_ms,
            started_ms=self._started_ms,
            version=__version__,
            host=socket.gethostname(),
            config_file=self._config_file,
            settings=settings(config),
            reasons=parts.health().reasons,
            store=self._store(parts),
            figures_ms=self._figures_ms,
            store_error=self._store_error,
            config_error=parts.config_error(),
            asides=self._asides,
            remarks=tuple(parts.turns.observer.remarks().values()),
            crash_lost=by_node(loss.rows),
            crash_unknown=len(loss.unknown),
            nodes=self._nodes(parts, found),
            minute_ms=self._counts[-1][0] - self._counts[0][0] if self._counts else 0,
            connections=total(parts.metrics.connections),
            rows=_rows(parts.metrics),
            windows=len(windows),
            window_ms=windows.length_ms,
            tenants_seen=windows.tenants,
            checkpoint_age_ms=max(0, now_ms - parts.turns.durable_ms),
            outputs=_outputs(config, parts.couriers, found, now_ms),
            dead=found.dead if found else (),
            dead_partial=found.dead_partial if found else False,
            held=found.held if found else (),
            held_partial=found.held_partial if found else False,
            held_top=found.held_top if found else (),
            audit=_audited(parts.audit()),
            week=_week(config, found),
        )

    def _nodes(self, parts: Parts, found: Glance | None) -> tuple[NodeFigures, ...]:
        counts = by_node(parts.storage.intake.counts())
        before = self._counts[0][1] if self._counts else counts
        latest = self._counts[-1][1] if self._counts else counts
        lost = found.crash_lost if found else {}
        unknown = found.crash_unknown if found else {}
        return tuple(
            NodeFigures(
                node,
                counts.get(node, 0),
                latest.get(node, 0) - before.get(node, 0),
                lost.get(node, 0),
                unknown.get(node, 0),
            )
            for node in counts.keys() | unknown.keys()
        )

    def _store(self, parts: Parts) -> StoreFigures:
        path, measure = str(parts.storage.database.path), parts.housekeeping.measure
        pressure = str(parts.housekeeping.pressure)
        if measure is None:
            return StoreFigures(path, pressure=pressure)
        return StoreFigures(
            path, measure.occupied, measure.used, measure.room, measure.limit, measure.reserve, pressure
        )

    def _named(self, now_ms: int, count: int) -> TenantFigures | None:
        if self._tops is None:
            return None
        found = []
        for index, meter in enumerate(self._parts.config().meter_list()):
            top = self._tops.top(index, now_ms, count)
            first = tuple((tenant, amount // meter.divisor) for tenant, amount in top.first)
            found.append(TopFigures(meter.name, meter.unit, first, top.rest // meter.divisor, top.tenants))
        return TenantFigures(max(self._tops.since_ms(now_ms), self._started_ms), tuple(found))


def _audited(nodes: Sequence[NodeAudit] | None) -> tuple[NodeAudit, ...] | None:
    return None if nodes is None else tuple(nodes)


def _rows(metrics: Metrics) -> dict[str, dict[str, int]]:
    return {
        "counted": {"": total(metrics.counted)},
        "skipped": by_label(metrics.skipped, "reason"),
        "invalid": by_label(metrics.invalid, "reason"),
        "held": by_label(metrics.unattributed, "reason"),
    }


def _outputs(
    config: Config, couriers: Sequence[Courier], found: Glance | None, now_ms: int
) -> tuple[OutputFigures, ...]:
    policies = {courier.settings.name: courier.policy for courier in couriers}
    stored = {one.name: one for one in found.outputs} if found else {}
    figures = []
    for output in config.outputs:
        policy, have = policies.get(output.name), stored.get(output.name)
        figures.append(
            OutputFigures(
                name=output.name,
                format=output.format,
                target=_target(output.url) if policy is not None and output.url else "",
                fates=have.fates if have else {},
                oldest_ms=have.oldest_ms if have else None,
                paused=policy.paused if policy else None,
                paused_ms=have.paused_ms if have and policy and policy.paused else None,
                failures=policy.failures if policy else 0,
                outcome=policy.outcome if policy else "",
                detail=policy.detail if policy else "",
                wait_ms=policy.wait_ms(now_ms) if policy else 0,
            )
        )
    return tuple(figures)


def _target(url: str) -> str:
    """Host and port of a url: the rest of it may hold what is secret."""
    parts = urlsplit(url)
    return f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"


def _week(config: Config, found: Glance | None) -> WeekFigures | None:
    if found is None:
        return None
    units = {meter.name: meter.unit for meter in config.meter_list()}
    return WeekFigures(found.week.end_ms, found.week.events, found.week.values, units)


def build_web(
    config: Config,
    metrics: Metrics,
    health: Callable[[], Health],
    refresh: Callable[[], None],
    page: Page,
    api: Mapping[str, Callable[[], object]],
) -> Web:
    """The HTTP port, with the page."""
    return Web(
        *split_address(config.listen.http),
        metrics=metrics,
        health=health,
        refresh=refresh,
        token=TokenFile(config.listen.http_token_file) if config.listen.http_token_file else None,
        page=page,
        tenants=config.listen.http_tenants,
        api=api,
    )


def settings(config: Config) -> tuple[tuple[str, str], ...]:
    """The part of a configuration that people ask for first, without a secret in it."""
    listen, windows, store = config.listen, config.windows, config.store
    flush = config.envoy.flush_interval
    secured = "TLS" if listen.tls else "plaintext"
    return (
        ("listen.grpc", f"{listen.grpc} ({secured}{', token' if listen.token_file else ''})"),
        ("listen.streams", listen.streams or "none"),
        ("listen.http", f"{listen.http} ({'token' if listen.http_token_file else 'no token'})"),
        ("envoy.flush_interval", "off" if flush is None else format_duration(flush)),
        ("tenant.rules", f"{len(config.tenant.rules)}, in order"),
        ("dimensions", ", ".join(config.dimensions) or "none"),
        ("meters", ", ".join(config.meters)),
        ("windows", f"{format_duration(windows.length)}, grace {format_duration(windows.grace)}"),
        ("store", f"{store.path}, at most {format_size(store.max_bytes)}"),
        ("outputs", ", ".join(f"{output.name} ({output.format})" for output in config.outputs)),
    )
