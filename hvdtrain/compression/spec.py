"""Compression as text: `--compression powersgd:4,warmup=100,min=8192`.

    METHOD[:ARGUMENT][,OPTION=VALUE]...

The method is "none", "auto" (measured while training, none included: `hvdtrain.exchange.advisor`), or a registered
compressor (`hvdtrain.compression.registry`), which says what its argument means. Options:

    warmup=N          the first N steps are dense; default: the compressor's `dense_steps`
    min=N             parameters with fewer values, and those with fewer than two axes, stay dense; 8192
    feedback=on|off   error feedback: what a step does not send is kept for the next; default: the compressor's
    momentum=X        momentum correction, in place of the optimizer's own momentum, for compressors that take it
    layer.NAME=ARG    another argument, or none, for the parameter or module of that name
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hvdtrain.compression.codec import BucketContext, Codec, RandomKey
from hvdtrain.compression.registry import COMPRESSORS, Compressor
from hvdtrain.system.errors import UserError, suggest_nearest
from hvdtrain.system.text import join_alternatives

NONE, AUTO = "none", "auto"  # methods that are not compressors
OPTION_NAMES = ("warmup", "min", "feedback", "momentum")


@dataclass(frozen=True)
class Spec:
    """A parsed specification."""

    text: str
    method: str
    argument: str  # "" if the method takes none
    warmup: int = 0
    min: int = 8192
    feedback: bool | None = None  # None: the codec's own default
    momentum: float = 0.0
    layers: dict[str, str] = field(default_factory=dict)  # name of a parameter or module: argument, or "none"

    def argument_for(self, name: str, values: int, axes: int) -> str | None:
        """Return the method's argument for a parameter; None if it stays dense."""
        if self.method == NONE or values == 0:
            return None
        for layer, argument in sorted(self.layers.items(), key=lambda item: -len(item[0])):
            if layer_contains(layer, name):
                return None if argument == "none" else argument
        return None if values < self.min or axes < 2 else self.argument


def layer_contains(layer: str, name: str) -> bool:
    """Return whether a parameter is that layer or in it."""
    return name == layer or name.startswith(f"{layer}.")


def select_layers(text: str, names: Sequence[str]) -> str:
    """Return a specification without the layers that none of these parameters is in."""
    head, *options = text.split(",")

    def applies(option: str) -> bool:
        layer = option.partition("=")[0].removeprefix("layer.")
        return not option.startswith("layer.") or any(layer_contains(layer, name) for name in names)

    return ",".join([head, *filter(applies, options)])


def parse_compression(text: str) -> Spec:
    """Parse a specification. Raises UserError naming the part that is wrong, and the nearest valid one."""
    head, *options = text.split(",")
    method, colon, argument = head.partition(":")
    compressor = _find_compressor(method, text)
    if colon and (compressor is None or compressor.argument is None):
        raise UserError(f"compression {text!r}: {method} takes no argument")
    if compressor is not None:
        argument = _check_argument(compressor, argument or compressor.default_argument, text)
    values: dict[str, str] = {}
    layers: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"compression {text!r}: {option!r} is not an option; expected KEY=VALUE")
        if key.startswith("layer."):
            if value and value != "none" and compressor is None:
                raise UserError(f"compression {text!r}: {method} takes no argument")
            if value != "none" and compressor is not None:
                _check_argument(compressor, value, text)
            layers[key.removeprefix("layer.")] = value
        elif key in OPTION_NAMES:
            values[key] = value
        else:
            valid = (*OPTION_NAMES, "layer.NAME")
            raise UserError(f"compression {text!r}: {key!r} is not an option{suggest_nearest(key, valid)}")
    feedback, momentum = _parse_feedback(values, method, compressor, text)
    dense_steps = compressor.dense_steps if compressor is not None else 0
    return Spec(
        text=text,
        method=method,
        argument=argument,
        warmup=int(_parse_number(values, "warmup", str(dense_steps), text)),
        min=int(_parse_number(values, "min", "8192", text)),
        feedback=feedback,
        momentum=momentum,
        layers=layers,
    )


def _find_compressor(method: str, text: str) -> Compressor | None:
    """Return the compressor of a method; None for "none" and "auto"."""
    if method in (NONE, AUTO):
        return None
    try:
        return COMPRESSORS.get(method)
    except UserError:
        names = COMPRESSORS.names()
        if method in names:
            raise  # it is another distribution's, which cannot be loaded
        nearest = suggest_nearest(method, (NONE, *names, AUTO))
        raise UserError(f"compression {text!r}: {method!r} is not a method{nearest}") from None


def _parse_feedback(
    values: dict[str, str], method: str, compressor: Compressor | None, text: str
) -> tuple[bool | None, float]:
    """Return what `feedback` and `momentum` say, which depend on each other."""
    momentum = _parse_number(values, "momentum", "0", text)
    if momentum and not (compressor is not None and compressor.takes_momentum):
        able = [name for name, other in COMPRESSORS.load_all().items() if other.takes_momentum]
        raise UserError(f"compression {text!r}: {method} takes no momentum; expected {' or '.join(able)}")
    if not 0 <= momentum < 1:
        raise UserError(f"compression {text!r}: momentum is {momentum:g}; expected a value from 0 to below 1")
    feedback = values.get("feedback")
    if feedback not in (None, "on", "off"):
        raise UserError(f"compression {text!r}: feedback is {feedback!r}; expected on or off")
    if momentum and feedback == "off":
        raise UserError(f"compression {text!r}: momentum needs feedback")
    return None if feedback is None else feedback == "on", momentum


def _parse_number(values: dict[str, str], key: str, default: str, text: str) -> float:
    """Return an option that is a number and not negative; an integer but for momentum."""
    value = values.get(key, default)
    try:
        number = float(value) if key == "momentum" else int(value)
    except ValueError:
        number = -1
    if number < 0:
        kind = "a number" if key == "momentum" else "an integer"
        raise UserError(f"compression {text!r}: {key} is {value!r}; expected {kind}, not negative")
    return number


def _check_argument(compressor: Compressor, argument: str, text: str) -> str:
    """Return an argument that is valid, as it is. Raises UserError for another."""
    if compressor.argument is not None:
        try:
            compressor.argument.parse(argument)
        except ValueError as error:
            raise UserError(f"compression {text!r}: {error}") from None
    elif argument:
        raise UserError(f"compression {text!r}: {compressor.name} takes no argument")
    return argument


def check_scatters(spec: Spec) -> None:
    """Raise ValueError for a method that cannot bring each rank the sum of its own part only."""
    able = _list_scattering()
    if spec.method == AUTO:
        raise ValueError(f"it would try methods that send whole sums to every rank; name {join_alternatives(able)}")
    if spec.method not in able:
        raise ValueError(
            f"{spec.method} brings whole sums to every rank, and updated parameters would travel uncompressed, which "
            f"takes what it saves; use {join_alternatives(able)}, or leave out one of them"
        )


def check_sums_on_hosts(spec: Spec) -> None:
    """Raise ValueError for a method that has nothing to gain if hosts sum up before they encode."""
    able = _list_scattering()
    if spec.method not in able:
        reason = "does not encode a part for each host" if spec.method != NONE else "sends gradients as they are"
        reason = "would measure other ways than this one" if spec.method == AUTO else reason
        raise ValueError(f"{spec.method} {reason}; use {join_alternatives(able)}, or leave out --hierarchy")


def _list_scattering() -> list[str]:
    return [name for name, found in sorted(COMPRESSORS.load_all().items()) if found.scatters]


def make_codec(
    spec: Spec,
    argument: str,
    shapes: Sequence[tuple[int, int]],
    key: RandomKey,
    device: torch.device,
    scatters: bool = False,
) -> Codec:
    """Make the codec of a bucket.

    Args:
        spec: of a compressor.
        argument: the method's argument for the bucket's parameters.
        shapes: the bucket's parameters as matrices.
        key: what the codec may draw its first state by.
        device: where the bucket is.
        scatters: whether each rank is to have the sum of its own part only.
    """
    compressor = COMPRESSORS.get(spec.method)
    value = compressor.argument.parse(argument) if compressor.argument is not None else None
    return compressor.codec.for_bucket(BucketContext(value, spec.feedback, shapes, key, device, scatters))
