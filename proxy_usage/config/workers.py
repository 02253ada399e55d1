"""What each of several workers is told: its part of the configuration, and the place of its store.

    worker 0      store.path itself                usage.db
    worker 1 …    beside it, with the number       usage.worker-1.db …

Bounds on what a machine has are for all workers together: store.max_bytes, store.ledger_max_bytes,
listen.limits.memory and new_streams are divided. An archive (`format: file`) is one for each worker, named as
stores are, and they share its max_bytes. All others are each worker's own, since the kernel gives it
whichever connections it likes: any worker may meet every tenant and key. Worker 0 alone audits, and counts
what all of them received.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from proxy_usage.config.models import Config
from proxy_usage.config.outputs import OutputConfig

T = TypeVar("T", bound=BaseModel)


def worker_path(path: Path, worker: int) -> Path:
    """The store of a worker, by the store of worker 0."""
    return path if worker == 0 else path.with_name(f"{path.stem}.worker-{worker}{path.suffix}")


def worker_stores(path: Path) -> dict[int, Path]:
    """The stores of workers 1 and up that there are, of this start or of earlier ones, by worker.

    Raises OSError where the directory cannot be read.
    """
    if not path.parent.is_dir():
        return {}
    name = re.compile(rf"{re.escape(path.stem)}\.worker-([1-9][0-9]{{0,5}}){re.escape(path.suffix)}")
    found = {int(match[1]): entry for entry in path.parent.iterdir() if (match := name.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def all_stores(config: Config) -> dict[int, Path]:
    """The stores of all workers by worker: those that are configured, and those that are left of more."""
    configured = {worker: worker_path(config.store.path, worker) for worker in range(config.workers)}
    return configured | worker_stores(config.store.path)


def worker_config(config: Config, worker: int, workers: int, *, grpc: str | None = None) -> Config:
    """The configuration of one of several workers.

    Args:
        workers: how many there are, whatever ``config`` says: it may have changed since they were started.
        grpc: the address that stands in place of that of the configuration, whose port may be 0.
    """
    listen, store = config.listen, config.store
    listening: dict[str, Any] = {
        "limits": listen.limits.part(workers),
        "grpc": grpc or listen.grpc,
        "streams": listen.streams if worker == 0 else None,
    }
    envoy = config.envoy
    if worker and listen.streams is not None:
        envoy = _with(envoy, long_streams="elsewhere")
    return _with(
        config,
        workers=workers,
        listen=_with(listen, **listening),
        envoy=envoy,
        audit=config.audit if worker == 0 else _with(config.audit, envoys=()),
        store=_with(
            store,
            path=worker_path(store.path, worker),
            max_bytes=store.max_bytes // workers,
            ledger_max_bytes=store.ledger_max_bytes // workers,
        ),
        outputs=tuple(_own_archive(output, worker, workers) for output in config.outputs),
    )


def _own_archive(output: OutputConfig, worker: int, workers: int) -> OutputConfig:
    """An archive has one writer."""
    if output.file is None:
        return output
    part = max(1, output.file.max_bytes // workers)
    own = _with(
        output.file,
        path=worker_path(output.file.path, worker),
        max_bytes=part,
        rotate_bytes=min(output.file.rotate_bytes, part),
    )
    return _with(output, file=own)


def _with(model: T, **changes: Any) -> T:
    return model.model_copy(update=changes)
