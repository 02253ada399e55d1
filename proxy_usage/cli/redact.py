"""Digests in place of what a recording tells of clients: paths, headers, addresses.

Equal values get equal digests within one recording and, since its key is thrown away, in no other. What is
billed by (host name, route, tags, metadata, sizes, times) stays as it is, to the bit: a recording is
rewritten on the wire, since types would round its times. A row that cannot be read is left out: nobody can
say what it tells.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Final

from proxy_usage.cli.capture import read_capture, wire_fields
from proxy_usage.recording import varint

Replace = Callable[[bytes], bytes]
Spec = Mapping[int, "Spec | None"]
"""Field numbers to what is inside; None: the value itself is replaced."""

_TEXT: Final = None
_ADDRESS: Spec = {1: {2: _TEXT}, 2: {1: _TEXT}}  # socket_address.address, pipe.path
_HEADERS: Spec = {2: _TEXT}  # a map entry's value; the names of headers stay
_COMMON: Spec = dict.fromkeys((2, 3, 13, 14, 20), _ADDRESS)
_REQUEST: Spec = {5: _TEXT, 6: _TEXT, 7: _TEXT, 8: _TEXT, 9: _TEXT, 10: _TEXT, 13: _HEADERS}
_RESPONSE: Spec = {4: _HEADERS, 5: _HEADERS}
_HTTP_ROW: Spec = {1: _COMMON, 3: _REQUEST, 4: _RESPONSE}
_TCP_ROW: Spec = {1: _COMMON}
_HTTP_LOGS, _TCP_LOGS, _LOG_ENTRY = 2, 3, 1
_BYTES = 2


def redact(path: Path) -> int:
    """Rewrites a recording in place. Returns how many rows were left out."""
    key = secrets.token_bytes(32)

    def replace(value: bytes) -> bytes:
        return b"#" + blake2b(value, key=key, digest_size=8).hexdigest().encode() if value else value

    left_out = 0
    messages = []
    for message in read_capture(path, raw=False):
        rewritten, bad = _message(message.raw, replace)
        messages.append(rewritten)
        left_out += bad
    beside = path.with_name(path.name + ".hashing")
    beside.touch(0o600)
    beside.write_bytes(b"".join(varint(len(raw)) + raw for raw in messages))
    beside.replace(path)
    return left_out


def _message(raw: bytes, replace: Replace) -> tuple[bytes, int]:
    """A StreamAccessLogsMessage with its rows rewritten, and how many were left out."""
    written = bytearray()
    left_out = 0
    for field, kind, value in wire_fields(raw):
        if kind != _BYTES or field not in (_HTTP_LOGS, _TCP_LOGS):
            written += _written(field, kind, value)
            continue
        rows = bytearray()
        for _, _, row in wire_fields(value):
            try:
                rewritten = _rewritten(row, _HTTP_ROW if field == _HTTP_LOGS else _TCP_ROW, replace)
            except IndexError:
                left_out += 1
            else:
                rows += _written(_LOG_ENTRY, _BYTES, rewritten)
        written += _written(field, _BYTES, bytes(rows))
    return bytes(written), left_out


def _rewritten(raw: bytes, spec: Spec, replace: Replace) -> bytes:
    """A message with the fields that ``spec`` names replaced. Raises IndexError where it cannot be read."""
    written = bytearray()
    for field, kind, value in wire_fields(raw):
        new = value
        if kind == _BYTES and field in spec:
            inside = spec[field]
            new = replace(value) if inside is None else _rewritten(value, inside, replace)
        written += _written(field, kind, new)
    return bytes(written)


def _written(field: int, kind: int, value: bytes) -> bytes:
    """A field as it goes over the wire; ``value`` is what stands behind its tag, without a length."""
    tag = varint(field << 3 | kind)
    return tag + varint(len(value)) + value if kind == _BYTES else tag + value
