"""Dataclasses as JSON, for what processes send to each other: parsed and checked where it arrives.

The sender may be of another version. Entries that a dataclass does not have are ignored; a field with a default may be
missing. All else must be exactly of the type that the field promises.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

INTEGER_BOUND = 2**64  # absolute values of integers that are read are below it


@dataclass(frozen=True)
class _Entry:
    """How a field of a dataclass is written in JSON."""

    name: str  # of the field
    key: str  # in the JSON object
    kind: Any  # the field's type
    required: bool


def named(key: str) -> dict[str, str]:
    """Return the metadata of a field whose key in JSON is not its name: `field(metadata=named("own name"))`."""
    return {"json": key}


def encode_record(value: object) -> Any:
    """Return a value with its dataclasses as JSON objects and its tuples as lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.key: encode_record(getattr(value, entry.name)) for entry in _entries(type(value))}
    if isinstance(value, dict):
        return {key: encode_record(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode_record(inner) for inner in value]
    return value


def parse_record(value: Any, kind: Any) -> Any:
    """Return a JSON value as a type.

    Args:
        value: what a JSON parser returned.
        kind: a dataclass, `list[T]`, `dict[str, T]`, a tuple of types, a union, int, float, str, bool, None or Any.

    Raises:
        ValueError: it is not of that type, or an invalid value of it.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if isinstance(kind, types.UnionType):
        return _parse_union(value, kind)
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(value, dict) and all(entry.key in value for entry in _entries(kind) if entry.required):
            found = {e.name: parse_record(value[e.key], e.kind) for e in _entries(kind) if e.key in value}
            return kind(**found)
    elif origin is list and isinstance(value, list):
        return [parse_record(one, arguments[0]) for one in value]
    elif origin is dict and isinstance(value, dict):
        return {key: parse_record(one, arguments[1]) for key, one in value.items()}
    elif origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(map(parse_record, value, arguments))
    elif kind is float and type(value) is int and abs(value) < INTEGER_BOUND:
        return float(value)
    elif type(value) is kind and (kind is not int or abs(value) < INTEGER_BOUND):  # True is not an integer
        return value
    raise ValueError(f"expected {getattr(kind, '__name__', kind)}, got {value!r:.100}")


def _parse_union(value: Any, kind: types.UnionType) -> Any:
    errors = []
    for one in get_args(kind):
        if one is type(None):
            if value is None:
                return None
            continue
        try:
            return parse_record(value, one)
        except ValueError as error:
            errors.append(error)
    raise errors[0] if len(errors) == 1 else ValueError(f"expected {kind}, got {value!r:.100}")


@cache
def _entries(kind: type) -> list[_Entry]:
    hints = get_type_hints(kind)
    members: tuple[Field[Any], ...] = fields(kind)
    return [
        _Entry(
            member.name,
            member.metadata.get("json", member.name),
            hints[member.name],
            member.default is MISSING and member.default_factory is MISSING,
        )
        for member in members
    ]
