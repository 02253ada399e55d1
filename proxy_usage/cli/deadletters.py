"""``proxy-usage deadletters``: events that an output refused alone, and putting them back."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy_usage.cli.options import (
    ConfigOption,
    EventArgument,
    JsonOption,
    LimitOption,
    OutputOption,
    load_config,
    reading_config,
)
from proxy_usage.cli.queue import show_event
from proxy_usage.cli.repair import repaired, when
from proxy_usage.cli.show import Cell, emit, moment, plain, table
from proxy_usage.errors import ProxyUsageError, UsageError

if TYPE_CHECKING:
    from proxy_usage.cli.stores import Readers
    from proxy_usage.store.reader import Reader
    from proxy_usage.store.views import DeadLetter

deadletters = typer.Typer(
    help="Events that an output refused alone, and putting them back.", no_args_is_help=True
)
IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="These events; without: all that are meant.")
]
ReasonOption = Annotated[
    str | None, typer.Option("--reason", metavar="REASON", help="With this reason only.")
]


@deadletters.command("ls")
def ls(
    config: ConfigOption = None,
    output: OutputOption = None,
    reason: ReasonOption = None,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List dead letters with the reason and the endpoint's answer."""
    from proxy_usage.cli.stores import opened

    with opened(reading_config(config)) as stores:
        letters = stores.listed(lambda reader: reader.dead_letters(output, reason, limit), limit)
        nothing = _nothing(stores, output, reason, "there are no dead letters")
    if as_json:
        emit({"deadletters": [plain(one) | stores.mark(worker) for worker, one in letters]})
        return
    rows: list[dict[str, Cell]] = [
        {
            "output": one.output,
            "id": one.id,
            "tenant": one.tenant,
            "meter": one.meter,
            "value": one.value,
            "window": moment(one.window_ms),
            "since": moment(one.at_ms),
            "reason": one.reason,
            "answer": one.answer,
            **stores.mark(worker),
        }
        for worker, one in letters
    ]
    table(rows, empty=nothing)


@deadletters.command("show")
def show(event_id: EventArgument, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show one dead letter: the answers, and what it says."""
    show_event(event_id, config, as_json)


@deadletters.command("replay")
def replay(
    ids: IdsArgument = None,
    config: ConfigOption = None,
    output: OutputOption = None,
    reason: ReasonOption = None,
    redate: Annotated[
        bool, typer.Option("--redate", help="Under another id, in the present window: a new event each.")
    ] = False,
    accept_duplicates: Annotated[
        bool,
        typer.Option("--accept-duplicates", help="With --redate: also those the endpoint may have stored."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Put dead letters back into the queue.

    Their id, time and bytes do not change, unless --redate. A running service does it itself; without one,
    this program takes the store's lock.
    """
    if accept_duplicates and not redate:
        raise UsageError(
            "--accept-duplicates goes with --redate",
            hint="without it an event keeps its id and is told apart",
        )
    loaded = load_config(config)
    wanted = list(dict.fromkeys(ids or []))
    asked: dict[str, object] = {"output": output, "ids": wanted, "reason": reason}
    if redate:
        done = repaired(
            loaded,
            "deadletters.redate",
            asked | {"accept_duplicates": accept_duplicates},
            lambda repairs, some: repairs.redate(output, some, reason, accept_duplicates=accept_duplicates),
            ids=wanted,
            knows=_knows,
        )
    else:
        done = repaired(
            loaded,
            "deadletters.replay",
            asked,
            lambda repairs, some: repairs.replay(output, some, reason),
            ids=wanted,
            knows=_knows,
        )

    def none_meant() -> str:
        from proxy_usage.cli.stores import opened

        with opened(loaded) as stores:
            return _nothing(stores, output, reason, "no dead letter was meant")

    counts = done.counts
    if as_json:
        emit({name: count for name, count in counts.items() if name != "minted"} | {"service": done.service})
        return
    if redate:
        count = counts.get("redated", 0)
        print(f"{count} new events take the place of dead letters; {when(done)}" if count else none_meant())
        if counts.get("doubtful"):
            print(f"{counts['doubtful']} may have been stored and stay: --accept-duplicates takes them, too")
        return
    count = counts.get("replayed", 0)
    print(f"{count} dead letters are back in the queue; {when(done)}" if count else none_meant())
    if counts.get("too_late"):
        print(f"{counts['too_late']} are too old to be sent as they are and stay: --redate makes them anew")


@deadletters.command("export")
def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to; - for standard output.")],
    config: ConfigOption = None,
    output: OutputOption = None,
    reason: ReasonOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is there, once the new one is complete.")
    ] = False,
) -> None:
    """Write dead letters to a file: a JSON object a line, with the event as it would be sent.

    They stay in the store. FILE must not exist yet, unless --force.
    """
    from proxy_usage.cli.stores import opened

    if file != "-" and not force and os.path.lexists(file):
        raise UsageError(
            f"cannot write {file}: it exists", hint="name a file that does not exist yet, or add --force"
        )
    with opened(reading_config(config)) as stores:
        having = stores.each(lambda reader: reader.dead_letters(output, reason, 1))
        lines = (
            _line(letter, body, stores.mark(worker))
            for worker in having
            for letter, body in stores.readers[worker].letters(output, reason)
        )
        if file == "-":
            for line in lines:
                print(line)
            return
        if not any(having.values()):  # an empty file would be in the way of the next try
            print(_nothing(stores, output, reason, f"there are no dead letters: {file} was not written"))
            return
        count = _write(Path(file), lines)
    print(f"{count} dead letters are in {file}")


def _nothing(stores: Readers, output: str | None, reason: str | None, otherwise: str) -> str:
    """What is said where no letter is meant: the reasons that there are, if the one named is none of them."""
    others = stores.other_reasons(lambda reader: reader.dead_reasons(output), reason)
    return f"no dead letters with this reason; there are: {others}" if others else otherwise


def _knows(reader: Reader, event_id: str) -> bool:
    return reader.event(event_id) is not None


def _line(letter: DeadLetter, body: bytes, mark: dict[str, int]) -> str:
    """``event`` is the CloudEvent; ``body`` stands for it, in base 64, where the stored bytes are no JSON."""
    try:
        event = {"event": json.loads(body)}
    except ValueError:
        event = {"body": base64.b64encode(body).decode()}
    return json.dumps(plain(letter) | mark | event, separators=(",", ":"))


def _write(path: Path, lines: Iterable[str]) -> int:
    """Writes a file for its owner alone, whole or not at all. Returns how many lines it has.

    Raises:
        ProxyUsageError: it cannot be written.
    """
    beside = path.with_name(path.name + ".partial")
    count = 0
    try:
        beside.touch(0o600)
        with beside.open("w", encoding="utf-8") as written:
            for line in lines:
                written.write(f"{line}\n")
                count += 1
            written.flush()
            os.fsync(written.fileno())
        beside.replace(path)
    except OSError as error:
        raise ProxyUsageError(
            f"cannot write {path}: {error.strerror}", hint="name a file in a directory you may write to"
        ) from None
    return count
