"""The types that options may have: one value, several of one type, or a fixed number of values.

int, float, str, bool, Path, Literal["a", "b"]      one value
tuple[int, ...], list[int]                          several: --widths 32,64
tuple[float, float], tuple[int, str]                as many as there are types: --betas 0.9,0.999
any of these or None
"""

from __future__ import annotations

import csv
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hvdtrain.system.errors import UserError
from hvdtrain.system.text import format_count

VALUE_TYPES = (int, float, str, bool)
EXPECTED_TYPES = (
    "options are int, float, str, bool, Path, Literal or Optional, lists and tuples of these, and dataclasses of them"
)
BOOL_TEXTS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


@dataclass(frozen=True)
class ValueType:
    """The type of one value."""

    type: type  # int, float, str, bool or pathlib.Path
    choices: tuple[str, ...] = ()  # of a Literal; empty: any value


@dataclass(frozen=True)
class SeveralValues:
    """The type of an option that holds several values."""

    container: type  # tuple or list
    items: tuple[ValueType, ...]  # one for any number of values of this type, else that of each value in order
    is_fixed: bool  # as many values as items


OptionType: TypeAlias = "ValueType | SeveralValues"


def parse_hint(hint: Any) -> tuple[OptionType | None, bool]:
    """Return the option type that a resolved type hint means, None if it is not one; and whether it may be None."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        optional = len(inner) < len(typing.get_args(hint))
        hint = inner[0] if len(inner) == 1 else hint
    container, arguments = typing.get_origin(hint), typing.get_args(hint)
    if container not in (tuple, list) or not arguments:
        return _parse_value_hint(hint), optional
    is_fixed = container is tuple and arguments[1:] != (Ellipsis,)
    items = [_parse_value_hint(argument) for argument in (arguments if is_fixed else arguments[:1])]
    known = tuple(item for item in items if item is not None)
    return SeveralValues(container, known, is_fixed) if len(known) == len(items) else None, optional


def _parse_value_hint(hint: Any) -> ValueType | None:
    if typing.get_origin(hint) is Literal:
        return ValueType(str, tuple(typing.get_args(hint)))
    if hint in VALUE_TYPES or (isinstance(hint, type) and issubclass(hint, Path)):
        return ValueType(hint)
    return None


def convert_several(
    kind: SeveralValues, flag: str, value: Any, convert: Callable[[ValueType, Any], Any]
) -> Sequence[Any]:
    """Return values in the option's container. Raises UserError for another number of them.

    Args:
        kind: the option's type.
        flag: the option on the command line.
        value: a tuple or list; anything else counts as one value.
        convert: returns one value as its type.
    """
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not kind.is_fixed:
        converted: Sequence[Any] = [convert(kind.items[0], one) for one in values]
    elif len(values) != len(kind.items):
        shown = ",".join(map(str, values))
        raise UserError(f"{flag}: {shown!r} has {format_count(len(values), 'value')}; expected {len(kind.items)}")
    else:
        converted = [convert(item, one) for item, one in zip(kind.items, values, strict=True)]
    return kind.container(converted)  # type: ignore[no-any-return]


def split_texts(flag: str, text: str) -> list[str]:
    """Return the parts of `a,b`; a part with a comma is in double quotes. "" has none. Raises UserError."""
    if not text:
        return []
    try:
        parts = next(csv.reader([text], strict=True))
    except (csv.Error, StopIteration) as error:
        raise UserError(f"{flag}: {text!r} is not a list: {error}; expected values separated by commas") from None
    for part in parts[1:]:
        if part.startswith(" "):  # "Hello, world" would silently be two texts
            raise UserError(
                f"{flag}: {text!r} has a comma and a space; expected values separated by commas alone, or one value "
                "in double quotes"
            )
    return parts


def parse_text(kind: ValueType, flag: str, text: str) -> Any:
    """Return a text of the command line as a value of a list. Raises UserError."""
    if kind.type is bool:
        if text.lower() not in BOOL_TEXTS:
            raise UserError(f"{flag}: {text!r} is not a valid boolean; expected true or false")
        return BOOL_TEXTS[text.lower()]
    if kind.type in (int, float):
        try:
            return kind.type(text)
        except ValueError:
            what = "integer" if kind.type is int else "float"
            raise UserError(f"{flag}: {text!r} is not a valid {what}") from None
    return text


def parse_texts(kind: SeveralValues, flag: str, texts: Sequence[str]) -> list[Any]:
    """Return the values that an option with several was given: the flag may be repeated. Raises UserError."""
    parts = [part for text in texts for part in split_texts(flag, text)]
    items = kind.items if kind.is_fixed and len(kind.items) == len(parts) else (kind.items[0],) * len(parts)
    return [parse_text(item, flag, part) for item, part in zip(items, parts, strict=True)]


def join_values(values: Sequence[Any]) -> str:
    """Return values as the command line takes them: `32,64`."""
    return ",".join(f'"{value}"' if "," in str(value) else str(value) for value in values)


def check_annotated(cls: type, name: str) -> None:
    """Raise UserError if the last class to set a field does so without a type, which dataclasses ignore."""
    last = next(base for base in cls.__mro__ if name in vars(base) or name in inspect.get_annotations(base))
    if name not in inspect.get_annotations(last):
        value = vars(last)[name]
        raise UserError(
            f"{last.__name__}.{name} is set without a type, and would be ignored: write "
            f"`{name}: {type(value).__name__} = {value!r}` under @dataclass(kw_only=True)"
        )
