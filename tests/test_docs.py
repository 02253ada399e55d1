"""Pages that are written from the code say what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType

from proxy_usage.config import json_schema

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
