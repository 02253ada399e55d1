"""YAML and the environment to a frozen, validated ``Config``."""

from proxy_usage.config.load import load, load_text
from proxy_usage.config.models import Config
from proxy_usage.config.reference import json_schema, show
from proxy_usage.config.reload import RELOADABLE, changed, needs_restart

__all__ = ["RELOADABLE", "Config", "changed", "json_schema", "load", "load_text", "needs_restart", "show"]
