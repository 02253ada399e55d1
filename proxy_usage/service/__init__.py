"""The asynchronous shell: builds the parts, runs them, drains them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from proxy_usage.config import load
from proxy_usage.errors import ConfigError
from proxy_usage.service.forwarding import serve_forwarder
from proxy_usage.service.logs import configure_log, name_worker, take_library_lines
from proxy_usage.service.process import run_sink
from proxy_usage.service.serving import serve
from proxy_usage.service.worker import Part, depend_on_supervisor


def run(
    config_path: Path, env: Mapping[str, str], *, restored: bool = False, worker: str | None = None
) -> int:
    """Runs the sink with a configuration file until it is stopped. Returns the process's exit code.

    Args:
        restored: the store comes from a backup.
        worker: what its supervisor tells one of several workers.

    Raises:
        ConfigError: the configuration has mistakes. StoreError, ListenError: it cannot start.
    """
    part = None if worker is None else Part.decode(worker)
    if part is not None:
        depend_on_supervisor()
        name_worker(part.number)
    config = load(config_path, env)
    if config.forward is not None:
        raise ConfigError(
            f"{config_path}: with a section forward it is a forwarder's configuration",
            hint="start it with proxy-usage forward, or remove the section",
        )
    configure_log(config.log.level, config.log.format)
    take_library_lines()
    if part is None and config.workers > 1:
        from proxy_usage.service.supervisor import supervise

        return asyncio.run(supervise(config_path, env, config, restored=restored))
    return run_sink(serve(config_path, env, config, restored=restored, part=part))


def forward(config_path: Path, env: Mapping[str, str]) -> int:
    """Runs a forwarder with a configuration file until it is stopped. Returns the process's exit code.

    Raises:
        ConfigError: the configuration has mistakes, or is a sink's. ListenError: it cannot start.
    """
    config = load(config_path, env)
    if config.forward is None:
        raise ConfigError(
            f"{config_path}: no section forward says what to read",
            hint="add forward: {url: …, stream: …}, or start a sink with proxy-usage run",
        )
    configure_log(config.log.level, config.log.format)
    take_library_lines()
    return asyncio.run(serve_forwarder(config, config.forward))
