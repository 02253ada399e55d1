"""``proxy-usage record``: what arrives at a running service, written to a file for a while."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, load_config
from proxy_usage.cli.show import emit, size
from proxy_usage.errors import ProxyUsageError, UsageError

if TYPE_CHECKING:
    from proxy_usage.config import Config

ASK_EVERY_S = 0.3


def record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Made by the service; must not exist yet.")],
    config: ConfigOption = None,
    seconds: Annotated[int, typer.Option("--seconds", min=1, max=3600, help="Ends after so long.")] = 30,
    limit: Annotated[str, typer.Option("--size", metavar="SIZE", help="Ends when so large.")] = "64MiB",
    hashed: Annotated[
        bool, typer.Option("--hash", help="Put digests in place of paths, headers and addresses.")
    ] = False,
    entries: Annotated[
        bool, typer.Option("--print", help="Then print each whole entry, as Envoy's schema types it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Record what arrives at the running service, for a support case. Ctrl-C ends it early.

    FILE gets the messages as `explain` reads them; FILE's name with .streams.json and .received.json in
    place of its ending the number of each message's stream and its time of receipt in milliseconds. Of
    several workers, all record, and it ends when the first of them has its share of --size.
    """
    from proxy_usage.cli.recordings import Recording
    from proxy_usage.cli.stores import refuse_forwarder
    from proxy_usage.config.units import parse_size
    from proxy_usage.config.workers import worker_path
    from proxy_usage.control import NotRunning, socket_path

    loaded = load_config(config)
    refuse_forwarder(loaded)
    path = file.absolute()
    stores = {worker: worker_path(loaded.store.path, worker) for worker in range(loaded.workers)}
    recording = Recording({worker: socket_path(store) for worker, store in stores.items()}, path)
    try:
        recording.start(max_bytes=_size(limit, parse_size), seconds=seconds)
    except NotRunning as error:
        raise ProxyUsageError(
            "no service runs here, so nothing arrives", hint="start it with proxy-usage run, then record"
        ) from error
    try:
        while recording.running():
            time.sleep(ASK_EVERY_S)
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # pressed twice: the file is still ended properly
            recording.stop()
    answer = recording.end()
    left_out = 0
    if hashed:
        from proxy_usage.cli.redact import redact

        left_out = redact(path)
    if entries:
        _print_entries(path, loaded)
    if as_json:
        emit({**answer, "hashed": hashed, "left_out": left_out})
        return
    ended = {"time": "time is up", "size": "it is as large as it may be"}.get(
        answer["ended"], answer["ended"]
    )
    print(f"{answer['messages']} messages, {size(answer['bytes'])}, in {path} ({ended})")
    for worker in recording.down:
        print(f"worker {worker} was down: what came to it meanwhile is not in it")
    for part in recording.left:
        print(f"{part} is of a worker that died: its end may be cut, and its streams are not told apart")
    if left_out:
        print(f"{left_out} rows that cannot be read were left out: nobody can say what they tell")
    print(f"see what becomes of them: proxy-usage explain {path}")


def _print_entries(path: Path, config: Config) -> None:
    """A line of JSON an entry; what the strict types cannot hold is named."""
    from proxy_usage.cli.capture import read_capture
    from proxy_usage.cli.explain import typed
    from proxy_usage.cli.rows import Explainer

    for row in Explainer(config, time.time_ns() // 1_000_000).rows(read_capture(path, raw=False)):
        whole, error = typed(row)
        print(json.dumps({"entry": row.entry, "typed": whole, "typed_error": error}))


def _size(text: str, parse: Any) -> int:
    try:
        limit: int = parse(text)
    except ValueError as error:
        raise UsageError(f"--size: {error}", hint="write it like 64MiB") from None
    return limit
