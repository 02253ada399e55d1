"""The types of single values: what text is accepted, and what it becomes.

Values that come from a file arrive with a validation context, ``{"base": directory}``. Without one (models
built in code) durations may be given as integers of milliseconds and relative paths stay relative.
"""

from __future__ import annotations

import ipaddress
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from proxy_usage.config import units
from proxy_usage.config.mistakes import Wrong

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9_]{0,61}[a-z0-9])?$")


class Expanded(str):
    """A scalar with an environment variable put into it: the model decides what type it is."""

    __slots__ = ()


class Section(BaseModel):
    """Base of all parts of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, data: Any, info: ValidationInfo) -> Any:
        """A section without keys has its defaults; an optional key whose ``${VAR:-}`` is empty is not set."""
        if data is None:
            return {}
        if not isinstance(data, dict):
            return data
        for name, field in cls.model_fields.items():
            if info.context is not None and field.alias is not None and name in data:
                raise Wrong("unknown key", f"did you mean {field.alias}?", at=(name,))
        nullable = {
            field.alias or name
            for name, field in cls.model_fields.items()
            if type(None) in get_args(field.annotation)
        }
        return {
            key: None if key in nullable and isinstance(value, Expanded) and not value else value
            for key, value in data.items()
        }


def _duration(value: object, info: ValidationInfo) -> int:
    if info.context is None and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    try:
        return units.parse_duration(value)
    except ValueError as error:
        raise Wrong(str(error), units.DURATION_HELP) from None


def _positive_duration(value: object, info: ValidationInfo) -> int:
    if (ms := _duration(value, info)) == 0:
        raise Wrong("must be longer than 0", units.DURATION_HELP)
    return ms


def _interval(value: object, info: ValidationInfo) -> int | None:
    if value is None or value is False or value in ("off", ""):
        return None
    return _positive_duration(value, info)


def _size(value: object) -> int:
    try:
        return units.parse_size(value)
    except ValueError as error:
        raise Wrong(str(error), units.SIZE_HELP) from None


def _positive_size(value: object) -> int:
    if (size := _size(value)) == 0:
        raise Wrong("must be more than 0", units.SIZE_HELP)
    return size


def _whole(value: object) -> object:
    if isinstance(value, Expanded) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    return value


def _flag(value: object) -> object:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, Expanded) else value


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``127.0.0.1:9001``, ``[::1]:9001`` or ``name:9001``; port 0 lets the system choose.

    Raises Wrong (a ValueError).
    """
    remedy = "write host:port, e.g. 127.0.0.1:9001 or [::1]:9001"
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise Wrong(f"{address!r} is not an address with a port", remedy)
    if not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise Wrong(f"{port!r} is not a port between 0 and 65535", remedy)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise Wrong(f"{host!r} is not an IPv6 address", remedy) from None
    elif not re.fullmatch(r"[A-Za-z0-9._-]+", host):
        raise Wrong(f"{host!r} is not a host name or IPv4 address", remedy)
    elif re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise Wrong(f"{host!r} is not an IPv4 address", remedy) from None
    return host, int(port)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach ``host:port``. A name other than localhost is not trusted to."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(value: str) -> str:
    split_address(value)
    return value


def compile_regex(text: str) -> re.Pattern[str]:
    """Compiles a regular expression; raises Wrong, which says at which character it is bad."""
    try:
        return re.compile(text)
    except re.error as error:
        where = "" if error.pos is None else f" at character {error.pos + 1}"
        raise Wrong(
            f"bad regular expression {text!r}: {error.msg}{where}",
            "Python syntax; in YAML put it in single quotes, so that backslashes stay as they are",
        ) from None
    except (OverflowError, RecursionError) as error:
        raise Wrong(f"bad regular expression {text!r}: {error}", "make it simpler") from None


def _regex(value: str) -> str:
    compile_regex(value)
    return value


def _path(value: object, info: ValidationInfo) -> Path:
    if isinstance(value, Path):
        text = str(value)
    elif isinstance(value, str) and value and "\0" not in value:
        text = value
    else:
        raise Wrong(
            "must be the name of a file", "relative names start at the configuration file's directory"
        )
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise Wrong(f"{text!r} names a home directory that does not exist", "write the path out") from None
    if info.context is None:
        return path
    base: Path = info.context["base"]
    return Path(os.path.normpath(base / path))


UNREACHABLE = "let this user enter the directories above it (chmod +x, fsGroup), or name another place"


def _readable(path: Path, info: ValidationInfo) -> Path:
    """A file that must be there now: better to hear of it at start than at the first hand-shake."""
    if info.context is not None and not info.context.get("files", True):
        return path
    try:
        there = path.exists()
    except OSError as error:  # a directory above it may not be entered
        raise Wrong(f"file {path} cannot be reached: {error.strerror}", UNREACHABLE) from None
    if not there:
        raise Wrong(
            f"file {path} does not exist",
            "create it, or correct the name (relative to the configuration file)",
        )
    if not path.is_file():
        raise Wrong(f"{path} is not a file", "name a file")
    if not os.access(path, os.R_OK):
        raise Wrong(f"file {path} cannot be read by this user", "grant read permission (chmod, fsGroup)")
    return path


def http_url(value: str) -> str:
    """The value, if it is the address of something that speaks HTTP. Raises Wrong."""
    remedy = "write http://host[:port]/path or https://host[:port]/path"
    try:
        url: SplitResult = urlsplit(value)
        port = url.port
    except ValueError as error:
        raise Wrong(f"{_without_user(value)!r} is not a URL: {error}", remedy) from None
    if url.scheme not in ("http", "https"):
        raise Wrong(f"scheme {url.scheme!r} is neither http nor https", remedy)
    if url.username is not None or url.password is not None:
        raise Wrong(
            "a URL must not hold a user or password (it would show in logs)",
            "use token_file, or user and password_file",
        )
    if not url.hostname or port == 0:
        raise Wrong(f"{value!r} names no host or port that can be reached", remedy)
    if url.fragment or re.search(r"[\s\x00-\x1f]", value):
        raise Wrong(f"{value!r} has a fragment or white space", remedy)
    return value


def _without_user(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", url)


def _instant(value: object, info: ValidationInfo) -> int:
    """Milliseconds since the epoch of an RFC 3339 time with a zone."""
    instant_help = "write an RFC 3339 time with a zone, e.g. 2026-09-01T00:00:00Z"
    if info.context is None and isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise Wrong(f"{value!r} is not a time", instant_help)
    try:
        return units.parse_instant(value)
    except ValueError as error:
        raise Wrong(str(error), instant_help) from None


def format_instant(ms: int) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return (_EPOCH + timedelta(milliseconds=ms)).strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z"


def _name(value: str) -> str:
    if not _NAME.match(value):
        raise Wrong(
            f"{value!r} is not a name", "use lower-case letters, digits, '-' and '_', at most 63 characters"
        )
    return value


_DURATION_SCHEMA = {
    "type": "string",
    "pattern": units.DURATION_PATTERN,
    "examples": ["250ms", "30s", "1h30m"],
}
_SIZE_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": units.SIZE_PATTERN}],
    "examples": ["64MiB", 1048576],
}
# A YAML 1.1 reader makes false of off.
_INTERVAL_SCHEMA = {"anyOf": [_DURATION_SCHEMA, {"enum": ["off", False, None]}]}
_FILE_SCHEMA = {"type": "string", "minLength": 1, "description": "file; relative to the configuration file"}


def _show_interval(ms: int | None) -> str:
    return "off" if ms is None else units.format_duration(ms)


_as_duration = PlainSerializer(units.format_duration, when_used="json")
_as_size = PlainSerializer(units.format_size, when_used="json")

Duration = Annotated[int, PlainValidator(_duration), _as_duration, WithJsonSchema(_DURATION_SCHEMA)]
"""Milliseconds, 0 or more."""
PositiveDuration = Annotated[
    int, PlainValidator(_positive_duration), _as_duration, WithJsonSchema(_DURATION_SCHEMA)
]
Interval = Annotated[
    int | None,
    PlainValidator(_interval),
    PlainSerializer(_show_interval, when_used="json"),
    WithJsonSchema(_INTERVAL_SCHEMA),
]
"""Milliseconds, or None for ``off``."""
PositiveSize = Annotated[int, PlainValidator(_positive_size), _as_size, WithJsonSchema(_SIZE_SCHEMA)]
"""Bytes, 1 or more."""
Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
Count = Annotated[int, Strict(), Field(ge=1), BeforeValidator(_whole)]
Flag = Annotated[bool, Strict(), BeforeValidator(_flag)]
Text = Annotated[str, Field(min_length=1)]
Address = Annotated[str, AfterValidator(_address)]
Regex = Annotated[str, AfterValidator(_regex), WithJsonSchema({"type": "string", "format": "regex"})]
AnyPath = Annotated[Path, PlainValidator(_path), WithJsonSchema(_FILE_SCHEMA)]
"""A path that need not exist yet."""
FilePath = Annotated[Path, PlainValidator(_path), AfterValidator(_readable), WithJsonSchema(_FILE_SCHEMA)]
"""A file that exists and can be read."""
Name = Annotated[str, AfterValidator(_name)]
HttpUrl = Annotated[
    str, AfterValidator(http_url), WithJsonSchema({"type": "string", "pattern": "^https?://[^@]+$"})
]
Instant = Annotated[
    int,
    PlainValidator(_instant),
    PlainSerializer(format_instant, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""Milliseconds since the epoch."""
