"""Recorded messages, as ``explain`` reads them: where each ends, who sent it, of what type its rows are.

A capture is a file of ``StreamAccessLogsMessage``, each behind its length as a varint, in the order in which
they came; beside it, optionally, ``NAME.streams.json``: the number of the gRPC stream of each message. Only a
stream's first message says who sends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from proxy_usage.errors import DecodeError, UsageError

TYPES = (
    "NotSet",
    "TcpUpstreamConnected",
    "TcpPeriodic",
    "TcpConnectionEnd",
    "DownstreamStart",
    "DownstreamPeriodic",
    "DownstreamEnd",
    "UpstreamPoolReady",
    "UpstreamPeriodic",
    "UpstreamEnd",
    "DownstreamTunnelSuccessfullyEstablished",
    "UdpTunnelUpstreamConnected",
    "UdpPeriodic",
    "UdpSessionEnd",
    "TcpConnectionStart",
)
"""Names of envoy.data.accesslog.v3.AccessLogType by number."""

_COMMON_PROPERTIES = 1  # in both kinds of entries
_ACCESS_LOG_TYPE = 33  # in the common properties
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Message(NamedTuple):
    """One recorded message."""

    stream: int
    raw: bytes


def read_capture(path: Path, *, raw: bool) -> list[Message]:
    """The messages of a file; with ``raw``, the file is one message.

    Raises:
        UsageError: a file cannot be read, or the stream numbers do not belong to it.
        DecodeError: it is not what it should be; names the byte.
    """
    content = _content(path)
    if raw:
        return [Message(1, content)]
    messages = list(_delimited(path, content))
    beside = path.with_name(path.name.removesuffix(path.suffix) + ".streams.json")
    if not beside.exists():
        return [Message(1, message) for message in messages]
    try:
        streams = json.loads(_content(beside))
    except ValueError as error:
        raise UsageError(f"{beside} is not JSON: {error}", hint="move it away to read one stream") from None
    if not isinstance(streams, list) or not all(isinstance(number, int) for number in streams):
        raise UsageError(f"{beside} is not a list of stream numbers", hint="write [1, 1, 2], one a message")
    if len(streams) != len(messages):
        raise UsageError(
            f"{beside} has {len(streams)} stream numbers, {path} has {len(messages)} messages",
            hint="the two do not belong together; move the former away to read one stream",
        )
    return [Message(stream, message) for stream, message in zip(streams, messages, strict=True)]


def type_name(entry: bytes) -> str:
    """The name of a row's type, or its number where it has none; ``?`` where the row cannot be read."""
    number = 0
    try:
        for field, value in _fields(entry):
            if field != _COMMON_PROPERTIES or isinstance(value, int):
                continue
            for inner, one in _fields(value):
                if inner == _ACCESS_LOG_TYPE and isinstance(one, int):
                    number = one
    except IndexError:
        return "?"
    return TYPES[number] if number < len(TYPES) else str(number)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}",
            hint="name a file of recorded messages, or an event's id, 26 characters",
        ) from None


def _delimited(path: Path, content: bytes) -> Iterator[bytes]:
    at = number = 0
    while at < len(content):
        number += 1
        try:
            length, start = _varint(content, at)
        except IndexError:
            length, start = len(content) + 1, at
        if start + length > len(content):
            raise DecodeError(
                f"{path}: message {number} at byte {at} does not end in the file",
                hint="a capture has each message behind its length; --raw reads a file that is one message",
            )
        yield content[start : start + length]
        at = start + length


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field. Raises IndexError where the bytes are no message."""
    for field, wire_type, value in wire_fields(message):
        yield field, _varint(value, 0)[0] if wire_type == _VARINT else value


def wire_fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, wire type and bytes (without a length before them) of each field.

    Raises IndexError where the bytes are no message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            length = _varint(message, at)[1] - at
        elif wire_type == _BYTES:
            length, at = _varint(message, at)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise IndexError(at)
        if at + length > len(message):
            raise IndexError(at)
        yield field, wire_type, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends. Raises IndexError where it does not."""
    value = shift = 0
    while shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise IndexError(at)
