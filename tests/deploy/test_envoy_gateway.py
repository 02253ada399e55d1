"""deploy/envoy-gateway: what it says, and that it fits what Envoy Gateway makes and what Envoy takes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from envoy_gateway import (
    CLUSTER,
    DEPLOY,
    LISTENER,
    MANAGERS,
    ROOT,
    PatchError,
    Xds,
    locate,
    patch,
    readme_blocks,
    resolve,
    shipped,
)
from pki import Authority

from proxy_usage.config import Config, load, load_text
from proxy_usage.demo.envoy import EnvoyError, validate

SCHEMAS = ROOT / "tests" / "data" / "schemas"
LISTENERS = ("gateways/edge/http", "gateways/edge/https")
OUTPUT = "\noutputs: [{name: ledger, format: none}]\n"
PROXY = shipped("envoyproxy.yaml")
POLICY = shipped("envoypatchpolicy.yaml")
OWNER, OTHERS, OF_A_VIRTUAL_HOST, MERGED_TAG, MERGED_DIMENSIONS = readme_blocks()


@pytest.fixture
def xds() -> Xds:
    patched = Xds()
    patched.apply(POLICY["spec"]["jsonPatches"])
    return patched


@pytest.fixture
def site(tmp_path: Path) -> tuple[Path, Path]:
    pair = Authority(tmp_path, "site").issue("site", dns=["alpha.example.com"])
    return pair.cert, pair.key


def grpc_loggers(owner: dict[str, Any]) -> list[dict[str, Any]]:
    return [logger for logger in owner["access_log"] if logger["name"].endswith("_grpc")]


def common(logger: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = logger["typed_config"]["common_config"]
    return config


def tags(logger: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {tag["tag"]: tag for tag in common(logger)["custom_tags"]}


def seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text[:-1])


# --- the documents ----------------------------------------------------------------------------------------


def is_valid(document: dict[str, Any]) -> bool:
    schema = yaml.safe_load((SCHEMAS / f"{document['kind'].lower()}.schema.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(document))


def test_they_are_what_the_api_takes() -> None:
    assert is_valid(PROXY)
    assert is_valid(POLICY)


@pytest.mark.parametrize(
    ("document", "op", "pointer", "value"),
    [
        (PROXY, "remove", "/spec/telemetry/accessLog/settings/0/sinks/0/als/backendRefs", None),
        (PROXY, "replace", "/spec/telemetry/accessLog/settings/0/sinks/0/als/backendRefs/0/kind", "Pod"),
        (PROXY, "replace", "/spec/telemetry/accessLog/settings/0/sinks/0/type", "File"),
        (PROXY, "replace", "/spec/telemetry/accessLog/settings/0/type", "Upstream"),
        (PROXY, "add", "/spec/telemetry/accessLog/settings/0/sinks/0/als/customTags", []),
        (PROXY, "replace", "/spec/bootstrap/type", "Patch"),
        (POLICY, "replace", "/spec/targetRef/kind", "Service"),
        (POLICY, "remove", "/spec/targetRef", None),
        (POLICY, "remove", "/spec/jsonPatches/0/operation/value", None),
        (POLICY, "remove", "/spec/jsonPatches/0/name", None),
        (POLICY, "replace", "/spec/jsonPatches/0/operation/op", "merge"),
        (POLICY, "replace", "/spec/jsonPatches/0/type", "type.googleapis.com/envoy.config.route.v3.Route"),
    ],
)
def test_the_schemas_refuse_what_the_api_refuses(
    document: dict[str, Any], op: str, pointer: str, value: Any
) -> None:
    # Through JSON: what an alias repeats is changed in one place.
    changed = json.loads(json.dumps(document))
    patch(changed, op, pointer, value)
    assert not is_valid(changed)


def test_names_agree() -> None:
    namespace, gateway = POLICY["metadata"]["namespace"], POLICY["spec"]["targetRef"]["name"]
    assert PROXY["metadata"]["namespace"] == namespace
    patched = {entry["name"] for entry in POLICY["spec"]["jsonPatches"] if entry["type"] == LISTENER}
    assert patched == set(LISTENERS)
    assert all(name.startswith(f"{namespace}/{gateway}/") for name in patched)
    # Envoy Gateway names the cluster of an ALS sink by the places of its entry and of the sink.
    (place,) = [
        f"accesslog_als_{entry}_{sink}"
        for entry, setting in enumerate(PROXY["spec"]["telemetry"]["accessLog"]["settings"])
        for sink, kind in enumerate(setting["sinks"])
        if kind["type"] == "ALS"
    ]
    clusters = {entry["name"] for entry in POLICY["spec"]["jsonPatches"] if entry["type"] == CLUSTER}
    assert clusters == {place, "proxy_usage_streams"}
    service = PROXY["spec"]["telemetry"]["accessLog"]["settings"][0]["sinks"][0]["als"]["backendRefs"][0]
    owner = POLICY["spec"]["jsonPatches"][-1]["operation"]["value"]
    (address,) = [resolve(owner, pointer) for pointer in locate(owner, "..socket_address.address")]
    assert address == f"proxy-usage-0.{service['name']}.{service['namespace']}.svc.cluster.local"


def test_rows_come_from_routes_alone() -> None:
    setting = PROXY["spec"]["telemetry"]["accessLog"]["settings"][0]
    assert setting["type"] == "Route"  # without a type, the listener logs what found no route as well
    assert len(setting["sinks"]) == 1  # a second one would get every row until the patches are there


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_kustomization_builds_both_and_changes_nothing() -> None:
    built = subprocess.run(["kubectl", "kustomize", str(DEPLOY)], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    documents = {document["kind"]: document for document in yaml.safe_load_all(built.stdout)}
    assert documents == {"EnvoyProxy": PROXY, "EnvoyPatchPolicy": POLICY}


# --- what the patches make --------------------------------------------------------------------------------


async def test_envoy_takes_the_result(xds: Xds, site: tuple[Path, Path], tmp_path: Path) -> None:
    xds.apply(OF_A_VIRTUAL_HOST)
    xds.apply(MERGED_TAG)
    path = tmp_path / "patched.json"
    path.write_text(json.dumps(xds.static({}, site)))
    await validate(path)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("custom_tags", "custom_tag"),
        ("DownstreamPeriodic", "Periodic"),
        ("%CONNECTION_ID%", "%CONNECTION_NUMBER%"),
        ("healthy_panic_threshold", "panic_threshold"),
        ("access_log_flush_interval", "flush_interval"),
    ],
)
async def test_envoy_would_refuse_a_mistake_in_the_patches(
    good: str, bad: str, site: tuple[Path, Path], tmp_path: Path
) -> None:
    xds = Xds()
    xds.apply(shipped("envoypatchpolicy.yaml", {good: bad})["spec"]["jsonPatches"])
    path = tmp_path / "patched.json"
    path.write_text(json.dumps(xds.static({}, site)))
    with pytest.raises(EnvoyError, match=re.escape(bad.strip("%"))):
        await validate(path)


@pytest.mark.parametrize("listener", LISTENERS)
def test_every_manager_splits_its_rows(xds: Xds, listener: str) -> None:
    managers = xds.managers(listener)
    assert len(managers) == {"gateways/edge/http": 1, "gateways/edge/https": 2}[listener]
    for manager in managers:
        short, still_open = grpc_loggers(manager)
        assert [common(one)["log_name"] for one in (short, still_open)] == ["http", "open"]
        interval_s = seconds(manager["access_log_options"]["access_log_flush_interval"])
        ended = {"log_type_filter": {"types": ["DownstreamEnd"]}}
        early, late = short["filter"]["and_filter"]["filters"], still_open["filter"]["or_filter"]["filters"]
        assert early[0] == ended
        assert late[0] == {"log_type_filter": {"types": ["DownstreamPeriodic"]}}
        assert late[1]["and_filter"]["filters"][0] == ended
        below = early[1]["duration_filter"]["comparison"]
        above = late[1]["and_filter"]["filters"][1]["duration_filter"]["comparison"]
        threshold_ms = round(interval_s * 900)  # 0.9 of it, as the sinks split
        assert (below["op"], below["value"]["default_value"]) == ("LE", threshold_ms - 1)
        assert (above["op"], above["value"]["default_value"]) == ("GE", threshold_ms)
        clusters = [common(one)["grpc_service"]["envoy_grpc"]["cluster_name"] for one in (short, still_open)]
        assert clusters == ["accesslog_als_0_0", "proxy_usage_streams"]
        # Clients do not choose the ids of their streams, and the file log is as it was.
        assert manager["use_remote_address"] is True
        assert manager["preserve_external_request_id"] is False
        assert manager["access_log"][0]["name"] == "envoy.access_loggers.file"


@pytest.mark.parametrize("listener", LISTENERS)
def test_each_listener_logs_its_connections(xds: Xds, listener: str) -> None:
    document = xds.resources[LISTENER][listener]
    (connections,) = grpc_loggers(document)
    assert connections["name"] == "envoy.access_loggers.tcp_grpc"
    assert common(connections)["log_name"] == "conn"
    assert "filter" not in connections
    assert tags(connections).keys() == {"conn_id", "emit_us"}
    # What a listener logs already stays.
    kept = [logger for logger in document["access_log"] if logger["name"] == "envoy.access_loggers.file"]
    assert len(kept) == (1 if listener == "gateways/edge/http" else 0)


def test_what_the_sinks_read_by_default_is_carried(xds: Xds) -> None:
    config = load(ROOT / "config" / "proxy-usage.yaml", env={})
    sources = [*config.tenant.rules, *config.dimensions.values()]
    read = {source.custom_tag for source in sources if source.custom_tag}
    assert read == {"project_name", "vhost_project", "gateway", "gateway_namespace", "gateway_class"}
    read |= {config.envoy.tags.connection_id, config.envoy.tags.duration_ms, config.envoy.tags.emit_us}
    for listener in LISTENERS:
        for manager in xds.managers(listener):
            for logger in grpc_loggers(manager):
                assert tags(logger).keys() == read
        (connections,) = grpc_loggers(xds.resources[LISTENER][listener])
        assert common(connections)["log_name"] in config.envoy.connection_logs


def test_it_is_the_configuration_for_two_sinks(xds: Xds) -> None:
    """Loggers and clusters say what deploy/envoy says, but for names and where the gateway's is from."""
    static = yaml.safe_load((ROOT / "deploy/envoy/envoy-two-sinks.yaml").read_text())["static_resources"]
    names = {"proxy_usage": "accesslog_als_0_0", "proxy_usage_streams": "proxy_usage_streams"}

    def loggers(owner: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(json.dumps(grpc_loggers(owner)))
        for logger in found:
            service = common(logger)["grpc_service"]["envoy_grpc"]
            service["cluster_name"] = names.get(service["cluster_name"], service["cluster_name"])
            for tag in common(logger)["custom_tags"]:
                if tag["tag"].startswith("gateway"):
                    tag["default"] = (
                        tag.pop("literal")["value"]
                        if "literal" in tag
                        else tag.pop("metadata")["default_value"]
                    )
        return found

    plain = static["listeners"][0]
    ours = xds.resources[LISTENER]["gateways/edge/http"]
    assert loggers(ours) == loggers(plain)
    (manager,) = xds.managers("gateways/edge/http")
    (plain_manager,) = [resolve(plain, pointer) for pointer in locate(plain, MANAGERS)]
    assert loggers(manager) == loggers(plain_manager)

    for cluster in static["clusters"]:
        if cluster["name"] in names:
            mine = xds.resources[CLUSTER][names[cluster["name"]]]
            for key in cluster.keys() - {"name", "type", "load_assignment"}:
                assert mine[key] == cluster[key], key


def test_what_envoy_gateway_made_of_the_cluster_stays(xds: Xds) -> None:
    before, after = Xds().resources[CLUSTER]["accesslog_als_0_0"], xds.resources[CLUSTER]["accesslog_als_0_0"]
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {
        "common_lb_config",
        "connect_timeout",
        "health_checks",
        "typed_extension_protocol_options",
    }
    assert before.keys() <= after.keys()
    assert after["eds_cluster_config"] == before["eds_cluster_config"]


def test_other_filters_are_left_alone(xds: Xds) -> None:
    def passed_on(resources: Xds) -> Any:
        return resources.resources[LISTENER]["gateways/edge/https"]["filter_chains"][2]

    assert passed_on(xds) == passed_on(Xds())


@pytest.mark.parametrize(
    "change",
    [
        lambda xds: xds.resources[LISTENER].pop("gateways/edge/https"),
        lambda xds: xds.resources[CLUSTER].pop("accesslog_als_0_0"),
        lambda xds: patch(xds.managers("gateways/edge/http")[0], "remove", "/access_log/1"),
    ],
)
def test_a_patch_without_its_target_is_an_error(change: Callable[[Xds], Any]) -> None:
    xds = Xds()
    change(xds)
    with pytest.raises(PatchError):
        xds.apply(POLICY["spec"]["jsonPatches"])


# --- the README -------------------------------------------------------------------------------------------


def configured(block: dict[str, Any]) -> Config:
    return load_text(yaml.safe_dump(block) + OUTPUT, origin="README", base=DEPLOY, env={})


def test_the_sinks_of_the_readme_are_those_of_the_patches(xds: Xds) -> None:
    owner, others = configured(OWNER), configured(OTHERS)
    (manager,) = xds.managers("gateways/edge/http")
    interval_ms = seconds(manager["access_log_options"]["access_log_flush_interval"]) * 1000
    assert owner.envoy.flush_interval == others.envoy.flush_interval == interval_ms
    assert (owner.envoy.long_streams, others.envoy.long_streams) == ("here", "elsewhere")
    service = PROXY["spec"]["telemetry"]["accessLog"]["settings"][0]["sinks"][0]["als"]["backendRefs"][0]
    assert {config.listen.grpc for config in (owner, others)} == {f"0.0.0.0:{service['port']}"}
    streams = xds.resources[CLUSTER]["proxy_usage_streams"]
    (port,) = [resolve(streams, pointer) for pointer in locate(streams, "..socket_address.port_value")]
    assert owner.listen.streams == f"0.0.0.0:{port}"
    assert others.listen.streams is None


def test_the_readme_names_a_tenant_of_a_virtual_host(xds: Xds) -> None:
    xds.apply(OF_A_VIRTUAL_HOST)
    (path,) = {entry["operation"]["path"] for entry in OF_A_VIRTUAL_HOST}
    (manager,) = xds.managers("gateways/edge/http")
    read = tags(grpc_loggers(manager)[0])["vhost_project"]["value"]
    metadata_filter = path.rpartition("/")[2]
    assert read == f"%METADATA(VIRTUAL_HOST:{metadata_filter}:project_name)%"


@pytest.mark.parametrize(
    "written",
    [
        '[{"kind":"Gateway","name":"edge","namespace":"gateways","sectionName":"http"}]',
        '[{"namespace":"gateways","sectionName":"http","name":"edge","kind":"Gateway"}]',
        r'[{"annotations":{"a":"\"name\":\"no\""},"name":"edge","namespace":"gateways"}]',
    ],
)
def test_the_readme_reads_the_gateway_from_what_envoy_gateway_writes(written: str) -> None:
    config = configured(MERGED_DIMENSIONS)
    default = load(ROOT / "config" / "proxy-usage.yaml", env={})
    assert config.dimensions.keys() == default.dimensions.keys()  # a file's dimensions are all that there are
    found = {}
    for name in ("gateway", "gateway_namespace"):
        source = MERGED_DIMENSIONS["dimensions"][name]
        match = re.search(source["pattern"], written)
        assert match is not None
        found[name] = match["value"]
    assert found == {"gateway": "edge", "gateway_namespace": "gateways"}


# --- the tests' own tool ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "pointer", "after"),
    [
        ("add", "/a/1", {"a": [1, 9, 2], "b/c": {}}),
        ("add", "/a/-", {"a": [1, 2, 9], "b/c": {}}),
        ("replace", "/a/0", {"a": [9, 2], "b/c": {}}),
        ("remove", "/a/0", {"a": [2], "b/c": {}}),
        ("add", "/b~1c/d", {"a": [1, 2], "b/c": {"d": 9}}),
        ("add", "/x/y/-", {"a": [1, 2], "b/c": {}, "x": {"y": [9]}}),
    ],
)
def test_patches_are_applied_as_the_standard_says(op: str, pointer: str, after: Any) -> None:
    document = {"a": [1, 2], "b/c": {}}
    patch(document, op, pointer, 9)
    assert document == after


@pytest.mark.parametrize(
    ("op", "pointer"),
    [
        ("add", "/a/3"),
        ("replace", "/a/2"),
        ("replace", "/x"),
        ("remove", "/x"),
        ("replace", "/x/y"),
        ("move", "/a"),
    ],
)
def test_what_cannot_be_applied_is_an_error(op: str, pointer: str) -> None:
    with pytest.raises(PatchError):
        patch({"a": [1, 2]}, op, pointer, 9)


def test_paths_find_what_they_say() -> None:
    document = {"f": [{"n": "a", "d": {"x": "1"}}, {"n": "b"}], "g": {"f": [{"n": "a"}]}}
    assert locate(document, "..f[?(@.n=='a')]") == ["/f/0", "/g/f/0"]
    assert locate(document, "$.f[?(@.d.x=='1')].n") == ["/f/0/n"]
    assert locate(document, "..f[?(@.n=='c')]") == []
