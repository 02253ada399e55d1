"""Wire bytes in, totals out: pure, synchronous, without I/O or a clock of its own.

    raw message ─ parts ─▶ Split (rows still closed) ─ Fold.entries ─▶ totals per identity and window ─┐
        └─ read_identifier ─▶ Origin                         └─▶ StreamRow, where a row needs state ───┤
                                                                                  Drained ◀─ Fold.drain ┘

A caller counts ``len(split.entries)`` before it folds a part, and drains when ``Fold.full`` says so. There
are two folds, ``ProtobufFold`` and ``CompiledFold``; ``CHOICE`` says which of them runs, and why.

Hostile bytes never raise, with one exception: ``read_identifier`` raises ``DecodeError`` for an identifier
that cannot be read. A malformed row costs that row, a damaged message the rows behind the damage.
"""

from proxy_usage.decode.choice import CHOICE, Choice
from proxy_usage.decode.contract import Fold
from proxy_usage.decode.folding import new_fold
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
    DRAIN_ROWS,
    ConnectionRow,
    Drained,
    EnvoySettings,
    RowFate,
    Sighting,
    SkipTest,
    StreamRow,
)

__all__ = [
    "CHOICE",
    "DRAIN_ROWS",
    "SLICE_BYTES",
    "WHOLE_BYTES",
    "Choice",
    "ConnectionRow",
    "Drained",
    "EnvoySettings",
    "Fold",
    "RowFate",
    "Sighting",
    "SkipTest",
    "Split",
    "StreamRow",
    "new_fold",
    "parts",
    "read_identifier",
    "slices",
    "split",
    "write_identifier",
]
