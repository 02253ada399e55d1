"""How verbs answer: tables for people, plain where no person looks, and JSON with stable keys.

Text that came from clients is shown with its control characters escaped: a terminal obeys some of them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from proxy_usage.events import rfc3339
from proxy_usage.page.names import visible

Cell = str | int | None


def emit(value: object) -> None:
    """Prints JSON: dataclasses and named tuples as objects, integers as integers, in ASCII."""
    print(json.dumps(plain(value), indent=2))


def plain(value: Any) -> Any:
    """What JSON can hold of a value; bytes as text, undecodable ones escaped."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return lossy(value) if isinstance(value, bytes) else value


def lossy(raw: bytes) -> str:
    """Bytes as text; what is not UTF-8 appears as ``\\xff``."""
    return raw.decode("utf-8", "backslashreplace")


def safe(text: str) -> str:
    """Text without anything that a terminal would obey or that would break a line."""
    return visible(text)


def moment(time_ms: int | None) -> str:
    """A time as RFC 3339, or a dash."""
    return "-" if time_ms is None else rfc3339(time_ms)


def size(count: int) -> str:
    """Bytes in the largest unit of which there are at least ten, rounded down."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >> shift >= 10:
            return f"{count >> shift} {unit}"
    return f"{count} B"


def facts(pairs: Iterable[tuple[str, Cell]]) -> None:
    """Prints names and values, a line each; what is None is left out."""
    lines = [(name, _text(value)) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        print(f"{name:<{width}}  {value}".rstrip())


def table(rows: Iterable[Mapping[str, Cell]], *, empty: str = "") -> None:
    """Prints rows by column, or ``empty`` when there are none. Numbers are to the right, None is a dash.

    All rows have the columns of the first.
    """
    lines = list(rows)
    if not lines:
        if empty:
            print(empty)
        return
    names = list(lines[0])
    numeric = [all(not isinstance(line[name], str) for line in lines) for name in names]
    texts = [[_text(line[name]) for name in names] for line in lines]
    if sys.stdout.isatty():
        _rich(names, texts, numeric)
        return
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    for printed in (names, *texts):
        cells = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(printed, widths, numeric, strict=True)
        )
        print("  ".join(cells).rstrip())


def _rich(names: Iterable[str], texts: Iterable[Sequence[str]], numeric: Iterable[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, right in zip(names, numeric, strict=True):
        drawn.add_column(name, justify="right" if right else "left", overflow="fold")
    for line in texts:
        drawn.add_row(*(Text(text) for text in line))
    Console().print(drawn)


def _text(cell: Cell) -> str:
    return "-" if cell is None else safe(cell) if isinstance(cell, str) else str(cell)
