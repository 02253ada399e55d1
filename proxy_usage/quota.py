"""How many different identities a node may bring, so that one that invents them crowds out nobody else."""

from __future__ import annotations

from proxy_usage.model import Identity, Origin

HOUR_MS = 3_600_000
MAX_TRACKED = 1_000_000
"""Identities remembered of all nodes together: past it all are forgotten, and counting begins anew."""
MAX_IDENTITY_BYTES = 16_384
MAX_KEPT_BYTES = 1_024
"""Of each value of an identity that has more than ``MAX_IDENTITY_BYTES``, when it is held."""


class Quota:
    """Distinct identities per node, as its peer names it, within an hour.

    An identity is remembered by its hash: two that share one count as one, which nobody can bring about,
    since hashes of bytes differ from process to process.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._hour = 0
        self._tracked = 0
        self._seen: dict[tuple[str, str], set[int]] = {}

    def admits(self, identity: Identity, now_ms: int) -> bool:
        """Whether the identity is known in this hour, or its node may bring another one."""
        hour = now_ms // HOUR_MS
        if hour != self._hour or self._tracked >= MAX_TRACKED:
            self._hour, self._tracked = hour, 0
            self._seen.clear()
        place = identity.origin.peer, identity.origin.node_id
        seen = self._seen.get(place)
        if seen is None:
            seen = self._seen[place] = set()
        digest = hash(identity)
        if digest in seen:
            return True
        if len(seen) >= self._limit:
            return False
        seen.add(digest)
        self._tracked += 1
        return True


def overflow(identity: Identity) -> Identity:
    """Stands for all identities of a node past its quota."""
    return Identity(Origin("", identity.origin.node_id, ""), -1, b"", (), routed=False)


def trimmed(identity: Identity) -> Identity:
    """The identity, or what can be kept of one whose values are a client's novel."""
    if len(identity.value) + sum(map(len, identity.dimensions)) <= MAX_IDENTITY_BYTES:
        return identity
    return identity._replace(
        value=identity.value[:MAX_KEPT_BYTES],
        dimensions=tuple(value[:MAX_KEPT_BYTES] for value in identity.dimensions),
    )
