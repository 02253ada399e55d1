"""What the page is made of: one moment of a sink, as plain values that can be added up and sent elsewhere.

Times are milliseconds since the epoch, spans end in ``_ms``, sizes are bytes; amounts of meters are in the
unit that is billed. Text that others chose is here as it is; ``document`` makes it fit to be shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy_usage.page.ring import History
from proxy_usage.store.glance import DeadGroup, HeldGroup, HeldTop


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """One Envoy, by what it calls itself."""

    node: str
    read: int
    """Entries over the life of the store."""
    minute: int
    """Entries of the last minute."""
    lost: int = 0
    """Entries that were read and lost by crashes of this sink."""
    unknown: int = 0
    """How often nobody could say what a crash lost."""


@dataclass(frozen=True, slots=True)
class NodeAudit:
    """What an audit says of one Envoy since ``since_ms``. None: it cannot be known."""

    node: str
    state: str
    """``complete``, ``missing`` or ``unknown``."""
    since_ms: int
    written: int | None
    dropped: int | None
    flushed: int | None
    received: int | None
    missing: int | None
    lost: int | None


@dataclass(frozen=True, slots=True)
class OutputFigures:
    """One output. Counts are over the life of the store."""

    name: str
    format: str
    target: str
    """Host and port of its url; empty where nothing is sent."""
    fates: Mapping[str, int]
    """Events by fate, ``pending`` and ``dead`` among them."""
    oldest_ms: int | None = None
    """When the oldest event that is not settled was made."""
    paused: str | None = None
    paused_ms: int | None = None
    failures: int = 0
    """Attempts in a row that were not accepted."""
    outcome: str = ""
    """Why the last one was not."""
    detail: str = ""
    """The endpoint's words; they may name a tenant."""
    wait_ms: int = 0
    """Until the next attempt."""


@dataclass(frozen=True, slots=True)
class TopFigures:
    """One meter: who has most of it."""

    meter: str
    unit: str
    first: tuple[tuple[str, int], ...]
    rest: int
    tenants: int


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """All meters, and from when on they are counted."""

    since_ms: int
    meters: tuple[TopFigures, ...]


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """Sizes of the store; None before it was measured."""

    path: str
    occupied: int | None = None
    used: int | None = None
    room: int | None = None
    limit: int | None = None
    reserve: int | None = None
    pressure: str = "none"


@dataclass(frozen=True, slots=True)
class WeekFigures:
    """Hour by hour: events made and their values by meter. The last hour is the present one."""

    end_ms: int
    events: tuple[int, ...]
    values: Mapping[str, tuple[int, ...]]
    units: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of one sink, or of several added up."""

    now_ms: int
    started_ms: int
    version: str
    host: str
    config_file: str
    settings: tuple[tuple[str, str], ...]
    """What the configuration comes to, key by key: the few that matter here."""
    reasons: Mapping[str, str]
    """Why it is not ready."""
    store: StoreFigures
    figures_ms: int | None
    """When the store was last looked into; None: not yet."""
    store_error: str = ""
    """Why it could not be, last."""
    config_error: str = ""
    asides: int = 0
    """Damaged stores that lie beside this one."""
    remarks: tuple[str, ...] = ()
    crash_lost: Mapping[str, int] = field(default_factory=dict)
    """Entries per node that the crash before this start lost."""
    crash_unknown: int = 0
    """Nodes of which nobody can say."""
    nodes: tuple[NodeFigures, ...] = ()
    minute_ms: int = 0
    """What "the last minute" of the nodes is: less than one after a start."""
    connections: int = 0
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Entries since the start by fate (``counted``, ``skipped``, ``invalid``) and reason."""
    windows: int = 0
    window_ms: int = 60_000
    tenants_seen: int = 0
    checkpoint_age_ms: int = 0
    outputs: tuple[OutputFigures, ...] = ()
    dead: tuple[DeadGroup, ...] = ()
    dead_partial: bool = False
    """There are more dead letters than were looked at."""
    held: tuple[HeldGroup, ...] = ()
    held_partial: bool = False
    held_top: tuple[HeldTop, ...] = ()
    tenants: TenantFigures | None = None
    """None: they are not to be named."""
    audit: tuple[NodeAudit, ...] | None = None
    """None: no audit is set up."""
    history: History = field(default_factory=lambda: History(None, {}))
    week: WeekFigures | None = None
    since: Mapping[str, int] = field(default_factory=dict)
    """When a problem was first seen, by its key."""
    workers: tuple[WorkerFigures, ...] = ()
    """Those that it was added up of; empty: it is of one process."""


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One of several workers, as their supervisor knows it."""

    number: int
    said: Snapshot | None
    """What it said last; None: nothing yet."""
    silent: str = ""
    """Why it does not answer; empty: it does."""
    since_ms: int | None = None
    """When it answered last; None: never."""
