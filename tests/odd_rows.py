"""Rows that no Envoy sends and anybody may: the schema followed, with every liberty that the wire takes.

A row is written from a seed: known fields in any order, repeated, of another wire type, with numbers longer
than need be, negative or huge; unknown fields and groups between them; broken off now and then.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from wire import START_NS, varint

NUMBER, BOOL, TEXT = "number", "bool", "text"
TIME: Mapping[int, Any] = {1: "seconds", 2: "nanos"}
DURATION: Mapping[int, Any] = {1: "open", 2: "nanos"}
FLAGS: Mapping[int, Any] = {**dict.fromkeys((4, 9, 12, 15, 28), BOOL), 13: {}}
COMMON: Mapping[int, Any] = {
    4: {3: TEXT},
    5: TIME,
    6: DURATION,
    8: DURATION,
    12: DURATION,
    15: TEXT,
    16: FLAGS,
    17: "metadata",
    19: TEXT,
    22: "entry",
    23: DURATION,
    26: TEXT,
    27: BOOL,
    29: NUMBER,
    30: NUMBER,
    33: "type",
}
REQUEST: Mapping[int, Any] = {1: "method", 3: TEXT, 5: TEXT, 12: NUMBER, 13: "entry"}
RESPONSE: Mapping[int, Any] = {1: {1: "status"}, 3: NUMBER, 6: "details"}
HTTP_ROW: Mapping[int, Any] = {1: COMMON, 2: NUMBER, 3: REQUEST, 4: RESPONSE}
TCP_ROW: Mapping[int, Any] = {1: COMMON, 2: {1: NUMBER, 2: NUMBER}}

TEXTS = (b"", b"-", b"alpha", b"beta", b"web", b"\xff\xfe", b"x" * 239, b"x" * 240, b"x" * 300, b"y" * 5_000)
KEYS = (
    b"project_name",
    b"vhost_project",
    b"region",
    b"x-project",
    b"conn_id",
    b"dur_ms",
    b"emit_us",
    b"",
    b"k",
)
NUMBERS = (0, 1, 5, 127, 128, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 60) - 1, 1 << 60, (1 << 63) - 1, 1 << 63)
NEGATIVE = (1 << 64) - 1
LATE_S = START_NS // 1_000_000_000
CHOICES: Mapping[str, tuple[int, ...]] = {
    "bool": (0, 1, 1, 2),
    "type": (6, 6, 6, 6, 3, 3, 0, 2, 4, 5, 7, 11, 14, 99, NEGATIVE),
    "method": (0, 1, 2, 6, 9, 10, 77, NEGATIVE),
    "status": (0, 101, 200, 200, 204, 404, 1 << 40),
    "seconds": (LATE_S, LATE_S, LATE_S, LATE_S + 40, LATE_S + 400, LATE_S + 90_000, 0, 5, 1 << 62, NEGATIVE),
    "open": (0, 0, 1, 30, 54, 61, 400 * 86_400, 1 << 40, NEGATIVE),
    "nanos": (0, 7, 999_999_999),
    "odd nanos": (0, 1, 500_000_000, 999_999_999, 1_000_000_000, NEGATIVE),
    "odd number": NUMBERS,
}
"""Values of fields that are numbers, those of an ordinary row more often."""
DETAILS = (b"via_upstream", b"internal_redirect", b"", b"direct_response")


class Writer:
    """Writes from a seed. ``oddity`` is how likely each field takes a liberty."""

    def __init__(self, seed: int, oddity: float = 0.03) -> None:
        self._dice = random.Random(seed)
        self._oddity = oddity

    def message(self, rows: int) -> bytes:
        """A message of rows, broken off or mixed now and then."""
        dice = self._dice
        raw = b""
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            http = dice.random() < 0.7
            body = b""
            for _ in range(rows):
                body += self._bytes(1, self.row(http=http))
                if self._odd():
                    body += self._unknown()
            raw += self._bytes(2 if http else 3, body)
            if self._odd():
                raw += self._unknown()
        return self._broken(raw) if self._odd() else raw

    def row(self, *, http: bool) -> bytes:
        """An HTTP row or a TCP row."""
        raw = self._fields(HTTP_ROW if http else TCP_ROW)
        return self._broken(raw) if self._odd() else raw

    def _odd(self) -> bool:
        return self._dice.random() < self._oddity

    def _fields(self, schema: Mapping[int, Any]) -> bytes:
        dice = self._dice
        numbers = [number for number in schema if dice.random() < 0.8]
        if 22 in schema or (13 in schema and 12 in schema):
            numbers += [22 if 22 in schema else 13] * dice.randrange(4)
        if self._odd():
            dice.shuffle(numbers)
        if self._odd() and numbers:
            numbers.append(dice.choice(numbers))
        raw = b""
        for number in numbers:
            raw += self._field(number, schema[number])
            if self._odd():
                raw += self._unknown()
        return raw

    def _field(self, number: int, kind: Any) -> bytes:
        dice = self._dice
        if self._odd():  # of a wire type that is not the schema's
            other = (self._number(number, 7), self._bytes(number, b"\x08\x01"), self._fixed(number))
            return dice.choice(other)
        if isinstance(kind, Mapping):
            return self._bytes(number, self._fields(kind))
        match kind:
            case "text":
                return self._bytes(number, dice.choice(TEXTS))
            case "details":
                return self._bytes(number, dice.choice(DETAILS))
            case "entry":
                return self._bytes(number, self._entry(dice.choice(KEYS), dice.choice(TEXTS)))
            case "metadata":
                return self._bytes(number, self._metadata())
        if self._odd() and f"odd {kind}" in CHOICES:
            kind = f"odd {kind}"
        return self._number(number, dice.choice(CHOICES[kind]) if kind in CHOICES else dice.randrange(5_000))

    def _metadata(self) -> bytes:
        dice = self._dice
        value = dice.choice(
            (
                self._bytes(3, dice.choice(TEXTS)),
                self._number(4, 1),
                b"\x11" + bytes(8),
                b"",
                self._bytes(3, b"one") + self._bytes(3, b"two"),
                self._bytes(5, self._bytes(1, self._entry(b"name", self._bytes(3, b"deep")))),
                b"\xff",
            )
        )
        inner = self._bytes(1, self._entry(b"name", value))
        struct = self._bytes(1, self._entry(b"project", self._bytes(5, inner)))
        if self._odd():
            struct += self._bytes(1, self._entry(b"project", self._bytes(5, inner)))
        return self._bytes(1, self._entry(dice.choice((b"datum", b"datum", b"jwt")), struct))

    def _entry(self, key: bytes, value: bytes) -> bytes:
        parts = [self._bytes(1, key), self._bytes(2, value)]
        if self._odd():
            parts.reverse()
        if self._odd():
            parts.append(self._dice.choice((self._bytes(2, b"again"), self._unknown(), b"\x12")))
        if self._odd():
            parts.pop()
        return b"".join(parts)

    def _unknown(self) -> bytes:
        dice = self._dice
        return dice.choice(
            (
                self._number(40, 3),
                self._bytes(41, b"\x0a\x01"),
                self._bytes(2_047, b""),
                self._bytes(2_048, b"z"),
                self._fixed(42),
                varint(43 << 3 | 3) + b"\x08\x01" + varint(43 << 3 | 4),
                varint(43 << 3 | 3),
                b"\x00",
                b"\x07",
            )
        )

    def _number(self, number: int, value: int) -> bytes:
        return self._varint(number << 3) + self._varint(value)

    def _bytes(self, number: int, value: bytes) -> bytes:
        return self._varint(number << 3 | 2) + self._varint(len(value)) + value

    def _fixed(self, number: int) -> bytes:
        return self._dice.choice((varint(number << 3 | 5) + b"abcd", varint(number << 3 | 1) + b"abcdefgh"))

    def _varint(self, value: int) -> bytes:
        if not self._dice.random() < self._oddity / 20:
            return varint(value)
        short, longer = varint(value), self._dice.randrange(1, 11)
        return short[:-1] + bytes([short[-1] | 0x80]) + b"\x80" * (longer - 1) + b"\x00"

    def _broken(self, raw: bytes) -> bytes:
        dice = self._dice
        if not raw:
            return raw
        at = dice.randrange(len(raw))
        return dice.choice((raw[:at], raw[:at] + dice.randbytes(dice.randrange(4)) + raw[at + 1 :]))
