"""The last word on usage that a process ends with and no store has."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from proxy_usage.errors import StoreError
from proxy_usage.intake import Intake, Source, by_node

log = structlog.get_logger()


def tell_unsaved(why: str, saved: Mapping[Source, int], intake: Intake, failure: StoreError | None) -> None:
    """Says in the log how many rows were read and are in no store, and who else will say so.

    Args:
        saved: rows read, as of the last turn that the store has.
        failure: why it took no other.
    """
    rows = {source: count - saved.get(source, 0) for source, count in intake.counts().items()}
    if not any(rows.values()):
        log.warning(why, hint="all that was read is in the store")
        return
    log.error(
        why,
        rows={node: count for node, count in by_node(rows).items() if count},
        error="" if failure is None else failure.message,
        hint="the file of row counts could not be written, or is away: perhaps only this line tells of them"
        if intake.behind
        else "the next start reports as lost what of them is in no store",
    )
