"""Connection time: a client's connection, known at its close, belongs to those whose requests it carried.

A listener row says how long a connection was held open and rarely says for whom. The rows of its requests do,
on other log streams, before or after it:

    request rows ──sighting──▶ tenants of the connection ─┐
                                                          ├─▶ equal shares, a tenant each
    listener row ──waits: 3 s, or 30 s while nobody ──────┘   nobody: held
                          is known

Connection ids begin at 1 again when an Envoy restarts: a tenant counts only if he had streams while the
connection was open. Tenants and waiting rows are part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

from proxy_usage.decode import ConnectionRow, Sighting
from proxy_usage.model import NS_PER_MS, Identity, Key, Origin

SETTLE_MS = 3_000
"""How long a row whose tenants are known waits for more: rows of one connection come on several streams."""
WAIT_MS = 30_000
"""How long a row waits for a first tenant."""
SLACK_NS = 100 * NS_PER_MS
"""A stream's start and its connection's are taken by different parts of Envoy. An Envoy that restarts takes
longer."""
MOVES = 1_024
"""Rows that one look settles at the most."""
DIGEST = 16


class Tie(NamedTuple):
    """A tenant's key has used a connection, by streams that began from ``first_ns`` to ``last_ns``."""

    connection: bytes
    key: Key
    first_ns: int
    last_ns: int


class Waiting(NamedTuple):
    """A listener row whose time is not booked yet."""

    number: int
    connection: bytes
    start_ns: int
    identity: Identity
    window_ms: int
    open_ns: int
    since_ms: int


class Share(NamedTuple):
    """A tenant's part of a connection's time; without a key it is nobody's."""

    key: Key | None
    identity: Identity
    window_ms: int
    open_ns: int
    last: bool
    """Whether the row is settled with it: one row has several shares."""


class ConnectionTurn(NamedTuple):
    """What one turn saves of the connections."""

    tied: tuple[Tie, ...]
    untied: tuple[bytes, ...]
    waiting: tuple[Waiting, ...]
    settled: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the turn has nothing to save."""
        return not any(self)


class SavedConnections(NamedTuple):
    """The connections as the last turn of a former process left them."""

    ties: tuple[Tie, ...] = ()
    waiting: tuple[Waiting, ...] = ()


class Connections:
    """Who used which connection, and the listener rows that wait.

    Args:
        limit: connections remembered at the most; past it the oldest is forgotten. As many rows may wait;
            past it the oldest is settled at once.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._ties: dict[bytes, dict[Key, tuple[int, int]]] = {}
        # Rows by number, oldest first, in one of two places.
        self._young: dict[int, Waiting] = {}
        self._ownerless: dict[int, Waiting] = {}
        self._awaited: dict[bytes, set[int]] = {}  # connection → its rows in _ownerless
        self._found: dict[int, None] = {}  # rows in _ownerless whose connection was seen since
        self._next = 1
        self._tied: dict[tuple[bytes, Key], tuple[int, int]] = {}
        self._untied: set[bytes] = set()
        self._new: dict[int, Waiting] = {}
        self._settled: set[int] = set()

    def __len__(self) -> int:
        return len(self._ties)

    def __repr__(self) -> str:
        return f"<Connections {len(self._ties)} waiting={len(self._young) + len(self._ownerless)}>"

    def saw(self, sighting: Sighting, key: Key, start_ns: int) -> None:
        """Rows of a key came over a connection, of a stream that began at ``start_ns``."""
        if not sighting.conn_id:
            return
        connection = _digest(sighting.origin, sighting.conn_id)
        ties = self._ties.get(connection)
        if ties is None:
            if len(self._ties) >= self._limit:
                self._untie(next(iter(self._ties)), before_ns=None)
            ties = self._ties[connection] = {}
        first_ns, last_ns = ties.get(key, (start_ns, start_ns))
        span = min(first_ns, start_ns), max(last_ns, start_ns)
        if ties.get(key) != span:
            ties[key] = self._tied[connection, key] = span
        self._found.update(dict.fromkeys(sorted(self._awaited.get(connection, ()))))

    def closed(self, row: ConnectionRow, owner: Key | None = None) -> Share | None:
        """A connection was closed.

        Args:
            owner: whom its row names itself. Without one the row waits until ``due`` settles it.

        Returns: the owner's share.
        """
        connection = _digest(row.origin, row.conn_id) if row.conn_id else b""
        waiting = Waiting(
            self._next, connection, row.start_ns, row.identity, row.window_ms, row.open_ns, row.now_ms
        )
        if owner is not None:
            self._untie(connection, before_ns=_end_ns(waiting))
            return Share(owner, row.identity, row.window_ms, row.open_ns, last=True)
        self._next += 1
        self._young[waiting.number] = self._new[waiting.number] = waiting
        return None

    def due(self, now_ms: int) -> list[Share]:
        """Settles rows that waited long enough: equal whole shares, what is left to the first by name."""
        shares: list[Share] = []
        moves = 0
        while self._young and moves < MOVES:
            waiting = next(iter(self._young.values()))
            crowded = len(self._young) > self._limit
            if now_ms - waiting.since_ms < SETTLE_MS and not crowded:
                break
            del self._young[waiting.number]
            moves += 1
            if crowded or self._owners(waiting) or not waiting.connection:
                shares.extend(self._settle(waiting))
            else:
                self._ownerless[waiting.number] = waiting
                self._awaited.setdefault(waiting.connection, set()).add(waiting.number)
        while self._found and moves < MOVES:
            waiting = self._ownerless[next(iter(self._found))]
            del self._found[waiting.number]
            moves += 1
            if self._owners(waiting):
                self._disown(waiting)
                shares.extend(self._settle(waiting))
        while self._ownerless and moves < MOVES:
            waiting = next(iter(self._ownerless.values()))
            crowded = len(self._young) + len(self._ownerless) > self._limit
            if now_ms - waiting.since_ms < WAIT_MS and not crowded:
                break
            moves += 1
            self._disown(waiting)
            shares.extend(self._settle(waiting))
        return shares

    def begin(self) -> ConnectionTurn:
        """What changed since the last turn. ``rollback`` must follow if it does not become durable."""
        turn = ConnectionTurn(
            tied=tuple(Tie(connection, key, *span) for (connection, key), span in self._tied.items()),
            untied=tuple(self._untied),
            waiting=tuple(self._new.values()),
            settled=tuple(self._settled),
        )
        self._tied, self._untied, self._new, self._settled = {}, set(), {}, set()
        return turn

    def rollback(self, turn: ConnectionTurn) -> None:
        """The turn did not become durable: the next one holds it again."""
        for tie in turn.tied:
            if tie.key in self._ties.get(tie.connection, {}):
                self._tied.setdefault((tie.connection, tie.key), (tie.first_ns, tie.last_ns))
        # A connection that has ties again since then loses the former ones first, then gets these.
        self._untied.update(turn.untied)
        waiting = (row for row in turn.waiting if row.number in self._young or row.number in self._ownerless)
        self._new.update((row.number, row) for row in waiting)
        self._settled.update(turn.settled)

    def restore(self, saved: SavedConnections) -> None:
        """Takes over what a former process saved."""
        for tie in saved.ties:
            self._ties.setdefault(tie.connection, {})[tie.key] = tie.first_ns, tie.last_ns
        for waiting in saved.waiting:
            self._young[waiting.number] = waiting
            self._next = max(self._next, waiting.number + 1)

    def _owners(self, waiting: Waiting) -> list[Key]:
        """One key per tenant, by name; of several keys of a tenant, the first."""
        ties = self._ties.get(waiting.connection, {})
        owners: dict[str, Key] = {}
        for key in sorted(ties):
            first_ns, last_ns = ties[key]
            if last_ns >= waiting.start_ns - SLACK_NS and first_ns <= _end_ns(waiting):
                owners.setdefault(key.tenant, key)
        return list(owners.values())

    def _settle(self, waiting: Waiting) -> Iterator[Share]:
        owners = self._owners(waiting)
        if self._new.pop(waiting.number, None) is None:
            self._settled.add(waiting.number)
        self._untie(waiting.connection, before_ns=_end_ns(waiting))
        if not owners:
            yield Share(None, waiting.identity, waiting.window_ms, waiting.open_ns, last=True)
            return
        part, left = divmod(waiting.open_ns, len(owners))
        for place, key in enumerate(owners):
            share_ns = part + left if place == 0 else part
            yield Share(key, waiting.identity, waiting.window_ms, share_ns, last=place == len(owners) - 1)

    def _disown(self, waiting: Waiting) -> None:
        """Takes a row off those that nobody owns."""
        del self._ownerless[waiting.number]
        self._found.pop(waiting.number, None)
        awaited = self._awaited[waiting.connection]
        awaited.discard(waiting.number)
        if not awaited:
            del self._awaited[waiting.connection]

    def _untie(self, connection: bytes, before_ns: int | None) -> None:
        """Forgets who used a connection; not those who began later, on the next one of its number."""
        ties = self._ties.pop(connection, None)
        if ties is None:
            return
        self._untied.add(connection)
        for key, (first_ns, last_ns) in ties.items():
            self._tied.pop((connection, key), None)
            if before_ns is not None and last_ns > before_ns:
                span = max(first_ns, before_ns), last_ns
                self._ties.setdefault(connection, {})[key] = self._tied[connection, key] = span


def _end_ns(waiting: Waiting) -> int:
    return waiting.start_ns + waiting.open_ns + SLACK_NS


def _digest(origin: Origin, conn_id: bytes) -> bytes:
    """16 bytes that stand for a connection of an Envoy; two with one node id are told apart by address."""
    text = blake2b(digest_size=DIGEST)
    for part in (origin.peer.encode(), origin.host.encode(), origin.node_id.encode(), conn_id):
        text.update(len(part).to_bytes(4, "big"))
        text.update(part)
    return text.digest()
