"""Durations, sizes and moments as people write them, to integers and back.

Durations are whole milliseconds (``250ms``, ``30s``, ``1h30m``, ``29d``), sizes whole bytes (``64MiB``,
``500kB``, ``1048576``). Fractions and signs are refused: ``1.5h`` is written ``1h30m``, and nothing here may
round.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DURATION_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_SIZE_UNITS = {
    "TiB": 1 << 40,
    "GiB": 1 << 30,
    "MiB": 1 << 20,
    "KiB": 1 << 10,
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "kB": 10**3,
    "B": 1,
}
_MAX = (1 << 63) - 1

# Each unit at most once and in falling order, so that a slip such as 5m3h is not read as something meant.
DURATION_PATTERN = r"^(?=\d)(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?$"
SIZE_PATTERN = r"^\d+\s?(TiB|GiB|MiB|KiB|TB|GB|MB|kB|B)?$"

_DURATION = re.compile(DURATION_PATTERN, re.ASCII)
_DURATION_PART = re.compile(r"(\d+)(d|h|ms|m|s)", re.ASCII)
_SIZE = re.compile(r"^(\d+)\s?([A-Za-z]*)$", re.ASCII)

DURATION_HELP = "write a whole number with its unit: 250ms, 30s, 5m, 29d, or combined as 1h30m"
SIZE_HELP = "write whole bytes or a unit: 1048576, 500kB, 64MiB, 8GiB"


def parse_duration(text: object) -> int:
    """Milliseconds of a duration such as ``1h30m``.

    Raises ValueError, saying what is wrong, for anything that is not text of that form.
    """
    value = _text(text, "duration")
    if not _DURATION.match(value):
        raise ValueError(_why_not(value, "duration"))
    total = sum(int(number) * _DURATION_UNITS[unit] for number, unit in _DURATION_PART.findall(value))
    if total > _MAX:
        raise ValueError(f"{value!r} is longer than can be counted")
    return total


def parse_size(text: object) -> int:
    """Bytes of a size such as ``64MiB`` or a plain whole number.

    Raises ValueError, saying what is wrong, for anything else.
    """
    value = _text(text, "size")
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(_why_not(value, "size"))
    number, unit = match.groups()
    if unit and unit not in _SIZE_UNITS:
        raise ValueError(f"unit {unit!r} is not known{_unit_meant(unit)}")
    total = int(number) * _SIZE_UNITS[unit or "B"]
    if total > _MAX:
        raise ValueError(f"{value!r} is more than can be counted")
    return total


def parse_instant(text: str) -> int:
    """Milliseconds since the epoch of an RFC 3339 time with a zone; what is finer is cut off.

    Raises ValueError, saying what is wrong, for anything else.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a time") from None
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no zone")
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def format_duration(ms: int) -> str:
    """The shortest text that ``parse_duration`` reads back as ``ms``: 5400000 is ``1h30m``."""
    parts = []
    for unit, factor in _DURATION_UNITS.items():
        count, ms = divmod(ms, factor)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def format_size(size: int) -> str | int:
    """Text in the largest unit that divides ``size``, or the number itself where none does."""
    for unit, factor in _SIZE_UNITS.items():
        if size and size % factor == 0 and factor > 1:
            return f"{size // factor}{unit}"
    return size


def _text(value: object, noun: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"is not a {noun}")  # noqa: TRY004 - a wrong value in a file, like all others
    return str(value).strip()


def _why_not(value: str, noun: str) -> str:
    if value.startswith("-"):
        return f"negative {noun}s do not exist"
    if re.match(r"^\d+[.,]\d", value):
        return f"{value!r} is not a whole number{' with a unit' if noun == 'duration' else ''}"
    if noun == "duration" and value.isdecimal():
        return f"{value!r} has no unit"
    return f"{value!r} is not a {noun}"


def _unit_meant(unit: str) -> str:
    """Names the unit that differs in case only: ``mb`` is not guessed, but the way out is shown."""
    for known in _SIZE_UNITS:
        if known.lower() in (unit.lower(), f"{unit.lower()}b", f"{unit.lower()}ib"):
            return f" (did you mean {known}?)"
    return ""
