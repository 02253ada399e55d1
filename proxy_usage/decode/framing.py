"""A message taken apart into its rows, which stay closed, and the identifier of its sender.

After an outage Envoy sends its backlog as one message of many megabytes; protobuf would hold the event loop
for all of it. So a message above ``WHOLE_BYTES`` is walked here, tag by tag, and handed out in slices.

Both ways give the same rows for the same bytes: what protobuf accepts, the walk reads alike; what protobuf
refuses, the walk reads in both cases, up to the damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple, overload

from google.protobuf.message import DecodeError as ProtobufError

from proxy_usage.als.v1 import als_pb2 as als
from proxy_usage.decode.choice import CHOICE
from proxy_usage.decode.values import at_path
from proxy_usage.errors import DecodeError
from proxy_usage.model import Origin

WHOLE_BYTES = 320 * 1024
"""Up to this size a message is opened in one go. Envoy's messages are longer than its buffer, for it flushes
when a row has passed the buffer's size: room for a buffer of 256 KiB and a row as long as they come."""
SLICE_BYTES = 64 * 1024
"""How much of a larger message is opened at a time."""
PART_ROWS = 50
"""Rows in a piece at most. A row of a long stream costs some 27 µs until it is booked, so that even a piece
of nothing else holds the event loop for less than 5 ms."""
_FIELDS_BEFORE_IDENTIFIER = 1_000
"""Envoy writes it first; no more of a message's fields than this are searched for it."""

_ELSE, _IDENTIFIER, _HTTP_LOGS, _TCP_LOGS = range(4)  # _ELSE apart, the field numbers in Message
_LOG_ENTRY = 1  # field number in Rows
_MORE, _END = range(2)  # of the extension's ``scan``; any other state: what follows is odd
_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = range(6)


class Split(NamedTuple):
    """Rows of one message, or of a slice of it, still closed."""

    entries: Sequence[bytes]
    """The HTTP rows, then the TCP rows. (Envoy's messages hold only one kind.) ``OpenRows`` and the
    extension's sequence make bytes of a row only when asked for it."""
    http: int
    """How many of ``entries``, from the first on, are HTTP rows."""
    damaged: str | None = None
    """What ended the walk before the end of the message, and at which byte; rows behind it are lost."""


class OpenRows(Sequence[bytes]):
    """Rows that were opened along with their message. As bytes they are cut out of it again, if asked for."""

    def __init__(self, closed: Callable[[], Sequence[bytes]], places: range, opened: Sequence[Any]) -> None:
        """``opened`` are the rows at ``places`` of a message, of which ``closed`` has all."""
        self._closed = closed
        self._places = places
        self.opened = opened

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> bytes: ...
    @overload
    def __getitem__(self, place: slice) -> OpenRows: ...
    def __getitem__(self, place: int | slice) -> bytes | OpenRows:
        if isinstance(place, slice):
            return OpenRows(self._closed, self._places[place], self.opened[place])
        return self._closed()[self._places[place]]


def open_rows(part: Split) -> Sequence[Any]:
    """The rows of a part, opened. None in the place of one that is malformed."""
    entries = part.entries
    if isinstance(entries, OpenRows):
        return entries.opened
    return [open_row(raw, http=number < part.http) for number, raw in enumerate(entries)]


def open_row(raw: bytes, *, http: bool) -> Any:
    """A row, opened; None if it is malformed."""
    try:
        return als.HttpRow.FromString(raw) if http else als.TcpRow.FromString(raw)
    except ProtobufError:
        return None


def parts(raw: bytes) -> Iterator[Split]:
    """The message in pieces that each may be folded without a pause. Never raises."""
    native = CHOICE.native
    if native is None:
        return protobuf_parts(raw)
    size = len(raw)
    if size > WHOLE_BYTES:
        return _scanned(native, raw)
    entries, http, *_, state = native.scan(raw, 0, _ELSE, size, size + 1, size + 1)
    if state != _END:
        return _pieces(split(raw))
    whole = Split(entries, http)
    return iter((whole,)) if len(entries) <= PART_ROWS else _pieces(whole)


def protobuf_parts(raw: bytes) -> Iterator[Split]:
    """The same without the extension."""
    if len(raw) > WHOLE_BYTES:
        return slices(raw)
    try:
        return _opened_pieces(raw, als.OpenMessage.FromString(raw))
    except ProtobufError:
        return _pieces(split(raw))


def _scanned(native: Any, raw: bytes) -> Iterator[Split]:
    """A large message with the extension, as far as it is plain."""
    pos, inside, stop, state = 0, _ELSE, len(raw), _MORE
    while state == _MORE:
        entries, http, pos, inside, stop, state = native.scan(raw, pos, inside, stop, SLICE_BYTES, PART_ROWS)
        if state == _MORE or len(entries):
            yield Split(entries, http)
    if state != _END:
        yield from slices(raw, place=(pos, inside, stop))


def _opened_pieces(raw: bytes, message: als.OpenMessage) -> Iterator[Split]:
    http, tcp = message.http_logs.log_entry, message.tcp_logs.log_entry
    before, rows = len(http), len(http) + len(tcp)
    closed = cache(lambda: split(raw).entries)
    for first in range(0, rows, PART_ROWS) or (0,):
        last = min(first + PART_ROWS, rows)
        opened = http[first:last] + tcp[max(first - before, 0) : max(last - before, 0)]
        yield Split(OpenRows(closed, range(first, last), opened), min(max(before - first, 0), last - first))


def _pieces(whole: Split) -> Iterator[Split]:
    if len(whole.entries) <= PART_ROWS:
        yield whole
        return
    for first in range(0, len(whole.entries), PART_ROWS):
        rows = whole.entries[first : first + PART_ROWS]
        last = first + PART_ROWS >= len(whole.entries)
        yield Split(rows, min(max(whole.http - first, 0), len(rows)), whole.damaged if last else None)


def split(raw: bytes) -> Split:
    """The whole message in one piece. Never raises."""
    try:
        message = als.Message.FromString(raw)
    except ProtobufError:
        pieces = list(slices(raw, len(raw) + 1))
        http = [entry for piece in pieces for entry in piece.entries[: piece.http]]
        tcp = [entry for piece in pieces for entry in piece.entries[piece.http :]]
        return Split(http + tcp, len(http), pieces[-1].damaged if pieces else None)
    http = list(message.http_logs.log_entry)
    return Split([*http, *message.tcp_logs.log_entry], len(http))


def slices(raw: bytes, size: int = SLICE_BYTES, place: tuple[int, int, int] | None = None) -> Iterator[Split]:
    """The message in pieces of about ``size`` bytes, none copied before it is asked for. Never raises.

    A piece may be empty: a stretch of the message that holds no rows. ``place`` is where to go on: a byte,
    the list of rows that it is in (0: none), and where that, or the message, ends.
    """
    http: list[bytes] = []
    tcp: list[bytes] = []
    place = place or (0, _ELSE, len(raw))
    begun = place[0]
    damaged = None
    try:
        for field, start, stop in _walk(raw, place):
            if field == _HTTP_LOGS:
                http.append(raw[start:stop])
            elif field == _TCP_LOGS:
                tcp.append(raw[start:stop])
            if stop - begun >= size or len(http) + len(tcp) >= PART_ROWS:
                yield Split(http + tcp, len(http))
                http, tcp, begun = [], [], stop
    except DecodeError as error:
        damaged = error.message
    if http or tcp or damaged:
        yield Split(http + tcp, len(http), damaged)


def read_identifier(raw: bytes, peer: str, node_paths: Sequence[tuple[str, ...]]) -> Origin | None:
    """Who sends the stream that this message belongs to; None if the message does not say.

    Envoy says it in a stream's first message only. ``peer`` is the authenticated name of the connection,
    ``node_paths`` is ``FoldPlan.node_paths``. Values of ``node.metadata`` become text: numbers without
    ``.0``, ``true`` and ``false``, objects and lists as compact JSON with sorted keys; absent ones ``""``.
    Bytes that are not UTF-8 appear escaped, as ``\\xff``.

    Raises ``DecodeError`` if there is an identifier and it cannot be read.
    """
    found = []
    try:
        for field, start, stop in islice(
            _walk(raw, (0, _ELSE, len(raw)), rows=False), _FIELDS_BEFORE_IDENTIFIER
        ):
            if field == _IDENTIFIER:
                found.append(raw[start:stop])
    except DecodeError:
        if not found:
            return None  # the rows' walk reports the damage
    if not found:
        return None
    try:
        # Protobuf merges a message field that comes twice; joined bytes mean just that.
        identifier = als.Identifier.FromString(b"".join(found))
        node = identifier.node
        values = tuple(_text(_node_value(node, path)) for path in node_paths)
    except ProtobufError as error:
        raise DecodeError(
            f"the identifier of a log stream from {peer or 'an unnamed peer'} is malformed "
            f"({sum(map(len, found))} bytes): {error}",
            hint="check what connects to listen.grpc: it does not speak Envoy's access log service v3",
        ) from error
    return Origin(peer, _text(node.id), _text(identifier.log_name), values)


def _node_value(node: als.Node, path: tuple[str, ...]) -> bytes:
    match path:
        case ("id",):
            value = node.id
        case ("cluster",):
            value = node.cluster
        case ("locality", "region"):
            value = node.locality.region
        case ("locality", "zone"):
            value = node.locality.zone
        case ("locality", "sub_zone"):
            value = node.locality.sub_zone
        case ("metadata", *keys):
            return at_path(node.metadata, [key.encode() for key in keys])
        case _:
            value = b""
    return bytes(value)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _walk(raw: bytes, place: tuple[int, int, int], *, rows: bool = True) -> Iterator[tuple[int, int, int]]:
    """``(field, start, stop)`` of everything in a message, in its order; field ``_ELSE`` is not for us.

    With ``rows`` the walk goes into http_logs and tcp_logs and gives each row under the number of these;
    without, it steps over them. One step reads one tag: whoever walks may pause after each.

    Raises ``DecodeError``, naming the byte, where it cannot go on.
    """
    pos, inside, stop = place  # in which list of rows; where it, or the message, ends
    overrun = ""  # set while in a list that claims to go on behind the end of the message
    groups: list[int] = []  # the open groups: an old encoding, stepped over with all that is in it
    while True:
        if pos == stop:
            if groups or overrun:
                raise DecodeError(overrun or f"a group is still open at byte {pos}")
            if not inside:
                return
            inside, stop = _ELSE, len(raw)
            continue
        begun = pos
        field, wire_type, start, pos = _field(raw, pos, stop)
        if not field and not groups:  # inside them protobuf does not look
            raise DecodeError(f"field number 0 at byte {begun}")
        if wire_type == _GROUP:
            groups.append(field)
        elif wire_type == _GROUP_END and (not groups or groups.pop() != field):
            raise DecodeError(f"a group that did not begin ends at byte {begun}")
        ours = wire_type == _BYTES and not groups
        beyond = f"a field of {pos - start} bytes at byte {begun} runs past the end" if pos > stop else ""
        if ours and rows and not inside and field in (_HTTP_LOGS, _TCP_LOGS):
            inside, stop, overrun = field, min(pos, stop), beyond
            pos = start
            yield _ELSE, start, start
            continue
        if beyond:
            raise DecodeError(beyond)
        if ours and inside:
            yield (inside if field == _LOG_ENTRY else _ELSE), start, pos
        else:
            yield (field if ours and field <= _TCP_LOGS else _ELSE), start, pos


def _field(raw: bytes, pos: int, stop: int) -> tuple[int, int, int, int]:
    """Number, wire type, start and end of the field at ``pos``; the end may lie behind ``stop``."""
    tag, start = _varint(raw, pos, stop)
    field, wire_type = tag >> 3, tag & 7
    if wire_type == _BYTES:
        size, start = _varint(raw, start, stop)
        after = start + size
    elif wire_type == _VARINT:
        after = _varint(raw, start, stop)[1]
    elif wire_type in (_GROUP, _GROUP_END):
        after = start
    elif wire_type in (_FIXED32, _FIXED64):
        after = start + (4 if wire_type == _FIXED32 else 8)
    else:
        raise DecodeError(f"wire type {wire_type} at byte {pos} does not exist")
    return field, wire_type, start, after


def _varint(raw: bytes, pos: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    for at in range(pos, min(stop, pos + 10)):
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
    raise DecodeError(f"a number at byte {pos} does not end")


def write_identifier(origin: Origin, node_paths: Sequence[tuple[str, ...]]) -> bytes:
    """A message that says no more than who sends: what ``read_identifier`` reads, but for node metadata.

    For recordings that begin in the middle of a stream; put before a message, it is part of it.
    """
    node = als.Node(id=origin.node_id.encode())
    for path, value in zip(node_paths, origin.node, strict=False):
        match path:
            case ("cluster",):
                node.cluster = value.encode()
            case ("locality", field):
                setattr(node.locality, field, value.encode())
    identifier = als.Identifier(node=node, log_name=origin.log_name.encode())
    written: bytes = als.Message(identifier=identifier.SerializeToString()).SerializeToString()
    return written
