"""The configuration shown: as JSON Schema, and with every default filled in."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic.json_schema import GenerateJsonSchema

from proxy_usage.config.checks import foreign_keys
from proxy_usage.config.models import Config
from proxy_usage.config.tree import escape


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the file before ``${VAR}`` is replaced, with keys as they are written."""
    schema = Config.model_json_schema(by_alias=True, mode="validation")
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "proxy-usage configuration",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def show(config: Config) -> str:
    """YAML that ``load_text`` reads back as ``config``, with every default filled in.

    Secrets are named by their files, never shown.
    """
    data = _escaped(config.model_dump(mode="json", by_alias=True))
    for name, meter in data["meters"].items():
        for key in foreign_keys(name):
            del meter[key]
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    return text


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return escape(str(value))
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value
