"""Kinds of arguments that a compression method may take, as in `topk:0.01`, `powersgd:4` and `qsgd:4bit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Argument(Protocol):
    """What a method's argument means, its default, and which texts are valid."""

    @property
    def help(self) -> str: ...

    @property
    def default_text(self) -> str: ...

    def parse(self, text: str) -> Any:
        """Return the value of a text. Raises ValueError with what is wrong and what was expected."""


@dataclass(frozen=True)
class Fraction:
    """A number above 0 and at most 1."""

    help: str  # "fraction of the values that is sent"
    default: float

    @property
    def default_text(self) -> str:
        return f"{self.default:g}"

    def parse(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise ValueError(f"{text!r} is not a valid fraction; expected a number above 0, at most 1")
        return value


@dataclass(frozen=True)
class PositiveInteger:
    """An integer of at least 1."""

    name: str  # "rank", for messages
    help: str
    default: int

    @property
    def default_text(self) -> str:
        return str(self.default)

    def parse(self, text: str) -> int:
        if not (text.isdecimal() and int(text) >= 1):
            raise ValueError(f"{text!r} is not a valid {self.name}; expected an integer of at least 1")
        return int(text)


@dataclass(frozen=True)
class Choice:
    """One of a few texts, each with its value."""

    name: str  # "bit width", for messages
    help: str
    values: Mapping[str, object]
    default: str

    @property
    def default_text(self) -> str:
        return self.default

    def parse(self, text: str) -> Any:
        if text not in self.values:
            *first, last = self.values
            raise ValueError(f"{text!r} is not a valid {self.name}; expected {', '.join(first)} or {last}")
        return self.values[text]
