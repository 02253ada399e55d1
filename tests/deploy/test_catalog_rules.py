"""Every rule and every trap of the service catalog: a document that breaks it, beside the shipped one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy_usage.catalog import WARNING, Catalog, check_config, check_rules, load_catalog
from proxy_usage.catalog.rules import object_name
from proxy_usage.model import Meter, Quantity

COMPONENT = Path(__file__).parents[2] / "config/components/service-catalog"
REQUESTS = "networking.datumapis.com/gateway/requests"
ROUTE = "networking.datumapis.com/HTTPRoute"

Documents = dict[str, Any]
"""The two documents, as ``service`` and ``configuration``; ``more`` for others."""


def shipped() -> Documents:
    names = {"service": "service.yaml", "configuration": "service-configuration.yaml"}
    return {key: yaml.safe_load((COMPONENT / name).read_text("utf-8")) for key, name in names.items()} | {
        "more": []
    }


def write(directory: Path, documents: Documents) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    every = [documents["service"], documents["configuration"], *documents["more"]]
    (directory / "all.yaml").write_text(yaml.safe_dump_all(every), "utf-8")
    return directory


Mutation = Callable[[Documents], object]


def spec(documents: Documents) -> dict[str, Any]:
    found: dict[str, Any] = documents["configuration"]["spec"]
    return found


def metric(documents: Documents, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = spec(documents)["metrics"][index]
    return found


def resource(documents: Documents) -> dict[str, Any]:
    found: dict[str, Any] = spec(documents)["monitoredResourceTypes"][0]
    return found


def destinations(documents: Documents) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec(documents)["billing"]["consumerDestinations"]
    return found


def charge(name: str = REQUESTS, **more: Any) -> dict[str, Any]:
    usage = {"metricRef": REQUESTS, "pricingUnit": "request", "rates": [{"flat": "0.1"}]}
    return {"name": name, "chargeType": "Usage", "currency": "USD", "usage": usage} | more


def put(of: dict[str, Any], **values: Any) -> None:
    of.update(values)


def both(first: Mutation, second: Mutation) -> Mutation:
    def change(documents: Documents) -> None:
        first(documents)
        second(documents)

    return change


def charges(*given: dict[str, Any]) -> Mutation:
    return lambda documents: put(spec(documents), charges=list(given))


def extra_metric(documents: Documents, **values: Any) -> None:
    added = copy.deepcopy(metric(documents)) | values
    spec(documents)["metrics"].append(added)
    destinations(documents)[0]["metrics"].append(added["name"])


def second_configuration(documents: Documents) -> None:
    other = copy.deepcopy(documents["configuration"])
    other["metadata"]["name"] = "networking-again"
    documents["more"].append(other)


def rename_service(documents: Documents) -> None:
    documents["service"]["spec"]["serviceName"] = "net.example.com"


def findings(tmp_path: Path, change: Mutation, before: Mutation | None = None) -> list[str]:
    documents = shipped()
    change(documents)
    previous: Catalog | None = None
    if before is not None:
        old = shipped()
        before(old)
        previous = load_catalog(write(tmp_path / "old", old))
    return check_rules(load_catalog(write(tmp_path / "new", documents)), previous)


STANDING: list[tuple[str, Mutation, str]] = [
    (
        "W1",
        lambda d: spec(d)["metrics"].append(copy.deepcopy(metric(d))),
        f"metric {REQUESTS} is declared 2 times",
    ),
    ("W1", lambda d: spec(d)["monitoredResourceTypes"].append(copy.deepcopy(resource(d))), f"type {ROUTE}"),
    ("W1", charges(charge(), charge()), f"charge {REQUESTS} is declared 2 times"),
    ("W1", charges(charge(f"{REQUESTS}/a.b"), charge(f"{REQUESTS}/A-b")), "once encoded"),
    ("W1", lambda d: resource(d)["labels"].append({"name": "region"}), "label region"),
    ("W1", lambda d: destinations(d).append(copy.deepcopy(destinations(d)[0])), "two destinations"),
    ("W1", lambda d: destinations(d)[0]["metrics"].append(REQUESTS), "twice"),
    ("W1", lambda d: metric(d)["dimensions"].append("region"), "dimension region twice"),
    ("W1", lambda d: d["more"].append(d["service"]), "two documents are Service"),
    ("W2", lambda d: destinations(d)[0]["metrics"].append(f"{REQUESTS}2"), f"metric {REQUESTS}2"),
    ("W2", lambda d: put(destinations(d)[0], monitoredResourceType=f"{ROUTE}2"), f"type {ROUTE}2"),
    ("W2", charges(charge(usage=charge()["usage"] | {"metricRef": "x/y"})), "metric x/y"),
    ("W2", lambda d: put(spec(d)["serviceRef"], name="compute"), "no Service of that name"),
    ("W3", rename_service, f"metric {REQUESTS} must be net.example.com/"),
    ("W3", lambda d: put(resource(d), type="networking.datumapis.com/"), "type networking.datumapis.com/"),
    ("W3", charges(charge("compute.datumapis.com/x")), "charge compute.datumapis.com/x"),
    ("P1", lambda d: metric(d).pop("displayName"), f"metric {REQUESTS}"),
    ("P1", lambda d: put(resource(d), displayName=""), f"type {ROUTE}"),
    ("P2", lambda d: put(spec(d), phase="Draft"), "Draft"),
    ("P3", lambda d: destinations(d)[0]["metrics"].remove(REQUESTS), REQUESTS),
    ("P4", lambda d: metric(d)["dimensions"].append("zone"), "dimension zone is not a label"),
    ("P4", lambda d: resource(d)["labels"].append({"name": "zone"}), "label zone"),
    (
        "P8",
        second_configuration,
        f"{REQUESTS} of networking-datumapis-com and {REQUESTS} of networking-again",
    ),
    ("P8", lambda d: extra_metric(d, name=REQUESTS.replace("datumapis.", "datumapis-")), "would both own"),
    (
        "P10",
        lambda d: put(spec(d)["serviceRef"], name="networking.datumapis.com"),
        "networking-datumapis-com",
    ),
    ("P11", lambda d: put(d["service"]["metadata"], namespace="usage-system"), "Service"),
    ("P11", lambda d: put(d["configuration"]["metadata"], namespace="usage-system"), "the object"),
    ("P12", lambda d: put(metric(d), kind="Cumulative"), REQUESTS),
    ("P13", charges(charge()), REQUESTS),
]


@pytest.mark.parametrize(
    ("code", "change", "says"), STANDING, ids=[f"{c}-{n}" for n, (c, *_) in enumerate(STANDING)]
)
def test_a_document_that_breaks_a_rule_is_told_which(
    code: str, change: Mutation, says: str, tmp_path: Path
) -> None:
    assert any(found.startswith(f"{code}:") and says in found for found in findings(tmp_path, change))


def unchanged(_: Documents) -> None:
    return None


def deprecated(documents: Documents) -> None:
    documents["service"]["spec"]["phase"] = "Deprecated"
    put(spec(documents), phase="Deprecated")


def draft(documents: Documents) -> None:
    documents["service"]["spec"]["phase"] = "Draft"
    put(spec(documents), phase="Draft")


CHANGES: list[tuple[str, Mutation, Mutation, str]] = [
    ("W4", deprecated, unchanged, "ServiceConfiguration networking-datumapis-com cannot go from Deprecated"),
    ("W4", deprecated, unchanged, "Service networking-datumapis-com cannot go from Deprecated to Published"),
    ("W4", draft, deprecated, "from Draft to Deprecated"),
    ("W4", unchanged, lambda d: put(spec(d), phase="Retired"), "from Published to Retired"),
    ("W5", unchanged, lambda d: put(spec(d), monitoredResourceTypes=[]), f"type {ROUTE} is Published"),
    ("W5", unchanged, lambda d: put(resource(d)["gvk"], kind="GRPCRoute"), "gvk"),
    ("W5", unchanged, lambda d: spec(d)["metrics"].pop(0), f"metric {REQUESTS} is Published"),
    (
        "W5",
        unchanged,
        lambda d: put(metric(d), kind="Gauge"),
        f"kind of metric {REQUESTS} is frozen as Delta",
    ),
    ("W5", unchanged, lambda d: put(metric(d), unit="1"), f"declare a new one, {REQUESTS}/v2"),
    ("W5", charges(charge()), unchanged, f"charge {REQUESTS}"),
    ("W5", charges(charge()), charges(charge(displayName="Requests")), f"charge {REQUESTS}"),
    ("W5", unchanged, lambda d: put(spec(d)["billing"], quotaGating="BillingEntitlement"), "quotaGating"),
    ("W5", unchanged, lambda d: put(spec(d)["billing"], consumerDestinations=[]), "destination of type"),
    (
        "W5",
        unchanged,
        lambda d: destinations(d)[0]["metrics"].remove(REQUESTS),
        f"{REQUESTS} cannot be taken out",
    ),
    ("W6", unchanged, rename_service, "serviceName never changes"),
    ("P5", unchanged, lambda d: metric(d)["dimensions"].remove("region"), "dimension region"),
    ("P5", unchanged, lambda d: resource(d)["labels"].pop(0), "label region"),
    ("P5", deprecated, lambda d: metric(d)["dimensions"].remove("region"), "dimension region"),
]


@pytest.mark.parametrize(
    ("code", "before", "change", "says"), CHANGES, ids=[f"{c}-{n}" for n, (c, *_) in enumerate(CHANGES)]
)
def test_a_change_that_breaks_a_rule_is_told_which(
    code: str, before: Mutation, change: Mutation, says: str, tmp_path: Path
) -> None:
    assert any(found.startswith(f"{code}:") and says in found for found in findings(tmp_path, change, before))


def add_dimension(documents: Documents) -> None:
    resource(documents)["labels"].append({"name": "zone", "description": "Zone of the proxy."})
    for index in range(4):
        metric(documents, index)["dimensions"].append("zone")


def reword(documents: Documents) -> None:
    put(documents["service"]["spec"], displayName="Edge", description="Other words.")
    put(resource(documents), displayName="Route", description="Other words.")
    put(metric(documents), displayName="Requests", description="Other words.")


def add_route_type(documents: Documents) -> None:
    added = copy.deepcopy(resource(documents)) | {"type": "networking.datumapis.com/TCPRoute"}
    spec(documents)["monitoredResourceTypes"].append(added)
    name = "networking.datumapis.com/gateway/connections"
    spec(documents)["metrics"].append(copy.deepcopy(metric(documents)) | {"name": name})
    destinations(documents).append({"monitoredResourceType": added["type"], "metrics": [name]})


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (unchanged, reword),
        (unchanged, add_dimension),
        (unchanged, lambda d: extra_metric(d, name=f"{REQUESTS}/v2", unit="1")),
        (unchanged, add_route_type),
        (unchanged, deprecated),
        (draft, unchanged),
        (draft, lambda d: put(metric(d), unit="1")),
        (both(draft, add_dimension), unchanged),
        (deprecated, both(deprecated, lambda d: put(metric(d), unit="1"))),
    ],
    ids=[
        "words",
        "dimension",
        "metric",
        "type",
        "next-phase",
        "publish",
        "draft-unit",
        "draft-dimension",
        "thawed",
    ],
)
def test_what_may_change_passes(before: Mutation, change: Mutation, tmp_path: Path) -> None:
    assert findings(tmp_path, change, before) == []


def test_a_charge_that_stays_as_it_is_breaks_nothing_new(tmp_path: Path) -> None:
    found = findings(tmp_path, charges(charge()), charges(charge()))
    assert [finding.split(":")[0] for finding in found] == ["P13"]


@pytest.mark.parametrize(
    ("order", "codes"),
    [
        (["service.yaml", "service-configuration.yaml"], []),
        (["service-configuration.yaml", "service.yaml"], ["P9"]),
        (["elsewhere.yaml", "service-configuration.yaml"], []),
    ],
)
def test_the_service_is_listed_before_its_configuration(
    order: list[str], codes: list[str], tmp_path: Path
) -> None:
    for name in ("service.yaml", "service-configuration.yaml"):
        (tmp_path / name).write_text((COMPONENT / name).read_text("utf-8"), "utf-8")
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump({"kind": "Component", "resources": order}), "utf-8"
    )
    assert [found.split(":")[0] for found in check_rules(load_catalog(tmp_path))] == codes


def test_identifiers_become_object_names_as_billing_makes_them() -> None:
    assert object_name(REQUESTS) == "networking-datumapis-com-gateway-requests"
    assert object_name(ROUTE) == "networking-datumapis-com-httproute"


METERS = (
    Meter("requests", REQUESTS, "{request}", Quantity.REQUESTS),
    Meter("egress_bytes", REQUESTS.replace("requests", "egress-bytes"), "By", Quantity.WIRE_OUT),
    Meter("ingress_bytes", REQUESTS.replace("requests", "ingress-bytes"), "By", Quantity.WIRE_IN),
    Meter("seconds", REQUESTS.replace("requests", "connection-seconds"), "s", Quantity.OPEN_NS, 10**9),
)
NAMES = tuple(label["name"] for label in resource(shipped())["labels"])


def differences(
    tmp_path: Path, change: Mutation, meters: Iterable[Meter] = METERS, names: tuple[str, ...] = NAMES
) -> list[str]:
    documents = shipped()
    change(documents)
    return check_config(load_catalog(write(tmp_path, documents)), tuple(meters), names)


def test_what_fits_gives_no_finding(tmp_path: Path) -> None:
    assert differences(tmp_path, unchanged) == []
    assert differences(tmp_path, deprecated) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: put(metric(d), name=f"{REQUESTS}/v2"), f"no ServiceConfiguration declares {REQUESTS}"),
        (lambda d: put(metric(d), unit="1"), "its unit is {request}"),
        (lambda d: put(metric(d), kind="Cumulative"), "declared as Cumulative"),
        (lambda d: destinations(d)[0]["metrics"].remove(REQUESTS), "no billing destination"),
        (draft, "is Draft"),
        (lambda d: put(spec(d), phase="Retired"), "is Retired"),
        (lambda d: metric(d)["dimensions"].remove("region"), "dimension region is not declared"),
    ],
)
def test_what_would_not_be_billed_is_a_finding(change: Mutation, says: str, tmp_path: Path) -> None:
    found = [finding for finding in differences(tmp_path, change) if not finding.startswith(WARNING)]
    assert any(finding.startswith("meter requests: ") and says in finding for finding in found)


def test_what_is_declared_and_not_sent_is_a_warning(tmp_path: Path) -> None:
    assert differences(tmp_path, unchanged, METERS[1:], NAMES[1:]) == [
        f"{WARNING}{REQUESTS} is declared by networking-datumapis-com and no meter sends it",
        f"{WARNING}dimension region is declared and not configured: its events would not carry it",
    ]
