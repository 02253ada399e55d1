"""What HTTP itself says of a batch that was not taken: the same for every format.

status                     verdict
413                        Refused, for its size
401, 403                   Paused ``unauthorized``
408, 425, 429, 5xx         Retry, not before Retry-After (501 is a misconfiguration)
3xx                        Paused ``redirected``: usage goes where the configuration says, nowhere else
other                      Paused ``misconfigured``

What means that the content was refused, each format says itself.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from proxy_usage.outputs.base import Answer, Paused, Refused, Retry

MAX_RETRY_AFTER_MS = 3_600_000
"""An endpoint that asks for more patience is asked again after an hour."""


def said(answer: Answer) -> str:
    """The beginning of an answer's body, as text."""
    return answer.body[:500].decode(errors="replace")


def read_failure(answer: Answer) -> Refused | Retry | Paused:
    """Classifies an answer that is no success (contract: "What a client should do")."""
    status, text, after_ms = answer.status, f"{answer.status}: {said(answer)}", _retry_after_ms(answer)
    if status == 413:
        return Refused(status, said(answer), too_large=True)
    if status in (401, 403):
        return Paused("unauthorized", text, after_ms)
    if status in (408, 425, 429) or (status >= 500 and status != 501):
        reason = {408: "timeout", 425: "too_early", 429: "throttled"}.get(status, "server_error")
        return Retry(reason, text, after_ms)
    if 300 <= status < 400:
        place = answer.headers.get("location", "")
        return Paused("redirected", f"{status} to {place[:200]}", after_ms)
    return Paused("misconfigured", text, after_ms)


def _retry_after_ms(answer: Answer) -> int:
    """``Retry-After`` in seconds or as a date, as milliseconds from now; 0 when absent or unreadable.

    A date is measured against the answer's own ``Date``, so that the two clocks need not agree.
    """
    value = answer.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return min(int(value) * 1_000, MAX_RETRY_AFTER_MS) if len(value) < 10 else MAX_RETRY_AFTER_MS
    try:
        until = parsedate_to_datetime(value)
        now = parsedate_to_datetime(answer.headers["date"]) if "date" in answer.headers else None
    except (TypeError, ValueError, OverflowError):
        return 0
    if until.tzinfo is None or (now is not None and now.tzinfo is None):
        return 0
    wait = until - (now or datetime.now(UTC))
    return max(0, min(wait.days * 86_400_000 + wait.seconds * 1_000, MAX_RETRY_AFTER_MS))
