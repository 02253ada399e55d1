"""Until when a certificate is good: read off its DER, for a metric and nothing else.

Python's ssl module tells it of a peer's certificate only, not of one in a file.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

_SEQUENCE, _VERSION, _UTC_TIME = 0x30, 0xA0, 0x17
_END = "-----END CERTIFICATE-----"


def expires_s(path: Path) -> int | None:
    """``notAfter`` of a PEM file's first certificate, in seconds since the epoch; None if it has none."""
    try:
        text = path.read_text("ascii", "replace")
        first = text[text.index("-----BEGIN CERTIFICATE-----") : text.index(_END) + len(_END)]
        return _not_after(ssl.PEM_cert_to_DER_cert(first))
    except (OSError, ValueError, IndexError):
        return None


def _not_after(der: bytes) -> int:
    """RFC 5280: Certificate { tbsCertificate { [0] version?, serial, signature, issuer, validity … } … }."""
    _, certificate, _ = _element(der)
    _, fields, _ = _element(certificate)
    kind, value, rest = _element(fields)
    if kind == _VERSION:
        kind, value, rest = _element(rest)
    for _ in range(3):  # past the serial: signature, issuer, validity
        kind, value, rest = _element(rest)
    if kind != _SEQUENCE:
        raise ValueError("no validity")
    _, _, after = _element(value)
    kind, moment, _ = _element(after)
    # Two digits are 1950 to 2049, as Python reads them up to 2068: nothing lasts that long.
    form = "%y%m%d%H%M%SZ" if kind == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return int(datetime.strptime(moment.decode("ascii"), form).replace(tzinfo=UTC).timestamp())


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """The first element's tag and content, and what follows it."""
    size, start = der[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[2:start], "big")
    if start + size > len(der):
        raise ValueError("cut short")
    return der[0], der[start : start + size], der[start + size :]
