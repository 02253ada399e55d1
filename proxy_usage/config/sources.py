"""Where the tenant and the dimensions of a row are read from.

A source is exactly one of the keys ``custom_tag``, ``dynamic_metadata``, ``request_header``, ``route_name``,
``authority``, ``sni``, ``node`` and ``literal``; ``pattern`` picks a part of its text and ``map_file``
translates it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    PlainValidator,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from proxy_usage.config.fields import Expanded, FilePath, Flag, Regex, Section, Text, compile_regex
from proxy_usage.config.maps import is_label, load_map
from proxy_usage.config.mistakes import Wrong, WrongMany
from proxy_usage.model import Field, FieldKind

SOURCES = tuple(kind.value for kind in FieldKind)


def _just_true(value: object) -> Literal[True]:
    if value is True or (isinstance(value, Expanded) and value.lower() == "true"):
        return True
    raise Wrong("must be true", "write true, or remove the key; pattern: picks a part of the text")


def _route_name(value: object) -> str | Literal[True]:
    if value is True or (isinstance(value, Expanded) and value.lower() == "true"):
        return True
    if not isinstance(value, str) or not value:
        raise Wrong(
            "must be a regular expression or true",
            "e.g. '^httproute/(?P<value>[^/]+)/'; true takes the whole route name",
        )
    compile_regex(value)
    return value


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


OnlyTrue = Annotated[Literal[True], PlainValidator(_just_true), WithJsonSchema({"const": True})]
RouteName = Annotated[
    str | Literal[True],
    PlainValidator(_route_name),
    WithJsonSchema({"anyOf": [{"const": True}, {"type": "string", "format": "regex", "minLength": 1}]}),
]
Path_ = Annotated[tuple[Text, ...], BeforeValidator(_one_or_more)]


class DynamicMetadata(Section):
    """A value in the row's dynamic metadata. Route metadata is not there: carry it by a custom tag."""

    filter: Text
    """Name space of the metadata, which is the name of an Envoy filter."""
    path: Path_
    """Keys from the name space down to the value."""


class SourceConfig(Section):
    """One readable field and what is taken of its text."""

    custom_tag: Text | None = None
    """A custom tag of the logger."""
    dynamic_metadata: DynamicMetadata | None = None
    """A value in the dynamic metadata."""
    request_header: Text | None = None
    """A header that the logger copies: safe only where Envoy takes the client's copy away."""
    route_name: RouteName | None = None
    """A regular expression that is the pattern at the same time, or true for the whole name."""
    authority: OnlyTrue | None = None
    """`true`: the host that was asked for, without its port."""
    sni: OnlyTrue | None = None
    """`true`: the server name of the TLS handshake."""
    node: Text | None = None
    """``id``, ``cluster``, ``locality.region``, ``.zone``, ``.sub_zone`` or ``metadata.a.b``."""
    literal: str | None = None
    """The same text for all."""
    pattern: Regex | None = None
    """What of the text counts: its group `tenant`, `value` or `key`, else all of it."""
    map_file: FilePath | None = None
    """YAML or JSON, text to text; keys may be `*.example.com`. Texts that are not in it do not match."""

    _mapping: Mapping[str, str] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        wrong = [*self._source_mistakes(given), *self._extra_mistakes()]
        if self.map_file is not None:
            try:
                # A frozen model's private attribute: what the file held when the configuration was loaded.
                self._mapping = load_map(self.map_file, labels=self._translates_to_tenant())
            except WrongMany as error:
                wrong.extend(error.mistakes)
        if len(wrong) == 1:
            raise wrong[0]
        if wrong:
            raise WrongMany(tuple(wrong))
        return self

    def _translates_to_tenant(self) -> bool:
        return False

    def _source_mistakes(self, given: list[str]) -> list[Wrong]:
        if not given:
            return [Wrong("names no source", f"give exactly one of {', '.join(SOURCES)}")]
        if len(given) > 1:
            return [
                Wrong(
                    f"has {len(given)} sources: {', '.join(given)}",
                    "keep one; write another entry for the other",
                )
            ]
        if self.node is not None and not _node_path_known(self.node):
            return [
                Wrong(
                    f"a node has no {self.node!r}",
                    "give id, cluster, locality.region, locality.zone, locality.sub_zone or metadata.KEY",
                    at=("node",),
                )
            ]
        return []

    def _extra_mistakes(self) -> list[Wrong]:
        wrong = []
        if self.pattern is not None and isinstance(self.route_name, str):
            wrong.append(
                Wrong(
                    "route_name already is a regular expression",
                    "remove pattern, or write route_name: true beside it",
                    at=("pattern",),
                )
            )
        if self.literal is not None:
            wrong.extend(
                Wrong(f"{key} does nothing to a literal", f"remove {key}", at=(key,))
                for key in ("pattern", "map_file")
                if getattr(self, key) is not None
            )
        return wrong

    @property
    def field(self) -> Field:
        """What is read of a row; request headers in lower case, as Envoy logs them."""
        if self.dynamic_metadata is not None:
            metadata = self.dynamic_metadata
            return Field(FieldKind.DYNAMIC_METADATA, (metadata.filter, *metadata.path))
        if self.custom_tag is not None:
            return Field(FieldKind.CUSTOM_TAG, (self.custom_tag,))
        if self.request_header is not None:
            return Field(FieldKind.REQUEST_HEADER, (self.request_header.lower(),))
        if self.node is not None:
            return Field(FieldKind.NODE, tuple(self.node.split(".")))
        if self.literal is not None:
            return Field(FieldKind.LITERAL, (self.literal,))
        kinds = (FieldKind.ROUTE_NAME, FieldKind.AUTHORITY, FieldKind.SNI)
        return Field(next(kind for kind in kinds if getattr(self, kind.value) is not None))

    def __str__(self) -> str:
        """The source, its pattern and the name of its map file, in a line."""
        parts: dict[str, object] = {name: getattr(self, name) for name in (*SOURCES, "pattern")}
        if self.dynamic_metadata is not None:
            parts["dynamic_metadata"] = ".".join((self.dynamic_metadata.filter, *self.dynamic_metadata.path))
        parts |= {"map_file": None if self.map_file is None else self.map_file.name}
        return ", ".join(f"{name}: {value}" for name, value in parts.items() if value is not None)

    @property
    def regex(self) -> re.Pattern[str] | None:
        """The pattern to search the text with, or None when all of it is taken.

        Its named group (``key`` with a map_file, else ``tenant`` or ``value``) selects the text; without one,
        the whole match.
        """
        if isinstance(self.route_name, str):
            return re.compile(self.route_name)
        return None if self.pattern is None else re.compile(self.pattern)

    @property
    def mapping(self) -> Mapping[str, str] | None:
        """What ``map_file`` held when the configuration was loaded. A key may be ``*.example.com``."""
        return self._mapping

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class RuleConfig(SourceConfig):
    """A tenant rule: the first rule whose field a row has names the tenant."""

    trusted: Flag = False
    """For request_header: the operator states that Envoy removes what clients send under this name."""

    def _translates_to_tenant(self) -> bool:
        return True

    def _extra_mistakes(self) -> list[Wrong]:
        wrong = super()._extra_mistakes()
        if self.request_header is not None and not self.trusted:
            wrong.append(
                Wrong(
                    f"clients can send {self.request_header} themselves, and name the tenant who pays",
                    "make Envoy remove or overwrite the client's copy, then write trusted: true beside it",
                    at=("request_header",),
                )
            )
        if self.trusted and self.request_header is None:
            wrong.append(Wrong("only a request_header can be trusted", "remove trusted", at=("trusted",)))
        if self.literal is not None and not is_label(self.literal):
            wrong.append(
                Wrong(
                    f"tenant {self.literal!r} is not a DNS label, the endpoint would lose its events",
                    "use lower-case letters, digits and '-', at most 63",
                    at=("literal",),
                )
            )
        return wrong


class DimensionConfig(SourceConfig):
    """A dimension of the events, and its value where the source has none."""

    default: str = ""
    """Where the source has no value."""


def _node_path_known(path: str) -> bool:
    head, _, rest = path.partition(".")
    if head == "metadata":
        return bool(rest) and all(rest.split("."))
    return path in ("id", "cluster", "locality.region", "locality.zone", "locality.sub_zone")
