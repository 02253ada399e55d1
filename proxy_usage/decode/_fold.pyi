"""The compiled inner loop: see ``native/``. What it is not certain of it leaves to ``ProtobufFold``."""

from collections.abc import Callable, Iterator, Sequence
from typing import overload

DIGEST: str
"""``source_digest()`` of what this was built from."""

class Spans(Sequence[bytes]):
    """Rows of a message, still closed; each becomes bytes when it is asked for."""

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Spans: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[bytes]: ...

class Rows:
    """Sums that a walker gave away. ``len`` is how many are left."""

    def take(self, limit: int) -> list[tuple[int, int, int, bytes, tuple[bytes, ...], bool, list[int]]]:
        """``(source, window_ms, rule, value, dimensions, routed, [rows, *amounts])`` of the next ones."""

    def __len__(self) -> int: ...

class Walker:
    """Reads rows and adds them up."""

    rows: int
    """In the table."""
    answers: int
    """Of ``judge``, remembered; at most 131,072."""
    held_bytes: int
    """Of its rows."""
    allocated_bytes: int
    """Of the table as it was taken from the system."""

    def __new__(
        cls,
        fields: tuple[tuple[int, tuple[bytes, ...]], ...],
        rules: bytes,
        dimensions: bytes,
        columns: bytes,
        plain: int,
        judge: Callable[[int, bytes], bool],
        tests: tuple[tuple[int, frozenset[int] | None, bool, int, int, int, int], ...],
        window_ms: int,
        skew_ms: int,
        horizon_ms: int,
        finished_below_ns: int,
        secret: bytes,
        /,
    ) -> Walker:
        """``rules`` and ``dimensions`` are numbers of ``fields``, ``columns`` of sums, one byte each;
        ``plain`` has a bit for each rule that takes any text. Raises ValueError past its bounds."""

    def source(self, http: bytes, tcp: bytes, constants: tuple[bytes, ...], tests: int, /) -> int:
        """Makes a source of rows known until the next ``take``; its number. ValueError: one too many."""

    def fold(self, source: int, entries: Spans | list[bytes], http: int, now_ms: int, /) -> list[int] | None:
        """Adds rows up; the places of those that are left to be read with care."""

    def take(self) -> tuple[Rows, list[int], list[int], list[int]]:
        """All sums, rows by fate, notes, end rows of HTTP streams by source; and begins anew."""

def scan(
    raw: bytes, pos: int, inside: int, stop: int, size: int, rows: int, /
) -> tuple[Spans, int, int, int, int, int]:
    """The next rows of a message: ``(entries, http, pos, inside, stop, state)``.

    ``inside`` is the list of rows that ``pos`` is in (0, 2 or 3) and ``stop`` where that, or the message,
    ends. It pauses after ``size`` bytes or so many ``rows``. ``state`` is 0 for more, 1 at the end, 2 where
    what follows at ``pos`` is odd.
    """
