"""One sample event per meter, read back by the CloudEvents SDK before anything is billed.

What an event says is decided by the configuration (type, source, dimensions) and frozen once minted; a
mistake that an independent reader would find must be found at the start, not in a queue of a million events.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec
from ulid import ULID

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.errors import ConfigError, DecodeError
from proxy_usage.events import Mint, rfc3339
from proxy_usage.model import MAX_EVENT_VALUE, Key
from proxy_usage.outputs import FORMATS
from proxy_usage.store import Queued

_ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
_TENANT = "sample-project"
_TIME_MS = 1_767_225_599_999
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def check_samples(mint: Mint, defaults: Sequence[str]) -> None:
    """Makes an event of each meter and checks that the SDK reads what was meant.

    Args:
        defaults: the dimensions' defaults, in their order.

    Raises:
        ConfigError: an event is not a CloudEvent, or says something else than was meant.
    """
    mistakes = []
    key = Key(_TENANT, tuple(defaults))
    for index, meter in enumerate(mint.meters):
        body = mint.body(_ID, index, key, _TIME_MS, MAX_EVENT_VALUE)
        meant = {
            "specversion": "1.0",
            "id": _ID,
            "source": mint.source,
            "type": meter.type,
            "subject": f"projects/{_TENANT}",
            "time": rfc3339(_TIME_MS),
            "datacontenttype": "application/json",
            "data": {
                "value": str(MAX_EVENT_VALUE),
                "dimensions": dict(zip(mint.dimensions, key.dimensions, strict=True)),
            },
        }
        try:
            read = read_event(body)
        except DecodeError as error:
            mistakes.append(f"meters.{meter.name}: {error.message}")
            continue
        mistakes.extend(
            f"meters.{meter.name}: {name} is read as {read.get(name)!r}, meant was {value!r}"
            for name, value in meant.items()
            if read.get(name) != value
        )
    if mistakes:
        raise ConfigError(
            "the events of this configuration are not sound CloudEvents",
            hint="correct the meters' types and the outputs' source",
            mistakes=tuple(mistakes),
        )


def check_formats(outputs: Sequence[OutputConfig], mint: Mint, defaults: Sequence[str]) -> None:
    """Encodes an event of each meter for each output that posts, and reads the request as its receiver would.

    Args:
        defaults: the dimensions' defaults, in their order.

    Raises:
        ConfigError: a request says something else than was meant.
    """
    key = Key(_TENANT, tuple(defaults))
    dimensions = dict(zip(mint.dimensions, key.dimensions, strict=True))
    for output in outputs:
        if output.format not in FORMATS:
            continue
        wire = FORMATS[output.format](output, mint.length_ms)
        for index, meter in enumerate(mint.meters):
            event = mint.body(_ID, index, key, _TIME_MS, MAX_EVENT_VALUE)
            queued = Queued(1, _ID, _TENANT, meter.name, MAX_EVENT_VALUE, event)
            sent = msgspec.json.decode(wire.encode([queued]).body)
            (said,) = sent if isinstance(sent, list) else (sent,)
            if output.format == "ceilometer":
                meant = {
                    "type": "delta",
                    "volume": MAX_EVENT_VALUE,
                    "project_id": _TENANT,
                    "id": str(ULID.from_str(_ID).to_uuid()),
                }
                said["resource_metadata"] = {name: said["resource_metadata"].get(name) for name in dimensions}
                meant["resource_metadata"] = dimensions
            else:
                meant = msgspec.json.decode(event)
            wrong = {name: said.get(name) for name, value in meant.items() if said.get(name) != value}
            if wrong:
                raise ConfigError(
                    f"outputs {output.name!r}: meters.{meter.name} would be sent as {wrong!r}",
                    hint="this is a defect of proxy-usage: report it with your configuration",
                )


def read_event(body: bytes) -> dict[str, object]:
    """An event's attributes and its ``data``, as the CloudEvents SDK reads them; ``time`` as RFC 3339 text.

    Raises:
        DecodeError: it is not a CloudEvent.
    """
    # Imported here: most verbs read no event.
    from cloudevents.core.exceptions import BaseCloudEventException, CloudEventValidationError
    from cloudevents.core.formats.json import JSONFormat

    try:
        event = JSONFormat().read(None, body)
    except CloudEventValidationError as error:
        reasons = "; ".join(f"{name}: {one}" for name, found in error.errors.items() for one in found)
        raise DecodeError(f"not a CloudEvent: {reasons}") from error
    except (BaseCloudEventException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DecodeError(f"not a CloudEvent: {error}") from error
    read: dict[str, object] = dict(event.get_attributes())
    time = event.get_time()
    if time is not None:
        read["time"] = rfc3339((time - _EPOCH) // timedelta(milliseconds=1))
    read["data"] = event.get_data()
    return read
