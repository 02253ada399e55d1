"""The asynchronous shell: builds the parts, runs them, drains them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from proxy_usage.config import load
from proxy_usage.service.logs import configure_log
from proxy_usage.service.serving import serve


def run(config_path: Path, env: Mapping[str, str], *, restored: bool = False) -> int:
    """Runs the sink with a configuration file until it is stopped. Returns the process's exit code.

    Args:
        restored: the store comes from a backup.

    Raises:
        ConfigError: the configuration has mistakes. StoreError, ListenError: it cannot start.
    """
    config = load(config_path, env)
    configure_log(config.log.level, config.log.format)
    return asyncio.run(serve(config_path, env, config, restored=restored))
