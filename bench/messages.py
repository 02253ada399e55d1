"""Messages as Envoy sends them, serialised once, in the file that peers/generator.cc reads.

They are built with Envoy's complete schema (xds-protos) and look like a gateway's: five addresses, eight
durations, seven custom tags, TLS, a user agent, dynamic metadata in a third of them. The generator overwrites
three things of an entry, whose places are written beside it: the tenant's number, the namespace in its route
(the same number) and the second in which it began. So a tenant has one route, and as many keys as tenants.
"""

from __future__ import annotations

import itertools
import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from envoy.config.core.v3 import base_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2

KIB = 1 << 10
TEMPLATES = 48
"""Messages of a file: enough that no server has their bytes in its fastest cache."""
START_S = 1_795_300_000
"""Of the second that is overwritten: its varint is five bytes long, like that of any second of this age."""
DIGITS = 7
_NUMBER = b"0" * DIGITS
_PLACES = re.compile(rb"(?:tenant-|httproute/ns-)(?=" + _NUMBER + rb")")
END = {"http": 6, "tcp": 3}


class Amounts(NamedTuple):
    """What the entries of a message come to."""

    received: int
    sent: int
    ns: int


class Message(NamedTuple):
    """One serialised message."""

    raw: bytes
    entries: int
    amounts: Amounts


class Template(NamedTuple):
    """A message as the file has it, with the places of what is overwritten: of tenants' numbers and a second
    for every entry."""

    raw: bytes
    amounts: Amounts
    places: list[tuple[list[int], int]]


def hello() -> Message:
    """The first message of a stream: who sends. A real one has 61 kB, but comes once an hour."""
    whole = als_pb2.StreamAccessLogsMessage()
    whole.identifier.log_name = "http"
    node = whole.identifier.node
    node.id, node.cluster, node.locality.region = "bench-envoy", "gateway", "eu-1"
    return Message(whole.SerializeToString(), 0, Amounts(0, 0, 0))


def messages(kind: str, size: int, *, seed: int = 1, count: int = TEMPLATES) -> list[Message]:
    """``count`` messages of entries of a kind, ``http`` or ``tcp``: each a little longer than ``size`` bytes,
    since Envoy flushes when its buffer passes its size."""
    dice = random.Random(seed)
    return [_message(kind, size, dice) for _ in range(count)]


def write(path: Path, kind: str, size: int) -> Path:
    """Writes the generator's file, unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = [hello(), *messages(kind, size)]
        part = path.with_suffix(".part")
        part.write_bytes(struct.pack("<I", len(made)) + b"".join(_packed(one) for one in made))
        part.replace(path)
    return path


def read(path: Path) -> list[Template]:
    """What ``write`` wrote: the stream's first message, then the others."""
    packed = memoryview(path.read_bytes())
    at = 0

    def take(layout: str) -> tuple[int, ...]:
        nonlocal at
        values = struct.unpack_from(layout, packed, at)
        at += struct.calcsize(layout)
        return values

    found = []
    for _ in range(take("<I")[0]):
        (size,) = take("<I")
        raw = bytes(packed[at : at + size])
        at += size
        *amounts, entries = take("<QQQI")
        places_ = []
        for _ in range(entries):
            (digits,) = take("<I")
            places_.append((list(take(f"<{digits}I")), take("<I")[0]))
        found.append(Template(raw, Amounts(*amounts), places_))
    return found


def numbered(message: Message, tenants: int, dice: random.Random, second: int = START_S) -> bytes:
    """A message with other tenants, as the generator makes it: for programs that run in one process."""
    raw = bytearray(message.raw)
    for digits, at in places(message):
        number = b"%07d" % dice.randrange(tenants)
        for place in digits:
            raw[place : place + DIGITS] = number
        raw[at : at + 5] = varint(second)
    return bytes(raw)


def _message(kind: str, size: int, dice: random.Random) -> Message:
    whole = als_pb2.StreamAccessLogsMessage()
    rows = whole.http_logs.log_entry if kind == "http" else whole.tcp_logs.log_entry
    held = received = sent = ns = 0
    while held <= size:
        entry, amounts = (_http if kind == "http" else _tcp)(dice)
        rows.append(entry)
        held += entry.ByteSize()
        received, sent, ns = received + amounts.received, sent + amounts.sent, ns + amounts.ns
    return Message(whole.SerializeToString(), len(rows), Amounts(received, sent, ns))


def _http(dice: random.Random) -> tuple[Any, Amounts]:
    row = accesslog_pb2.HTTPAccessLogEntry()
    amounts = _common(row.common_properties, "http", dice)
    common = row.common_properties
    common.route_name = f"httproute/ns-{'0' * DIGITS}/web/rule/0/match/0/example"
    common.upstream_cluster = "httproute/backend/web/rule/0"
    row.protocol_version = accesslog_pb2.HTTPAccessLogEntry.HTTP2
    request, response = row.request, row.response
    request.request_method = base_pb2.RequestMethod.GET
    request.scheme, request.authority = "https", "www.example.com"
    request.path = f"/api/v1/items/{dice.randrange(10**6)}?page={dice.randrange(100)}"
    request.user_agent = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
    request.request_id = f"{dice.getrandbits(64):016x}-{dice.getrandbits(48):012x}"
    request.request_headers_bytes = dice.randrange(300, 900)
    response.response_code.value = 200
    response.response_code_details = "via_upstream"
    response.response_headers_bytes = dice.randrange(100, 400)
    response.response_body_bytes = max(0, amounts.sent - 300)
    return row, amounts


def _tcp(dice: random.Random) -> tuple[Any, Amounts]:
    row = accesslog_pb2.TCPAccessLogEntry()
    amounts = _common(row.common_properties, "tcp", dice)
    row.common_properties.upstream_cluster = "tcp-backend"
    row.connection_properties.received_bytes = amounts.received
    row.connection_properties.sent_bytes = amounts.sent
    return row, amounts


def _common(common: Any, kind: str, dice: random.Random) -> Amounts:
    common.access_log_type = END[kind]
    common.start_time.seconds, common.start_time.nanos = START_S, dice.randrange(1, 10**9)
    amounts = Amounts(dice.randrange(400, 4_000), dice.randrange(1_000, 60_000), dice.randrange(10**6, 10**9))
    common.duration.nanos = amounts.ns
    common.downstream_wire_bytes_received, common.downstream_wire_bytes_sent = amounts.received, amounts.sent
    for address in (
        common.downstream_remote_address,
        common.downstream_local_address,
        common.downstream_direct_remote_address,
        common.upstream_remote_address,
        common.upstream_local_address,
    ):
        address.socket_address.address = (
            f"10.{dice.randrange(256)}.{dice.randrange(256)}.{dice.randrange(256)}"
        )
        address.socket_address.port_value = dice.randrange(1_024, 65_536)
    for part in (
        common.time_to_last_rx_byte,
        common.time_to_first_upstream_tx_byte,
        common.time_to_last_upstream_tx_byte,
        common.time_to_first_upstream_rx_byte,
        common.time_to_last_upstream_rx_byte,
        common.time_to_first_downstream_tx_byte,
        common.time_to_last_downstream_tx_byte,
    ):
        part.nanos = dice.randrange(10**5, amounts.ns)
    common.stream_id = f"{dice.getrandbits(64):016x}"
    common.custom_tags["project_name"] = f"tenant-{'0' * DIGITS}"
    common.custom_tags["gateway"] = "edge"
    common.custom_tags["gateway_namespace"] = "gateways"
    common.custom_tags["gateway_class"] = "envoy"
    common.custom_tags["conn_id"] = str(dice.randrange(10**6))
    if dice.randrange(3) == 0:
        common.metadata.filter_metadata["envoy.filters.http.lua"]["verdict"] = "allow"
    return amounts


def varint(number: int) -> bytes:
    """A number of five bytes, as protobuf writes it."""
    return bytes((number >> shift & 0x7F) | (0x80 if shift < 28 else 0) for shift in range(0, 35, 7))


def places(message: Message) -> Iterator[tuple[list[int], int]]:
    """For every entry: where its tenant's number stands, and where its second."""
    seconds = [match.start() for match in re.finditer(re.escape(varint(START_S)), message.raw)]
    numbers = [match.end() for match in _PLACES.finditer(message.raw)]
    if len(seconds) != message.entries or len(numbers) < message.entries:
        raise AssertionError("a message holds by chance what is to be overwritten: take another seed")
    # A row begins with its common properties, and these with what comes before the second: the numbers of a
    # row stand between its second and the next row's.
    for second, following in itertools.pairwise([*seconds, len(message.raw)]):
        yield [place for place in numbers if second < place < following], second


def _packed(message: Message) -> bytes:
    parts = [struct.pack("<I", len(message.raw)), message.raw]
    parts.append(struct.pack("<QQQI", *message.amounts, message.entries))
    for digits, second in places(message):
        parts.append(struct.pack(f"<I{len(digits)}II", len(digits), *digits, second))
    return b"".join(parts)
