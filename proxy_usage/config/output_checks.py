"""Mistakes of outputs that only show beside other keys or on the disk, found without touching anything."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from proxy_usage.config.fields import UNREACHABLE
from proxy_usage.config.mistakes import Finding, Loc
from proxy_usage.config.models import Config
from proxy_usage.config.outputs import CeilometerConfig, OutputConfig

OWN_METADATA = ("window_start", "window_end", "meter")
"""What a sample's resource_metadata has besides the dimensions."""


def output_findings(config: Config) -> Iterator[Finding]:
    """Outputs that collide, or that cannot do what is asked of them."""
    if not config.outputs:
        yield Finding(
            ("outputs",),
            "has no output, so nothing would be delivered",
            "add {name: billing, url: …}, or {name: shadow, format: none} to keep the ledger alone",
        )
    seen: dict[str, int] = {}
    for index, output in enumerate(config.outputs):
        first = seen.setdefault(output.name, index)
        if first != index:
            yield Finding(
                ("outputs", index, "name"),
                f"{output.name!r} is the name of {{other}} already",
                "give each output its own name: the store tells them apart by it",
                concerns=(("outputs", first),),
            )
        default = OutputConfig.model_fields["source"].default
        if output.format == "cloudevents" and output.source not in (config.outputs[0].source, default):
            # Its receiver tells duplicates by source and id: another one later would be another event.
            yield Finding(
                ("outputs", index, "source"),
                "is not what would be sent: an event has one source, that of {other}",
                "write the same source, or leave it out",
                concerns=(("outputs", 0),),
            )
        yield from _sample_findings(config, index)
    yield from _archive_findings(config)


def _sample_findings(config: Config, index: int) -> Iterator[Finding]:
    """Samples that would name dimensions there are not, or have them hidden."""
    output = config.outputs[index]
    if output.format != "ceilometer":
        return
    for name in OWN_METADATA:
        if name in config.dimensions:
            yield Finding(
                ("outputs", index, "format"),
                f"ceilometer writes {name} into resource_metadata, which dimension {name!r} would be lost by",
                "give the dimension another name",
                concerns=(("dimensions", name),),
            )
    samples = output.ceilometer or CeilometerConfig()
    named: dict[str, str] = {}
    for meter, name in samples.names.model_dump().items():
        other = named.setdefault(name, meter)
        if other != meter:
            yield Finding(
                ("outputs", index, "ceilometer", "names", meter),
                f"{name!r} is the name of {other} already: the two would be added up",
                "give each meter its own name",
            )
    template = samples.resource_id
    if template == CeilometerConfig().resource_id:
        return  # without the dimensions it names, the tenant is the resource
    place: Loc = ("outputs", index, "ceilometer", "resource_id")
    known = ("tenant", "meter", *config.dimensions)
    unknown = [name for name in re.findall(r"\{(\w+)\}", template) if name not in known]
    if unknown:
        yield Finding(
            place,
            f"{{{unknown[0]}}} is no dimension",
            f"known are {', '.join(known)}",
            concerns=(("dimensions",),),
        )
    if re.search(r"[{}]", re.sub(r"\{\w+\}", "", template)):
        yield Finding(place, f"{template!r} has a brace that names nothing", "write {NAME} for a dimension")


def _archive_findings(config: Config) -> Iterator[Finding]:
    """Archives that are somebody else's files."""
    seen: dict[Path, int] = {}
    for index, output in enumerate(config.outputs):
        if output.format != "file" or output.file is None:
            continue
        place: Loc = ("outputs", index, "file", "path")
        path = output.file.path
        first = seen.setdefault(path, index)
        if first != index:
            yield Finding(
                place,
                f"{path} is the archive of {{other}} already",
                "give each output a file of its own",
                concerns=(("outputs", first),),
            )
        if path.parent == config.store.path.parent and path.name.startswith(config.store.path.name):
            yield Finding(
                place,
                f"{path} is named like a part of the store",
                "name a file of its own, best on another disk",
                concerns=(("store", "path"),),
            )


def archive_places(config: Config) -> Iterator[Finding]:
    """Archives that cannot be written where they are."""
    for index, output in enumerate(config.outputs):
        if output.format == "file" and output.file is not None:
            found = file_finding(output.file.path, "usage.ndjson")
            if found is not None:
                yield Finding(("outputs", index, "file", "path"), *found)


def file_finding(
    path: Path, example: str, access: Callable[[Path, int], bool] = os.access
) -> tuple[str, str] | None:
    """What keeps a file from being written at ``path``, and what to do: found without trying."""
    try:
        return _file_finding(path, example, access)
    except OSError as error:  # a directory above it may not be entered
        return f"{path} cannot be reached: {error.strerror}", UNREACHABLE


def _file_finding(path: Path, example: str, access: Callable[[Path, int], bool]) -> tuple[str, str] | None:
    directory = path.parent
    if path.is_dir():
        return f"{path} is a directory", f"name a file, e.g. {example} in it"
    if not directory.exists() and not directory.parent.is_dir():
        return f"directory {directory} does not exist", f"create it: mkdir -p {directory}"
    if directory.exists() and not directory.is_dir():
        return f"{directory} is not a directory", "name a file in a directory"
    writable = directory if directory.exists() else directory.parent
    if not access(writable, os.W_OK | os.X_OK):
        return (
            f"directory {writable} cannot be written by this user",
            "grant write permission (chown, fsGroup), or name another directory",
        )
    return None
