"""Pages that are written from the code say what the code says."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from proxy_usage.config import Config, json_schema

ROOT = Path(__file__).parent.parent


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs" / "write_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_troubleshooting_is_current() -> None:
    page = ROOT / "docs" / "troubleshooting.md"
    assert page.read_text(encoding="utf-8") == generator().page(), "run: make docs"


def test_the_page_of_all_keys_is_current_and_complete() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == generator().configuration(), "run: make docs"
    schema = json_schema()
    keys = {key for model in (schema, *schema["$defs"].values()) for key in model.get("properties", ())}
    assert {key for key in keys if f"| `{key}`" not in page} == set()


def test_every_key_says_what_it_is() -> None:
    rows = [line for line in generator().configuration().splitlines() if line.startswith("| `")]
    silent = [row for row in rows if row.endswith("|  |")]
    assert not silent, silent


def cells(section: str, key: str) -> tuple[str, str]:
    """Default and description of a key of the page."""
    table = generator().configuration().partition(f"## {section}\n")[2].partition("\n## ")[0]
    (row,) = (line for line in table.splitlines() if re.match(rf"\| `{key}`[ ↻]* \|", line))
    _, _, default, about, _ = re.split(r" ?(?<!\\)\| ?", row)
    return default, about


@pytest.mark.parametrize(
    ("section", "key", "default"),
    [
        ("`outputs[]`", "url", "unset"),
        ("`outputs[]`", "name", "required"),
        ("`outputs[]`", "timeout", "`1m`"),
        ("`tenant.rules[]`", "custom_tag", "unset"),
        ("`dimensions.NAME`", "node", "unset"),
        ("`dimensions.NAME`", "default", '`""`'),
        ("`meters.NAME`", "type", "by its name"),
        ("`meters.NAME`", "count", "`streams`"),
        ("`audit.envoys[]`", "count", "`logs`"),
        ("`tenant`", "rules", "`{custom_tag: project_name}`, `{custom_tag: vhost_project}`"),
        ("The whole file", "outputs", "required"),
        ("The whole file", "skip", "`[]`"),
        ("`listen`", "limits", "see below"),
    ],
)
def test_what_an_example_says_is_no_default(section: str, key: str, default: str) -> None:
    assert cells(section, key)[0] == default


def test_keys_of_few_values_name_them_as_they_are_written() -> None:
    found = 0
    models: list[type[BaseModel]] = [Config]
    for model in models:
        for name, field in model.model_fields.items():
            below, _ = generator().models(field.annotation)
            models += [below] if below is not None else []
            if get_origin(field.annotation) is not Literal:
                continue
            rows = [row for row in generator().configuration().splitlines() if row.startswith(f"| `{name}`")]
            wanted = [f"`{value}`" for value in get_args(field.annotation)]
            assert any(all(value in row for value in wanted) for row in rows), name
            found += 1
    assert found > 5


def test_the_page_of_all_keys_says_nothing_of_the_programs_insides() -> None:
    page = generator().configuration()
    for words in ("None", "as `load` returns", "Key.dimensions", "milliseconds since the epoch", " | end"):
        assert words not in page
    for section, key in (("`listen`", "tls"), ("`store`", "keep_delivered")):
        assert cells(section, key)[1].endswith("."), key


def test_every_error_that_is_raised_is_on_it() -> None:
    page = generator().page()
    for name in ("StoreLocked", "StoreForeign", "ListenError", "ConfigError", "UsageError", "StageDied"):
        assert f"## {name}\n" in page
    assert "is in use by" in page
    assert "one process owns a store" in page


def test_an_error_without_a_remedy_is_rare() -> None:
    """Each has a hint, but for the few that name their cause and leave nothing to be done."""
    rows = [line for line in generator().page().splitlines() if line.startswith("| ") and "---" not in line]
    silent = [row for row in rows if row.endswith("|  |")]
    assert len(silent) * 10 < len(rows), silent
