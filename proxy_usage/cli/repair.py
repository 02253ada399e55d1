"""How verbs that change a store reach it: through the service that owns it, or with its lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from proxy_usage.config import Config
    from proxy_usage.service.repairs import Repairs, Steps


class Done(NamedTuple):
    """What a repair came to."""

    counts: dict[str, int]
    service: bool
    """Whether a running service did it."""


def repaired(
    config: Config,
    verb: str,
    arguments: dict[str, object],
    here: Callable[[Repairs], Steps],
    *,
    minting: bool = False,
) -> Done:
    """Asks the running service; without one, takes the store's lock and does it ``here``.

    Raises:
        StoreUnavailable: there is no store. StoreLocked: a service that cannot be asked owns it.
        UsageError: what is asked for cannot be done.
    """
    from proxy_usage.control import NotRunning, call, socket_path
    from proxy_usage.service.build import opened_repairs
    from proxy_usage.service.repairs import carry_out
    from proxy_usage.store.reader import Reader

    try:
        answer = call(socket_path(config.store.path), verb, **arguments)
        counts = answer if isinstance(answer, dict) else {}
        return Done({str(name): int(count) for name, count in counts.items()}, service=True)
    except NotRunning:
        pass
    with Reader(config.store.path):  # opening it to write would make one where none is
        pass
    with opened_repairs(config, minting=minting) as repairs:
        return Done(carry_out(here(repairs)), service=False)


def when(done: Done) -> str:
    """When what is in the queue now leaves it."""
    return "the service sends them" if done.service else "they are sent when the service runs"
