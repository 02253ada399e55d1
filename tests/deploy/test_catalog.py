"""The shipped service catalog: what it says, that it builds, and that it fits what the program sends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from conftest import ALLOWED_SKIP
from kustomize import build, needs_kubectl, too_old

from proxy_usage.catalog import WARNING, check_config, check_rules, load_catalog
from proxy_usage.config import Config, load

ROOT = Path(__file__).parents[2]
COMPONENT = ROOT / "config/components/service-catalog"
STAGING = ROOT / "config/components/service-catalog-staging"
REFERENCE = ROOT / "config/proxy-usage.yaml"
SCHEMAS = ROOT / "tests/data/schemas"

PREFIX = "networking.datumapis.com/gateway/"
DIMENSIONS = [
    "region",
    "gateway",
    "gateway_namespace",
    "gateway_class",
    "httproute_name",
    "httproute_namespace",
    "project_name",
]
# What is deployed under these names and therefore frozen: metric, kind, unit, display name.
DEPLOYED = [
    (f"{PREFIX}requests", "Delta", "{request}", "HTTP Route Requests"),
    (f"{PREFIX}egress-bytes", "Delta", "By", "HTTP Route Egress Bytes"),
    (f"{PREFIX}ingress-bytes", "Delta", "By", "HTTP Route Ingress Bytes"),
    (f"{PREFIX}connection-seconds", "Delta", "s", "HTTP Route Connection Seconds"),
]


def document(path: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return parsed


SERVICE = document(COMPONENT / "service.yaml")
CONFIGURATION = document(COMPONENT / "service-configuration.yaml")


def test_the_component_is_a_component_and_lists_the_service_first() -> None:
    kustomization = document(COMPONENT / "kustomization.yaml")
    assert kustomization == {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "resources": ["service.yaml", "service-configuration.yaml"],
    }


@pytest.mark.parametrize(
    ("schema", "subject"),
    [("service", SERVICE), ("serviceconfiguration", CONFIGURATION)],
    ids=lambda v: str(v)[:20],
)
def test_the_documents_are_what_the_schemas_say(schema: str, subject: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(document(SCHEMAS / f"{schema}.schema.yaml"))
    assert [error.message for error in validator.iter_errors(subject)] == []
    assert not validator.is_valid({**subject, "spec": {**subject["spec"], "meters": []}})


def test_the_service_is_the_deployed_one() -> None:
    assert SERVICE["metadata"]["name"] == "networking-datumapis-com"
    assert SERVICE["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "kustomize"
    spec = SERVICE["spec"]
    assert spec["serviceName"] == "networking.datumapis.com"
    assert spec["phase"] == "Published"
    assert spec["owner"] == {"producerProjectRef": {"name": "datum-cloud"}}
    assert spec["displayName"]
    assert spec["description"]


def test_the_configuration_is_compatible_with_what_is_deployed() -> None:
    assert CONFIGURATION["metadata"] == {"name": "networking-datumapis-com"}
    spec = CONFIGURATION["spec"]
    assert spec["serviceRef"] == {"name": "networking-datumapis-com"}
    assert spec["phase"] == "Published"
    (resource,) = spec["monitoredResourceTypes"]
    assert resource["type"] == "networking.datumapis.com/HTTPRoute"
    assert resource["displayName"]
    assert resource["gvk"] == {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute"}
    assert [label["name"] for label in resource["labels"]] == DIMENSIONS
    assert [(m["name"], m["kind"], m["unit"], m["displayName"]) for m in spec["metrics"]] == DEPLOYED
    assert [metric["dimensions"] for metric in spec["metrics"]] == [DIMENSIONS] * 4
    assert spec["billing"] == {
        "consumerDestinations": [
            {"monitoredResourceType": resource["type"], "metrics": [name for name, *_ in DEPLOYED]}
        ]
    }
    assert "charges" not in spec


def test_the_shipped_catalog_breaks_no_rule_and_can_be_applied_again() -> None:
    catalog = load_catalog(COMPONENT)
    assert catalog.order == ("Service", "ServiceConfiguration")
    assert check_rules(catalog) == []
    assert check_rules(catalog, catalog) == []


def reference() -> Config:
    return load(REFERENCE, {})


def test_everything_the_program_sends_by_default_is_declared_and_the_reverse() -> None:
    config = Config()
    assert check_config(load_catalog(COMPONENT), config.meter_list(), list(config.dimensions)) == []


def test_everything_the_reference_configuration_sends_is_declared_and_the_reverse() -> None:
    config = reference()
    meters = config.meter_list()
    assert check_config(load_catalog(COMPONENT), meters, list(config.dimensions)) == []
    assert sorted((meter.type, meter.unit) for meter in meters) == sorted((n, u) for n, _, u, _ in DEPLOYED)
    assert sorted(config.dimensions) == sorted(DIMENSIONS)


def test_a_reference_configuration_with_less_is_told_so_by_warnings_alone() -> None:
    config = reference()
    findings = check_config(load_catalog(COMPONENT), config.meter_list()[1:], list(config.dimensions)[1:])
    assert len(findings) == 2
    assert all(finding.startswith(WARNING) for finding in findings)


def test_the_readme_says_when_not_to_apply_how_to_compare_and_what_a_connection_second_is() -> None:
    text = (COMPONENT / "README.md").read_text("utf-8")
    for said in (
        "do not apply",
        "kubectl diff",
        "-o yaml",
        "the time that streams were open",
        "count: streams",
    ):
        assert said in text


@pytest.mark.parametrize(("version", "old"), [("v1.20.5+k3s1", True), ("v1.21.0", False), ("v2.0.0", False)])
def test_a_kubectl_that_builds_no_components_is_the_one_skip_that_is_allowed(version: str, old: bool) -> None:
    assert too_old(version).startswith(ALLOWED_SKIP) is old


def overlay(directory: Path, key: str, *components: Path) -> Path:
    """A kustomization that lists copies of the components; kustomize follows relative paths alone."""
    for component in components:
        shutil.copytree(component, directory / "components" / component.name)
    target = directory / "overlay"
    target.mkdir()
    lines = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        key: [f"../components/{component.name}" for component in components],
    }
    (target / "kustomization.yaml").write_text(yaml.safe_dump(lines), "utf-8")
    return target


@needs_kubectl
def test_an_overlay_builds_exactly_the_two_documents(tmp_path: Path) -> None:
    built = build(overlay(tmp_path, "components", COMPONENT))
    assert built.returncode == 0, built.stderr
    assert list(yaml.safe_load_all(built.stdout)) == [SERVICE, CONFIGURATION]


@needs_kubectl
def test_staging_adds_prices_and_changes_nothing_else(tmp_path: Path) -> None:
    built = build(overlay(tmp_path, "components", COMPONENT, STAGING))
    assert built.returncode == 0, built.stderr
    service, configuration = yaml.safe_load_all(built.stdout)
    schema = document(SCHEMAS / "serviceconfiguration.schema.yaml")
    assert jsonschema.Draft202012Validator(schema).is_valid(configuration)
    (charge,) = configuration["spec"].pop("charges")
    assert [service, configuration] == [SERVICE, CONFIGURATION]
    assert charge["name"].startswith("networking.datumapis.com/")
    assert (charge["chargeType"], charge["currency"]) == ("Usage", "USD")
    assert charge["usage"] == {
        "metricRef": f"{PREFIX}requests",
        "pricingUnit": "request",
        "rates": [{"flat": "0.000001"}],
    }
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "all.yaml").write_text(built.stdout, "utf-8")
    priced, plain = load_catalog(tmp_path / "built"), load_catalog(COMPONENT)
    # A price may be added to what is Published; it stays for good, which is what P13 warns of.
    assert [finding.split(":")[0] for finding in check_rules(priced, plain)] == ["P13"]
    assert any(finding.startswith("W5: charge") for finding in check_rules(plain, priced))


@needs_kubectl
def test_as_a_resource_the_component_is_an_error(tmp_path: Path) -> None:
    built = build(overlay(tmp_path, "resources", COMPONENT))
    assert built.returncode != 0
    assert "Component" in built.stderr


@needs_kubectl
def test_the_prices_alone_give_nothing(tmp_path: Path) -> None:
    assert build(overlay(tmp_path, "components", STAGING)).stdout.strip() == ""
