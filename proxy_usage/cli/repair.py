"""How verbs that change stores reach them: through the services that own them, or with their locks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from proxy_usage.errors import UsageError

if TYPE_CHECKING:
    from proxy_usage.config import Config
    from proxy_usage.service.repairs import Repairs, Steps
    from proxy_usage.store.reader import Reader


class Done(NamedTuple):
    """What a repair came to."""

    counts: dict[str, int]
    service: bool
    """Whether a running service did it."""


Knows = Callable[["Reader", str], bool]
"""Whether a store has what an id names."""


def repaired(
    config: Config,
    verb: str,
    arguments: dict[str, object],
    here: Callable[[Repairs, Sequence[str]], Steps],
    *,
    ids: Sequence[str] = (),
    knows: Knows | None = None,
    minting: bool = False,
) -> Done:
    """Asks the running service; without one, takes the store's lock and does it ``here``.

    Where several workers have stores, it is done in each, or in those that have what ``ids`` name.

    Raises:
        StoreUnavailable: there is no store. StoreLocked: a service that cannot be asked owns it.
        UsageError: what is asked for cannot be done.
    """
    from proxy_usage.cli.stores import store_paths

    paths = store_paths(config)
    if len(paths) > 1 and ids and knows is not None:
        wanted = _spread(config, ids, knows)
    else:
        wanted = dict.fromkeys(paths, ids)
    counts: Counter[str] = Counter()
    service = False
    refused: list[UsageError] = []
    for worker, some in wanted.items():
        try:
            done = _repaired_one(config, paths[worker], verb, arguments, here, some, minting=minting)
        except UsageError as error:
            if some or len(wanted) == 1:
                raise
            refused.append(error)  # one of the stores may never have heard of an output
            continue
        counts.update(done.counts)
        service = service or done.service
    if len(refused) == len(wanted):
        raise refused[0]
    return Done(dict(counts), service)


def _spread(config: Config, ids: Sequence[str], knows: Knows) -> dict[int, Sequence[str]]:
    """The ids by the worker whose store has them; worker 0 may say that it does not know one."""
    from proxy_usage.cli.stores import opened

    wanted: dict[int, list[str]] = {}
    with opened(config) as stores:
        for one in ids:
            having = [worker for worker, reader in stores.readers.items() if knows(reader, one)]
            for worker in having or [0]:
                wanted.setdefault(worker, []).append(one)
    return dict(sorted(wanted.items()))


def _repaired_one(
    config: Config,
    path: Path,
    verb: str,
    arguments: dict[str, object],
    here: Callable[[Repairs, Sequence[str]], Steps],
    ids: Sequence[str],
    *,
    minting: bool,
) -> Done:
    from proxy_usage.control import NotRunning, call, socket_path
    from proxy_usage.service.build import opened_repairs
    from proxy_usage.service.repairs import carry_out
    from proxy_usage.store.reader import Reader

    try:
        answer = call(socket_path(path), verb, **arguments | ({"ids": list(ids)} if ids else {}))
        counts = answer if isinstance(answer, dict) else {}
        return Done({str(name): int(count) for name, count in counts.items()}, service=True)
    except NotRunning:
        pass
    with Reader(path):  # opening it to write would make one where none is
        pass
    part = config.model_copy(update={"store": config.store.model_copy(update={"path": path})})
    with opened_repairs(part, minting=minting) as repairs:
        return Done(carry_out(here(repairs, ids)), service=False)


def when(done: Done) -> str:
    """When what is in the queue now leaves it."""
    return "the service sends them" if done.service else "they are sent when the service runs"
