"""Rows that are not metered: by what they say, with the reason they are counted under."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from proxy_usage.config.fields import Regex, Section
from proxy_usage.config.mistakes import Wrong

_REGEXES = ("flag", "details", "route", "method", "log_name", "node")
_STATUS = re.compile(r"[1-5](xx|[0-9]{2})", re.ASCII)


def _statuses(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else (value,)
    texts = tuple(str(item) for item in items if not isinstance(item, bool))
    if not texts or len(texts) != len(items) or not all(_STATUS.fullmatch(text) for text in texts):
        raise Wrong(f"{value!r} is not a status", "write 404, 5xx or a list of these; 100 to 599")
    return texts


_STATUS_SCHEMA = {
    "type": ["integer", "string"],
    "minimum": 100,
    "maximum": 599,
    "pattern": "^[1-5](xx|[0-9]{2})$",
}
Statuses = Annotated[
    tuple[str, ...],
    BeforeValidator(_statuses),
    WithJsonSchema({"anyOf": [_STATUS_SCHEMA, {"type": "array", "minItems": 1, "items": _STATUS_SCHEMA}]}),
]


class SkipCondition(Section):
    """All keys that are given must match: ``status`` as a number or class, the others as a whole by regex."""

    flag: Regex | None = None
    """Short response flag, as in Envoy's %RESPONSE_FLAGS%: ``NR``, ``UF|UH``."""
    details: Regex | None = None
    """Response code details: ``route_not_found``."""
    status: Statuses | None = None
    """``404``, ``5xx`` or a list of these."""
    route: Regex | None = None
    """The route's name."""
    method: Regex | None = None
    """`GET`, `POST` and so on."""
    log_name: Regex | None = None
    """The logger's name."""
    node: Regex | None = None
    """The node id."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.status is None and not self.regexes:
            raise Wrong(
                "no condition: this would skip every row", f"give one of status, {', '.join(_REGEXES)}"
            )
        return self

    @property
    def regexes(self) -> Mapping[str, re.Pattern[str]]:
        """The given keys other than status, compiled; use ``fullmatch``."""
        return {key: re.compile(text) for key in _REGEXES if (text := getattr(self, key)) is not None}

    @property
    def statuses(self) -> frozenset[int] | None:
        """The status codes that match, or None when the status does not matter."""
        if self.status is None:
            return None
        codes: set[int] = set()
        for text in self.status:
            low = int(text.replace("x", "0"))
            codes.update(range(low, low + 100) if text.endswith("xx") else (low,))
        return frozenset(codes)

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class SkipRule(Section):
    """A condition, and the name its rows are counted under."""

    if_: SkipCondition = Field(alias="if")
    reason: str = Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")
    """Label of the metric: ``no_route``."""
