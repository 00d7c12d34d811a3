"""What a framework supplies to be trained: a recipe as pure functions, and a backend that compiles them.

Arrays are the framework's own. They cross this border by name, in flat dicts: `{"dense.kernel": array}`. A name is a
path whose parts are joined by dots, of parameters and buffers as torch will see them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = Any  # of the framework: a jax.Array, a tf.Tensor, a torch.Tensor; or its tracer
Arrays: TypeAlias = dict[str, Array]  # by name
Tree: TypeAlias = Any  # of arrays, nested as the framework's users have it
Batch: TypeAlias = Any  # nested tuples, lists and dicts of arrays (B, ...)
Entropy: TypeAlias = Any  # (2,) uint32: what randomness in `score` is drawn from


SEVERAL_PREFIX = "loss_"  # before a key of a dict of optimizers: the score that its optimizer minimizes


@dataclass(frozen=True)
class Returned:
    """What `score` has returned.

    Attributes:
        scores: by name: (B,) or (B, k), or a pair of numerators and denominators; or whatever else the recipe's method
            returned, which is refused later.
        state: what training changes otherwise, after the batch: of the same names, shapes and types as before.
        outputs: per-example outputs (B, ...) by name; None: none were returned.
    """

    scores: Any
    state: Arrays
    outputs: Any = None


class PureOptimizer(Protocol):
    """An optimizer of some parameters, as pure functions.

    Attributes:
        parameters: the names of the parameters that it updates.
        lr: its learning rate before the schedule.
        state: its initial state, by name.
    """

    parameters: Sequence[str]
    lr: float
    state: Arrays

    def update(self, gradients: Arrays, state: Arrays, params: Arrays, factor: Array) -> tuple[Arrays, Arrays]:
        """Return the new parameters and the new state; it is compiled.

        Args:
            gradients: of each of `parameters`, of its shape.
            state: by the names of `state`.
            params: of each of `parameters`.
            factor: () float32, with JAX's 64-bit types float64: the learning rate is `lr` times it.
        """


class Functions(Protocol):
    """A recipe as pure functions.

    Attributes:
        params: the initial parameters that are trained, by name.
        state: the initial values of what training changes otherwise (moving means), by name.
        optimizers: of each loss, by its name: `{"loss": ...}` unless the recipe returned several.
        several: whether the recipe returned a dict of optimizers.
    """

    params: Arrays
    state: Arrays
    optimizers: Mapping[str, PureOptimizer]
    several: bool

    def score(self, params: Arrays, state: Arrays, batch: Batch, entropy: Entropy | None) -> Returned:
        """Call the recipe's `score`; it is traced and compiled. entropy: None in an evaluation."""

    def outputs(self, params: Arrays, state: Arrays, batch: Batch) -> Any:
        """Call the recipe's `outputs`, in an evaluation; it is traced and compiled."""

    def export_model(self, params: Arrays, state: Arrays) -> Any:
        """Return the model as the recipe's author knows it, with these values: for `evaluated` and `hvdtrain.load`."""


# Of the cotangents of the losses, by their names, (B,) each: the gradients of all parameters, by name.
Pullback: TypeAlias = Callable[[Mapping[str, Tensor]], Arrays]


class ScoreProgram(Protocol):
    """A compiled `score` and its derivatives."""

    def score_for_training(
        self, params: Arrays, state: Arrays, batch: Batch, entropy: NDArray[Any]
    ) -> tuple[Returned, Pullback]:
        """Return the scores, and what turns cotangents of the losses into gradients."""

    def score_for_evaluation(self, params: Arrays, state: Arrays, batch: Batch) -> Returned:
        """Return the scores of an evaluation."""

    def compute_outputs(self, params: Arrays, state: Arrays, batch: Batch) -> Any:
        """Return what the recipe's `outputs` returns."""


# Of whole flat tensors, the state, the parameters, and the factor of the learning rate: the new parameters and state.
UpdateProgram: TypeAlias = Callable[[Sequence[Array], Arrays, Arrays, float], tuple[Arrays, Arrays]]


@dataclass(frozen=True)
class Place:
    """Where a gradient lies in some flat tensors."""

    flat: int  # which of them
    offset: int  # in values
    shape: tuple[int, ...]


class Backend(Protocol):
    """How a framework compiles pure functions, and shares memory with torch.

    Attributes:
        num_compilations: how often anything was compiled in this process.
    """

    num_compilations: int

    def import_tensor(self, tensor: Tensor) -> Array:
        """Return a torch tensor as an array that shares its memory. Raises ValueError if that would be a copy."""

    def export_array(self, array: Array) -> Tensor:
        """Return an array as a torch tensor that shares its memory, and must not be written."""

    def compile_score(self, functions: Functions, losses: Sequence[str]) -> ScoreProgram:
        """Compile a recipe's score. losses: the names of the scores that are differentiated."""

    def compile_update(self, optimizer: PureOptimizer, places: Mapping[str, Place]) -> UpdateProgram:
        """Compile an optimizer's update.

        The result returns only when all of its results are computed: the flat tensors may be written then.

        Args:
            optimizer: its `update` is compiled.
            places: of each of its parameters' gradients, in the flat tensors that the program is given.
        """


def name_loss(key: object) -> str:
    """Return the score that the optimizer of a key in a recipe's dict of optimizers minimizes."""
    return str(key) if str(key).startswith(SEVERAL_PREFIX) else f"{SEVERAL_PREFIX}{key}"
