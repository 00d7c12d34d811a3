"""How a compressor is added: one file that registers its codec.

    @compressor("topk", argument=Fraction("fraction of the values that is sent", default=0.01), dense_steps=100)
    @dataclass(frozen=True)
    class TopK(Codec):
        ...

hvdtrain's own are the files of `hvdtrain.compression.codecs`. Another distribution names its own in the entry point
group `hvdtrain.compressors`: `topk = my_package.my_module:TopK`. That is all that `--compression NAME`, its help,
`auto`, `hvdtrain bench compression` and checkpoints need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hvdtrain.compression.arguments import Argument
from hvdtrain.compression.codec import Codec, Collective
from hvdtrain.system.errors import UserError
from hvdtrain.system.plugins import Registry

CodecClass = TypeVar("CodecClass", bound=type[Codec])


@dataclass(frozen=True)
class Compressor:
    """A registered method of compression."""

    name: str
    codec: type[Codec]
    argument: Argument | None
    dense_steps: int
    auto_candidate: bool
    takes_momentum: bool

    @property
    def default_argument(self) -> str:
        """The argument if none is given; "" if it takes none."""
        return self.argument.default_text if self.argument is not None else ""

    @property
    def scatters(self) -> bool:
        """Whether it can bring each rank the sum of its own part only."""
        return self.codec.collective is Collective.REDUCE_SCATTER

    @property
    def default_spec(self) -> str:
        """The method with its default argument, such as "topk:0.01" or "int8"."""
        return f"{self.name}:{self.default_argument}" if self.argument is not None else self.name


COMPRESSORS: Registry[Compressor] = Registry("compressor", "hvdtrain.compressors", "hvdtrain.compression.codecs")


def compressor(
    name: str,
    *,
    argument: Argument | None = None,
    dense_steps: int = 0,
    auto_candidate: bool = False,
    takes_momentum: bool = False,
) -> Callable[[CodecClass], CodecClass]:
    """Return a decorator that registers a codec's class, which `Codec.for_bucket` makes codecs of.

    Args:
        name: what `--compression` calls it.
        argument: what may follow a colon; None: nothing.
        dense_steps: the default of `warmup=`: first steps without compression that training needs at its beginning to
            reach the accuracy of training without (tests/benchmarks/accuracy.py).
        auto_candidate: whether `--compression auto` tries it, with its default argument.
        takes_momentum: whether it works with `momentum=`: its decoded values are 0 if they are not sent.
    """

    def register(codec: CodecClass) -> CodecClass:
        COMPRESSORS.register(name, Compressor(name, codec, argument, dense_steps, auto_candidate, takes_momentum))
        return codec

    return register


def default_specs() -> list[str]:
    """Return all methods with their default arguments. Raises UserError if another distribution's cannot be loaded."""
    return [found.default_spec for found in _sorted_compressors()]


def auto_candidates() -> list[str]:
    """Return what `--compression auto` may choose next to "none". Raises UserError as `default_specs` does."""
    return [found.default_spec for found in _sorted_compressors() if found.auto_candidate]


def _sorted_compressors() -> list[Compressor]:
    """Return all by name, in an order that is the same on all ranks, whatever they have imported before."""
    return [found for _, found in sorted(COMPRESSORS.load_all().items())]


def describe_methods() -> str:
    """Return the help of `--compression`."""
    methods = []
    for name in sorted(COMPRESSORS.names()):
        try:
            found = COMPRESSORS.get(name)
        except UserError:  # another distribution's, which is of no use now and must not take the help away
            methods.append(f"{name} (cannot be loaded)")
            continue
        methods.append(f"{found.default_spec} ({found.argument.help})" if found.argument else name)
    return (
        f"gradient compression: none, {', '.join(methods)}; with options, e.g. powersgd:4,warmup=100,min=8192; auto: "
        "measured while training, none included"
    )
