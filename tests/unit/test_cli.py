"""The command line as a whole: verbs, exit codes, errors without tracebacks, and what is not loaded."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from cli_call import Caller, said

from proxy_usage import __version__
from proxy_usage.config import load_text

VERBS = (
    ("run",),
    ("validate",),
    ("explain",),
    ("status",),
    ("compare",),
    ("demo",),
    ("version",),
    ("config", "schema"),
    ("config", "show"),
    ("queue", "ls"),
    ("queue", "show"),
    ("deadletters", "ls"),
    ("deadletters", "show"),
    ("deadletters", "replay"),
    ("unattributed", "ls"),
)
WITH_CONFIG = [verb for verb in VERBS if verb not in {("demo",), ("version",), ("config", "schema")}]
TIME = ["--from", "2026-09-01T00:00:00Z", "--to", "2026-09-01T01:00:00Z"]
ARGUMENTS = {
    ("explain",): ["FILE"],
    ("compare",): TIME,
    ("queue", "show"): ["ID"],
    ("deadletters", "show"): ["ID"],
}


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Caller:
    monkeypatch.delenv("PROXY_USAGE_CONFIG", raising=False)
    return Caller(tmp_path, capsys)


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    answer = said([*verb, "--help"], capsys)
    assert answer.code == 0
    assert f"Usage: proxy-usage {' '.join(verb)}" in answer.out
    assert ("--config" in answer.out) == (verb in WITH_CONFIG)
    assert ("--json" in answer.out) == (verb not in {("run",), ("demo",), ("config", "schema")})


def test_the_installed_command_is_this_one() -> None:
    (command,) = entry_points(group="console_scripts", name="proxy-usage")
    assert command.value == "proxy_usage.__main__:main"
    ran = python("-m", "proxy_usage", "--version")
    assert (ran.returncode, ran.stdout) == (0, f"proxy-usage {__version__}\n")


@pytest.mark.parametrize("verb", WITH_CONFIG, ids=" ".join)
def test_a_configuration_that_nobody_named_is_asked_for(verb: tuple[str, ...], call: Caller) -> None:
    answer = call.bare(*verb, *ARGUMENTS.get(verb, []))
    assert answer.code == 2
    assert answer.err.startswith("error: no configuration is named\n  hint: ")
    assert "PROXY_USAGE_CONFIG" in answer.err
    assert answer.out == ""


@pytest.mark.parametrize("verb", WITH_CONFIG, ids=" ".join)
def test_a_configuration_that_is_not_there_is_named(verb: tuple[str, ...], call: Caller) -> None:
    call.config.unlink()
    answer = call(*verb, *ARGUMENTS.get(verb, []))
    assert answer.code == 78
    assert f"error: configuration {call.config} does not exist" in answer.err


@pytest.mark.parametrize("verb", WITH_CONFIG, ids=" ".join)
def test_mistakes_in_the_configuration_are_all_told(verb: tuple[str, ...], call: Caller) -> None:
    call.configure(windwos={}, workers="many")
    answer = call(*verb, *ARGUMENTS.get(verb, []))
    assert answer.code == 78
    assert "2 mistakes" in answer.err
    assert "did you mean windows?" in answer.err


@pytest.mark.parametrize(
    "arguments",
    [(), ("fly",), ("status", "--fly"), ("queue",), ("queue", "ls", "--limit", "0"), ("explain",)],
)
def test_a_wrong_call_is_a_usage_error(arguments: tuple[str, ...], call: Caller) -> None:
    answer = call.bare(*arguments)
    assert answer.code == 2
    assert "Usage: proxy-usage" in answer.out + answer.err


def test_the_environment_names_the_configuration(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXY_USAGE_CONFIG", str(call.config))
    assert call.bare("config", "show").code == 0


def test_config_show_is_what_a_configuration_comes_to(call: Caller, tmp_path: Path) -> None:
    text = call("config", "show").out
    loaded = load_text(text, origin="shown", base=tmp_path, env={})
    assert (loaded.store.path, loaded.windows.length) == (call.store, 60_000)
    assert call("config", "show", "--json").json["windows"]["length"] == "1m"


def test_config_schema_is_a_schema(call: Caller) -> None:
    schema = call.bare("config", "schema").json
    assert schema["title"] == "proxy-usage configuration"
    assert "outputs" in schema["properties"]


def test_version_names_what_it_stands_on(call: Caller) -> None:
    shown = call.bare("version", "--json").json
    assert shown["version"] == __version__
    assert shown["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"protobuf", "grpcio", "sqlite", "fold"} <= shown.keys()
    assert f"proxy-usage       {__version__}\n" in call.bare("version").out


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "proxy_usage", "config", "schema"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def loaded_after(code: str) -> set[str]:
    ran = python("-c", f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)")
    assert ran.returncode == 0, ran.stderr
    return {name.partition(".")[0] for name in json.loads(ran.stderr.splitlines()[-1])}


def test_the_command_line_loads_little() -> None:
    heavy = {"aiohttp", "cloudevents", "envoy_data_plane", "grpc", "google", "rich", "sqlite3"}
    assert loaded_after("import proxy_usage.cli") & heavy == set()
