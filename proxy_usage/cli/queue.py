"""``proxy-usage queue``: events on their way to an output."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from proxy_usage.cli.options import (
    ConfigOption,
    EventArgument,
    JsonOption,
    LimitOption,
    OutputOption,
    reading_config,
)
from proxy_usage.cli.show import Cell, emit, facts, moment, plain, table
from proxy_usage.errors import UsageError

if TYPE_CHECKING:
    from proxy_usage.store.views import Place

queue = typer.Typer(help="Events on their way to an output.", no_args_is_help=True)


@queue.command("ls")
def ls(
    config: ConfigOption = None,
    output: OutputOption = None,
    limit: LimitOption = 100,
    ambiguous: Annotated[
        bool,
        typer.Option(
            "--ambiguous", help="Instead: delivered when the endpoint may have forgotten an earlier attempt."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List events that wait, and the batches that are sent again."""
    from proxy_usage.cli.stores import opened

    if ambiguous:
        _ambiguous(config, output, limit, as_json)
        return
    with opened(reading_config(config)) as stores:
        events = stores.listed(lambda reader: reader.queue(output, limit), limit)
        batches = stores.listed(lambda reader: reader.batches(output, limit), limit)
    if as_json:
        emit(
            {
                "events": [plain(one) | stores.mark(worker) for worker, one in events],
                "batches": [plain(one) | stores.mark(worker) for worker, one in batches],
            }
        )
        return
    waiting: list[dict[str, Cell]] = [
        {
            "output": one.output,
            "id": one.id,
            "tenant": one.tenant,
            "meter": one.meter,
            "value": one.value,
            "window": moment(one.window_ms),
            "state": one.state,
            "attempts": one.attempts,
            **stores.mark(worker),
        }
        for worker, one in events
    ]
    table(waiting, empty="nothing waits")
    if batches:
        print()
    again: list[dict[str, Cell]] = [
        {
            "output": one.output,
            "batch": one.batch,
            "events": one.events,
            "attempts": one.attempts,
            "first sent": moment(one.first_attempt_ms),
            "not before": moment(one.not_before_ms),
            "answer": one.answer,
            **stores.mark(worker),
        }
        for worker, one in batches
    ]
    table(again)


def _ambiguous(config: ConfigOption, output: str | None, limit: int, as_json: bool) -> None:
    from proxy_usage.cli.stores import opened

    with opened(reading_config(config)) as stores:
        found = stores.listed(lambda reader: reader.ambiguous(output, limit), limit)
    if as_json:
        emit({"ambiguous": [plain(one) | stores.mark(worker) for worker, one in found]})
        return
    rows: list[dict[str, Cell]] = [
        {
            "output": one.output,
            "id": one.id,
            "tenant": one.tenant,
            "meter": one.meter,
            "value": one.value,
            "window": moment(one.window_ms),
            "delivered": moment(one.at_ms),
            **stores.mark(worker),
        }
        for worker, one in found
    ]
    table(rows, empty="nothing was delivered that may have been stored before")


@queue.command("show")
def show(event_id: EventArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show one event: where it is, and what it says."""
    show_event(event_id, config, as_json)


def show_event(event_id: str, config: ConfigOption, as_json: bool) -> None:
    """Shows an event, wherever it is.

    Raises:
        UsageError: the store does not know it. DecodeError: what it stored is not a CloudEvent.
    """
    from proxy_usage.cli.stores import opened
    from proxy_usage.samples import read_event

    with opened(reading_config(config)) as stores:
        views = stores.each(lambda reader: reader.event(event_id))
    view = next((one for one in views.values() if one is not None), None)
    if view is None:
        raise UsageError(
            f"the store knows no event {event_id}",
            hint="proxy-usage queue ls and deadletters ls show ids; settled ones are kept for a while only",
        )
    event = None if view.body is None else read_event(view.body)
    if as_json:
        emit({**plain(view), "event": event})
        return
    facts(
        [
            ("id", view.id),
            ("tenant", view.tenant),
            *view.dimensions.items(),
            (view.meter, view.value),
            ("window", moment(view.window_ms)),
            ("minted", None if view.minted_ms is None else moment(view.minted_ms)),
        ]
    )
    print()
    table([place_row(one) for one in view.places])
    print()
    gone = "Every output has settled it; its bytes are gone."
    print(gone if event is None else json.dumps(event, indent=2))


def place_row(place: Place) -> dict[str, Cell]:
    """What became of an event at an output."""
    return {
        "output": place.output,
        "state": place.state,
        "since": moment(place.at_ms),
        "first sent": moment(place.first_attempt_ms),
        "attempts": place.attempts if place.at_ms is None else None,  # nobody knows once it is settled
        "not before": moment(place.not_before_ms),
        "status": place.status,
        "reason": place.reason,
        "answer": place.answer,
    }
