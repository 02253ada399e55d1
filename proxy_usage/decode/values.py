"""What a row holds beside its numbers, read as raw bytes: tags, headers, names, and values inside metadata.

Metadata is opened level by level and only along the path asked for. A value nested past what a decoder
accepts (a client's token can bring one) therefore harms nobody who does not read it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from proxy_usage.als.v1 import als_pb2 as als
from proxy_usage.model import Field, FieldKind, Origin

NO_REQUEST = als.Request()
NO_RESPONSE = als.Response()
"""What TCP rows have of both."""
_MAX_DEPTH = 64
"""An object or list nested deeper has no text."""

Reader = Callable[[Any], bytes]
"""Reads a raw value, ``b""`` where absent."""


def reader(field: Field, origin: Origin, node_paths: Sequence[tuple[str, ...]]) -> Reader:
    """How to read a field from ``(common, request)`` of a row, of which ``request`` is empty on TCP rows.

    Readers of maps raise protobuf's ``DecodeError`` where what they look for cannot be opened.
    """
    match field.kind:
        case FieldKind.CUSTOM_TAG:
            tag = lookup(field.path[0].encode())
            return lambda row: tag(row[0].custom_tags)
        case FieldKind.DYNAMIC_METADATA:
            return lambda row: filter_metadata(row[0].metadata, field.path)
        case FieldKind.REQUEST_HEADER:
            header = lookup(field.path[0].encode())
            return lambda row: header(row[1].request_headers)
        case FieldKind.ROUTE_NAME:
            return lambda row: row[0].route_name
        case FieldKind.AUTHORITY:
            return lambda row: row[1].authority
        case FieldKind.SNI:
            return lambda row: row[0].tls_properties.tls_sni_hostname
    value = constant(field, origin, node_paths)
    return lambda _row: value


def constant(field: Field, origin: Origin, node_paths: Sequence[tuple[str, ...]]) -> bytes:
    """The value that all rows of an origin have; ``b""`` of a field that is not the same in all of them."""
    if field.kind is FieldKind.NODE:
        return origin.node[node_paths.index(field.path)].encode()
    return field.path[0].encode() if field.kind is FieldKind.LITERAL else b""


def lookup(key: bytes) -> Callable[[Iterable[bytes]], bytes]:
    """Finds the value of a key among a map's closed entries, of which the last wins; ``b""`` where absent.

    Every encoder of a map writes the key first, so an entry is opened only if it begins with this key (or,
    to be safe, with a value): to open them all would cost more than all the rest of a row.
    """
    begins = key_begins(key)
    open_entry = als.Entry.FromString

    def find(entries: Iterable[bytes]) -> bytes:
        value = b""
        for raw in entries:
            if raw.startswith(begins):
                entry = open_entry(raw)
                if entry.key == key:
                    value = entry.value
        return value

    return find


def key_begins(key: bytes) -> tuple[bytes, bytes]:
    """What an entry of this key begins with, if ``lookup`` is to find it."""
    return als.Entry(key=key).SerializeToString(), b"\x12"


def at_path(struct: bytes, path: Sequence[bytes]) -> bytes:
    """The text of what is at ``path`` in a ``google.protobuf.Struct``; ``b""`` where there is nothing.

    Strings are as they came; numbers without ``.0``; ``true`` and ``false``; objects and lists as compact
    JSON with sorted keys, for Envoy writes their keys in changing order. Raises protobuf's ``DecodeError``.
    """
    if not path:
        return _text(als.Value(struct_value=struct)) if struct else b""
    for key in path[:-1]:
        struct = als.Value.FromString(lookup(key)(als.Struct.FromString(struct).fields)).struct_value
    return _text(als.Value.FromString(lookup(path[-1])(als.Struct.FromString(struct).fields)))


def filter_metadata(metadata: bytes, path: Sequence[str]) -> bytes:
    """The text of what is at ``(filter, key, …)`` in metadata, see ``at_path``."""
    if not metadata:
        return b""
    name, *keys = [part.encode() for part in path]
    return at_path(lookup(name)(als.Metadata.FromString(metadata).filter_metadata), keys)


def _text(value: als.Value) -> bytes:
    if value.WhichOneof("kind") == "string_value":
        return bytes(value.string_value)
    try:
        plain = _plain(value, _MAX_DEPTH)
    except _TooDeep:
        return b""
    if plain is None:
        return b""
    text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return text.encode("utf-8", "surrogateescape")


class _TooDeep(Exception):
    pass


def _plain(value: als.Value, depth: int) -> object:
    """The value as JSON has it."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        if not depth:
            raise _TooDeep
        return {
            entry.key.decode("utf-8", "surrogateescape"): _plain(als.Value.FromString(entry.value), depth - 1)
            for entry in map(als.Entry.FromString, als.Struct.FromString(value.struct_value).fields)
        }
    if kind == "list_value":
        if not depth:
            raise _TooDeep
        items = als.ListValue.FromString(value.list_value).values
        return [_plain(als.Value.FromString(item), depth - 1) for item in items]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number
    if kind == "string_value":
        return value.string_value.decode("utf-8", "surrogateescape")
    return value.bool_value if kind == "bool_value" else None
