"""What deploy/ comes to: read from the files themselves, or built by kubectl, and checked against schemas.

``VARIANTS`` names what can be applied. Those that need patches are built; the others are put together here,
too, so that they are checked where kubectl is missing.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import referencing
import yaml
from kustomize import build, needs_kubectl

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
VERSIONS = ("1.27", "1.32", "1.37")
"""Of Kubernetes: the oldest with gRPC probes, one between, the newest whose schemas there are."""
SCHEMAS = Path(__file__).resolve().parents[1] / "data" / "schemas"
CUSTOM: dict[tuple[str, str], Path] = {
    ("monitoring.coreos.com/v1", "PrometheusRule"): SCHEMAS / "prometheusrule.schema.yaml",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): SCHEMAS / "servicemonitor.schema.yaml",
}
"""Schemas of kinds that are not Kubernetes' own, by apiVersion and kind."""

DECIDED = {
    "BILLING_URL": "https://billing.example.org/v1/usage/events:batchIngest",
    "PLAINTEXT": "true",
    "ALLOW_SAN": "uri:spiffe://example.org/*",
}
"""What the base leaves to those who apply it."""

Document = dict[str, Any]


class Variant(NamedTuple):
    """A base or an overlay, and components laid over it."""

    root: str
    components: tuple[str, ...] = ()
    built: bool = True

    def __str__(self) -> str:
        return "+".join((self.root, *self.components)) + ("" if self.built else " (files)")

    def documents(self, directory: Path) -> list[Document]:
        """All of its objects."""
        if self.built:
            return built(self, directory)
        return assembled(self.root, *self.components)


VARIANTS = [
    Variant("base", built=False),
    Variant("base", ("components/daemonset",), built=False),
    Variant("base"),
    Variant("base", ("components/tls",)),
    Variant("base", ("components/daemonset",)),
    Variant("base", ("components/daemonset", "components/tls")),
    Variant("overlays/dev"),
    Variant("overlays/production"),
]
PARAMETERS = [
    pytest.param(variant, id=str(variant), marks=[needs_kubectl] if variant.built else [])
    for variant in VARIANTS
]


def read(path: Path) -> list[Document]:
    """The documents in a file."""
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def kustomization(directory: Path) -> Document:
    (document,) = read(directory / "kustomization.yaml")
    return document


def copied(directory: Path) -> Path:
    """A copy of deploy/, to build more from."""
    return Path(shutil.copytree(DEPLOY, directory / "deploy"))


def built(variant: Variant, directory: Path) -> list[Document]:
    """What kubectl makes of it, without a warning."""
    target = copied(directory) / "overlays" / "tested"
    target.mkdir()
    lines = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "usage-system",
        "resources": [f"../../{variant.root}"],
        "components": [f"../../{component}" for component in variant.components],
    }
    (target / "kustomization.yaml").write_text(yaml.safe_dump(lines), "utf-8")
    return built_from(target)


def built_from(directory: Path) -> list[Document]:
    """What kubectl builds of a directory, without a warning."""
    result = build(directory)
    assert (result.returncode, result.stderr) == (0, "")
    return list(yaml.safe_load_all(result.stdout))


def assembled(*parts: str) -> list[Document]:
    """Resources and ConfigMaps of directories one after the other. Of patches only deletions are heeded."""
    found: dict[tuple[str, str], Document] = {}
    for part in parts:
        directory = DEPLOY / part
        lines = kustomization(directory)
        for name in lines["resources"]:
            found.update({identity(document): document for document in read(directory / name)})
        for patch in lines.get("patches", ()):
            for document in read(directory / patch["path"]):
                assert document.get("$patch") == "delete", f"{patch['path']} wants kubectl"
                del found[identity(document)]
        for generator in lines["configMapGenerator"]:
            place = ("ConfigMap", generator["name"])
            before = found.get(place, {"data": {}})["data"]
            assert (generator.get("behavior") == "merge") is bool(before)
            data = {name: (directory / name).read_text("utf-8") for name in generator.get("files", ())}
            data |= dict(literal.split("=", 1) for literal in generator.get("literals", ()))
            found[place] = {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": generator["name"]},
                "data": before | data,
            }
    return list(found.values())


def identity(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


# --- schemas ------------------------------------------------------------------------------------------


def problems(document: Document, version: str) -> list[str]:
    """What a Kubernetes of this version would not take. A kind that nobody knows is a problem."""
    place = (document["apiVersion"], document["kind"])
    if place in CUSTOM:
        (schema,) = read(CUSTOM[place])
        return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]
    try:
        schema = _schema(*place, version)
    except FileNotFoundError:
        return [f"no schema for {place[1]} of {place[0]}"]
    # The validator looks at the first part of the group alone: apps.example.org would pass for apps.
    known = [(f"{it['group']}/" if it["group"] else "") + it["version"] for it in schema[_KINDS]]
    if place[0] not in known:
        return [f"{place[1]} is of {known}, not of {place[0]}"]
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{place[1]} {'.'.join(map(str, error.path))}: {error.message}"]
    return []


def patch_problems(patch: Document, version: str) -> list[str]:
    """As ``problems`` for a strategic merge patch, which may leave out whatever it does not change."""
    document = _without_nulls({name: value for name, value in patch.items() if name != "$patch"})
    schema = _without_required(_schema(patch["apiVersion"], patch["kind"], version))
    definitions = _without_required(_contents("_definitions.json", version))
    resources = [referencing.Resource.from_contents(part) for part in (schema, definitions)]
    registry: Any = resources @ referencing.Registry()
    validator = jsonschema.Draft202012Validator(schema, registry=registry)
    return [error.message for error in validator.iter_errors(document)]


_KINDS = "x-kubernetes-group-version-kind"


def _schema(api_version: str, kind: str, version: str) -> Document:
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    return _contents(f"{kind.lower()}-{group}.json", version)


@cache
def _contents(name: str, version: str) -> Document:
    place = f"kubernetes-json-schema/v{version}.0-local-strict/{name}"
    contents: Document = kubernetes_validate.utils.schema_contents(place, version)
    return contents


def _without_required(schema: Any) -> Any:
    if isinstance(schema, dict):
        # A property may be called "required", and is then no list.
        return {
            name: _without_required(value)
            for name, value in schema.items()
            if name != "required" or not isinstance(value, list)
        }
    return [_without_required(value) for value in schema] if isinstance(schema, list) else schema


def _without_nulls(value: Any) -> Any:
    """Null is how a patch says that something goes."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


# --- what is in them ----------------------------------------------------------------------------------


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def pods(documents: list[Document]) -> Iterator[Document]:
    """The pod specs."""
    for document in of_kind(documents, "StatefulSet", "DaemonSet", "Deployment"):
        yield document["spec"]["template"]["spec"]


def sink(documents: list[Document]) -> Document:
    """The workload that runs the sink."""
    (found,) = of_kind(documents, "StatefulSet", "DaemonSet")
    return copy.deepcopy(found)


def container(workload: Document) -> Document:
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(found)


def config_map(documents: list[Document], name: str) -> dict[str, str]:
    (found,) = [one for one in of_kind(documents, "ConfigMap") if one["metadata"]["name"] == name]
    return dict(found["data"])


def settings(documents: list[Document]) -> tuple[str, dict[str, str]]:
    """The configuration's text, and the environment that the sink is given."""
    workload = sink(documents)
    (volume,) = [
        volume for volume in workload["spec"]["template"]["spec"]["volumes"] if volume["name"] == "config"
    ]
    env: dict[str, str] = {}
    for source in container(workload)["envFrom"]:
        env |= config_map(documents, source["configMapRef"]["name"])
    return config_map(documents, volume["configMap"]["name"])["proxy-usage.yaml"], env


def labelled(selector: Mapping[str, str], workload: Document) -> bool:
    """Whether a selector finds the workload's pods."""
    labels: Mapping[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return selector.items() <= labels.items()


def here(text: str, directory: Path, **changes: str) -> str:
    """The configuration's text with what is mounted in the pod in ``directory``."""
    for mounted in ("/etc/proxy-usage-tls", "/etc/proxy-usage-billing", "/var/lib/proxy-usage"):
        place = directory / mounted.lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        text = text.replace(mounted, str(place))
    for name in ("tls/tls.crt", "tls/tls.key", "tls/ca.crt", "billing/token", "billing/ca.crt"):
        (directory / f"etc/proxy-usage-{name}").touch()
    for old, new in changes.items():
        text = text.replace(old, new)
    return text
