"""Our schema against Envoy's own, as xds-protos publishes it: same numbers, same wire, same values."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2 as full
from google.protobuf import struct_pb2, timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy_usage.als.v1 import als_pb2 as ours

ROOT = Path(__file__).resolve().parents[2]

PAIRS = [
    (ours.Message, full.StreamAccessLogsMessage),
    (ours.OpenMessage, full.StreamAccessLogsMessage),
    (ours.HttpRows, full.StreamAccessLogsMessage.HTTPAccessLogEntries),
    (ours.TcpRows, full.StreamAccessLogsMessage.TCPAccessLogEntries),
    (ours.Identifier, full.StreamAccessLogsMessage.Identifier),
    (ours.Node, base_pb2.Node),
    (ours.Locality, base_pb2.Locality),
    (ours.HttpRow, accesslog_pb2.HTTPAccessLogEntry),
    (ours.TcpRow, accesslog_pb2.TCPAccessLogEntry),
    (ours.Common, accesslog_pb2.AccessLogCommon),
    (ours.Timestamp, timestamp_pb2.Timestamp),
    (ours.Duration, Duration),
    (ours.Tls, accesslog_pb2.TLSProperties),
    (ours.Request, accesslog_pb2.HTTPRequestProperties),
    (ours.Response, accesslog_pb2.HTTPResponseProperties),
    (ours.UInt32Value, wrappers_pb2.UInt32Value),
    (ours.Connection, accesslog_pb2.ConnectionProperties),
    (ours.ResponseFlags, accesslog_pb2.ResponseFlags),
    (ours.Metadata, base_pb2.Metadata),
    (ours.Struct, struct_pb2.Struct),
    (ours.Value, struct_pb2.Value),
    (ours.ListValue, struct_pb2.ListValue),
]

# What our `bytes` hold where Envoy's field is a message.
INSIDE = {
    "Message.identifier": ours.Identifier,
    "OpenMessage.identifier": ours.Identifier,
    "Node.metadata": ours.Struct,
    "Common.metadata": ours.Metadata,
    "Value.struct_value": ours.Struct,
    "Value.list_value": ours.ListValue,
    "ListValue.values": ours.Value,
    "HTTPAccessLogEntries": ours.HttpRow,
    "TCPAccessLogEntries": ours.TcpRow,
}
VALUES_OF_MAPS = {"Metadata.filter_metadata": ours.Struct, "Struct.fields": ours.Value}

WIRE_TYPES = {
    FieldDescriptor.TYPE_DOUBLE: 1,
    FieldDescriptor.TYPE_FIXED64: 1,
    FieldDescriptor.TYPE_STRING: 2,
    FieldDescriptor.TYPE_BYTES: 2,
    FieldDescriptor.TYPE_MESSAGE: 2,
}


def test_the_committed_code_is_current(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "protos" / "generate.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.generate(tmp_path)
    module = Path("proxy_usage/als/v1/als_pb2.py")
    assert (ROOT / module).read_bytes() == (tmp_path / module).read_bytes(), "run python protos/generate.py"


def test_every_message_of_ours_has_its_counterpart() -> None:
    paired = {mine.DESCRIPTOR.name for mine, _ in PAIRS}
    only_ours = {"Rows", "Entry", "Present"}  # of either kind, of any map, of one flag
    assert paired | only_ours == set(ours.DESCRIPTOR.message_types_by_name)


@pytest.mark.parametrize(("mine", "theirs"), PAIRS, ids=lambda side: side.DESCRIPTOR.name)
def test_numbers_names_and_wire_types_are_envoys(mine: Any, theirs: Any) -> None:
    for field in mine.DESCRIPTOR.fields:
        other = theirs.DESCRIPTOR.fields_by_number[field.number]
        assert other.name == field.name
        assert other.is_repeated == field.is_repeated
        assert WIRE_TYPES.get(other.type, 0) == WIRE_TYPES.get(field.type, 0)


@pytest.mark.parametrize("mine", [ours.Message, ours.OpenMessage])
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["http_logs", "tcp_logs"]))
@settings(max_examples=60)
def test_random_messages_read_the_same(mine: Any, seed: int, kind: str) -> None:
    source = random.Random(seed)
    message = full.StreamAccessLogsMessage()
    fill(message.identifier, source, 7)
    for _ in range(source.randrange(1, 4)):
        fill(getattr(message, kind).log_entry.add(), source, 7)
    parsed = mine.FromString(message.SerializeToString())
    compare(parsed, message)
    assert len(getattr(parsed, kind).log_entry) == len(getattr(message, kind).log_entry)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_sizes_read_the_same(size: int) -> None:
    row = accesslog_pb2.HTTPAccessLogEntry()
    row.common_properties.downstream_wire_bytes_received = size
    row.common_properties.downstream_wire_bytes_sent = size
    row.request.request_body_bytes = row.response.response_body_bytes = size
    compare(ours.HttpRow.FromString(row.SerializeToString()), row)
    connection = accesslog_pb2.TCPAccessLogEntry()
    connection.connection_properties.received_bytes = connection.connection_properties.sent_bytes = size
    compare(ours.TcpRow.FromString(connection.SerializeToString()), connection)


def fill(message: Any, source: random.Random, depth: int) -> None:
    """Gives about half of all of Envoy's fields, ours or not, a random value."""
    for field in message.DESCRIPTOR.fields:
        if source.random() < 0.5 or (field.message_type and not depth):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            fill_map(getattr(message, field.name), field.message_type, source, depth)
        elif field.message_type and field.is_repeated:
            for _ in range(source.randrange(3)):
                fill(getattr(message, field.name).add(), source, depth - 1)
        elif field.message_type:
            part = getattr(message, field.name)
            part.SetInParent()
            fill(part, source, depth - 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(scalar(field, source) for _ in range(source.randrange(3)))
        else:
            setattr(message, field.name, scalar(field, source))


def fill_map(container: Any, entry: Descriptor, source: random.Random, depth: int) -> None:
    for _ in range(source.randrange(4)):
        value = entry.fields_by_name["value"]
        key = scalar(entry.fields_by_name["key"], source)
        if value.message_type:
            fill(container[key], source, depth - 1)
        else:
            container[key] = scalar(value, source)


def scalar(field: FieldDescriptor, source: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return source.choice(["", "a", "ns-1", "é ü 漢", "x" * 200])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return source.randbytes(source.randrange(8))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return source.random() < 0.5
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return source.choice([0.0, -1.5, 42.0, 2.0**60])
    if field.enum_type:
        return source.choice([value.number for value in field.enum_type.values])
    signed = field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)
    bits = 64 if field.type in (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64) else 32
    number = source.randrange(2 ** source.randrange(1, bits if signed else bits + 1))
    return -number if signed and source.random() < 0.3 else number


def compare(mine: Any, theirs: Any, kind: str = "") -> None:
    """Every field of ours holds what Envoy's does. ``kind`` is what a list of rows is called there."""
    for field in mine.DESCRIPTOR.fields:
        name = f"{mine.DESCRIPTOR.name}.{field.name}"
        one, other = getattr(mine, field.name), getattr(theirs, field.name)
        counterpart = theirs.DESCRIPTOR.fields_by_number[field.number]
        if field.message_type and field.is_repeated:
            for part, whole in zip(one, other, strict=True):
                compare(part, whole)
        elif field.message_type:
            assert mine.HasField(field.name) == theirs.HasField(field.name), name
            compare(one, other, counterpart.message_type.name)
        elif counterpart.message_type and counterpart.message_type.GetOptions().map_entry:
            compare_map(name, one, other)
        elif counterpart.message_type and field.is_repeated:
            assert len(one) == len(other), name
            for part, whole in zip(one, other, strict=True):
                compare(INSIDE[kind if kind in INSIDE else name].FromString(part), whole)
        elif counterpart.message_type:
            compare(INSIDE[name].FromString(one), other)
        else:
            assert one == (other.encode() if isinstance(other, str) else other), name


def compare_map(name: str, entries: Any, container: Any) -> None:
    opened = {entry.key.decode(): entry.value for entry in map(ours.Entry.FromString, entries)}
    assert opened.keys() == set(container), name
    for key, value in opened.items():
        if name in VALUES_OF_MAPS:
            compare(VALUES_OF_MAPS[name].FromString(value), container[key])
        else:
            assert value.decode() == container[key], name
