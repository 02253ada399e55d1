"""Wire bytes in, totals out: pure, synchronous, without I/O or a clock of its own.

    raw message ─ parts ─▶ Split (rows still closed) ─ Fold.entries ─▶ totals per identity and window ─┐
        └─ read_identifier ─▶ Origin                         └─▶ StreamRow, where a row needs state ───┤
                                                                                  Drained ◀─ Fold.drain ┘

A caller counts ``len(split.entries)`` before it folds a part, and drains when ``Fold.full`` says so.

Hostile bytes never raise, with one exception: ``read_identifier`` raises ``DecodeError`` for an identifier
that cannot be read. A malformed row costs that row, a damaged message the rows behind the damage.
"""

from proxy_usage.decode.fold import Fold
from proxy_usage.decode.framing import (
    SLICE_BYTES,
    WHOLE_BYTES,
    Split,
    parts,
    read_identifier,
    slices,
    split,
    write_identifier,
)
from proxy_usage.decode.rows import (
    ConnectionRow,
    Drained,
    EnvoySettings,
    RowFate,
    Sighting,
    SkipTest,
    StreamRow,
)

__all__ = [
    "SLICE_BYTES",
    "WHOLE_BYTES",
    "ConnectionRow",
    "Drained",
    "EnvoySettings",
    "Fold",
    "RowFate",
    "Sighting",
    "SkipTest",
    "Split",
    "StreamRow",
    "parts",
    "read_identifier",
    "slices",
    "split",
    "write_identifier",
]
