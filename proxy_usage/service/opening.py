"""What a start finds in the place of its store: the store, a damaged one, one from a backup, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from proxy_usage.errors import StoreForeign, StoreVersion
from proxy_usage.events import Mint
from proxy_usage.intake import Intake, Loss, by_node
from proxy_usage.store import Checkpoints, Database
from proxy_usage.store.aside import forget, notes
from proxy_usage.store.report import Aside, adopt, asides
from proxy_usage.store.restore import Restored
from proxy_usage.store.salvage import Salvage
from proxy_usage.turn import Layout, OutputSlot, Recovered

log = structlog.get_logger()


class Past(NamedTuple):
    """What a start has to tell of the time before it."""

    adopted: tuple[Aside, ...] = ()
    """Stores that were set aside since the last start, or by this one."""
    restored: Restored | None = None
    """Set when the store came from a backup."""
    salvages: tuple[Salvage, ...] = ()
    """What is still to be brought over from stores that were set aside."""

    def tell(self, loss: Loss) -> None:
        """Says in the log what a person has to know of it."""
        for aside in self.adopted:
            log.error(
                "store set aside",
                file=aside.file,
                reason=aside.reason,
                hint="a fresh store is in its place; what can be read of the file becomes dead letters",
            )
        if self.restored is not None:
            log.warning(
                "store restored from a backup",
                dead_letters=self.restored.events,
                hint="what waited may have been sent since: proxy-usage deadletters ls --reason restored",
            )
        if loss.rows or loss.unknown:
            log.warning("a crash lost entries", rows=by_node(loss.rows), unknown_nodes=list(loss.unknown))


def recover(database: Database, max_held: int, now_ms: int) -> tuple[Checkpoints, Recovered]:
    """Reads what the store holds; one that makes no sense is set aside like one that SQLite cannot read.

    Raises:
        StoreFull, StoreUnavailable: it can neither be used nor set aside.
    """
    try:
        return _recovered(database, max_held)
    except StoreVersion:
        raise
    except StoreForeign as error:
        database.replace(error.message, now_ms)
    return _recovered(database, max_held)


def _recovered(database: Database, max_held: int) -> tuple[Checkpoints, Recovered]:
    checkpoints = Checkpoints(database, max_held=max_held)
    return checkpoints, checkpoints.recover()


def learn(database: Database) -> tuple[Aside, ...]:
    """Lets the store know of those that were set aside before it."""
    learned = []
    for note in notes(database.path):
        if note.path.exists():
            learned.append(adopt(database, note))
        forget(note)
    return tuple(learned)


def crash_loss(intake: Intake, recovered: Recovered, past: Past) -> Loss:
    """What the process before this one had read and not saved, as far as anybody can say.

    Nobody can where the store is new and the file of row counts is not, where the file is new and the store
    is not, and where either is older than it should be.
    """
    related = recovered.layout is not None and past.restored is None
    return intake.compare(recovered.intake, related=related)


def salvages(
    database: Database, outputs: Sequence[OutputSlot], layout: Layout, mint_of: Callable[[Layout], Mint]
) -> tuple[Salvage, ...]:
    """What is still to be brought over from stores that were set aside."""
    with database.reading() as db:
        known = asides(db)
    return tuple(
        Salvage(database, aside, outputs, layout, mint_of) for aside in known if not aside.report.ended
    )
