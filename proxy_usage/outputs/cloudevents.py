"""CloudEvents for any endpoint that takes them over HTTP: OpenMeter and the like.

The same stored bytes as for the billing endpoint, under the content type of the CloudEvents HTTP binding and
without parameters, which some endpoints compare exactly. 200, 202 and 204 take the whole request: such
endpoints say nothing of single events. Other successes are ambiguous: a 207 or 206 may mean a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxy_usage.config.outputs import CLOUDEVENT, CLOUDEVENTS, OutputConfig
from proxy_usage.outputs.answers import read_failure, said
from proxy_usage.outputs.base import Ambiguous, Answer, Refused, Request, Settled, Verdict
from proxy_usage.store import Fate, Queued

TAKEN = frozenset({200, 202, 204})


class CloudEvents:
    """CloudEvents in batches, or one by one where the content type is that of one."""

    def __init__(self, output: OutputConfig, _window_ms: int) -> None:
        self._content_type = output.content_type or CLOUDEVENTS

    def encode(self, events: Sequence[Queued]) -> Request:
        """The stored bytes: in a JSON array, or those of the one event."""
        body = b"[" + b",".join(event.body for event in events) + b"]"
        if self._content_type == CLOUDEVENT:
            body = events[0].body
        return Request(body, {"Content-Type": self._content_type})

    def read(self, answer: Answer, events: Sequence[Queued]) -> Verdict:
        """Classifies an answer. A page for people is nobody's answer to a batch, whatever its status."""
        if 200 <= answer.status < 300:
            page = answer.headers.get("content-type", "").lower().startswith("text/html")
            if answer.status not in TAKEN or page:
                return Ambiguous(f"{answer.status}: does not say that all was accepted: {said(answer)}")
            delivered = Fate("delivered", answer.status)
            return Settled({event.seq: delivered for event in events})
        if answer.status in (400, 422):
            return Refused(answer.status, said(answer))
        return read_failure(answer)
