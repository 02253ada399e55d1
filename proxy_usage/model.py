"""The nouns of the pipeline, in the order in which usage flows through them.

    Origin ─ who sent a row         Field ─ what a rule reads       Meter ─ what is summed
       └──────────── Identity ◀── decode folds rows into ──▶ Totals
                        │ attribution
                     Key (tenant, dimensions)  or  Unattributed (reason)
                        │ windows
                     Cell (one key in one window) ─ closing ─▶ Event

Everything here is immutable and holds integers only: no float ever touches an amount.
Times are milliseconds since the Unix epoch (``*_ms``) or nanoseconds (``*_ns``), sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

NS_PER_MS = 1_000_000
NS_PER_SECOND = 1_000_000_000

MAX_BYTES = 1 << 60
"""A row that claims this many bytes or more is invalid (design: "What counts")."""
MAX_DURATION_NS = 400 * 86_400 * NS_PER_SECOND
"""A row that claims to have lasted longer is invalid."""
MAX_EVENT_VALUE = (1 << 63) - 1
"""``data.value`` is decoded as an int64 by the endpoint's consumer."""

Amounts = tuple[int, ...]
"""One non-negative integer per configured meter, in the meters' order and base unit."""


class Quantity(StrEnum):
    """The integers a row offers to be summed. A new source of a meter is added here and in decode."""

    REQUESTS = "requests"  # 1 per downstream HTTP end row
    WIRE_IN = "wire_in"  # bytes the client sent, as counted on its socket
    WIRE_OUT = "wire_out"  # bytes the client was sent
    BODY_IN = "body_in"  # bytes of the request body alone
    BODY_OUT = "body_out"  # bytes of the response body alone
    OPEN_NS = "open_ns"  # nanoseconds the stream (or TCP connection) was open
    UPGRADED_NS = "upgraded_ns"  # the same, of upgraded streams (101), CONNECT tunnels and TCP alone
    CONNECTION_NS = "connection_ns"  # nanoseconds a client's connection was held open, from listener rows


@dataclass(frozen=True, slots=True)
class Meter:
    """A billable signal: which integer of a row is summed and how the sum becomes a value.

    ``value = sum // divisor``; ``sum % divisor`` is carried to the key's next window.
    """

    name: str
    """Name in the configuration, e.g. ``connection_seconds``."""
    type: str
    """CloudEvents type, which is the meter name in the service catalog."""
    unit: str
    """UCUM unit as the catalog declares it: ``{request}``, ``By``, ``s``."""
    quantity: Quantity
    divisor: int = 1
    """Base units in one value: 1, or 10^9 for nanoseconds that are billed as seconds."""


class Origin(NamedTuple):
    """Where a row came from: known per gRPC stream, from its first message and its connection."""

    peer: str
    """Authenticated name of the peer, or ``""`` on a plaintext listener."""
    node_id: str
    log_name: str
    node: tuple[str, ...] = ()
    """Values of the node paths that the configuration reads (``FoldPlan.node_paths``), in its order."""
    host: str = ""
    """Address that the stream came from: Envoys that claim the same node id are told apart by it."""


class FieldKind(StrEnum):
    """Where a rule or a dimension reads its value from."""

    CUSTOM_TAG = "custom_tag"
    DYNAMIC_METADATA = "dynamic_metadata"
    REQUEST_HEADER = "request_header"
    ROUTE_NAME = "route_name"
    AUTHORITY = "authority"
    SNI = "sni"
    NODE = "node"
    LITERAL = "literal"


class Field(NamedTuple):
    """One readable field: its kind and what names it within the row.

    ``path`` is ``(tag,)`` for a custom tag, ``(filter, key, …)`` for dynamic metadata, ``(header,)`` in
    lower case for a request header, ``("locality", "region")`` for a node, ``(text,)`` for a literal and
    empty for the rest.
    """

    kind: FieldKind
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind.value}:{'.'.join(self.path)}" if self.path else self.kind.value


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What decode must read from a row: all that attribution will ask for, and nothing more."""

    rules: tuple[Field, ...]
    """The fields of the tenant rules, in the order of the rules."""
    dimensions: tuple[Field, ...]
    """The distinct fields that the dimensions read. Node and literal fields are in ``Origin``, not here."""
    node_paths: tuple[tuple[str, ...], ...]
    """The node paths that rules and dimensions read, e.g. ``(("locality", "region"),)``."""
    quantities: tuple[Quantity, ...]
    """What to add up, one per meter, in the meters' order."""
    window_ms: int
    """Length of a window; divides an hour."""
    max_skew_ms: int
    late_horizon_ms: int


class Identity(NamedTuple):
    """What rows must have in common to be attributed alike: the unit in which decode folds.

    Only the rule that matched contributes a value, so that a field no rule needed (a header the client
    chose, say) never multiplies identities.
    """

    origin: Origin
    rule: int
    """Index of the rule that matched. When none did, ``~index`` (below 0) of the first with a value."""
    value: bytes
    """The raw value of that rule's field; empty when no rule's field was present."""
    dimensions: tuple[bytes, ...]
    """Raw values of ``FoldPlan.dimensions``; ``b""`` where absent."""
    routed: bool
    """Whether the row names a route: rows without one are what ``tenant.no_route`` is about."""


class Key(NamedTuple):
    """Whom and what usage is billed to: the unit of windows, remainders and events."""

    tenant: str
    dimensions: tuple[str, ...]
    """Values in the order of the configured dimensions."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One key's usage in one window, as it is handed to the store to be closed or saved.

    ``id`` names the cell for as long as it is open, also across restarts: a checkpoint stores cells by it.
    """

    id: int
    window_ms: int
    """Start of the window."""
    key: Key
    rows: int
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Event:
    """A billable event, minted once: ``body`` is what is sent, now and at every resend."""

    id: str
    """ULID, 26 characters."""
    meter: int
    """Index of the meter in the configured order."""
    window_ms: int
    time_ms: int
    """The CloudEvents ``time``: last millisecond of the window."""
    value: int
    """1 … 2^63-1, in the meter's unit."""
    body: bytes
    """The CloudEvent as JSON, UTF-8."""
