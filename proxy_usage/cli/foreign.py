"""Files of other systems, read piece by piece: CloudEvents, and sums as CSV."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from proxy_usage.errors import UsageError

PIECE = 1 << 20
"""Characters read at once, and the most that one event may take."""
COLUMNS = ["tenant", "meter", "value"]

_GAP = re.compile(r"[\s,]*")
_VALUE = re.compile(r"-?[0-9]{1,38}")


class Sum(NamedTuple):
    """A line of a CSV file, and where it stands."""

    tenant: str
    meter: str
    value: int
    place: str


def events(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON array, or a JSON object a line; ``-`` is standard input.

    Raises:
        UsageError: the file cannot be read, ends early, or holds anything else.
    """
    with _opened(path) as file:
        yield from _objects(file, str(path))


def sums(path: Path) -> Iterator[Sum]:
    """The lines of a CSV file, with or without a heading; ``-`` is standard input.

    Raises:
        UsageError: the file cannot be read, or a line is not tenant, meter and a whole number.
    """
    with _opened(path) as file:
        lines = csv.reader(file, strict=True)
        try:
            for cells in lines:
                place = f"{path}:{lines.line_num}"
                if not cells or (lines.line_num == 1 and [cell.strip().lower() for cell in cells] == COLUMNS):
                    continue
                yield _sum(cells, place)
        except csv.Error as error:
            raise UsageError(f"{path}:{lines.line_num}: {error}", hint="write tenant,meter,value") from None


def _sum(cells: list[str], place: str) -> Sum:
    stripped = [cell.strip() for cell in cells]
    if len(stripped) != len(COLUMNS) or not stripped[0] or not _VALUE.fullmatch(stripped[2]):
        raise UsageError(
            f"{place}: {','.join(cells)!r} is no sum", hint="write tenant,meter,value with a whole number"
        )
    return Sum(stripped[0], stripped[1], int(stripped[2]), place)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        if str(path) == "-":
            yield io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield file
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="name a file, or -") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8: {error.reason}", hint="convert it to UTF-8") from None


def _objects(file: TextIO, name: str) -> Iterator[Mapping[str, Any]]:
    decode = json.JSONDecoder().raw_decode
    text, at, number = "", 0, 0
    more, inside, closed = True, False, False
    while True:
        at = _end_of_gap(text, at)
        if at == len(text) and not more:
            break
        if at < len(text) and number == 0 and not (inside or closed) and text[at] == "[":
            inside, at = True, at + 1
            continue
        if at < len(text) and inside and text[at] == "]":
            inside, closed, at = False, True, at + 1
            continue
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            if not more or len(text) - at > PIECE or isinstance(error, RecursionError):
                raise _no_event(name, number + 1) from None
            piece = file.read(PIECE)
            more = bool(piece)
            text, at = text[at:] + piece, 0
            continue
        number += 1
        if closed or not isinstance(value, dict):
            raise _no_event(name, number)
        yield value
        at = end
    if inside:
        raise UsageError(f"{name} ends within its array", hint="the file is not complete: get it again")


def _end_of_gap(text: str, at: int) -> int:
    gap = _GAP.match(text, at)
    return at if gap is None else gap.end()


def _no_event(name: str, number: int) -> UsageError:
    return UsageError(
        f"{name}: event {number} is no JSON object",
        hint="give one JSON array of CloudEvents, or one a line, each below 1 MiB; a file that was cut "
        "ends so, too",
    )
