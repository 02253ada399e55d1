"""Rows of connections and of what came over them, without a message around them."""

from proxy_usage.connections import SETTLE_MS, Connections, Share
from proxy_usage.decode import ConnectionRow, Sighting
from proxy_usage.model import NS_PER_MS, Identity, Key, Origin

HTTP = Origin("", "envoy-1", "http")
CONN = Origin("", "envoy-1", "conn")
START_MS = 1_795_303_800_000
START_NS = START_MS * NS_PER_MS
MS = NS_PER_MS
NOBODY = Identity(CONN, -1, b"", (), routed=False)


def key(tenant: str, region: str = "eu") -> Key:
    return Key(tenant, (region,))


def saw(
    connections: Connections,
    tenant: str | Key,
    conn_id: bytes = b"1",
    *,
    start_ns: int = START_NS + MS,
    origin: Origin = HTTP,
) -> None:
    sighting = Sighting(origin, conn_id, NOBODY)
    connections.saw(sighting, key(tenant) if isinstance(tenant, str) else tenant, start_ns)


def closed(
    connections: Connections,
    conn_id: bytes = b"1",
    *,
    open_ns: int = 1_000 * MS,
    start_ns: int = START_NS,
    origin: Origin = CONN,
    now_ms: int = START_MS,
    owner: Key | None = None,
) -> Share | None:
    row = ConnectionRow(origin, conn_id, start_ns, NOBODY, START_MS, open_ns, now_ms)
    return connections.closed(row, owner)


def shares(connections: Connections, waited_ms: int = SETTLE_MS) -> list[tuple[str | None, int]]:
    """Who gets how much."""
    due = connections.due(START_MS + waited_ms)
    return [(share.key.tenant if share.key else None, share.open_ns) for share in due]
