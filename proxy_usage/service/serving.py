"""The process: a service from its start to its end, signals, and the exit code."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import structlog

from proxy_usage.config import Config, load
from proxy_usage.errors import ConfigError, StageDied
from proxy_usage.service.build import open_storage
from proxy_usage.service.service import Service
from proxy_usage.service.worker import Part

log = structlog.get_logger()


class Life(Protocol):
    """What can be started, told to stop, and drained."""

    @property
    def stopping(self) -> bool: ...

    def request_stop(self) -> None: ...

    def reload(self) -> None: ...

    async def start(self) -> None: ...

    async def supervise(self) -> None: ...

    async def drain(self) -> None: ...


async def live(service: Life, *, forcible: bool = True) -> bool:
    """From start to drain, by signals. False: a second one cut the drain short.

    Args:
        forcible: False: a second one changes nothing.

    Raises:
        StageDied: a part of it ended by itself; it was drained.
    """
    forced = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        (forced.set if service.stopping and forcible else service.request_stop)()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    await service.start()
    try:
        await service.supervise()
    except StageDied:
        await service.drain()
        raise
    log.info("draining")
    drain = asyncio.create_task(service.drain())
    force = asyncio.create_task(forced.wait())
    done, _ = await asyncio.wait([drain, force], return_when=asyncio.FIRST_COMPLETED)
    force.cancel()
    if drain in done:
        drain.result()
        return True
    drain.cancel()
    return False


async def serve(
    path: Path, env: Mapping[str, str], config: Config, *, restored: bool = False, part: Part | None = None
) -> int:
    """Runs a sink until it is told to stop. Returns the exit code: 0 drained; 1 forced by a
    second signal, or stopped with usage that the store did not take.

    Args:
        part: set in one of several workers. No second signal forces it: whoever stops a service signals its
            supervisor, which passes the signal on, and often every process of it besides.
    """

    def read() -> Config:
        loaded = load(path, env)
        if part is None:
            return loaded
        if loaded.workers != part.of:
            raise ConfigError(
                "workers cannot change while it runs; nothing was taken over",
                hint="restart proxy-usage, or undo the change",
            )
        return part.config(loaded)

    config = config if part is None else part.config(config)
    storage = open_storage(
        config,
        from_backup=restored,
        adopts=part is None or part.number == 0,
        make=part is None or not part.again,
    )
    storage.past.tell(storage.loss)
    service: Service | None = None
    try:
        service = Service(config, storage, reload=read, config_file=path, worker=part is not None)
        if not await live(service, forcible=part is None):
            service.tell_unsaved("stopped before the drain was done")
            return 1
        if service.store_failure is not None:
            return 1
        log.info("drained")
        return 0
    finally:
        if service is not None:
            await service.end()
        storage.close()
