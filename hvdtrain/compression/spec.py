"""Compression as text: `--compression powersgd:4,warmup=100,min=8192`.

    none fp16 bf16 int8 onebit      no argument
    auto                            measured while training, none included (hvdtrain.exchange.advisor)
    qsgd:4bit                       bits a value: 2, 4 or 8
    topk:0.01  randomk:0.25         part of the values that is sent
    powersgd:4                      rank of the factors

Options behind it, separated by commas:

    warmup=N          the first N steps are dense; 0, for topk, randomk and powersgd 100
    min=N             parameters with fewer values, and those with fewer than two axes, stay dense; 8192
    feedback=on|off   the error-feedback memory; each method has its own habit
    momentum=X        topk: momentum correction, in place of the optimizer's own momentum
    layer.NAME=ARG    another argument, or none, for the parameter or module of that name
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hvdtrain.compression.cast import Cast, Fp16
from hvdtrain.compression.codec import Codec, RandomKey
from hvdtrain.compression.int8 import Int8
from hvdtrain.compression.onebit import OneBit
from hvdtrain.compression.powersgd import PowerSgd
from hvdtrain.compression.qsgd import Qsgd
from hvdtrain.compression.randomk import RandomK
from hvdtrain.compression.topk import TopK
from hvdtrain.system.errors import UserError, suggest_nearest

METHODS = ("none", "fp16", "bf16", "int8", "onebit", "qsgd", "topk", "randomk", "powersgd", "auto")
DEFAULT_ARGUMENTS = {"qsgd": "4bit", "topk": "0.01", "randomk": "0.25", "powersgd": "4"}
# What training needs at its beginning to end as well as dense (tests/benchmarks/accuracy.py).
DEFAULT_WARMUP = {"topk": "100", "randomk": "100", "powersgd": "100"}
OPTION_NAMES = ("warmup", "min", "feedback", "momentum")


@dataclass(frozen=True)
class Spec:
    """A parsed specification."""

    text: str
    method: str
    argument: str  # "" where the method takes none
    warmup: int = 0
    min: int = 8192
    feedback: bool | None = None  # None: the method's own habit
    momentum: float = 0.0
    layers: dict[str, str] = field(default_factory=dict)  # name of a parameter or module: argument, or "none"

    def argument_for(self, name: str, values: int, axes: int) -> str | None:
        """The method's argument for a parameter; None if it stays dense."""
        if self.method == "none" or values == 0:
            return None
        for layer, argument in sorted(self.layers.items(), key=lambda item: -len(item[0])):
            if layer_contains(layer, name):
                return None if argument == "none" else argument
        return None if values < self.min or axes < 2 else self.argument


def layer_contains(layer: str, name: str) -> bool:
    """Whether a parameter is that layer or in it."""
    return name == layer or name.startswith(f"{layer}.")


def parse_compression(text: str) -> Spec:
    """Parse a specification. Raises UserError naming the part that is wrong, and the nearest right one."""
    head, *options = text.split(",")
    method, colon, argument = head.partition(":")
    if method not in METHODS:
        raise UserError(f"compression {text!r}: no method {method!r}{suggest_nearest(method, METHODS)}")
    if colon and method not in DEFAULT_ARGUMENTS:
        raise UserError(f"compression {text!r}: {method} takes no argument")
    argument = _check_argument(method, argument or DEFAULT_ARGUMENTS.get(method, ""), text)
    values: dict[str, str] = {}
    layers: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"compression {text!r}: {option!r} is no option; an option is KEY=VALUE")
        if key.startswith("layer."):
            layers[key.removeprefix("layer.")] = value if value == "none" else _check_argument(method, value, text)
        elif key in OPTION_NAMES:
            values[key] = value
        else:
            raise UserError(
                f"compression {text!r}: no option {key!r}{suggest_nearest(key, (*OPTION_NAMES, 'layer.NAME'))}"
            )
    momentum = _parse_number(values, "momentum", "0", text)
    if momentum and method != "topk":
        raise UserError(f"compression {text!r}: momentum goes with topk")
    if not 0 <= momentum < 1:
        raise UserError(f"compression {text!r}: momentum is {momentum:g}; expected a value from 0 to below 1")
    feedback = values.get("feedback")
    if feedback not in (None, "on", "off"):
        raise UserError(f"compression {text!r}: feedback is {feedback!r}; expected on or off")
    if momentum and feedback == "off":
        raise UserError(f"compression {text!r}: momentum needs feedback")
    return Spec(
        text=text,
        method=method,
        argument=argument,
        warmup=int(_parse_number(values, "warmup", DEFAULT_WARMUP.get(method, "0"), text)),
        min=int(_parse_number(values, "min", "8192", text)),
        feedback=None if feedback is None else feedback == "on",
        momentum=momentum,
        layers=layers,
    )


def _parse_number(values: dict[str, str], key: str, default: str, text: str) -> float:
    """An option that is a number and not negative; a whole one but for momentum."""
    value = values.get(key, default)
    try:
        number = float(value) if key == "momentum" else int(value)
    except ValueError:
        number = -1
    if number < 0:
        kind = "a number" if key == "momentum" else "a whole number"
        raise UserError(f"compression {text!r}: {key} is {value!r}; expected {kind}, not negative")
    return number


def _check_argument(method: str, argument: str, text: str) -> str:
    """An argument of the method that makes sense, as it is."""
    if argument and method not in DEFAULT_ARGUMENTS:
        raise UserError(f"compression {text!r}: {method} takes no argument")
    if method == "qsgd" and argument not in ("2bit", "4bit", "8bit"):
        raise UserError(f"compression {text!r}: {argument!r} is no width; expected 2bit, 4bit or 8bit")
    if method == "powersgd" and not (argument.isdecimal() and int(argument) >= 1):
        raise UserError(f"compression {text!r}: {argument!r} is no rank; expected a whole number from 1 on")
    if method in ("topk", "randomk"):
        try:
            ratio = float(argument)
        except ValueError:
            ratio = 0.0
        if not 0 < ratio <= 1:
            raise UserError(f"compression {text!r}: {argument!r} is no part; expected above 0, at most 1")
    return argument


def make_codec(spec: Spec, argument: str, shapes: list[tuple[int, int]], key: RandomKey, device: torch.device) -> Codec:
    """The codec of a bucket. shapes: its parameters as matrices, which only powersgd looks at."""
    if spec.method == "powersgd":
        return PowerSgd(int(argument), shapes, key, device)
    if spec.method == "randomk":
        return RandomK(float(argument), unbiased=spec.feedback is not True)
    if spec.method == "topk":
        return TopK(float(argument))
    if spec.method == "qsgd":
        return Qsgd(int(argument.removesuffix("bit")))
    if spec.method == "fp16":
        return Fp16() if device.type == "cuda" else Cast(torch.float16)
    simple: dict[str, Codec] = {"bf16": Cast(torch.bfloat16), "int8": Int8(), "onebit": OneBit()}
    return simple[spec.method]
