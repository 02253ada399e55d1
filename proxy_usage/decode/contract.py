"""What both folds are: the one that opens rows with protobuf, and the compiled one before it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from proxy_usage.decode.framing import Split, parts
from proxy_usage.decode.rows import DRAIN_ROWS, Drained
from proxy_usage.model import Origin


class Fold(ABC):
    """Folds messages into totals until it is drained. Not thread-safe."""

    @property
    @abstractmethod
    def full(self) -> bool:
        """Whether so much is held that the caller must drain before it folds on."""

    @abstractmethod
    def entries(self, origin: Origin, split: Split, now_ms: int) -> int:
        """Folds a part of a message and returns how many rows it had. Never raises on its bytes."""

    @abstractmethod
    def drains(self, limit: int = DRAIN_ROWS) -> Iterator[Drained]:
        """Hands over all that was folded since the last drain, and begins anew.

        What is handed over is fixed by the call itself, in a time that does not depend on how much it is;
        it comes in pieces of at most ``limit`` totals, each made when it is asked for. Everything but totals
        is in the first piece. A later piece may have an identity again.
        """

    def message(self, origin: Origin, raw: bytes, now_ms: int) -> int:
        """Folds a whole message and returns how many rows it had. Never raises on its bytes."""
        return sum(self.entries(origin, part, now_ms) for part in parts(raw))

    def drain(self) -> Drained:
        """All of ``drains`` in one."""
        pieces = self.drains()
        whole = next(pieces)
        for piece in pieces:
            for (identity, window_ms), totals in piece.totals.items():
                whole.add(identity, window_ms, totals)
        return whole
