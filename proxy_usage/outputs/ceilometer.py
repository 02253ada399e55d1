"""The samples of OpenStack's Ceilometer, as its HTTP publisher posts them (SCS-0412): keys, order, types.

A sample is a plain object of fourteen keys, a batch a bare JSON array of them; the names ``counter_*`` and
the signature of the message bus do not go over HTTP. Any 2xx takes the whole request, whatever its body says.
Nothing of a sample is made up here: two encodings of one stored event are the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from ulid import ULID

from proxy_usage.config.outputs import CeilometerConfig, OutputConfig
from proxy_usage.errors import DecodeError
from proxy_usage.outputs.answers import read_failure, said
from proxy_usage.outputs.base import Answer, Refused, Request, Settled, Verdict
from proxy_usage.store import Fate, Queued

PLACE = re.compile(r"\{(\w+)\}")
"""A dimension in ``resource_id``; ``{tenant}`` and ``{meter}`` are the event's own."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TICK = timedelta(milliseconds=1)


class _Data(msgspec.Struct):
    value: str
    dimensions: dict[str, str]


class _Event(msgspec.Struct):
    id: str
    type: str
    subject: str
    time: datetime
    data: _Data


class Ceilometer:
    """Delta samples, one an event.

    Args:
        window_ms: length of the windows of events that do not say when theirs began.
    """

    def __init__(self, output: OutputConfig, window_ms: int) -> None:
        self._config = output.ceilometer or CeilometerConfig()
        self._window_ms = window_ms
        self._names: Mapping[str, str] = self._config.names.model_dump()
        self._units: Mapping[str, str] = self._config.units.model_dump()
        self._decoder = msgspec.json.Decoder(_Event)
        self._encoder = msgspec.json.Encoder()

    def encode(self, events: Sequence[Queued]) -> Request:
        """A JSON array of samples; with ``ceilometer.batch: false`` the one sample alone.

        Raises:
            DecodeError: a stored event is none.
        """
        samples = [self.sample(event) for event in events]
        body = self._encoder.encode(samples if self._config.batch else samples[0])
        return Request(body, {"Content-Type": "application/json"})

    def read(self, answer: Answer, events: Sequence[Queued]) -> Verdict:
        """Any 2xx is a delivery: Ceilometer's publisher looks at nothing else."""
        if 200 <= answer.status < 300:
            delivered = Fate("delivered", answer.status)
            return Settled({event.seq: delivered for event in events})
        if answer.status in (400, 422):
            return Refused(answer.status, said(answer))
        return read_failure(answer)

    def sample(self, queued: Queued) -> dict[str, Any]:
        """The sample of one event, its keys in Ceilometer's order.

        Raises:
            DecodeError: the stored event is none.
        """
        try:
            event = self._decoder.decode(queued.body)
            id_ = ULID.from_str(event.id).to_uuid()
            volume = int(event.data.value)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
            raise DecodeError(
                f"a stored event is no usage event: {error}", hint="keep a copy of the store"
            ) from None
        tenant = event.subject.removeprefix("projects/")
        name, unit = self._meter(queued.meter, event.type)
        end = event.time + _TICK
        start = end - timedelta(milliseconds=self._window_ms)
        if queued.window_ms is not None:
            start = _EPOCH + timedelta(milliseconds=queued.window_ms)
        metadata = event.data.dimensions | {
            "window_start": _isoformat(start),
            "window_end": _isoformat(end),
            "meter": event.type,
        }
        return {
            "name": name,
            "type": "delta",
            "unit": unit,
            "volume": volume,
            "user_id": None,
            "user_name": None,
            "project_id": tenant,
            "project_name": tenant,
            "resource_id": self._resource(tenant, event),
            "timestamp": _isoformat(event.time),
            "resource_metadata": metadata,
            "source": self._config.source,
            "id": str(id_),
            "monotonic_time": None,
        }

    def _meter(self, meter: str, kind: str) -> tuple[str, str]:
        """Name and unit. Of a meter that nobody knows: its type, so that it is never taken for another."""
        for known in (meter, kind.rpartition("/")[2].replace("-", "_")):
            if known in self._names:
                return self._names[known], self._units[known]
        return kind, "1"

    def _resource(self, tenant: str, event: _Event) -> str:
        """The resource, or the tenant where the event says nothing of a part of it."""
        parts = event.data.dimensions | {"tenant": tenant, "meter": event.type}
        template = self._config.resource_id
        if all(parts.get(name) for name in PLACE.findall(template)):
            return PLACE.sub(lambda match: parts[match[1]], template)
        return tenant


def _isoformat(moment: datetime) -> str:
    """As Ceilometer's notifications have it: microseconds, and UTC as an offset."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
