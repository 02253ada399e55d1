"""Held usage and the rules of today.

An identity says where its values stand, by the rules that were in force when its rows were read. ``facts``
says what they are, by field; so that usage without a tenant can be given to whom later rules name, however
the rules have changed since. A rule that reads a field of which nothing is known is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from proxy_usage.attribution import Attributor, Unattributed
from proxy_usage.model import Field, FieldKind, Identity, Key, Origin


class Fact(NamedTuple):
    """What was read from one field."""

    kind: str
    """``FieldKind``, as text: a fact outlives the program that noted it."""
    path: tuple[str, ...]
    value: bytes


def facts(attributor: Attributor, identity: Identity) -> tuple[Fact, ...]:
    """What an identity says, by the rules under which it was made. Fields without a value are left out."""
    found: dict[Field, bytes] = {}
    index = identity.rule if identity.rule >= 0 else ~identity.rule
    if identity.value and index < len(attributor.rules):
        found[attributor.rules[index]] = identity.value
    for field, value in zip(attributor.fields, identity.dimensions, strict=False):
        found.setdefault(field, value)
    for path, text in zip(attributor.node_paths, identity.origin.node, strict=False):
        found[Field(FieldKind.NODE, path)] = text.encode("utf-8", "surrogateescape")
    return tuple(Fact(field.kind.value, field.path, value) for field, value in found.items() if value)


def attribute_again(
    attributor: Attributor, known: Sequence[Fact], origin: Origin, *, routed: bool
) -> Key | Unattributed:
    """Whom the present rules bill for usage of which ``known`` is known.

    Args:
        origin: where it came from; its node's values are taken from ``known``.
        routed: whether its rows named a route.
    """
    values = {(fact.kind, fact.path): fact.value for fact in known}

    def value(field: Field) -> bytes:
        if field.kind is FieldKind.LITERAL:
            return field.path[0].encode()
        return values.get((field.kind.value, field.path), b"")

    rule, refused = -1, True
    for index, field in enumerate(attributor.rules):
        if not (found := value(field)):
            continue
        if attributor.accepts(index, found.decode("utf-8", "surrogateescape")):
            rule = index
            break
        if refused:
            rule, refused = ~index, False
    read = attributor.rules[rule if rule >= 0 else ~rule]
    nodes = (value(Field(FieldKind.NODE, path)) for path in attributor.node_paths)
    identity = Identity(
        origin._replace(node=tuple(text.decode("utf-8", "surrogateescape") for text in nodes)),
        rule,
        value(read) if rule >= 0 or not refused else b"",
        tuple(value(field) for field in attributor.fields),
        routed=routed,
    )
    return attributor.attribute(identity)
