"""A key's closed window becomes CloudEvents, at most one per meter.

The envelope is the one of the usage-ingestion endpoint: CloudEvents 1.0, a ULID as id, the value as a
JSON string with an int64 of at least 1, every declared dimension present, nothing for zero. An event's id,
time and bytes are made here, once, inside the transaction that closes the window; whoever sends it later
sends these bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from proxy_usage.errors import DecodeError
from proxy_usage.model import MAX_EVENT_VALUE, Amounts, Cell, Event, Key, Meter

RANDOM_BYTES = 10
"""Of an event's id."""
_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = tuple(first + second for first in _DIGITS for second in _DIGITS)
_IDS_AHEAD = 100
"""For so many ids randomness is drawn at a time: the kernel is asked seldom."""


class Minted(NamedTuple):
    """The events of one cell and what is left of each meter for the key's next window."""

    events: tuple[Event, ...]
    remainders: Amounts
    """Base units below one value, per meter: always less than the meter's divisor."""


class Mint:
    """Makes events of cells.

    Args:
        meters: in the order of a cell's amounts.
        dimensions: names, in the order of ``Key.dimensions``.
        source: CloudEvents ``source``. It is part of the duplicate key of some endpoints, so it must be the
            same at every replica and after every restart.
        length_ms: length of a window.
        random: gives n random bytes; ``RANDOM_BYTES`` per event, some events ahead.
    """

    def __init__(
        self,
        meters: Sequence[Meter],
        dimensions: Sequence[str],
        source: str,
        length_ms: int,
        *,
        random: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self.meters = tuple(meters)
        self.dimensions = tuple(dimensions)
        self.source = source
        self.length_ms = length_ms
        self._random = random
        self._drawn = b""
        self._encoder = msgspec.json.Encoder()

    def mint(self, cell: Cell, remainders: Sequence[int], now_ms: int) -> Minted:
        """Turns a cell's amounts, plus what earlier windows left, into events.

        Args:
            remainders: base units left over by the key's earlier windows, per meter.
            now_ms: the present, which becomes the time part of the ids.
        """
        events: list[Event] = []
        left: list[int] = []
        for index, meter in enumerate(self.meters):
            value, rest = divmod(cell.amounts[index] + remainders[index], meter.divisor)
            left.append(rest)
            while value > 0:  # more than one event only above an int64, which no real window reaches
                part = min(value, MAX_EVENT_VALUE)
                value -= part
                events.append(self._event(index, cell.key, cell.window_ms, part, now_ms))
        return Minted(tuple(events), tuple(left))

    def anew(self, body: bytes, now_ms: int) -> tuple[str, int, bytes]:
        """An event's value and dimensions under a new id, in the present window: ``(id, window, body)``.

        Raises:
            DecodeError: ``body`` is no CloudEvent.
        """
        event = _decoded(body)
        window_ms = now_ms - now_ms % self.length_ms
        event_id = self._id(now_ms)
        renewed = event | {"id": event_id, "time": rfc3339(window_ms + self.length_ms - 1)}
        return event_id, window_ms, self._encoder.encode(renewed)

    def merged(self, latest: bytes, value: int, now_ms: int) -> Iterator[tuple[str, int, bytes]]:
        """One event in the place of several of one ``likeness``: ``(id, value, body)``.

        Args:
            latest: the body of the last of them, whose time the new one has.
            value: the sum of their values; above an int64 it takes more than one event.

        Raises:
            DecodeError: ``latest`` is no CloudEvent.
        """
        event = _decoded(latest)
        while value > 0:
            part = min(value, MAX_EVENT_VALUE)
            value -= part
            event_id = self._id(now_ms)
            renewed = event | {"id": event_id, "data": event["data"] | {"value": str(part)}}
            yield event_id, part, self._encoder.encode(renewed)

    def _id(self, now_ms: int) -> str:
        if not self._drawn:
            self._drawn = self._random(RANDOM_BYTES * _IDS_AHEAD)
        randomness, self._drawn = self._drawn[:RANDOM_BYTES], self._drawn[RANDOM_BYTES:]
        return ulid(now_ms, randomness)

    def _event(self, meter: int, key: Key, window_ms: int, value: int, now_ms: int) -> Event:
        event_id = self._id(now_ms)
        time_ms = window_ms + self.length_ms - 1
        return Event(
            event_id, meter, window_ms, time_ms, value, self.body(event_id, meter, key, time_ms, value)
        )

    def body(self, event_id: str, meter: int, key: Key, time_ms: int, value: int) -> bytes:
        """The CloudEvent as JSON."""
        return self._encoder.encode(
            {
                "specversion": "1.0",
                "id": event_id,
                "source": self.source,
                "type": self.meters[meter].type,
                "subject": f"projects/{key.tenant}",
                "time": rfc3339(time_ms),
                "datacontenttype": "application/json",
                "data": {
                    "value": str(value),
                    "dimensions": dict(zip(self.dimensions, key.dimensions, strict=True)),
                },
            }
        )


def likeness(body: bytes) -> dict[str, Any]:
    """All that two events must agree in to be merged: everything but id, time and value.

    Raises:
        DecodeError: it is no CloudEvent.
    """
    event = _decoded(body)
    return event | {"id": "", "time": "", "data": event["data"] | {"value": ""}}


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        event = msgspec.json.decode(body, type=dict[str, Any])
        msgspec.convert(event["data"], dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError) as error:
        raise DecodeError(
            f"a stored event is no JSON object: {error}", hint="keep a copy of the store"
        ) from None
    return event


def ulid(time_ms: int, randomness: bytes) -> str:
    """A ULID, as https://github.com/ulid/spec has it: 26 digits of base 32.

    Here and not python-ulid's, which reads ids elsewhere and takes several times as long.

    Args:
        time_ms: below 2**48. randomness: 10 bytes.
    """
    number = time_ms << 80 | int.from_bytes(randomness, "big")
    return "".join([_PAIRS[number >> bits & 1023] for bits in range(120, -1, -10)])


@lru_cache(maxsize=64)  # all keys of a window have the same
def rfc3339(time_ms: int) -> str:
    """Milliseconds since the epoch as RFC 3339 in UTC with milliseconds."""
    seconds, millis = divmod(time_ms, 1_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{millis:03d}Z"
