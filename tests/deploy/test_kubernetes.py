"""deploy/: every manifest against Kubernetes' schemas, what is built of them, and whether all of it agrees.

There is no cluster here; test_probes.py runs what can be run without one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kustomize import needs_kubectl
from manifests import (
    DECIDED,
    DEPLOY,
    PARAMETERS,
    VERSIONS,
    Document,
    Variant,
    assembled,
    built_from,
    container,
    copied,
    here,
    identity,
    kustomization,
    labelled,
    of_kind,
    patch_problems,
    pods,
    problems,
    read,
    settings,
    sink,
)

from proxy_usage import __version__
from proxy_usage.cli import main
from proxy_usage.config import Config, load_text
from proxy_usage.config.fields import split_address
from proxy_usage.config.units import parse_size
from proxy_usage.errors import ConfigError
from proxy_usage.receiver import SERVICE
from proxy_usage.service import service as life

ROOT = DEPLOY.parent
PARTS = [DEPLOY / name for name in ("base", "components", "overlays")]
DIRECTORIES = sorted(path.parent for part in PARTS for path in part.rglob("kustomization.yaml"))
UID = 65532


@pytest.fixture(scope="module", params=PARAMETERS)
def documents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    variant: Variant = request.param
    return variant.documents(tmp_path_factory.mktemp("deploy"))


# --- files and schemas --------------------------------------------------------------------------------


def resources() -> list[Path]:
    return [
        directory / name
        for directory in DIRECTORIES
        for name in kustomization(directory).get("resources", ())
        if name.endswith(".yaml")
    ]


def patches() -> list[Path]:
    return [
        directory / patch["path"]
        for directory in DIRECTORIES
        for patch in kustomization(directory).get("patches", ())
    ]


def name_of(path: object) -> str:
    return path.relative_to(DEPLOY).as_posix() if isinstance(path, Path) else str(path)


def test_no_file_is_left_out() -> None:
    generated = [
        directory / name
        for directory in DIRECTORIES
        for generator in kustomization(directory).get("configMapGenerator", ())
        for name in generator.get("files", ())
    ]
    known = {*resources(), *patches(), *generated, *(each / "kustomization.yaml" for each in DIRECTORIES)}
    known.add(DEPLOY / "components" / "monitoring" / "rules.yaml")  # for a Prometheus without the operator
    assert {path for part in PARTS for path in part.rglob("*") if path.is_file()} == known


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", resources(), ids=name_of)
def test_a_manifest_is_what_kubernetes_takes(path: Path, version: str) -> None:
    found = read(path)
    assert found
    assert [problem for document in found for problem in problems(document, version)] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", patches(), ids=name_of)
def test_a_patch_names_only_fields_that_there_are(path: Path, version: str) -> None:
    found = read(path)
    assert found
    assert [problem for document in found for problem in patch_problems(document, version)] == []


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"apiVersion": "v1", "kind": "Nonsense", "metadata": {"name": "a"}}, "no schema for Nonsense"),
        ({"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRules"}, "no schema for Prom"),
        ({"apiVersion": "policy.example.org/v1", "kind": "PodDisruptionBudget"}, "is of ['policy/v1']"),
        ({"apiVersion": "v1", "kind": "ServiceAccount", "automount": False}, "automount"),
        ({"apiVersion": "v1", "kind": "Service", "spec": {"ports": [{"port": "http"}]}}, "integer"),
        ({"apiVersion": "apps/v1", "kind": "DaemonSet", "spec": {"selector": {}}}, "template"),
    ],
)
def test_the_check_finds_what_is_wrong(document: Document, says: str) -> None:
    (problem,) = problems(document, VERSIONS[-1])
    assert says in problem


def test_the_check_of_patches_finds_a_field_that_is_not_there() -> None:
    (patch,) = read(DEPLOY / "components/tls/certificate.yaml")
    (changed,) = patch["spec"]["template"]["spec"]["containers"]
    changed["readinesProbe"] = changed.pop("readinessProbe")
    (problem,) = patch_problems(patch, VERSIONS[-1])
    assert "readinesProbe" in problem


def test_all_of_it_is_what_kubernetes_takes(documents: list[Document]) -> None:
    assert [problem for document in documents for problem in problems(document, VERSIONS[-1])] == []
    kinds = {"ServiceAccount", "ConfigMap", "Service", "NetworkPolicy"}
    assert kinds <= {document["kind"] for document in documents}
    assert len({identity(document) for document in documents}) == len(documents)


@needs_kubectl
@pytest.mark.parametrize("name", ["base", "overlays/dev", "overlays/production"])
def test_what_is_applied_is_built_where_it_lies(name: str) -> None:
    found = built_from(DEPLOY / name)
    assert {document["metadata"]["namespace"] for document in found} == {"usage-system"}
    # With the namespace, `kubectl delete -k` would delete the volumes.
    assert of_kind(found, "Namespace") == []


# --- pods ---------------------------------------------------------------------------------------------


def test_pods_are_restricted(documents: list[Document]) -> None:
    """Kubernetes' pod security standard "restricted", field by field."""
    for pod in pods(documents):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == UID
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"} & pod.keys()
        assert pod["automountServiceAccountToken"] is False
        for each in pod["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert all("hostPort" not in port for port in each["ports"])
            assert each["resources"]["requests"].keys() == {"cpu", "memory"}
            assert each["resources"]["limits"].keys() == {"memory"}


def test_only_the_daemonset_asks_for_more_than_restricted_volumes(documents: list[Document]) -> None:
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"}
    allowed |= {"projected", "secret"}
    kinds = {
        kind
        for pod in pods(documents)
        for volume in pod.get("volumes", ())
        for kind in volume.keys() - {"name"}
    }
    assert kinds - allowed == ({"hostPath"} if of_kind(documents, "DaemonSet") else set())


def test_the_user_is_the_images() -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user == (str(UID), str(UID))


def test_the_daemonset_runs_the_pod_of_the_statefulset() -> None:
    one, other = (sink(assembled("base", *more)) for more in ((), ("components/daemonset",)))
    pod, twin = one["spec"]["template"]["spec"], other["spec"]["template"]["spec"]
    ports = pod["containers"][0]["ports"]
    ports.insert(1, {"name": "streams", "containerPort": 9002})
    assert twin.pop("nodeSelector")
    del pod["affinity"]
    store = twin["volumes"].pop()
    assert store == {"name": "store", "hostPath": {"path": "/var/lib/proxy-usage", "type": "Directory"}}
    assert twin == pod
    assert one["spec"]["template"]["metadata"] == other["spec"]["template"]["metadata"]
    # Two pods of one node would fight for its store.
    assert other["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_what_a_pod_refers_to_is_there(documents: list[Document]) -> None:
    there = {identity(document) for document in documents}
    promised = {("Secret", "proxy-usage-tls"), ("Secret", "proxy-usage-billing")}  # which the README asks for
    workload = sink(documents)
    pod, program = workload["spec"]["template"]["spec"], container(workload)
    wanted = {("ServiceAccount", pod["serviceAccountName"])}
    wanted |= {("ConfigMap", source["configMapRef"]["name"]) for source in program["envFrom"]}
    for volume in pod["volumes"]:
        if "configMap" in volume:
            wanted.add(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            wanted.add(("Secret", volume["secret"]["secretName"]))
    assert wanted <= there | promised
    claims = [claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())]
    volumes = [*claims, *(volume["name"] for volume in pod["volumes"])]
    assert sorted(volumes) == sorted(mount["name"] for mount in program["volumeMounts"])
    text = (DEPLOY / "README.md").read_text()
    assert all(name in text for kind, name in wanted if kind == "Secret")


def test_what_selects_pods_selects_the_sinks(documents: list[Document]) -> None:
    workload = sink(documents)
    selectors = [workload["spec"]["selector"]["matchLabels"]]
    selectors += [it["spec"]["selector"]["matchLabels"] for it in of_kind(documents, "PodDisruptionBudget")]
    selectors += [it["spec"]["podSelector"]["matchLabels"] for it in of_kind(documents, "NetworkPolicy")]
    services = [it for it in of_kind(documents, "Service") if it["metadata"]["name"] != "billing"]
    selectors += [it["spec"]["selector"] for it in services]
    assert all(labelled(selector, workload) for selector in selectors)
    (account,) = of_kind(documents, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_two_sinks_stand_apart_and_one_goes_at_a_time() -> None:
    found = assembled("base")
    workload = sink(found)
    assert workload["spec"]["replicas"] == 2
    (budget,) = of_kind(found, "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1
    apart = workload["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    (term,) = apart["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    (preferred,) = apart["preferredDuringSchedulingIgnoredDuringExecution"]
    terms = [term, preferred["podAffinityTerm"]]
    assert all(labelled(one["labelSelector"]["matchLabels"], workload) for one in terms)
    # 30 s of caching in the cluster's DNS and 5 s in Envoy must have passed.
    assert workload["spec"]["minReadySeconds"] >= 35
    assert set(workload["spec"]["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}


# --- the configuration, and all that must agree with it -----------------------------------------------


def loaded(documents: list[Document], directory: Path) -> Config:
    text, env = settings(documents)
    env = {name: here(value, directory) for name, value in env.items()}
    undecided = {} if "BILLING_URL" in env else DECIDED
    return load_text(
        here(text, directory), origin="proxy-usage.yaml", base=directory, env={**undecided, **env}
    )


def port_of(address: str | None) -> int | None:
    """The port of a listener that others can reach."""
    if address is None:
        return None
    host, port = split_address(address)
    assert host == "0.0.0.0", "neither Envoys nor the kubelet reach a loopback address"
    return port


def test_ports_agree(documents: list[Document], tmp_path: Path) -> None:
    listen = loaded(documents, tmp_path).listen
    listeners = {name: port_of(getattr(listen, name)) for name in ("grpc", "streams", "http")}
    program = container(sink(documents))
    assert {port["name"]: port["containerPort"] for port in program["ports"]} == {
        name: port for name, port in listeners.items() if port is not None
    }
    for service in of_kind(documents, "Service"):
        for port in service["spec"]["ports"]:
            assert port["name"] == port["targetPort"]
            if service["metadata"]["name"] != "billing":
                assert port["port"] == listeners[port["name"]]
    (policy,) = of_kind(documents, "NetworkPolicy")
    gateways, scrapes = policy["spec"]["ingress"]
    open_to_gateways = {port["port"] for port in gateways["ports"]}
    assert {listeners["grpc"], listeners["streams"]} - {None} <= open_to_gateways
    assert listeners["http"] not in open_to_gateways
    assert [port["port"] for port in scrapes["ports"]] == [listeners["http"]]


def test_probes_agree(documents: list[Document], tmp_path: Path) -> None:
    config = loaded(documents, tmp_path)
    program = container(sink(documents))
    healthz = {"path": "/healthz", "port": "http"}
    assert program["startupProbe"]["httpGet"] == program["livenessProbe"]["httpGet"] == healthz
    # Minutes for a start that reads gigabytes; a stuck process is restarted sooner.
    start = program["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 600
    readiness = program["readinessProbe"]
    assert "httpGet" not in readiness, "/readyz is red while the billing endpoint is away"
    if config.listen.tls is None:
        assert readiness["grpc"] == {"port": port_of(config.listen.grpc), "service": SERVICE}
    else:
        assert readiness["tcpSocket"] == {"port": "grpc"}, "the kubelet's gRPC probe knows no TLS"
        assert "grpc" not in readiness


def test_files_are_where_they_are_mounted(documents: list[Document]) -> None:
    text, env = settings(documents)
    program = container(sink(documents))
    verb, option, path = program["args"]
    assert (verb, option, path) == ("run", "--config", "/etc/proxy-usage/proxy-usage.yaml")
    mounts = {mount["mountPath"]: mount for mount in program["volumeMounts"]}
    named = re.findall(r"/(?:etc|var)/[\w/.-]+", "\n".join([path, text, *env.values()]))
    assert {str(Path(name).parent) for name in named} == mounts.keys()
    assert all(
        mount.get("readOnly", False) is (place != "/var/lib/proxy-usage") for place, mount in mounts.items()
    )
    assert all("subPath" not in mount for mount in mounts.values()), "renewed Secrets would not arrive"
    for volume in sink(documents)["spec"]["template"]["spec"]["volumes"]:
        if "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o440
            assert sink(documents)["spec"]["template"]["spec"]["securityContext"]["fsGroup"] == UID


def test_a_drain_is_granted_its_time(documents: list[Document]) -> None:
    most = life.DRAIN_STREAMS_S + life.DRAIN_TURNS_S + life.DRAIN_DELIVERY_S
    (asked,) = re.findall(r"Grant it (\d+) s", (ROOT / "README.md").read_text())
    grace = sink(documents)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert most < int(asked) < grace


def test_memory_and_volume_are_large_enough(documents: list[Document], tmp_path: Path) -> None:
    config = loaded(documents, tmp_path)
    limit = container(sink(documents))["resources"]["limits"]["memory"]
    # Beside messages: the process itself 63 MiB, a million streams 225 bytes each, 200,000 keys.
    assert config.worst_case_memory() + (1 << 30) <= parse_size(f"{limit}B")
    for claim in sink(documents)["spec"].get("volumeClaimTemplates", ()):
        storage = claim["spec"]["resources"]["requests"]["storage"]
        assert parse_size(f"{storage}B") > 2 * config.store.max_bytes


def test_exactly_one_process_owns_a_long_stream(documents: list[Document], tmp_path: Path) -> None:
    config = loaded(documents, tmp_path)
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind(documents, "Service")}
    assert services["proxy-usage"]["clusterIP"] == "None", "Envoy must see the pods"
    if of_kind(documents, "DaemonSet"):
        assert config.envoy.flush_interval == 60_000
        assert config.envoy.long_streams == "here"
        streams = services["proxy-usage-streams"]
        assert streams["internalTrafficPolicy"] == "Local"
        assert streams.get("clusterIP") != "None"
        assert [port["name"] for port in streams["ports"]] == ["streams"]
        assert of_kind(documents, "PodDisruptionBudget") == []
    else:
        assert config.envoy.flush_interval is None
        assert config.listen.streams is None
        assert "proxy-usage-streams" not in services


def test_the_program_takes_it(
    documents: list[Document],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the catalog: every dimension and meter is declared."""
    text, env = settings(documents)
    for name, value in {**DECIDED, **env}.items():
        monkeypatch.setenv(name, here(value, tmp_path))
    path = tmp_path / "proxy-usage.yaml"
    path.write_text(here(text, tmp_path))
    catalog = ROOT / "config/components/service-catalog"
    assert main(["validate", "--config", str(path), "--catalog", str(catalog)]) == 0, capsys.readouterr()


def test_the_base_decides_nothing_that_must_be_decided(tmp_path: Path) -> None:
    text, env = settings(assembled("base"))
    with pytest.raises(ConfigError) as refused:
        load_text(here(text, tmp_path), origin="a", base=tmp_path, env=env)
    told = "\n".join(refused.value.mistakes)
    assert "components/tls" in told
    assert "the billing endpoint" in told
    with pytest.raises(ConfigError, match="1 mistake") as refused:
        load_text(
            here((DEPLOY / "components/tls/proxy-usage.yaml").read_text(), tmp_path),
            origin="a",
            base=tmp_path,
            env={**env, "BILLING_URL": DECIDED["BILLING_URL"]},
        )
    assert "the name in the Envoys' certificates" in refused.value.mistakes[0]


def test_tls_changes_nothing_but_who_may_connect(tmp_path: Path) -> None:
    plain, secured = (
        load_text(
            here((DEPLOY / directory / "proxy-usage.yaml").read_text(), tmp_path),
            origin=directory,
            base=tmp_path,
            env=DECIDED,
        )
        for directory in ("base", "components/tls")
    )
    tls = secured.listen.tls
    assert tls is not None
    assert tls.client_ca_file is not None
    assert tls.allow_san == (DECIDED["ALLOW_SAN"],)
    assert secured.model_copy(update={"listen": secured.listen.model_copy(update={"tls": None})}) == plain


@needs_kubectl
def test_production_is_encrypted_and_dev_says_that_it_is_not(tmp_path: Path) -> None:
    production, dev = (built_from(DEPLOY / f"overlays/{name}") for name in ("production", "dev"))
    config = loaded(production, tmp_path)
    assert config.listen.tls is not None
    (output,) = config.outputs
    assert str(output.url).startswith("https:")
    assert output.token_file is not None
    assert "PLAINTEXT" not in settings(production)[1]
    assert settings(dev)[1]["PLAINTEXT"] == "true"
    workload = sink(dev)
    assert workload["spec"]["replicas"] == 1
    assert "volumeClaimTemplates" not in workload["spec"]


@needs_kubectl
def test_dev_delivers_to_its_stand_in(tmp_path: Path) -> None:
    dev = built_from(DEPLOY / "overlays/dev")
    (stand_in,) = of_kind(dev, "Deployment")
    (service,) = [it for it in of_kind(dev, "Service") if it["metadata"]["name"] == "billing"]
    assert labelled(service["spec"]["selector"], stand_in)
    (port,) = [port["port"] for port in service["spec"]["ports"]]
    (output,) = loaded(dev, tmp_path).outputs
    assert output.url == f"http://billing:{port}/v1/usage/events:batchIngest"
    program = container(stand_in)
    assert program["args"] == ["--listen", f"0.0.0.0:{port}"]
    assert program["command"] == ["python", "-m", "proxy_usage.demo.billing"]
    (policy,) = of_kind(dev, "NetworkPolicy")
    out = policy["spec"]["egress"]
    assert labelled(out[0]["to"][0]["podSelector"]["matchLabels"], stand_in)
    assert out[0]["ports"] == [{"protocol": "TCP", "port": port}]
    assert out[1:] == of_kind(assembled("base"), "NetworkPolicy")[0]["spec"]["egress"][1:]


def test_the_image_is_this_version() -> None:
    images = {each["image"] for path in resources() for pod in pods(read(path)) for each in pod["containers"]}
    assert images == {f"proxy-usage:{__version__}"}
    (image,) = kustomization(DEPLOY / "overlays/production")["images"]
    assert image["newTag"] == __version__


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed: its package has Linux programs alone")

    def lint(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(hadolint), str(path)], capture_output=True, text=True)

    clean = lint(ROOT / "Dockerfile")
    assert (clean.returncode, clean.stdout) == (0, "")
    spoilt = tmp_path / "Dockerfile"
    spoilt.write_text((ROOT / "Dockerfile").read_text() + "RUN sudo pip install wheel\n")
    assert "DL3004" in lint(spoilt).stdout


# --- the README ---------------------------------------------------------------------------------------


def written(comment: str) -> Document:
    """A kustomization of the README, by its first line."""
    text = (DEPLOY / "README.md").read_text()
    (block,) = re.findall(rf"^```yaml\n# {re.escape(comment)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    document: Document = yaml.safe_load(block)
    return document


@needs_kubectl
def test_an_owner_beside_the_others_as_the_readme_says(tmp_path: Path) -> None:
    tree = copied(tmp_path)
    found: dict[str, list[Document]] = {}
    for name in ("short", "owner"):
        (tree / "overlays" / name).mkdir()
        lines = written(f"deploy/overlays/{name}/kustomization.yaml")
        (tree / "overlays" / name / "kustomization.yaml").write_text(yaml.safe_dump(lines))
        found[name] = built_from(tree / "overlays" / name)
        assert [problem for one in found[name] for problem in problems(one, VERSIONS[-1])] == []
    short, owner = (loaded(found[name], tmp_path) for name in ("short", "owner"))
    assert short.envoy.flush_interval == owner.envoy.flush_interval == 60_000
    assert (short.envoy.long_streams, owner.envoy.long_streams) == ("elsewhere", "here")
    assert (short.listen.streams, owner.listen.streams) == (None, "0.0.0.0:9002")
    assert sink(found["owner"])["spec"]["replicas"] == 1
    # Neither takes the other's pods for its own, by whatever selects pods.
    names = [{identity(one) for one in found[name]} for name in ("short", "owner")]
    assert not names[0] & names[1]
    for one, other in (("short", "owner"), ("owner", "short")):
        workload = sink(found[other])
        assert not labelled(sink(found[one])["spec"]["selector"]["matchLabels"], workload)
        for service in of_kind(found[one], "Service"):
            assert not labelled(service["spec"]["selector"], workload)
        for policy in of_kind(found[one], "NetworkPolicy"):
            assert not labelled(policy["spec"]["podSelector"]["matchLabels"], workload)
    host = f"{identity(sink(found['owner']))[1]}-0.{sink(found['owner'])['spec']['serviceName']}"
    assert f"`{host}.usage-system.svc.cluster.local`" in (DEPLOY / "README.md").read_text()


def test_what_the_readme_names_is_there() -> None:
    text = (DEPLOY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DEPLOY / link).exists(), link
    for name in re.findall(r"^\| `([\w/]+)`", text, re.MULTILINE):
        assert (DEPLOY / name).is_dir(), name
    for name in re.findall(r"apply -k (\S+)", text):
        assert (ROOT / name / "kustomization.yaml").is_file(), name
    assert "Not run" in text
