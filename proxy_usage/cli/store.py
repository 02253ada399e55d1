"""``proxy-usage store``: what is in a store file, also in a damaged one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, reading_config
from proxy_usage.cli.show import Cell, emit, facts, plain, size, table

if TYPE_CHECKING:
    from proxy_usage.store.check import Checked

store = typer.Typer(help="What is in a store file, also in a damaged one.", no_args_is_help=True)


@store.callback()
def _group() -> None:
    """Keeps ``check`` a verb of its own while it is the only one."""


@store.command("check")
def check(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The file; else all workers' stores.")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a store from its first page to its last and say what is in it; exit with 1 when it is damaged.

    Changes nothing, works beside a running service, and on files that were set aside.
    """
    from proxy_usage.cli.stores import store_paths
    from proxy_usage.store.check import check_file

    paths = [file] if file is not None else list(store_paths(reading_config(config)).values())
    found = [check_file(path) for path in paths]
    if as_json:
        emit(_as_data(found[0]) if len(found) == 1 else {"stores": [_as_data(one) for one in found]})
    else:
        for number, one in enumerate(found):
            if number:
                print()
            _show(one)
    raise typer.Exit(0 if all(one.sound for one in found) else 1)


def _as_data(found: Checked) -> dict[str, Any]:
    balanced = None if found.conservation is None else found.conservation.balanced
    return {**plain(found), "sound": found.sound, "balanced": balanced}


def _show(found: Checked) -> None:
    facts(
        [
            ("file", f"{found.path} ({size(found.bytes)}, write-ahead log {size(found.log_bytes)})"),
            ("store", "of proxy-usage" if found.ours else "not of proxy-usage, or nothing of it can be read"),
            ("schema version", found.version),
            ("verdict", "sound" if found.sound else "DAMAGED, or not for this program"),
            *(("", line) for line in found.damage),
            ("balanced", None if found.conservation is None else _yes(found.conservation.balanced)),
            *_salvageable(found),
        ]
    )
    if found.tables:
        print()
        table({"table": name, "rows": rows} for name, rows in found.tables.items())


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _salvageable(found: Checked) -> list[tuple[str, Cell]]:
    """What setting it aside would bring over; nothing to say of a sound file."""
    could = found.salvageable
    if could is None or found.sound:
        return []
    values = ", ".join(f"{meter} {value}" for meter, value in could.values.items())
    lines = [f"{could.events} events ({values or 'none'}), {could.open_windows} open windows"]
    if could.uncertain_windows:
        lines.append(f"{could.uncertain_windows} windows that may have been billed would be left out")
    lines.append(f"{could.gaps} places cannot be read, {could.senseless} rows make no sense")
    return [("could be salvaged" if number == 0 else "", line) for number, line in enumerate(lines)]
