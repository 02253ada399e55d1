"""What the program sends against what the catalog declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from proxy_usage.catalog.documents import Catalog, Metric, Phase
from proxy_usage.model import Meter

WARNING = "warning: "
"""Begins a finding that does not stop usage from being billed."""


class _Declared(NamedTuple):
    metric: Metric
    phase: Phase
    configuration: str
    routed: bool


def check_config(catalog: Catalog, meters: Sequence[Meter], dimension_names: Sequence[str]) -> list[str]:
    """Everything the program would send that the catalog does not declare so, and the reverse.

    An event that differs is accepted by the endpoint and then quarantined, or never billed. What is declared
    and not sent is a finding that starts with ``WARNING``: the catalog may serve other producers, too.
    """
    declared: dict[str, _Declared] = {}
    for configuration in catalog.configurations:
        spec = configuration.spec
        routed = {name for destination in spec.billing.consumer_destinations for name in destination.metrics}
        for metric in spec.metrics:
            declared[metric.name] = _Declared(
                metric, spec.phase, configuration.metadata.name, metric.name in routed
            )
    findings: list[str] = []
    for meter in meters:
        found = declared.get(meter.type)
        if found is None:
            findings.append(f"meter {meter.name}: no ServiceConfiguration declares {meter.type}")
        else:
            findings.extend(
                f"meter {meter.name}: {what}" for what in _differences(found, meter, dimension_names)
            )
    sent = {meter.type for meter in meters}
    findings.extend(
        f"{WARNING}{name} is declared by {found.configuration} and no meter sends it"
        for name, found in declared.items()
        if name not in sent and found.routed
    )
    dimensions = {
        name: None for meter in sent & declared.keys() for name in declared[meter].metric.dimensions
    }
    findings.extend(
        f"{WARNING}dimension {name} is declared and not configured: its events would not carry it"
        for name in sorted(dimensions.keys() - set(dimension_names))
    )
    return findings


def _differences(found: _Declared, meter: Meter, dimension_names: Sequence[str]) -> Iterator[str]:
    metric = found.metric
    if metric.unit != meter.unit:
        yield f"its unit is {meter.unit}, and {metric.name} is declared in {metric.unit}"
    if metric.kind != "Delta":
        yield f"{metric.name} is declared as {metric.kind}; what is sent is Delta"
    if not found.routed:
        yield f"{metric.name} has no billing destination in {found.configuration}: it would never be billed"
    if found.phase not in {Phase.PUBLISHED, Phase.DEPRECATED}:
        yield f"{found.configuration} is {found.phase}: its events would be quarantined"
    for name in dimension_names:
        if name not in metric.dimensions:
            yield f"dimension {name} is not declared for {metric.name}: its events would be quarantined"
