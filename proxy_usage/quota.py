"""How many different identities a node may bring, so that one that invents them crowds out nobody else."""

from __future__ import annotations

from proxy_usage.model import Identity, Origin

HOUR_MS = 3_600_000
MAX_TRACKED = 1_000_000
"""Identities remembered of all nodes together: past it all are forgotten, and counting begins anew."""
SETS = 256
"""A power of two: at ``MAX_TRACKED`` each has 4,000."""
LET_GO = 20
"""Forgotten identities that are freed at each look at another one."""
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
        self._brought: dict[tuple[str, str], int] = {}  # so many, by peer and node
        # Many small sets, since a large one that is full is copied in one go; and always the same ones, since
        # the collector walks what is new.
        self._seen: list[set[int]] = [set() for _ in range(SETS)]
        self._former: list[set[int]] = [set() for _ in range(SETS)]
        self._forgotten = 0  # so many are left in the former, and let go a little at a time
        self._letting_go = 0  # the set that they are taken from

    def admits(self, identity: Identity, digest: int, now_ms: int) -> bool:
        """Whether the identity, with this hash, is known in this hour, or its node may bring another one."""
        hour = now_ms // HOUR_MS
        if hour != self._hour or self._tracked >= MAX_TRACKED:
            self._hour, self._brought = hour, {}
            self._begin_anew()
        if self._forgotten:
            self._let_go()
        seen = self._seen[digest & (SETS - 1)]
        if digest in seen:
            return True
        place = identity.origin.peer, identity.origin.node_id
        brought = self._brought.get(place, 0)
        if brought >= self._limit:
            return False
        self._brought[place] = brought + 1
        seen.add(digest)
        self._tracked += 1
        return True

    def _begin_anew(self) -> None:
        if self._forgotten:  # an hour in which hardly anything came after one that brought very many
            for former in self._former:
                former.clear()
        self._seen, self._former = self._former, self._seen
        self._forgotten, self._letting_go, self._tracked = self._tracked, 0, 0

    def _let_go(self) -> None:
        """Frees a little of what was forgotten: all of it takes long."""
        while not (former := self._former[self._letting_go]):
            self._letting_go += 1
        for _ in range(min(LET_GO, len(former))):
            former.pop()
            self._forgotten -= 1


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
