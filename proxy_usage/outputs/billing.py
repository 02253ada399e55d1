"""The usage-ingestion endpoint of the billing platform: a JSON array of CloudEvents, an answer that counts.

The endpoint answers 200 ``{"accepted": n}`` or 207 ``{"accepted": n, "rejected": [{id, reason, detail}]}``.
It drops events of projects without an account while answering 200, so ``accepted`` is compared with what was
sent; the results of a 207 carry no index, and no id where the id itself was the problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from proxy_usage.outputs.answers import read_failure, said
from proxy_usage.outputs.base import Ambiguous, Answer, Refused, Request, Settled, Shortfall, Verdict
from proxy_usage.store import Fate, Queued

EVENT_CODES = frozenset(
    {"INVALID_ULID", "MISSING_REQUIRED_FIELD", "INVALID_DATACONTENTTYPE", "INVALID_VALUE_TYPE"}
)


class Billing:
    """CloudEvents for the usage-ingestion endpoint, in batches."""

    def encode(self, events: Sequence[Queued]) -> Request:
        """Joins the stored bytes into a JSON array; the endpoint takes at most 100 events of it."""
        return Request(
            b"[" + b",".join(event.body for event in events) + b"]", {"Content-Type": "application/json"}
        )

    def read(self, answer: Answer, events: Sequence[Queued]) -> Verdict:
        """Classifies an answer of the endpoint (contract: "What a client should do")."""
        text = said(answer)
        status = answer.status
        if 200 <= status < 300:
            return _read_success(answer, events, text)
        if status == 400:
            code, detail = _error(answer.body)
            return Refused(status, detail or text, code if code in EVENT_CODES else "")
        return read_failure(answer)


def _read_success(answer: Answer, events: Sequence[Queued], text: str) -> Verdict:
    parsed = _json(answer.body)
    if parsed is None:
        return Ambiguous(f"{answer.status}: not JSON: {text}")
    accepted: Any = parsed.get("accepted") if isinstance(parsed, dict) else None
    rejected: Any = (parsed.get("rejected") or []) if isinstance(parsed, dict) else None
    if not _is_count(accepted) or not isinstance(rejected, list):
        return Ambiguous(f"{answer.status}: does not say what was accepted: {text}")
    if accepted + len(rejected) > len(events):
        return Ambiguous(f"{answer.status}: speaks of more events than were sent: {text}")
    fates = _rejections(rejected, events, answer.status)
    if len(fates) == len(rejected) and accepted == len(events) - len(fates):
        delivered = Fate("delivered", answer.status)
        return Settled({event.seq: fates.get(event.seq, delivered) for event in events})
    return Shortfall(fates, f"{answer.status}: {accepted} of {len(events)} accepted: {text}")


def _json(body: bytes) -> Any:
    """The body's value; None where it is no JSON, however hostile: nested without end, not UTF-8."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rejections(rejected: list[Any], events: Sequence[Queued], status: int) -> dict[int, Fate]:
    """Matches rejections with events by id. One without an id can only be matched when one was sent."""
    by_id = {event.id: event.seq for event in events}
    fates: dict[int, Fate] = {}
    for item in rejected:
        if not isinstance(item, dict):
            continue
        seq = by_id.get(str(item.get("id") or ""))
        if seq is None and len(events) == 1:
            seq = events[0].seq
        if seq is not None:
            reason = str(item.get("reason") or "rejected")[:64]
            fates[seq] = Fate("dead", status, reason, str(item.get("detail") or ""))
    return fates


def _error(body: bytes) -> tuple[str, str]:
    """Code and message of an error body, empty where there are none."""
    parsed = _json(body)
    if not isinstance(parsed, dict):
        return "", ""
    code, message = str(parsed.get("code") or ""), str(parsed.get("message") or "")
    return code, f"{code}: {message}" if code else message
