"""Reading a catalog directory: what is found in it, and how each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy_usage.catalog import check_rules, load_catalog
from proxy_usage.errors import ConfigError

COMPONENT = Path(__file__).parents[2] / "config/components/service-catalog"
SERVICE = (COMPONENT / "service.yaml").read_text("utf-8")
CONFIGURATION = (COMPONENT / "service-configuration.yaml").read_text("utf-8")

CHARGES = """
  charges:
    - name: networking.datumapis.com/gateway/requests
      chargeType: Usage
      currency: USD
      usage:
        metricRef: networking.datumapis.com/gateway/requests
        pricingUnit: request
        rates:
          - flat: "0.000001"
          - tiered: [{upTo: "10", rate: "0.5"}, {rate: "0"}]
"""


def test_what_kubectl_prints_is_read(tmp_path: Path) -> None:
    service: dict[str, Any] = yaml.safe_load(SERVICE)
    configuration: dict[str, Any] = yaml.safe_load(CONFIGURATION)
    service["metadata"] |= {"uid": "0", "resourceVersion": "1", "managedFields": [{"manager": "x"}]}
    configuration["status"] = {"conditions": []}
    printed = {"apiVersion": "v1", "kind": "List", "items": [configuration, service]}
    (tmp_path / "live.yaml").write_text(yaml.safe_dump(printed), "utf-8")
    live = load_catalog(tmp_path)
    assert check_rules(load_catalog(COMPONENT), live) == check_rules(live) == []


def test_files_are_known_by_what_is_in_them_and_other_kinds_are_left_alone(tmp_path: Path) -> None:
    other = "apiVersion: services.miloapis.com/v1alpha1\nkind: ServiceAgent\nmetadata: {name: x}\n"
    (tmp_path / "a.yml").write_text(f"{other}---\n{CONFIGURATION}---\n{SERVICE}---\n- a list\n", "utf-8")
    (tmp_path / "notes.txt").write_text("a: [", "utf-8")
    catalog = load_catalog(tmp_path)
    assert [service.spec.service_name for service in catalog.services] == ["networking.datumapis.com"]
    assert [len(found.spec.metrics) for found in catalog.configurations] == [4]
    assert catalog.order == ()


def test_charges_of_every_rate_are_read(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(CONFIGURATION + CHARGES, "utf-8")
    (configuration,) = load_catalog(tmp_path).configurations
    (charge,) = configuration.spec.charges
    assert charge.usage is not None
    assert charge.usage.rates[0].flat == "0.000001"
    assert [tier.up_to for tier in charge.usage.rates[1].tiered or ()] == ["10", None]


MISTAKES = [
    (
        'unit: "{request}"',
        "unit: {request}",
        "spec.metrics.0.unit must be a string, not {'request': None}: quote it",
    ),
    ('unit: "{request}"', "unit: 1", "spec.metrics.0.unit must be a string, not 1: quote it"),
    ('unit: "{request}"', "unit: ''", "spec.metrics.0.unit"),
    ("kind: Delta", "kind: Sum", "spec.metrics.0.kind"),
    ("serviceRef:", "serviceReference:", "spec.serviceRef is missing"),
    ("serviceRef:", "serviceReference:", "spec.serviceReference is not a field"),
    ("metrics:\n    - name", "meters:\n    - name", "spec.meters is not a field"),
    ("displayName: HTTP Route Requests", f"displayName: {'x' * 129}", "at most 128"),
    (
        "dimensions: [region,",
        f"dimensions: [{', '.join(f'd{n}' for n in range(32))},",
        "metrics.0.dimensions",
    ),
    ("metrics:\n          - networking", "metrics: []\n        x:\n          - n", "at least 1"),
    ("serviceName: networking.datumapis.com", "serviceName: networking", "spec.serviceName"),
    ("serviceName: networking.datumapis.com", "serviceName: Net.example.com", "spec.serviceName"),
    ("displayName: Network Services", "displayName: ''", "spec.displayName"),
    ("kind: Service\nmetadata:\n  name: n", "kind: Service\nmetadata:\n  name: N", "Service metadata.name"),
    ("alpha1\nkind: Service\n", "beta1\nkind: Service\n", "v1beta1, not services.miloapis.com/v1alpha1"),
    ("phase: Published", "phase: Live", "spec.phase"),
    ("currency: USD", "currency: EUR", "spec.charges.0.currency"),
    ("chargeType: Usage", "chargeType: Recurring", "that one block and no other"),
    ("chargeType: Usage", "chargeType: Usage\n      oneTime: {}", "that one block and no other"),
    ('- flat: "0.000001"', '- flat: "0.1"\n            tiered: []', "exactly one of flat and tiered"),
    ('- flat: "0.000001"', "- {}", "exactly one of flat and tiered"),
    ('- flat: "0.000001"', "- flat: 0.000001", "rates.0.flat must be a string, not 1e-06: quote it"),
    ('- flat: "0.000001"', '- flat: "01"', "rates.0.flat"),
]


@pytest.mark.parametrize(("right", "wrong", "says"), MISTAKES)
def test_a_document_that_is_not_what_its_schema_says_is_refused_by_place(
    right: str, wrong: str, says: str, tmp_path: Path
) -> None:
    text = f"{SERVICE}---\n{CONFIGURATION}{CHARGES}"
    assert right in text
    (tmp_path / "all.yaml").write_text(text.replace(right, wrong, 1), "utf-8")
    with pytest.raises(ConfigError) as refused:
        load_catalog(tmp_path)
    assert any(mistake.startswith("all.yaml: ") and says in mistake for mistake in refused.value.mistakes)
    assert len(str(refused.value)) < 1000


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SERVICE.replace("phase: Published", "phase: Live"), "utf-8")
    (tmp_path / "b.yaml").write_text(CONFIGURATION.replace("kind: Delta", "kind: Sum"), "utf-8")
    with pytest.raises(ConfigError) as refused:
        load_catalog(tmp_path)
    assert [mistake[:7] for mistake in refused.value.mistakes] == ["a.yaml:", *["b.yaml:"] * 4]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "No such file"),
        ({}, "no ServiceConfiguration"),
        ({"service.yaml": SERVICE}, "no ServiceConfiguration"),
        ({"deployment.yaml": "apiVersion: apps/v1\nkind: Deployment\n"}, "no ServiceConfiguration"),
        ({"notes.yaml": "- just\n- a list\n---\ntext\n"}, "no ServiceConfiguration"),
        ({"broken.yaml": "a: [1\n"}, "broken.yaml is not YAML"),
        ({"bytes.yml": "\udcff"}, "bytes.yml is not YAML"),
    ],
)
def test_a_directory_without_a_catalog_is_an_error(
    files: dict[str, str] | None, says: str, tmp_path: Path
) -> None:
    directory = tmp_path / "catalog"
    if files is not None:
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=says) as refused:
        load_catalog(directory)
    assert refused.value.exit_code == 78
