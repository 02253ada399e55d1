"""What the documents say is true: commands run, configurations load, whatever is named exists."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.main import get_command

from proxy_usage.attribution import Reason
from proxy_usage.cli import app
from proxy_usage.config import Config, json_schema, load, load_text
from proxy_usage.decode.rows import EnvoySettings, handlings
from proxy_usage.errors import ProxyUsageError
from proxy_usage.metrics import DEAD_LETTER_REASONS, Metrics
from proxy_usage.model import Key
from proxy_usage.service.build import build_mint, build_pipeline, open_storage
from proxy_usage.store import Batch, Fate

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "proxy_usage"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text()
EXECUTED = ("docs/migration.md:",)
"""Pages whose commands need more than a sink: tests/e2e/test_cutover.py."""
NOW_MS = 1_800_000_000_000  # begins a minute
LEDGER_ALONE = "\noutputs: [{name: ledger, format: none}]\n"


class Block(NamedTuple):
    """A code block: its language, its text and where it begins."""

    language: str
    text: str
    place: str


def blocks() -> Iterator[Block]:
    for path in DOCUMENTS:
        text = path.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            yield Block(match[1], match[2], f"{path.relative_to(ROOT)}:{line}")


BLOCKS = list(blocks())


def commands(*, elsewhere: bool = True) -> list[list[str]]:
    """Every command in a shell block, in the order of the documents, without its comment.

    ``elsewhere``: those of pages that a test of their own executes, too.
    """
    here = [b for b in BLOCKS if b.language == "sh" and (elsewhere or not b.place.startswith(EXECUTED))]
    lines = [line for block in here for line in block.text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def section(heading: str) -> str:
    """The README from a heading to the next one of any level."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match, f"README.md has no section {heading!r}"
    return match[1]


def row(table: str, first: str) -> str:
    """The cells behind the first one of a table's row."""
    (found,) = re.findall(rf"^\| {re.escape(first)} \|(.+)\|$", table, re.MULTILINE)
    return str(found)


def spans(text: str) -> list[str]:
    """What stands between backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def words(text: str) -> set[str]:
    """The single words between backticks."""
    return {span for span in spans(text) if re.fullmatch(r"\w+", span)}


ALL_SPANS = [span for path in DOCUMENTS for span in spans(path.read_text())]


@cache
def said_in_code() -> frozenset[str]:
    """Every string that the program's sources hold, f-strings with their fields as ``{name}``."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add(ast.unparse(node)[2:-1])
    return frozenset(found)


# --- blocks -------------------------------------------------------------------------------------------


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} == {"", "sh", "yaml"}
    for block in BLOCKS:
        if not block.language:
            assert "──▶" in block.text, f"{block.place} is no drawing: say sh or yaml, so that it is tested"
    assert {command[0] for command in commands()} == {"make", "proxy-usage"}


def test_make_knows_its_commands() -> None:
    make = shutil.which("make")
    assert make, "the tests are started by make"
    helped = subprocess.run([make, "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    verbs = set(re.findall(r"^ +make (\S+) +\S", helped, re.MULTILINE))
    written = [command for command in commands() if command[0] == "make"]
    assert {verb for _, verb in written} >= {"run", "test"}
    for command in written:
        assert command[1] in verbs
        subprocess.run([make, "--dry-run", *command[1:]], cwd=ROOT, check=True, capture_output=True)
    runner = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^[^#\n]*\bmake test\b", runner, re.MULTILINE), ".ci/run runs the README's test command"


def whole_configuration() -> str:
    here = [b for b in BLOCKS if b.language == "yaml" and b.place.startswith("README.md:")]
    (text,) = [b.text for b in here if "outputs:" in b.text]
    return text


@pytest.fixture
def operated(tmp_path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """A site that uses the README's configuration, with a dead letter and a waiting event in its store.

    Returns the environment of its commands, and the ids by the verb that shows them.
    """
    document = yaml.safe_load(whole_configuration())
    document["listen"] = {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}
    (tmp_path / "token").write_text("secret")
    path = tmp_path / "proxy-usage.yaml"
    path.write_text(yaml.safe_dump(document))
    env = os.environ | {
        "PROXY_USAGE_CONFIG": str(path),
        "BILLING_URL": "http://127.0.0.1:9/v1/usage/events:batchIngest",  # nobody listens there
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return env, seeded(load(path, env))


def seeded(config: Config) -> dict[str, str]:
    """Puts two events into the store, of which one becomes a dead letter. Returns their ids by verb."""
    storage = open_storage(config)
    pipeline = build_pipeline(config, storage)
    nothing = ("",) * len(config.dimensions)
    one_request = [int(name == "requests") for name in config.meters]
    for tenant in ("alpha", "bravo"):
        assert pipeline.windows.add(Key(tenant, nothing), NOW_MS, 1, one_request, NOW_MS)
        pipeline._count(one_request)
    turn = pipeline.begin(NOW_MS, everything=True)
    dead, waiting = storage.checkpoints.commit(turn, build_mint(config), NOW_MS)
    batch = storage.queue.lease(storage.slots[0].output, NOW_MS, events=1, max_bytes=1 << 20, linger_ms=0)
    assert isinstance(batch, Batch)
    assert batch.events[0].id == dead.id
    storage.queue.settle(batch, {batch.events[0].seq: Fate("dead", 200, "not_accepted")}, NOW_MS)
    storage.close()
    return {"deadletters": dead.id, "queue": waiting.id, "explain": waiting.id}


def test_the_commands_of_the_program_do_what_they_say(
    operated: tuple[dict[str, str], dict[str, str]],
) -> None:
    env, ids = operated
    written = [command for command in commands(elsewhere=False) if command[0] == "proxy-usage"]
    assert written.count(["proxy-usage", "run"]) == 1
    answers: dict[str, str] = {}
    with subprocess.Popen(
        ["proxy-usage", "run"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    ) as sink:
        try:
            assert sink.stdout is not None
            events = (json.loads(line)["event"] for line in sink.stdout)
            assert "serving" in events, "the sink ended before it served"
            for command in written:
                if command[1] != "run":
                    command = [ids[command[1]] if word == "ID" else word for word in command]
                    done = subprocess.run(
                        command, cwd=ROOT, env=env, check=False, capture_output=True, text=True
                    )
                    # No Envoy is audited here, which is no proof of anything.
                    expected = 1 if command[1] == "audit" else 0
                    assert done.returncode == expected, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
                    answers[" ".join(command[1:3])] = done.stdout
            sink.send_signal(signal.SIGTERM)
            *_, last = events
        finally:
            sink.kill()
    assert last == "drained"
    assert sink.returncode == 0
    assert ids["queue"] in answers["queue ls"]
    assert ids["deadletters"] in answers["deadletters ls"]
    assert answers["deadletters replay"].startswith("1 dead letters are back")
    assert "running" in answers["status"]
    assert "can be used" in answers["validate --config"]


def configurations() -> list[Block]:
    """The blocks that are configurations of the sink, whole or in part."""
    documents = [(block, yaml.safe_load(block.text)) for block in BLOCKS if block.language == "yaml"]
    return [block for block, document in documents if not {"access_log", "apiVersion"} & document.keys()]


@pytest.mark.parametrize("block", configurations(), ids=lambda block: str(block.place))
def test_configurations_load(block: Block, tmp_path: Path) -> None:
    for key, name in re.findall(r"\b(\w+_file): ([\w./-]+)", block.text):
        (tmp_path / name).write_text("ns-a: alpha\n" if key == "map_file" else "secret\n")
    rest = "" if re.search(r"^outputs:", block.text, re.MULTILINE) else LEDGER_ALONE
    load_text(block.text + rest, origin=block.place, base=tmp_path, env={})


def one_document(key: str) -> dict[str, Any]:
    """The one YAML block that has a key at its top."""
    found = [yaml.safe_load(block.text) for block in BLOCKS if block.language == "yaml"]
    (document,) = [document for document in found if key in document]
    assert isinstance(document, dict)
    return document


def contains(whole: Any, part: Any) -> bool:
    """Whether all that ``part`` says is said by ``whole``, too."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and contains(whole[k], v) for k, v in part.items())
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(contains(item, want) for item in whole) for want in part)
    return bool(whole == part)


def deployed() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "envoy" / "envoy.yaml").read_text())
    return document["static_resources"]  # type: ignore[no-any-return]


def test_the_envoy_snippet_is_part_of_what_is_shipped() -> None:
    (listener,) = [one for one in deployed()["listeners"] if one["name"] == "http"]
    snippet = one_document("access_log")
    assert contains(listener["filter_chains"][0]["filters"][0]["typed_config"], snippet)
    assert not contains(snippet, {"use_remote_address": False})
    interval = snippet["access_log_options"]["access_log_flush_interval"]
    assert yaml.safe_load(whole_configuration())["envoy"]["flush_interval"] == interval


def test_the_cluster_is_as_described() -> None:
    (cluster,) = [one for one in deployed()["clusters"] if one["name"] == "proxy_usage"]
    assert cluster["health_checks"]
    assert cluster["common_lb_config"]["healthy_panic_threshold"] == {"value": 0}
    address = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
    port = yaml.safe_load(whole_configuration())["listen"]["grpc"].rpartition(":")[2]
    assert str(address["socket_address"]["port_value"]) == port


def test_the_envoy_gateway_resource_fits_the_sink() -> None:
    resource = one_document("apiVersion")
    assert resource["kind"] == "EnvoyProxy"
    ((setting,),) = [resource["spec"]["telemetry"]["accessLog"]["settings"]]
    assert setting["type"] == "Route"
    ((sink,),) = [setting["sinks"]]
    assert (sink["type"], sink["als"]["type"]) == ("ALS", "HTTP")
    defaults = Config()
    assert sink["als"]["logName"] not in defaults.envoy.connection_logs
    (backend,) = sink["als"]["backendRefs"]
    assert str(backend["port"]) == defaults.listen.grpc.rpartition(":")[2]
    texts = "".join(block.text for block in configurations())
    assert all(f"request_header: {name}" in texts for name in sink["als"]["http"]["requestHeaders"])


# --- links and names ----------------------------------------------------------------------------------


def test_links_and_paths_lead_somewhere() -> None:
    pages = [page for top in ("config", "deploy") for page in sorted((ROOT / top).rglob("*.md"))]
    assert len(pages) >= 4
    for path in (*DOCUMENTS, *pages):
        text = path.read_text()
        for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
            aim = path.parent / target if target else path
            assert aim.exists(), f"{path.name}: {target}"
            headings = re.findall(r"^#+ (.+)$", aim.read_text(), re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower() for heading in headings}
            assert not anchor or anchor in anchors, f"{path.name}: #{anchor}"
    tops = {entry.name for entry in ROOT.iterdir()}
    paths = {span.rstrip("'s") for span in ALL_SPANS if re.fullmatch(r"[\w.-]+/[\w./-]*", span)}
    missing = [name for name in paths if name.split("/")[0] in tops and not (ROOT / name).exists()]
    assert missing == []


def test_the_map_for_the_maintainer_names_what_is_there() -> None:
    named = re.findall(r"`([\w./-]+\.\w+)` \(((?:`\w+`(?:, )?)+)", section("For the maintainer"))
    assert len(named) > 8
    for path, symbols in named:
        text = (ROOT / path).read_text()
        missing = [symbol for symbol in spans(symbols) if not re.search(rf"\b{symbol}\b", text)]
        assert missing == [], f"{path}: {missing}"


def exposed() -> set[str]:
    """The names that a scrape can show, without their common prefix."""
    families = Metrics().registry.collect()
    names = [f"{family.name}_total" if family.type == "counter" else family.name for family in families]
    return {name.removeprefix("proxy_usage_") for name in names}


def test_the_metrics_are_complete() -> None:
    text = README[README.index("Metrics are at `/metrics`") : README.index("## The service catalog")]
    named = words(text) - {"proxy_usage_"}
    assert len(named) > 20
    assert named == exposed()
    elsewhere = [span for span in ALL_SPANS if re.fullmatch(r"proxy_usage_\w+", span)]
    assert {name.removeprefix("proxy_usage_") for name in elsewhere} <= exposed()


def test_verbs_that_are_named_exist() -> None:
    root: Any = get_command(app)
    in_text = [span.split() for span in ALL_SPANS if span.startswith("proxy-usage ")]
    for called in [*in_text, *(command for command in commands() if command[0] == "proxy-usage")]:
        known = root
        for word in called[1:]:
            if not hasattr(known, "commands") or word.startswith("-"):
                break
            assert word in known.commands, f"{shlex.join(called)}: no verb {word}"
            known = known.commands[word]


def has_key(schema: dict[str, Any], path: list[str], definitions: dict[str, Any]) -> bool:
    """Whether a JSON Schema has a property at ``path``; lists and mappings are looked into."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if not path:
        return True
    ways = [*schema.get("anyOf", ()), *(schema[key] for key in ("items",) if key in schema)]
    if any(has_key(way, path, definitions) for way in ways if isinstance(way, dict)):
        return True
    below = schema.get("properties", {}).get(path[0], schema.get("additionalProperties"))
    return isinstance(below, dict) and has_key(below, path[1:], definitions)


def test_configuration_keys_that_are_named_exist() -> None:
    schema = json_schema()
    dotted = {span for span in ALL_SPANS if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span)}
    named = {span for span in dotted if span.split(".")[0] in Config.model_fields}
    assert len(named) > 10
    assert [name for name in sorted(named) if not has_key(schema, name.split("."), schema["$defs"])] == []
    assert not has_key(schema, ["store", "pathh"], schema["$defs"])


# --- fates and reasons --------------------------------------------------------------------------------


def test_reasons_why_rows_are_held_are_complete() -> None:
    held = words(row(section("What becomes of a row"), "counted, held: nobody pays yet"))
    assert held == {reason.value for reason in Reason}


def test_reasons_why_rows_are_skipped_are_complete() -> None:
    named = words(row(section("What becomes of a row"), "skipped: not usage")) - {"skip"}
    settings = [
        EnvoySettings(),
        EnvoySettings(flush_interval_ms=1, short_only=True),
        EnvoySettings(connection_logs=frozenset()),
    ]
    tables = [handlings(envoy, "conn", http=True) for envoy in settings]
    by_type = {handling.skip[1] for table in tables for handling in table.values() if handling.skip}
    assert {"listener", "untyped", "periodic", "misrouted"} <= by_type <= named
    assert named <= said_in_code()


def test_reasons_why_rows_are_invalid_are_complete() -> None:
    raised = {"malformed"}  # what protobuf raises
    for path in (PACKAGE / "decode").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Invalid":
                raised.add(ast.literal_eval(node.args[0]))
    assert words(row(section("What becomes of a row"), "invalid")) == raised


def test_columns_of_status_are_explained_with_the_fates() -> None:
    tree = ast.parse((PACKAGE / "cli" / "status.py").read_text())
    (shown,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_output")
    (columns,) = (node for node in ast.walk(shown) if isinstance(node, ast.Dict))
    named = {ast.literal_eval(key) for key in columns.keys if key is not None}
    explained = spans(section("What becomes of an event"))
    plain = {"output", "attempted", "ambiguous", "oldest", "state"}
    assert named - plain - {*explained} == set()


def test_fates_of_events_exist() -> None:
    table = section("What becomes of an event")
    assert words(table) <= said_in_code()
    reasons = words(row(table, "`dead`"))
    assert {"not_accepted", "refused"} < reasons <= DEAD_LETTER_REASONS


def reasons_of_readiness() -> set[str]:
    """The keys that are set in a mapping called ``reasons``, but for stages, which have their names."""
    found = set()
    for path in (PACKAGE / "service").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Assign(
                    targets=[ast.Subscript(value=ast.Name("reasons"), slice=ast.Constant(str(key)))]
                ):
                    found.add(key)
                case ast.Assign(
                    targets=[ast.Subscript(value=ast.Name("reasons"), slice=ast.JoinedStr() as key)]
                ):
                    found.add(ast.unparse(key)[2:-1].replace("{name}", "NAME"))
    return found


def test_reasons_of_readiness_are_complete() -> None:
    rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|(.+)\|$", section("Operations"), re.MULTILINE)
    reasons = {reason for first, _ in rows for reason in spans(first)}
    assert {"store", "draining", "stream", "output NAME paused"} <= reasons_of_readiness() <= reasons
    assert {reason.replace("NAME", "{name}") for reason in reasons} - {"output {name}"} <= said_in_code()
    (advice,) = [second for first, second in rows if first == "`output NAME paused`"]
    assert {"unauthorized", "refusing_everything"} < words(advice) <= said_in_code()


def test_exit_codes_are_those_of_the_errors() -> None:
    (text,) = re.findall(r"^Exit codes: (.+?)\n\n", README, re.MULTILINE | re.DOTALL)
    kinds: list[type[ProxyUsageError]] = [ProxyUsageError, *ProxyUsageError.__subclasses__()]
    assert {int(span) for span in spans(text) if span.isdigit()} == {0, *(kind.exit_code for kind in kinds)}
