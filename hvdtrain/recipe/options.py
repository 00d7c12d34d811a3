"""Options as fields of dataclasses: how they are declared, checked, grouped and made from flat values.

option(default, help)            declares one; its name on the command line is the field's, with dashes
a field that is a dataclass      nests its options: those of `adam: Adam` are --adam.beta, ...
option_group(kind, section)      nests those of a component of hvdtrain, whose names stay flat
option_fields(cls)               all options of a class, those of its groups included
make_from_values(cls, values)    an object of the class from {name: value}
flatten_options(instance)        {name: value} of an object
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hvdtrain.recipe.option_types import (
    EXPECTED_TYPES,
    OptionType,
    SeveralValues,
    ValueType,
    check_annotated,
    convert_several,
    parse_hint,
)
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.system.recipe_errors import describe_error, in_recipe

# Modules with the classes that recipes derive from.
CONTRACT_MODULES = (
    "hvdtrain.recipe.base",
    "hvdtrain.recipe.dataset_recipe",
    *(f"hvdtrain.{framework}.recipe" for framework in ("torch", "jax", "keras")),
)
# What the Recipe of every framework has besides `hvdtrain.recipe.base.Recipe`; no option can have these names.
CONTRACT_NAMES = {"model", "dataset", "sampler", "collate", "optimizer", "score", "outputs", "buffers"}
# By the options' names; what type a value must have is known to the fields that it is given to.
OptionValues = Mapping[str, Any]
T = TypeVar("T")


def option(
    default: Any,
    help: str | Callable[[], str],
    *,
    at_least: float | None = None,
    above: float | None = None,
    name: str | None = None,
    section: str | None = None,
) -> Any:
    """Declare an option: a dataclass field with a help text. Choices are given by the type: Literal["mlp", "cnn"].

    Args:
        default: the value if none is given; of a list or a dataclass, each recipe gets a copy.
        help: one line for `--help`, or what returns it: called only when the help is printed.
        at_least: the smallest number that is accepted.
        above: a number that an accepted one must be greater than.
        name: what the option is called, if not as the field is.
        section: the title under which `--help` lists it, if it is not that of its group.
    """
    metadata = {"help": help, "at_least": at_least, "above": above, "name": name, "section": section}
    if type(default).__hash__ is None:  # which dataclasses refuse as a default, as all objects would share it
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_group(kind: type[Any], section: str) -> Any:
    """Declare a field that holds a dataclass of options, listed under the title `section`."""
    return dataclasses.field(default_factory=kind, metadata={"group": kind, "section": section})


@dataclass(frozen=True)
class OptionField:
    """One option of a recipe or of a run, as the command line needs it."""

    name: str  # with a dot if it is in a nested dataclass: "adam.beta"
    kind: OptionType
    optional: bool  # may be None
    default: Any
    help: str | Callable[[], str]
    at_least: float | None
    above: float | None
    section: str  # title in --help; "" for a recipe's own
    path: tuple[str, ...]  # attributes that lead to it: of the groups that it is in, then its own

    @property
    def type(self) -> type:
        """Return int, float, str, bool or pathlib.Path; of several values, the first one's."""
        return self.kind.items[0].type if isinstance(self.kind, SeveralValues) else self.kind.type

    @property
    def multiple(self) -> bool:
        """Return whether it holds several values."""
        return isinstance(self.kind, SeveralValues)

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the values that it may have; empty: any of its type."""
        return self.kind.choices if isinstance(self.kind, ValueType) else ()

    @property
    def flag(self) -> str:
        """Return the option as on the command line: `--batch-size`."""
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """Return an option's name as it is given on the command line."""
    return "--" + name.replace("_", "-")


def option_fields(cls: type) -> list[OptionField]:
    """Return the options of a dataclass and of the groups in it, in the order of declaration.

    Raises:
        UserError: the class is not a dataclass of its own, a field is set without a type or has the name of something
            else in the recipe contract (a method, `buffers`), or its type cannot be an option.
    """
    if "__annotations__" in cls.__dict__ and "__dataclass_fields__" not in cls.__dict__:
        raise UserError(f"recipe class {cls.__name__} has fields but is not a dataclass: add @dataclass(kw_only=True)")
    contract = [base for base in cls.__mro__ if base.__module__ in CONTRACT_MODULES]
    shared = {field.name for base in contract for field in dataclasses.fields(base)}
    reserved = {name for base in contract for name in vars(base)} - shared
    reserved |= CONTRACT_NAMES if contract else set()
    for field in dataclasses.fields(cls):
        check_annotated(cls, field.name)
        if field.name in reserved:
            raise UserError(f"{cls.__name__}.{field.name} is a name of the recipe contract: rename the option")
    return _collect_fields(cls, _Nesting())


@dataclass(frozen=True)
class _Nesting:
    """Where a dataclass of options is in the one that holds it."""

    path: tuple[str, ...] = ()
    prefix: str = ""  # of the options' names
    section: str = ""
    default: Any = None  # what holds the options' defaults; None: the class


def _collect_fields(cls: type, nesting: _Nesting) -> list[OptionField]:
    found: list[OptionField] = []
    for field in dataclasses.fields(cls):
        path = (*nesting.path, field.name)
        if "group" in field.metadata:
            section = field.metadata["section"]
            found += _collect_fields(field.metadata["group"], _Nesting(path, nesting.prefix, section))
        elif not field.init:
            continue
        elif (inner := find_nested_class(cls, field)) is not None:
            default = _find_default(cls, field, nesting.default)
            if type(default) is not inner:
                text = f"{default!r} as its default; expected an {inner.__name__}(...)"
                raise UserError(f"{cls.__name__}.{field.name}, a dataclass of options, has {text}")
            prefix = f"{nesting.prefix}{field.name}."
            found += _collect_fields(inner, _Nesting(path, prefix, nesting.section, default))
        else:
            found.append(_make_option_field(cls, field, nesting))
    return found


def find_nested_class(cls: type, field: dataclasses.Field[Any]) -> type | None:
    """Return the dataclass of options that a field of a recipe holds; None if it is an option itself."""
    if isinstance(field.type, type):
        return field.type if dataclasses.is_dataclass(field.type) else None
    hint = resolve_hint(cls, field)
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _find_default(cls: type, field: dataclasses.Field[Any], holder: Any) -> Any:
    """Return an option's default: what `holder` has, or else the class. Raises UserError if there is none."""
    if holder is not None:
        return getattr(holder, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise UserError(f"{cls.__name__}.{field.name} needs a default")


def resolve_hint(cls: type, field: dataclasses.Field[Any]) -> Any:
    """Return the type of one field; what else the class annotates may name types that only a type checker knows.

    Raises UserError if it cannot be resolved at run time.
    """
    owner = next((base for base in cls.__mro__ if field.name in inspect.get_annotations(base)), cls)
    holder = type("Hints", (), {"__annotations__": {field.name: field.type}})
    module = sys.modules.get(owner.__module__)
    try:
        return typing.get_type_hints(holder, vars(module) if module else {}, dict(vars(owner)))[field.name]
    except Exception as error:  # whatever the text of an annotation does
        raise UserError(
            f"the type {field.type!r} of {cls.__name__}.{field.name} cannot be resolved: {describe_error(error)}; "
            "import what it names outside of `if TYPE_CHECKING`"
        ) from error


def _make_option_field(cls: type, field: dataclasses.Field[Any], nesting: _Nesting) -> OptionField:
    hint = resolve_hint(cls, field)
    kind, optional = parse_hint(hint)
    if kind is None:
        raise UserError(f"{cls.__name__}.{field.name} has type {hint}; {EXPECTED_TYPES}")
    return OptionField(
        name=nesting.prefix + (field.metadata.get("name") or field.name),
        kind=kind,
        optional=optional,
        default=_find_default(cls, field, nesting.default),
        help=_find_metadata(cls, field.name, "help") or "",
        at_least=_find_metadata(cls, field.name, "at_least"),
        above=_find_metadata(cls, field.name, "above"),
        section=_find_metadata(cls, field.name, "section") or nesting.section,
        path=(*nesting.path, field.name),
    )


def _find_metadata(cls: type, name: str, key: str) -> Any:
    """Return what the nearest class declares with a field, such as its help: overriding a default keeps it."""
    for base in cls.__mro__:
        declared = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if declared is not None and declared.metadata.get(key) is not None:
            return declared.metadata[key]
    return None


def convert_value(field: OptionField, value: Any) -> Any:
    """Return a value as the field's type; a str may stand for a path and an int for a float. Raises UserError."""
    if value is None and (field.optional or field.default is None):
        return None
    if isinstance(field.kind, SeveralValues):
        return convert_several(field.kind, field.flag, value, lambda kind, one: _convert_one(field, kind, one))
    return _convert_one(field, field.kind, value)


def _convert_one(field: OptionField, kind: ValueType, value: Any) -> Any:
    if kind.choices and value not in kind.choices:
        raise UserError(f"{field.flag}: {value!r} is not one of {', '.join(map(repr, kind.choices))}")
    if issubclass(kind.type, Path) and isinstance(value, str):
        return Path(value)
    if kind.type is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise UserError(f"{field.flag}: {value} is too large for a float") from None
    if not isinstance(value, kind.type) or (kind.type is int and isinstance(value, bool)):
        raise UserError(f"{field.flag}: {value!r} is {type(value).__name__}; expected {kind.type.__name__}")
    check_number(field, value)
    return value


def check_number(field: OptionField, value: Any) -> None:
    """Raise UserError for a number out of bounds, for NaN, and for infinity unless the field's default is infinite.

    value: of any type; of several values each one is checked.
    """
    if isinstance(value, (tuple, list)):
        for one in value:
            check_number(field, one)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    may_be_infinite = isinstance(field.default, float) and math.isinf(field.default)
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not may_be_infinite)):
        raise UserError(f"{field.flag} is {value}; expected a finite number")
    if field.at_least is not None and value < field.at_least:
        bound = f"be at least {field.at_least:g}" if field.at_least else "not be negative"
        raise UserError(f"{field.flag} is {value}; it must {bound}")
    if field.above is not None and not value > field.above:
        raise UserError(f"{field.flag} is {value}; it must be above {field.above:g}")


def make_from_values(cls: type[T], values: OptionValues) -> T:
    """Make a recipe, or a dataclass of options with its groups, from values by their flat names.

    Raises UserError for an unknown name, and for a ValueError out of a `__post_init__`.
    """
    known = {field.name: field for field in option_fields(cls)}
    by_path: dict[tuple[str, ...], Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{cls.__name__} has no option {name!r}{suggest_nearest(name, known)}")
        by_path[known[name].path] = convert_value(known[name], value)
    with in_recipe(cls, "__post_init__()"):
        try:
            return _make_group(cls, by_path, ())
        except ValueError as error:
            raise UserError(str(error)) from error


def _make_group(cls: type[T], by_path: Mapping[tuple[str, ...], Any], path: tuple[str, ...], default: Any = None) -> T:
    """Make a dataclass of options; those not given are as in `default`, or as the class declares them if it is None."""
    arguments = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        here = (*path, field.name)
        if "group" in field.metadata:
            arguments[field.name] = _make_group(field.metadata["group"], by_path, here)
        elif here in by_path:
            arguments[field.name] = by_path[here]
        elif any(other[: len(here)] == here for other in by_path):
            holder = _find_default(cls, field, default)
            arguments[field.name] = _make_group(type(holder), by_path, here, holder)
    return cls(**arguments) if default is None else dataclasses.replace(default, **arguments)


def flatten_options(instance: Any) -> OptionValues:
    """Return the value of each option of an object, its groups' included, by their flat names."""
    values = {}
    for field in option_fields(type(instance)):
        value = instance
        for attribute in field.path:
            value = getattr(value, attribute)
        values[field.name] = value
    return values
