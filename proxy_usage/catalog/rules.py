"""Whether a catalog may be applied: the rules its admission enforces and the traps it does not see.

Each finding starts with the number of what it is about.

Rules of the admission webhooks (a document that breaks one is refused):

- W1  types, metric names and charge names are unique, charge names also once encoded as object names;
      labels, destinations and a destination's metrics are unique too
- W2  what a destination names, a type or a metric, is defined in the same document, and so is what a
      charge names; ``serviceRef`` names a Service that exists
- W3  every type, metric name and charge name is ``<serviceName>/`` and something after it
- W4  a phase stays or moves exactly one step forward
- W5  once Published: nothing billable is removed or renamed; ``gvk``, ``kind``, ``unit``, ``quotaGating``
      and whole charges are frozen
- W6  a Service's ``serviceName`` never changes

Traps (a document that falls into one is admitted and bills wrongly, or not at all):

- P1  without a display name admission passes and the fan-out to billing fails
- P2  events for a Draft document are quarantined
- P3  a metric that no destination routes is never billed, silently
- P4  a metric's dimensions and the labels of the type it is billed under are declared separately: do both
- P5  removing a dimension or a label is refused by billing, or gives the meter a new identity
- P6  a wrong kind or unit is permanent once Published: said with W5
- P8  two metrics that become the same billing object fight over it
- P9  the Service comes before its ServiceConfiguration
- P10 ``serviceRef.name`` is the Service's object name, not its domain
- P11 both objects are cluster-scoped: no namespace
- P12 Cumulative is summed like Delta: running totals would be charged again and again
- P13 a charge is frozen whole: it does not belong in the document that declares the metrics

P7, somebody else owning the object of that name, is known to the control plane alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from proxy_usage.catalog.documents import (
    Catalog,
    ConfigurationSpec,
    Metric,
    Phase,
    Service,
    ServiceConfiguration,
)

_PHASES = tuple(Phase)


def check_rules(catalog: Catalog, previous: Catalog | None = None) -> list[str]:
    """Everything in ``catalog`` that breaks a rule or falls into a trap; empty when it may be applied.

    With ``previous``, what is applied now, the rules about changes (W4, W5, W6, P5) are checked as well.
    """
    services = {service.metadata.name: service for service in catalog.services}
    findings = list(_across(catalog, services))
    for configuration in catalog.configurations:
        name = configuration.metadata.name
        checks = (_unique, _defined, _billed, _dimensions)
        found = chain(
            _scope(configuration),
            _service(configuration.spec, services),
            chain.from_iterable(check(configuration.spec) for check in checks),
        )
        findings.extend(f"{finding} (ServiceConfiguration {name})" for finding in found)
    if previous is not None:
        findings.extend(_changes(catalog, previous))
    return findings


def object_name(identifier: str) -> str:
    """Name of the object that an identifier becomes: lower case, ``/`` and ``.`` as ``-``."""
    return re.sub(r"[/.]", "-", identifier.lower())


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _across(catalog: Catalog, services: dict[str, Service]) -> Iterator[str]:
    """What is wrong between documents rather than in one."""
    for kind, documents in (("Service", catalog.services), ("ServiceConfiguration", catalog.configurations)):
        for name in _repeated(document.metadata.name for document in documents):
            yield f"W1: two documents are {kind} {name}"
    for service in services.values():
        if service.metadata.namespace is not None:
            yield f"P11: Service {service.metadata.name} is cluster-scoped and cannot have a namespace"
    kinds = [kind for kind in catalog.order if kind in {"Service", "ServiceConfiguration"}]
    if kinds != sorted(kinds):
        yield "P9: the kustomization lists a ServiceConfiguration before a Service"
    owners: dict[str, list[str]] = {}
    for configuration in catalog.configurations:
        for metric in configuration.spec.metrics:
            place = f"{metric.name} of {configuration.metadata.name}"
            owners.setdefault(object_name(metric.name), []).append(place)
    for name, places in owners.items():
        if len(places) > 1:
            yield f"P8: {' and '.join(places)} would both own the meter object {name}"


def _scope(configuration: ServiceConfiguration) -> Iterator[str]:
    if configuration.metadata.namespace is not None:
        yield "P11: the object is cluster-scoped and cannot have a namespace"


def _service(spec: ConfigurationSpec, services: dict[str, Service]) -> Iterator[str]:
    """The Service exists, and its domain begins every name."""
    slug = spec.service_ref.name
    service = services.get(slug)
    if service is None:
        by_domain = [name for name, other in services.items() if other.spec.service_name == slug]
        if by_domain:
            yield f"P10: serviceRef names the domain {slug}; the Service's object name is {by_domain[0]}"
        else:
            yield f"W2: serviceRef names {slug}, and no Service of that name is here"
        return
    prefix = f"{service.spec.service_name}/"
    for what, name in _identifiers(spec):
        if not name.startswith(prefix) or name == prefix:
            yield f"W3: {what} {name} must be {prefix} and something after it"


def _identifiers(spec: ConfigurationSpec) -> Iterator[tuple[str, str]]:
    yield from (("type", resource.type) for resource in spec.monitored_resource_types)
    yield from (("metric", metric.name) for metric in spec.metrics)
    yield from (("charge", charge.name) for charge in spec.charges)


def _unique(spec: ConfigurationSpec) -> Iterator[str]:
    names = Counter(_identifiers(spec))
    yield from (f"W1: {what} {name} is declared {n} times" for (what, name), n in names.items() if n > 1)
    charges = {charge.name for charge in spec.charges}
    for encoded in _repeated(map(object_name, charges)):
        yield f"W1: two charges are both called {encoded} once encoded"
    for resource in spec.monitored_resource_types:
        for label in _repeated(label.name for label in resource.labels):
            yield f"W1: label {label} of type {resource.type} is declared twice"
    destinations = spec.billing.consumer_destinations
    for name in _repeated(destination.monitored_resource_type for destination in destinations):
        yield f"W1: type {name} has two destinations"
    for destination in destinations:
        for name in _repeated(destination.metrics):
            yield f"W1: the destination of {destination.monitored_resource_type} names metric {name} twice"


def _defined(spec: ConfigurationSpec) -> Iterator[str]:
    types = {resource.type for resource in spec.monitored_resource_types}
    metrics = {metric.name for metric in spec.metrics}
    for destination in spec.billing.consumer_destinations:
        if destination.monitored_resource_type not in types:
            yield f"W2: a destination names type {destination.monitored_resource_type}, which is not defined"
        for name in destination.metrics:
            if name not in metrics:
                yield f"W2: a destination names metric {name}, which is not defined"
    for charge in spec.charges:
        if charge.usage is not None and charge.usage.metric_ref not in metrics:
            yield f"W2: charge {charge.name} names metric {charge.usage.metric_ref}, which is not defined"


def _billed(spec: ConfigurationSpec) -> Iterator[str]:
    """What admission lets through and billing then cannot use."""
    for what, name, display in chain(
        (("type", resource.type, resource.display_name) for resource in spec.monitored_resource_types),
        (("metric", metric.name, metric.display_name) for metric in spec.metrics),
    ):
        if not display:
            yield f"P1: {what} {name} has no displayName, which billing demands"
    if spec.phase is Phase.DRAFT:
        yield "P2: the phase is Draft: events for its metrics would be quarantined"
    routed = {name for destination in spec.billing.consumer_destinations for name in destination.metrics}
    for metric in spec.metrics:
        if metric.name not in routed:
            yield f"P3: no destination routes metric {metric.name}: it would never be billed"
        if metric.kind == "Cumulative":
            yield f"P12: metric {metric.name} is Cumulative, which is summed like Delta; declare Delta"
    for charge in spec.charges:
        yield f"P13: charge {charge.name} would be frozen here; patch it in by a component of its own"


def _dimensions(spec: ConfigurationSpec) -> Iterator[str]:
    metrics = {metric.name: metric for metric in spec.metrics}
    for metric in spec.metrics:
        for name in _repeated(metric.dimensions):
            yield f"W1: metric {metric.name} declares dimension {name} twice"
    labels = {r.type: {label.name for label in r.labels} for r in spec.monitored_resource_types}
    for destination in spec.billing.consumer_destinations:
        declared = labels.get(destination.monitored_resource_type, set())
        dimensions = [set(metrics[name].dimensions) for name in destination.metrics if name in metrics]
        used = set[str]().union(*dimensions)
        resource = destination.monitored_resource_type
        for name in sorted(used - declared):
            yield f"P4: dimension {name} is not a label of type {resource}"
        for name in sorted(declared - used):
            yield f"P4: label {name} of type {resource} is a dimension of no metric"


def _changes(catalog: Catalog, previous: Catalog) -> Iterator[str]:
    old_services = {service.metadata.name: service for service in previous.services}
    for service in catalog.services:
        old = old_services.get(service.metadata.name)
        if old is None:
            continue
        if service.spec.service_name != old.spec.service_name:
            yield f"W6: Service {service.metadata.name} is {old.spec.service_name}: serviceName never changes"
        yield from _phase(f"Service {service.metadata.name}", old.spec.phase, service.spec.phase)
    old_configurations = {
        configuration.metadata.name: configuration for configuration in previous.configurations
    }
    for configuration in catalog.configurations:
        name = configuration.metadata.name
        before = old_configurations.get(name)
        if before is None:
            continue
        yield from _phase(f"ServiceConfiguration {name}", before.spec.phase, configuration.spec.phase)
        found = list(_only_added(before.spec, configuration.spec))
        if before.spec.phase is Phase.PUBLISHED:
            found.extend(_frozen(before.spec, configuration.spec))
        yield from (f"{finding} (ServiceConfiguration {name})" for finding in found)


def _phase(what: str, old: Phase, new: Phase) -> Iterator[str]:
    if _PHASES.index(new) - _PHASES.index(old) not in {0, 1}:
        yield f"W4: {what} cannot go from {old} to {new}: one step forward at a time"


def _frozen(old: ConfigurationSpec, new: ConfigurationSpec) -> Iterator[str]:
    types = {resource.type: resource for resource in new.monitored_resource_types}
    for resource in old.monitored_resource_types:
        if resource.type not in types:
            yield f"W5: type {resource.type} is Published and cannot be removed or renamed"
        elif types[resource.type].gvk != resource.gvk:
            yield f"W5: gvk of type {resource.type} is frozen"
    metrics = {metric.name: metric for metric in new.metrics}
    for metric in old.metrics:
        yield from _frozen_metric(metric, metrics.get(metric.name))
    charges = {charge.name: charge for charge in new.charges}
    for charge in old.charges:
        if charges.get(charge.name) != charge:
            yield f"W5: charge {charge.name} is Published and cannot be changed or removed"
    if old.billing.quota_gating != new.billing.quota_gating:
        yield f"W5: quotaGating is frozen as {old.billing.quota_gating}"
    routes = {d.monitored_resource_type: set(d.metrics) for d in new.billing.consumer_destinations}
    for destination in old.billing.consumer_destinations:
        name = destination.monitored_resource_type
        if name not in routes:
            yield f"W5: the destination of type {name} cannot be removed"
            continue
        for metric_name in sorted(set(destination.metrics) - routes[name]):
            yield f"W5: metric {metric_name} cannot be taken out of the destination of type {name}"


def _frozen_metric(old: Metric, new: Metric | None) -> Iterator[str]:
    if new is None:
        yield f"W5: metric {old.name} is Published and cannot be removed or renamed"
        return
    for field, was, is_now in (("kind", old.kind, new.kind), ("unit", old.unit, new.unit)):
        if is_now != was:
            yield f"W5: {field} of metric {old.name} is frozen as {was}: declare a new one, {old.name}/v2"


def _only_added(old: ConfigurationSpec, new: ConfigurationSpec) -> Iterator[str]:
    """Dimensions and labels: once billing has seen them (not while Draft) they may only be added to."""
    if old.phase is Phase.DRAFT:
        return
    metrics = {metric.name: metric for metric in new.metrics}
    for metric in old.metrics:
        if metric.name in metrics:
            for name in sorted(set(metric.dimensions) - set(metrics[metric.name].dimensions)):
                yield f"P5: dimension {name} of metric {metric.name} cannot be removed"
    types = {resource.type: resource for resource in new.monitored_resource_types}
    for resource in old.monitored_resource_types:
        if resource.type in types:
            kept = {label.name for label in types[resource.type].labels}
            for name in sorted({label.name for label in resource.labels} - kept):
                yield f"P5: label {name} of type {resource.type} cannot be removed"
