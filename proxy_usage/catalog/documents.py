"""The two documents of the service catalog: typed, and read from a directory.

``Service`` and ``ServiceConfiguration`` of ``services.miloapis.com/v1alpha1`` live on a control plane that
this program never talks to; what is read here are files, or what ``kubectl get -o yaml`` printed. Lengths,
patterns and enums are those of the group's schema; the rules between fields are in ``rules``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

from proxy_usage.errors import ConfigError

API_VERSION = "services.miloapis.com/v1alpha1"


class Phase(StrEnum):
    """Life of a document; it moves one step at a time, forward only."""

    DRAFT = "Draft"
    PUBLISHED = "Published"
    DEPRECATED = "Deprecated"
    RETIRED = "Retired"


_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
ObjectName = Annotated[str, Field(max_length=63, pattern=rf"^{_LABEL}$")]
ServiceName = Annotated[str, Field(max_length=253, pattern=rf"^{_LABEL}(\.{_LABEL})+$")]
Identifier = Annotated[str, Field(min_length=1, max_length=253)]
DisplayName = Annotated[str, Field(max_length=128)]
Description = Annotated[str, Field(max_length=1024)]
Decimal = Annotated[str, Field(pattern=r"^(0|[1-9]\d*)(\.\d+)?$")]


class _Closed(BaseModel):
    """A block whose fields are all known: an unknown one is a slip of the pen."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class _Open(BaseModel):
    """A block with fields that do not matter here; they are kept, to be compared."""

    model_config = ConfigDict(frozen=True, extra="allow", alias_generator=to_camel, populate_by_name=True)


class Reference(_Closed):
    name: Identifier


class Metadata(_Open):
    name: Identifier
    namespace: str | None = None


class ServiceMetadata(Metadata):
    name: ObjectName


class Owner(_Closed):
    producer_project_ref: Reference


class ServiceSpec(_Closed):
    service_name: ServiceName
    phase: Phase
    display_name: Annotated[str, Field(min_length=1, max_length=128)]
    description: Description = ""
    owner: Owner
    dependencies: Annotated[tuple[Mapping[str, Any], ...], Field(max_length=16)] = ()
    enablement_policy: Mapping[str, Any] | None = None


class Service(_Open):
    """Who offers what; ``metadata.name`` is its slug, ``spec.service_name`` its domain."""

    metadata: ServiceMetadata
    spec: ServiceSpec


class GroupKind(_Closed):
    group: Identifier
    kind: Annotated[str, Field(min_length=1, max_length=63)]


class Label(_Closed):
    name: Annotated[str, Field(min_length=1, max_length=63)]
    description: Annotated[str, Field(max_length=512)] = ""


class ResourceType(_Closed):
    type: Identifier
    display_name: DisplayName = ""
    description: Description = ""
    gvk: GroupKind
    labels: Annotated[tuple[Label, ...], Field(max_length=64)] = ()


class Metric(_Closed):
    """A billable signal as the catalog declares it."""

    name: Identifier
    display_name: DisplayName = ""
    description: Description = ""
    kind: Literal["Delta", "Gauge", "Cumulative"]
    unit: Annotated[str, Field(min_length=1, max_length=64)]
    dimensions: Annotated[tuple[str, ...], Field(max_length=32)] = ()


class Destination(_Closed):
    monitored_resource_type: Identifier
    metrics: Annotated[tuple[str, ...], Field(min_length=1, max_length=256)]


class Billing(_Closed):
    quota_gating: Literal["OrganizationDefault", "BillingEntitlement"] = "OrganizationDefault"
    consumer_destinations: Annotated[tuple[Destination, ...], Field(max_length=64)] = ()


class Tier(_Open):
    rate: Decimal
    up_to: Decimal | None = None


class Rate(_Open):
    flat: Decimal | None = None
    tiered: tuple[Tier, ...] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Rate:
        if (self.flat is None) == (self.tiered is None):
            raise ValueError("a rate has exactly one of flat and tiered")
        return self


class UsageCharge(_Open):
    metric_ref: Identifier
    pricing_unit: Annotated[str, Field(min_length=1)]
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)]


class Charge(_Open):
    name: Identifier
    charge_type: Literal["Usage", "OneTime", "Recurring"]
    currency: Literal["USD"]
    usage: UsageCharge | None = None
    one_time: Mapping[str, Any] | None = None
    recurring: Mapping[str, Any] | None = None

    @model_validator(mode="after")
    def _matching_block(self) -> Charge:
        given = {"Usage": self.usage, "OneTime": self.one_time, "Recurring": self.recurring}
        if [name for name, block in given.items() if block is not None] != [self.charge_type]:
            raise ValueError(f"a charge of chargeType {self.charge_type} has that one block and no other")
        return self


class ConfigurationSpec(_Closed):
    service_ref: Reference
    phase: Phase
    version: Annotated[str, Field(max_length=64)] = ""
    monitored_resource_types: Annotated[tuple[ResourceType, ...], Field(max_length=128)] = ()
    metrics: Annotated[tuple[Metric, ...], Field(max_length=256)] = ()
    billing: Billing = Billing()
    charges: Annotated[tuple[Charge, ...], Field(max_length=64)] = ()
    # Nothing here is metering: allowed and not looked into.
    quota: Any = None
    user_interface: Any = None
    locations: Any = None
    provisioning: Any = None
    default_offer: Any = None


class ServiceConfiguration(_Open):
    """What a service meters and how it is billed."""

    metadata: Metadata
    spec: ConfigurationSpec


@dataclass(frozen=True, slots=True)
class Catalog:
    """What one directory declares. ``check_rules`` says whether it may be applied."""

    services: tuple[Service, ...]
    configurations: tuple[ServiceConfiguration, ...]
    order: tuple[str, ...] = ()
    """Kinds in the order in which a kustomization lists them; empty where none does."""


Document = TypeVar("Document", Service, ServiceConfiguration)

_COMPARE_HINT = (
    "the directory holds service.yaml and service-configuration.yaml, or what kubectl get -o yaml printed"
)


def load_catalog(directory: Path) -> Catalog:
    """Read every ``Service`` and ``ServiceConfiguration`` in the YAML files of ``directory`` (not below it).

    Files are recognised by what is in them, not by name; a ``List`` is opened; other kinds are left alone.

    Raises:
        ConfigError: the directory or a file cannot be read, is not YAML, or a document is not what the schema
            of its kind says (every mistake is named), or there is no ServiceConfiguration at all.
    """
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix in {".yaml", ".yml"})
    except OSError as error:
        raise ConfigError(f"catalog {directory}: {error.strerror}", hint=_COMPARE_HINT) from error
    services: list[Service] = []
    configurations: list[ServiceConfiguration] = []
    kinds: dict[str, list[str]] = {}
    listed: tuple[str, ...] = ()
    mistakes: list[str] = []
    for path in paths:
        for document in _documents(path):
            if _is_kustomization(path, document):
                listed = tuple(str(name) for name in document.get("resources") or ())
                continue
            if not str(document.get("apiVersion", "")).startswith("services.miloapis.com/"):
                continue
            kind = str(document.get("kind"))
            kinds.setdefault(path.name, []).append(kind)
            if kind == "Service":
                services.extend(_parse(Service, document, path, mistakes))
            elif kind == "ServiceConfiguration":
                configurations.extend(_parse(ServiceConfiguration, document, path, mistakes))
    if mistakes:
        raise ConfigError(f"catalog {directory} cannot be used", mistakes=tuple(mistakes))
    if not configurations:
        raise ConfigError(f"catalog {directory}: there is no ServiceConfiguration in it", hint=_COMPARE_HINT)
    order = tuple(kind for name in listed for kind in kinds.get(name, ()))
    return Catalog(tuple(services), tuple(configurations), order)


def _documents(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        documents = list(yaml.safe_load_all(path.read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"catalog {path}: {error.strerror}", hint=_COMPARE_HINT) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"catalog {path} is not YAML: {' '.join(str(error).split())}") from error
    for document in documents:
        if not isinstance(document, dict):
            continue
        if document.get("kind") == "List" and isinstance(document.get("items"), list):
            yield from (item for item in document["items"] if isinstance(item, dict))
        else:
            yield document


def _is_kustomization(path: Path, document: Mapping[str, Any]) -> bool:
    return path.stem == "kustomization" and document.get("kind") in {None, "Kustomization", "Component"}


def _parse(
    model: type[Document], document: Mapping[str, Any], path: Path, mistakes: list[str]
) -> Iterator[Document]:
    """The document, or nothing and its mistakes in ``mistakes``."""
    if document["apiVersion"] != API_VERSION:
        mistakes.append(f"{path.name}: apiVersion is {document['apiVersion']}, not {API_VERSION}")
        return
    try:
        yield model.model_validate(document)
    except ValidationError as error:
        mistakes.extend(f"{path.name}: {model.__name__} {_mistake(detail)}" for detail in error.errors())


def _mistake(detail: ErrorDetails) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "missing":
            return f"{place} is missing"
        case "extra_forbidden":
            return f"{place} is not a field"
        case "string_type":
            return f"{place} must be a string, not {reprlib.repr(detail['input'])}: quote it"
        case _:
            return f"{place}: {detail['msg']}, not {reprlib.repr(detail['input'])}"
