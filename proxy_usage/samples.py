"""One sample event per meter, read back by the CloudEvents SDK before anything is billed.

What an event says is decided by the configuration (type, source, dimensions) and frozen once minted; a
mistake that an independent reader would find must be found at the start, not in a queue of a million events.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from proxy_usage.errors import ConfigError, DecodeError
from proxy_usage.events import Mint, rfc3339
from proxy_usage.model import MAX_EVENT_VALUE, Key

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
