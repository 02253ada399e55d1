"""What Envoy Gateway does with an EnvoyPatchPolicy, and what it makes as a configuration of a single Envoy.

    xds = Xds()                                  # as it is made for the Gateway of tests/data/envoy_gateway
    xds.apply(policy["spec"]["jsonPatches"])
    bootstrap = xds.static(ports, site)

Envoy Gateway applies RFC 6902, with two additions: ``jsonPath`` finds where, and ``add`` makes what is
missing on its way. It applies what it can of a policy and reports the rest; here the rest is an error.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy" / "envoy-gateway"
DATA = ROOT / "tests" / "data" / "envoy_gateway"
TYPE = "type.googleapis.com/envoy.config."
LISTENER = f"{TYPE}listener.v3.Listener"
CLUSTER = f"{TYPE}cluster.v3.Cluster"
ENDPOINTS = f"{TYPE}endpoint.v3.ClusterLoadAssignment"
ROUTES = f"{TYPE}route.v3.RouteConfiguration"
MANAGERS = "..filters[?(@.name=='envoy.filters.network.http_connection_manager')].typed_config"
_FILES = {LISTENER: "listeners", CLUSTER: "clusters", ENDPOINTS: "endpoints", ROUTES: "routes"}
_STEP = re.compile(r"\.\.(?P<deep>\w+)|\.(?P<child>\w+)|\[\?\(@\.(?P<member>[\w.]+)=='(?P<equals>[^']*)'\)\]")
"""The part of JSONPath that the patches use: ``..name``, ``.name`` and ``[?(@.a.b=='c')]``."""


class PatchError(Exception):
    """What Envoy Gateway would report in the policy's status."""


def shipped(name: str, substitutions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A file of deploy/envoy-gateway. Each text that is substituted must be there."""
    text = (DEPLOY / name).read_text()
    for old, new in (substitutions or {}).items():
        assert old in text
        text = text.replace(old, new)
    document: dict[str, Any] = yaml.safe_load(text)
    return document


def readme_blocks() -> list[Any]:
    """The YAML blocks of the README, in their order."""
    text = (DEPLOY / "README.md").read_text()
    blocks = re.findall(r"^ *```yaml\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(block) for block in blocks]


def locate(document: Any, json_path: str) -> list[str]:
    """Pointers to all that a JSONPath finds."""
    text = json_path.removeprefix("$")
    found: list[tuple[str, Any]] = [("", document)]
    at = 0
    while at < len(text):
        step = _STEP.match(text, at)
        if step is None:
            raise PatchError(f"not understood: {text[at:]}")
        found = [next_ for pointer, node in found for next_ in _follow(step, pointer, node)]
        at = step.end()
    return [pointer for pointer, _ in found]


def _follow(step: re.Match[str], pointer: str, node: Any) -> Iterator[tuple[str, Any]]:
    if step["member"] is not None:
        for below, child in _children(pointer, node) if isinstance(node, list) else ():
            value = child
            for name in step["member"].split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if value == step["equals"]:
                yield below, child
        return
    name = step["deep"] or step["child"]
    if isinstance(node, dict) and name in node:
        yield f"{pointer}/{name}", node[name]
    if step["deep"]:
        for below, child in _children(pointer, node):
            yield from _follow(step, below, child)


def _children(pointer: str, node: Any) -> Iterator[tuple[str, Any]]:
    pairs: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(node, dict):
        pairs = iter(node.items())
    elif isinstance(node, list):
        pairs = iter(enumerate(node))
    for key, child in pairs:
        yield f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}", child


def resolve(document: Any, pointer: str) -> Any:
    """What a pointer points to."""
    for token in _tokens(pointer):
        document = document[int(token) if isinstance(document, list) else token]
    return document


def patch(document: Any, op: str, pointer: str, value: Any = None) -> None:
    """One operation of RFC 6902, in place. ``add`` makes what is missing on its way."""
    tokens = _tokens(pointer)
    target = document
    try:
        for token, following in itertools.pairwise(tokens):
            if op == "add" and isinstance(target, dict) and token not in target:
                target[token] = [] if following == "-" or following.isdigit() else {}
            target = target[int(token) if isinstance(target, list) else token]
        _change(target, op, tokens[-1], value)
    except (LookupError, TypeError, ValueError) as error:
        raise PatchError(f"{op} {pointer}: {error!r}") from error


def _change(target: Any, op: str, last: str, value: Any) -> None:
    key: Any = last
    if isinstance(target, list):
        key = len(target) if last == "-" else int(last)
        if op == "add":
            if key > len(target):
                raise IndexError(key)
            target.insert(key, value)
            return
    elif op == "add":
        target[key] = value
        return
    target[key]  # must be there
    if op == "replace":
        target[key] = value
    elif op == "remove":
        del target[key]
    else:
        raise ValueError(op)


def _tokens(pointer: str) -> list[str]:
    return [token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")[1:]]


def _own(value: Any) -> Any:
    """A copy in which nothing is shared, as YAML's aliases would."""
    return json.loads(json.dumps(value))


class Xds:
    """The resources by type and name."""

    def __init__(self) -> None:
        self.resources: dict[str, dict[str, Any]] = {
            type_: {
                resource.get("name") or resource["cluster_name"]: resource
                for resource in _own(yaml.safe_load((DATA / f"{name}.yaml").read_text()))
            }
            for type_, name in _FILES.items()
        }

    def apply(self, patches: Sequence[Mapping[str, Any]]) -> None:
        """Raises PatchError where Envoy Gateway would report one."""
        for entry in patches:
            named, operation = self.resources[entry["type"]], entry["operation"]
            path, json_path = operation.get("path", ""), operation.get("jsonPath")
            if operation["op"] == "add" and not path and not json_path:
                named[entry["name"]] = _own(operation["value"])
                continue
            if entry["name"] not in named:
                raise PatchError(f"no {entry['type']} {entry['name']}")
            document = named[entry["name"]]
            pointers = [found + path for found in locate(document, json_path)] if json_path else [path]
            if not pointers:
                raise PatchError(f"{entry['name']}: nothing at {json_path}")
            for pointer in pointers:
                patch(document, operation["op"], pointer, _own(operation.get("value")))

    def managers(self, listener: str) -> list[Any]:
        """The connection managers of a listener."""
        document = self.resources[LISTENER][listener]
        return [resolve(document, pointer) for pointer in locate(document, MANAGERS)]

    def static(self, ports: Mapping[int, int], site: tuple[Path, Path]) -> dict[str, Any]:
        """All of it in a bootstrap, for one machine.

        What the management server would send stands in its place; addresses are loopback ones with the ports
        that ``ports`` gives for theirs, and any free ones for listeners. ``site``: certificate and key.
        """
        taken = _own(self.resources)
        certificate = {
            "certificate_chain": {"filename": str(site[0])},
            "private_key": {"filename": str(site[1])},
        }
        for listener in taken[LISTENER].values():
            for pointer in locate(listener, MANAGERS):
                manager = resolve(listener, pointer)
                manager["route_config"] = taken[ROUTES][manager.pop("rds")["route_config_name"]]
            for pointer in locate(listener, "..common_tls_context"):
                context = resolve(listener, pointer)
                del context["tls_certificate_sds_secret_configs"]
                context["tls_certificates"] = [certificate]
        for cluster in taken[CLUSTER].values():
            if cluster["type"] == "EDS":
                cluster["type"] = "STATIC"
                service = cluster.pop("eds_cluster_config")["service_name"]
                cluster["load_assignment"] = taken[ENDPOINTS][service] | {"cluster_name": cluster["name"]}
        resources = {
            "listeners": list(taken[LISTENER].values()),
            "clusters": list(taken[CLUSTER].values()),
        }
        for pointer in locate(resources, "..socket_address"):
            address = resolve(resources, pointer)
            address["address"] = "127.0.0.1"
            address["port_value"] = ports.get(address["port_value"], 0)
        bootstrap = {
            "node": {"id": "envoy-gateways-edge-0", "cluster": "gateways/edge", "locality": {"zone": "a"}},
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
            "static_resources": resources,
        }
        for operation in shipped("envoyproxy.yaml")["spec"]["bootstrap"]["jsonPatches"]:
            patch(bootstrap, operation["op"], operation["path"], operation["value"])
        return bootstrap
