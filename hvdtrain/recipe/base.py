"""What a recipe is, for every framework: a dataclass whose fields are its command-line options, and four methods."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.system.recipe_errors import describe_error, in_recipe


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text. Choices are better said by the type: Literal["mlp", "cnn"]."""
    return dataclasses.field(default=default, metadata={"help": help})


CONTRACT_MODULES = ("hvdtrain.recipe.base", "hvdtrain.torch.recipe")  # modules with the Recipe that others subclass


@dataclass(kw_only=True)
class Recipe:
    """A model, its data, its optimizer and its score.

    A framework's Recipe (`hvdtrain.torch.Recipe`) adds the methods. Subclass that, with `@dataclass(kw_only=True)`;
    a field that is overridden keeps its help text.
    """

    framework: ClassVar[str] = ""
    # The metric of the evaluation by which the best checkpoint is kept.
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")

    epochs: int = option(10, "passes over the training examples")
    batch_size: int = option(64, "examples per step over all ranks together, on any number of ranks")
    lr: float = option(0.1, "learning rate, before the schedule")
    schedule: str = option(
        "constant", "learning-rate schedule, e.g. 'warmup:5ep cosine', 'step:30ep,60ep x0.1', 'linear', 'constant'"
    )


@dataclass(frozen=True)
class OptionField:
    """One option of a recipe or of a run, as the command line needs it."""

    name: str
    type: type  # int, float, str, bool or pathlib.Path
    optional: bool  # may be None
    choices: tuple[str, ...]
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def option_fields(cls: type) -> list[OptionField]:
    """The options of a dataclass, in the order of declaration.

    Raises UserError if a class is not a dataclass of its own, a field has the name of something else in the recipe
    contract (a method, `buffers`), or its type cannot be an option.
    """
    if "__annotations__" in cls.__dict__ and "__dataclass_fields__" not in cls.__dict__:
        raise UserError(f"recipe class {cls.__name__} has fields but is no dataclass: add @dataclass(kw_only=True)")
    contract = [base for base in cls.__mro__ if base.__module__ in CONTRACT_MODULES]
    shared = {field.name for base in contract for field in dataclasses.fields(base)}
    reserved = {name for base in contract for name in vars(base)} - shared
    for field in dataclasses.fields(cls):
        if field.name in reserved:
            raise UserError(f"{cls.__name__}.{field.name} is a name of the recipe contract: name the option otherwise")
    return [_make_option_field(cls, field, resolve_hint(cls, field)) for field in dataclasses.fields(cls) if field.init]


def resolve_hint(cls: type, field: dataclasses.Field[Any]) -> Any:
    """The type of one field; what else the class annotates may name types that exist for a type checker only.

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


def _make_option_field(cls: type, field: dataclasses.Field[Any], hint: Any) -> OptionField:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        optional = len(inner) < len(typing.get_args(hint))
        hint = inner[0] if len(inner) == 1 else hint
    choices: tuple[str, ...] = ()
    if typing.get_origin(hint) is Literal:
        choices, hint = tuple(typing.get_args(hint)), str
    if hint not in (int, float, str, bool) and not (isinstance(hint, type) and issubclass(hint, Path)):
        raise UserError(
            f"{cls.__name__}.{field.name} has type {hint}; options are int, float, str, bool, Path, Literal or Optional"
        )
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        raise UserError(f"{cls.__name__}.{field.name} needs a default")
    return OptionField(field.name, hint, optional, choices, default, _find_help(cls, field.name))


def _find_help(cls: type, name: str) -> str:
    """A field's help, from the nearest class that gives one: overriding a default keeps it."""
    for base in cls.__mro__:
        declared = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if declared is not None and declared.metadata.get("help"):
            return str(declared.metadata["help"])
    return ""


def convert_value(field: OptionField, value: Any) -> Any:
    """A value as the field's type; a str may stand for a path and an int for a float. Raises UserError for others."""
    if value is None and (field.optional or field.default is None):
        return None
    if field.choices and value not in field.choices:
        raise UserError(f"{field.flag}: {value!r} is not one of {', '.join(map(repr, field.choices))}")
    if issubclass(field.type, Path) and isinstance(value, str):
        return Path(value)
    if field.type is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise UserError(f"{field.flag}: {value} is too large for a float") from None
    if not isinstance(value, field.type) or (field.type is int and isinstance(value, bool)):
        raise UserError(f"{field.flag}: {value!r} is {type(value).__name__}; expected {field.type.__name__}")
    check_finite(field, value)
    return value


def check_finite(field: OptionField, value: Any) -> None:
    """Raise UserError for NaN, and for an infinite number unless the field's default is infinite too."""
    if not isinstance(value, float) or math.isfinite(value):
        return
    if math.isnan(value) or not (isinstance(field.default, float) and math.isinf(field.default)):
        raise UserError(f"{field.flag} is {value}; expected a finite number")


def make_from_values(cls: type[Any], values: dict[str, Any]) -> Any:
    """A recipe (or run options) from values; what its own checks refuse is a user's mistake.

    Raises UserError for an unknown name and for a ValueError out of `__post_init__`.
    """
    known = {field.name: field for field in option_fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{cls.__name__} has no option {name!r}{suggest_nearest(name, known)}")
        values = {**values, name: convert_value(known[name], value)}
    with in_recipe(cls, "__post_init__()"):
        try:
            return cls(**values)
        except ValueError as error:
            raise UserError(str(error)) from error
