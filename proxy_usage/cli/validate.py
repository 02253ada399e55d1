"""``proxy-usage validate``: every mistake before the start, and what may surprise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, config_file, load_config
from proxy_usage.cli.show import Cell, emit, facts, safe
from proxy_usage.errors import ConfigError

if TYPE_CHECKING:
    from proxy_usage.config import Config
    from proxy_usage.config.outputs import OutputConfig
    from proxy_usage.delivery.transport import TokenFile

CatalogOption = Annotated[
    Path | None,
    typer.Option("--catalog", metavar="DIR", help="Check against the service catalog in this directory."),
]


def validate(config: ConfigOption = None, catalog: CatalogOption = None, as_json: JsonOption = False) -> None:
    """Check the configuration, and that the catalog declares it.

    Exit code 0 when it can be used (there may be warnings), 78 when it cannot.
    """
    path = config_file(config)
    try:
        loaded = load_config(config)
        warnings = [*_warnings(loaded, time.time_ns() // 1_000_000), *_check(loaded, catalog)]
    except ConfigError as error:
        if not as_json:
            raise
        emit(
            {
                "ok": False,
                "config": str(path),
                "error": error.message,
                "mistakes": error.mistakes,
                "hint": error.hint,
            }
        )
        raise typer.Exit(error.exit_code) from None
    if as_json:
        emit({"ok": True, "config": str(path), **_summary(loaded, catalog), "warnings": warnings})
        return
    facts(_described(loaded, catalog))
    for warning in warnings:
        print(f"warning: {safe(warning)}")
    print(f"{path} can be used" + (f"; {len(warnings)} warnings" if len(warnings) > 1 else ""))


def _check(config: Config, catalog: Path | None) -> list[str]:
    """What cannot be seen in the file alone. Returns warnings.

    Raises:
        ConfigError: an event would not be a CloudEvent, or would not be what the catalog declares.
    """
    from proxy_usage.catalog import WARNING, check_config, check_rules, load_catalog
    from proxy_usage.samples import check_formats, check_samples
    from proxy_usage.service.build import build_mint

    defaults = [dimension.default for dimension in config.dimensions.values()]
    if config.outputs:
        check_samples(build_mint(config), defaults)
        check_formats(config.outputs, build_mint(config), defaults)
    if catalog is None:
        return []
    declared = load_catalog(catalog)
    findings = check_config(declared, config.meter_list(), tuple(config.dimensions))
    wrong = tuple(finding for finding in findings if not finding.startswith(WARNING))
    if wrong:
        raise ConfigError(
            f"catalog {catalog}: events of this configuration would not be billed as meant",
            hint="make meters and dimensions those that the catalog declares, or declare them there",
            mistakes=wrong,
        )
    return [
        *(finding.removeprefix(WARNING) for finding in findings),
        *(f"catalog: {finding}" for finding in check_rules(declared)),
    ]


def _warnings(config: Config, now_ms: int) -> Iterator[str]:
    """What is allowed and may not be meant."""
    from proxy_usage.config.units import format_size

    if sys.platform != "linux" and config.forward is None:
        unbounded = format_size(config.listen.limits.unbounded())
        yield f"only Linux says what has arrived: here senders can make the sink hold {unbounded}"
    for key, path, credentials in _credentials(config):
        if not credentials.token():
            yield f"{key}: {path} holds nothing that can be sent: it is empty, or has more than one line"
    sending = [output for output in config.outputs if output.format != "none"]
    if not sending:
        yield "no output sends anything: the ledger alone is kept"
    for output in config.outputs:
        name = f"outputs {output.name!r}"
        if output.source != config.outputs[0].source:
            yield f"{name}: source is not used, an event has one: that of {config.outputs[0].name!r}"
        if output.until is not None and output.until <= now_ms:
            yield f"{name}: until has passed, nothing more will be sent"
        for bound, at_ms in (("from", output.from_), ("until", output.until)):
            if at_ms is not None and at_ms % config.windows.length:
                # Whoever counts on the other side of the moment would count the window's rest twice, or not.
                yield f"{name}: {bound} is within a window; windows are sent whole, by when they begin"
    yield from _plain_text(config)


def _plain_text(config: Config) -> Iterator[str]:
    """What others on the way can read."""
    from proxy_usage.config.fields import is_loopback

    for output in config.outputs:
        url = urlsplit(output.url or "")
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
        if output.format != "none" and url.scheme in ("http", "nats") and not is_loopback(f"{host}:80"):
            what = (
                "the credentials and all usage travel"
                if output.token_file or output.user or (output.nats and output.nats.creds_file)
                else "all usage travels"
            )
            yield f"outputs {output.name!r}: {what} in plain text to {url.hostname}"
    if config.forward is not None and config.forward.url.startswith("nats:"):
        host = urlsplit(config.forward.url).hostname or ""
        if not is_loopback(f"[{host}]:80" if ":" in host else f"{host}:80"):
            yield f"forward: all usage travels in plain text from {host}"


def _credentials(config: Config) -> Iterator[tuple[str, Path, TokenFile]]:
    """Each file with a secret that is used: its key, its path, and who reads it."""
    from proxy_usage.delivery.transport import Password, TokenFile

    listen, forward = config.listen, config.forward
    tokens = {"listen.http_token_file": listen.http_token_file}
    if forward is None:
        tokens |= {"listen.token_file": listen.token_file, "audit.token_file": config.audit.token_file}
    else:
        tokens["forward.token_file"] = forward.token_file
    for output in config.outputs:
        if output.format == "none":
            continue
        tokens[f"outputs {output.name!r}: token_file"] = output.token_file
        if output.user is not None and output.password_file is not None:
            password = Password(output.user, output.password_file)
            yield f"outputs {output.name!r}: password_file", output.password_file, password
    for key, path in tokens.items():
        if path is not None:
            yield key, path, TokenFile(path)


def _summary(config: Config, catalog: Path | None) -> dict[str, Any]:
    outputs = [
        {
            "name": output.name,
            "format": output.format,
            "url": output.url,
            "file": output.file and str(output.file.path),
        }
        for output in config.outputs
    ]
    declared = None if catalog is None else str(catalog)
    if config.forward is not None:  # it has an HTTP port, and of all the rest nothing
        forward = {name: getattr(config.forward, name) for name in ("url", "stream", "durable", "subject")}
        listen = {"http": config.listen.http}
        return {"listen": listen, "forward": forward, "outputs": outputs, "catalog": declared}
    limits = config.listen.limits.part(config.workers)
    return {
        "listen": {"grpc": config.listen.grpc, "streams": config.listen.streams, "http": config.listen.http},
        "rules": [str(rule.field) for rule in config.tenant.rules],
        "dimensions": {name: str(dimension.field) for name, dimension in config.dimensions.items()},
        "meters": [{"name": m.name, "type": m.type, "unit": m.unit} for m in config.meter_list()],
        "skip": [rule.reason for rule in config.skip],
        "outputs": outputs,
        "store": str(config.store.path),
        "workers": config.workers,
        "memory": {
            "limit": limits.memory,
            "needed": limits.needed(),
            "worst_case": config.worst_case_memory(),
            "unbounded": limits.unbounded(),
        },
        "catalog": declared,
    }


def _place(output: OutputConfig) -> str | None:
    return str(output.file.path) if output.file is not None else output.url


def _described(config: Config, catalog: Path | None) -> Iterator[tuple[str, Cell]]:
    if config.forward is not None:  # it has an HTTP port, and of all the rest nothing
        yield "listen", f"HTTP {config.listen.http}"
        yield "forward", f"{config.forward.subject} of {config.forward.stream} at {config.forward.url}"
        yield "durable", config.forward.durable
    else:
        yield from _metered(config)
    for output in config.outputs:
        yield "output", f"{output.name} ({output.format}) {_place(output) or ''}".strip()
    if config.forward is None:
        yield from _kept(config)
    if catalog is not None:
        yield "catalog", f"{catalog}: every meter, unit and dimension is declared"


def _metered(config: Config) -> Iterator[tuple[str, Cell]]:
    listen = config.listen
    streams = f", long streams {listen.streams}" if listen.streams else ""
    yield "listen", f"gRPC {listen.grpc}{streams}, HTTP {listen.http}"
    yield "tenants", ", then ".join(str(rule.field) for rule in config.tenant.rules)
    for name, dimension in config.dimensions.items():
        yield "dimension", f"{name} from {dimension.field}"
    for meter in config.meter_list():
        yield "meter", f"{meter.name} as {meter.type} in {meter.unit}"


def _kept(config: Config) -> Iterator[tuple[str, Cell]]:
    from proxy_usage.config.units import format_size

    limits = config.listen.limits.part(config.workers)
    yield "store", str(config.store.path)
    message, window = format_size(limits.message), format_size(limits.window)
    worst = format_size(config.worst_case_memory())
    held = f"limit {format_size(limits.memory)}, an eighth more, and one message of {message}"
    if config.workers > 1:
        held = f"{config.workers} workers × ({held})"
    yield "memory", f"messages take at most {worst}: {held}"
    needed, new = format_size(limits.needed()), limits.new_streams
    product = f"({new} new streams + 1) × {message} + {limits.connections} connections × {window}"
    of = "each worker's senders" if config.workers > 1 else "senders"
    yield "", f"{of} may need {needed} of it at once: {product}"
    yield "samples", f"{len(config.meters)} events read by the CloudEvents SDK"
