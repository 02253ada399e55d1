"""What the billing endpoint checks about one event, in its order, and what it should check.

``read`` is the wire behaviour: the same checks in the same order with the same codes, and as lenient where
the endpoint is (its integer scan, say). ``findings`` are stricter and never change an answer: they name
what would be lost or quarantined further down the line, so that a test can insist that there is none.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

METERS = (
    "networking.datumapis.com/gateway/requests",
    "networking.datumapis.com/gateway/ingress-bytes",
    "networking.datumapis.com/gateway/egress-bytes",
    "networking.datumapis.com/gateway/connection-seconds",
)
"""The event types the catalog declares: requests, bytes in, bytes out, seconds."""
DIMENSIONS = (
    "region",
    "gateway",
    "gateway_namespace",
    "gateway_class",
    "httproute_name",
    "httproute_namespace",
    "project_name",
)
MAX_INT64 = (1 << 63) - 1

_STRINGS = ("id", "specversion", "type", "source", "subject", "datacontenttype")
_REQUIRED = ("specversion", "type", "source", "subject")
_SCANNED = re.compile(r"[ \t]*([+-]?[0-9]+)")
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_STRICT_VALUE = re.compile(r"[1-9][0-9]{0,18}")
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}(Z|\+00:00)")
_SOURCE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:.+|//[^/]+.*")


class Refusal(NamedTuple):
    """Why an event is refused: the fields of an entry of ``rejected``."""

    id: str
    """As sent; ``""`` when it is missing or the event is not JSON."""
    reason: str
    """``MISSING_REQUIRED_FIELD``, ``INVALID_ULID``, ``INVALID_DATACONTENTTYPE`` or ``INVALID_VALUE_TYPE``."""
    detail: str


def read(raw: bytes) -> dict[str, Any] | Refusal:
    """One event as it was sent, or why the endpoint refuses it (first failed check wins)."""
    try:
        event = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return Refusal("", "MISSING_REQUIRED_FIELD", f"the event is not JSON: {error}")
    if not isinstance(event, dict):
        return Refusal("", "MISSING_REQUIRED_FIELD", "the event is not a JSON object")
    for name in _STRINGS:
        # JSON null leaves a string field of the endpoint's decoder empty; any other type fails the event.
        if event.get(name) is not None and not isinstance(event[name], str):
            return Refusal("", "MISSING_REQUIRED_FIELD", f"{name} is not a string")
    return _refusal(event) or event


def _refusal(event: dict[str, Any]) -> Refusal | None:
    id_ = event.get("id") or ""
    if not id_:
        return Refusal("", "INVALID_ULID", "id is missing")
    if len(id_.encode()) != 26 or id_[0] > "7":
        return Refusal(id_, "INVALID_ULID", "id is not a ULID")
    for name in _REQUIRED:
        if not event.get(name):
            return Refusal(id_, "MISSING_REQUIRED_FIELD", f"{name} is missing")
    if not event["subject"].startswith("projects/") or event["subject"] == "projects/":
        return Refusal(id_, "MISSING_REQUIRED_FIELD", "subject is not projects/<name>")
    if event.get("datacontenttype") != "application/json":
        return Refusal(id_, "INVALID_DATACONTENTTYPE", "datacontenttype is not application/json")
    data = event.get("data")
    value = data.get("value") if isinstance(data, dict) else None
    scanned = _SCANNED.match(value) if isinstance(value, str) else None
    if scanned is None or not -MAX_INT64 - 1 <= int(scanned[1]) <= MAX_INT64:
        return Refusal(id_, "INVALID_VALUE_TYPE", "data.value is not a string with an integer")
    return None


def billed(event: dict[str, Any]) -> int:
    """The amount the consumer books for an accepted event; 0 where it would quarantine the value."""
    value: str = event["data"]["value"]
    if not _INTEGER.fullmatch(value) or not -MAX_INT64 - 1 <= int(value) <= MAX_INT64:
        return 0
    return int(value)


def findings(
    event: dict[str, Any], types: Collection[str] = METERS, dimensions: Collection[str] = DIMENSIONS
) -> list[tuple[str, str]]:
    """Everything that is wrong about an event the endpoint accepts: (what, detail) pairs."""
    data, subject = event["data"], event["subject"].removeprefix("projects/")
    found = [
        ("id", f"{event['id']!r} is not an upper-case ULID", _ULID.fullmatch(event["id"])),
        ("specversion", f"{event['specversion']!r}", event["specversion"] == "1.0"),
        ("type", f"{event['type']!r} is not declared", event["type"] in types),
        ("source", f"{event['source']!r} has no scheme and no host", _SOURCE.fullmatch(event["source"])),
        ("subject", f"{subject!r} is not a DNS label", _LABEL.fullmatch(subject)),
        ("value", f"{data['value']!r}", _STRICT_VALUE.fullmatch(data["value"]) and billed(event)),
        ("extension", "billingaccountref is the consumer's", "billingaccountref" not in event),
        ("time", f"{event.get('time')!r} is not RFC 3339, UTC, milliseconds", _is_time(event.get("time"))),
        ("data", f"unknown keys in {sorted(data)}", set(data) <= {"value", "dimensions", "resource"}),
    ]
    wrong = [(what, detail) for what, detail, good in found if not good]
    return wrong + _dimension_findings(data.get("dimensions"), dimensions)


def _is_time(time: Any) -> bool:
    if not isinstance(time, str) or not _TIME.fullmatch(time):
        return False
    try:
        datetime.fromisoformat(time)
    except ValueError:
        return False
    return True


def _dimension_findings(sent: Any, declared: Collection[str]) -> list[tuple[str, str]]:
    if not isinstance(sent, dict):
        return [("dimension", "data.dimensions is not an object")]
    wrong = [("dimension", f"{name} is not declared") for name in sent if name not in declared]
    wrong += [("dimension", f"{name} is missing") for name in declared if name not in sent]
    wrong += [
        ("dimension", f"{name} is not a string") for name, text in sent.items() if not isinstance(text, str)
    ]
    return wrong
