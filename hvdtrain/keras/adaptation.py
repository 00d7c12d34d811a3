"""How Keras recipes are adapted to torch, on each of Keras's backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from hvdtrain.bridge.functions import Backend, Batch, Functions
from hvdtrain.bridge.process import Device, choose_tensorflow_device, configure_jax
from hvdtrain.bridge.recipe import ForeignFramework
from hvdtrain.bridge.step import BridgeStep
from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.keras.choice import current_backend
from hvdtrain.keras.functions import KerasFunctions
from hvdtrain.keras.recipe import Recipe
from hvdtrain.system.errors import UserError
from hvdtrain.torch.setup import choose_device


def adapt_keras() -> ForeignFramework:
    """Return how Keras recipes are adapted to torch."""
    adapter = KerasAdapter()
    return ForeignFramework(adapter.make_functions, adapter.configure_process, calls_model=True)


class KerasAdapter:
    """Prepares a process for Keras's backend, and makes functions of recipes for it.

    Attributes:
        torch_device: where torch computes, if it is the backend; None: where Keras chooses.
    """

    torch_device: str | None = None

    def configure_process(self, options: StepOptions, world: World) -> Device:
        """Prepare Keras's backend as the run's options say, and return the device that this rank computes on.

        Raises UserError if the device is not there, or TensorFlow was used already.
        """
        backend = current_backend()
        if backend == "jax":
            return configure_jax(options, world)
        if backend == "tensorflow":
            from hvdtrain.keras.tensorflow_backend import set_tensorflow_threads

            device = choose_tensorflow_device(options, world)
            set_tensorflow_threads(options.resolve_threads(world.local_size).count, options.exchange.deterministic)
            return device
        chosen = choose_device(options.device.device, world.local_rank)
        self.torch_device = str(chosen)
        return "cuda" if chosen.type == "cuda" else "cpu"

    def make_functions(
        self, recipe: Any, entropy: NDArray[Any], amp: str, load_examples: Callable[[], Batch]
    ) -> tuple[Functions, Backend]:
        """Return a Keras recipe's functions, and the backend that compiles them: `FunctionsFactory`.

        Keras draws initial values from Python's generator, which is seeded as torch's is, and not from `entropy`.
        """
        return KerasFunctions(recipe, load_examples, amp, self.torch_device), self._make_backend()

    def _make_backend(self) -> Backend:
        backend = current_backend()
        if backend == "jax":
            from hvdtrain.bridge.jax_backend import JaxBackend

            return JaxBackend()
        if backend == "torch":
            from hvdtrain.keras.torch_backend import TorchBackend

            return TorchBackend(self.torch_device or "cpu")
        from hvdtrain.keras.tensorflow_backend import TensorFlowBackend

        return TensorFlowBackend()


class KerasStep(BridgeStep):
    """`hvdtrain.recipe.framework.Step` for a Keras recipe."""

    def __init__(self, recipe: Recipe, world: World, options: StepOptions) -> None:
        """Prepare training with all other ranks. Raises UserError, RecipeError."""
        check_backend(recipe)
        super().__init__(recipe, world, options, adapt_keras())
        self._messages.append(f"keras     computes with {recipe.backend}")
        functions = self.adaptation.bridge.functions
        if isinstance(functions, KerasFunctions) and functions.adds_losses:
            try:
                functions.check_added_losses(self.splits.load_first_batch(2))
            except UserError:
                self.close()
                raise


def check_backend(recipe: Recipe) -> None:
    """Raise UserError unless Keras was imported with the recipe's backend."""
    if recipe.backend != (current := current_backend()):
        raise UserError(
            f"{type(recipe).__name__}.backend is {recipe.backend!r}, but Keras was imported with {current!r}: give "
            f"--backend {recipe.backend} on the command line, or set KERAS_BACKEND before Keras is imported"
        )
