"""The validator's errors in the words of the person who wrote the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from proxy_usage.config.mistakes import Finding, Loc, Wrong, WrongMany, dotted
from proxy_usage.config.models import Config

_TYPES = {
    "string_type": ("text", "write text; a number or true needs quotes to be text"),
    "int_type": ("a whole number", "write digits without quotes or unit"),
    "bool_type": ("true or false", "write true or false"),
    "tuple_type": ("a list", "write [a, b], or one `- item` a line"),
    "dict_type": ("a mapping", "write `key: value` a line"),
    "mapping_type": ("a mapping", "write `key: value` a line"),
    "model_type": ("a mapping", "write `key: value` a line"),
}


def findings(error: ValidationError) -> Iterator[Finding]:
    """Every mistake in ``error``, with its path from the root."""
    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":
            continue  # the default of windows.reopen is windows.length, and that is what is wrong
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, WrongMany):
            yield from (_wrong(detail["loc"], one) for one in cause.mistakes)
        elif isinstance(cause, Wrong):
            yield _wrong(detail["loc"], cause)
        else:
            yield _validator(detail)


def _wrong(loc: Loc, wrong: Wrong) -> Finding:
    return Finding((*loc, *wrong.at), wrong.what, wrong.remedy, wrong.place)


def _validator(detail: ErrorDetails) -> Finding:
    loc, context, kind = detail["loc"], detail.get("ctx", {}), detail["type"]
    given = detail["input"]
    if kind == "extra_forbidden":
        return Finding(loc, "unknown key", _known_keys(loc))
    if kind == "missing":
        return Finding(loc, "is missing", "add it")
    if kind in _TYPES:
        noun, remedy = _TYPES[kind]
        return Finding(loc, f"must be {noun}, not {_noun(given)}", remedy)
    if kind == "literal_error":
        return Finding(
            loc, f"{given!r} is not a valid value", _valid_values(str(given), str(context["expected"]))
        )
    if kind == "greater_than_equal":
        return Finding(loc, f"{given} is too small", f"at least {context['ge']}")
    if kind == "less_than_equal":
        return Finding(loc, f"{given} is too large", f"at most {context['le']}")
    if kind == "string_too_short":
        return Finding(loc, "must not be empty", "write its value, or remove the key")
    if kind == "string_pattern_mismatch":
        return Finding(
            loc, f"{given!r} is not a name", "start with a lower-case letter, then letters, digits and '_'"
        )
    return Finding(loc, detail["msg"], "correct the value")


def _noun(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) < 40 else "text"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value).lower()


def _valid_values(given: str, expected: str) -> str:
    values = [value.strip("'") for value in expected.replace(" or ", ", ").split(", ")]
    near = get_close_matches(given, values, n=1)
    return f"valid are {', '.join(values)}" + (f" (did you mean {near[0]}?)" if near else "")


def _known_keys(loc: Loc) -> str:
    """The nearest key of the same section, else the section that has the key, else all there are."""
    key = str(loc[-1])
    here = _keys(_at(Config, loc[:-1]))
    if near := get_close_matches(key, here, n=1):
        return f"did you mean {near[0]}?"
    elsewhere = [dotted(other) for other in _all_keys(Config, ()) if other[-1] == key]
    if len(elsewhere) == 1:
        return f"it belongs under {elsewhere[0]}"
    return f"valid are {', '.join(here)}"


def _keys(model: type[BaseModel] | None) -> list[str]:
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def _all_keys(model: type[BaseModel], loc: Loc) -> Iterator[Loc]:
    for name, field in model.model_fields.items():
        here = (*loc, field.alias or name)
        yield here
        inner, kind = _unwrap(field.annotation)
        if inner is not None and kind is None:
            yield from _all_keys(inner, here)


def _at(model: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    """The model that validates what is at ``loc``."""
    current: type[BaseModel] | None = model
    parts = iter(loc)
    for part in parts:
        if current is None:
            return None
        field = next((f for name, f in current.model_fields.items() if (f.alias or name) == part), None)
        current, kind = _unwrap(field.annotation) if field else (None, None)
        if kind is not None:
            next(parts, None)  # the index or the name of the item
    return current


def _unwrap(annotation: Any) -> tuple[type[BaseModel] | None, type | None]:
    """The model inside an annotation, and the container it is in: ``tuple``, ``Mapping`` or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, None
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _unwrap(arguments[0])
    if origin is tuple:
        return _unwrap(arguments[0])[0], tuple
    if origin is Mapping:
        return _unwrap(arguments[1])[0], dict
    for argument in arguments:
        inner, kind = _unwrap(argument)
        if inner is not None:
            return inner, kind
    return None, None
