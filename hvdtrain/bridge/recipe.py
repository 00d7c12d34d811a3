"""A recipe of another framework as a torch recipe, so that the torch trainer trains it as it is."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hvdtrain.bridge.functions import Backend, Batch, Functions
from hvdtrain.bridge.model_bridge import ModelBridge
from hvdtrain.bridge.optimizer import BridgeOptimizer
from hvdtrain.bridge.process import Device
from hvdtrain.bridge.shadow import Shadow
from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import PassSizes, StepOptions
from hvdtrain.recipe.base import is_overridden


class FunctionsFactory(Protocol):
    """Makes a recipe's functions."""

    def __call__(
        self, recipe: Any, entropy: NDArray[Any], amp: str, load_examples: Callable[[], Batch]
    ) -> tuple[Functions, Backend]:
        """Return the functions and what compiles them.

        Raises UserError for a recipe that is not as it should be, and whatever its methods raise.

        Args:
            recipe: whose functions they are.
            entropy: (2,) uint32: what the initial values are drawn from.
            amp: "off", "bf16" or "fp16".
            load_examples: returns a batch of two training examples, of numpy arrays, or of one if there are no more.
        """


@dataclass(frozen=True)
class ForeignFramework:
    """How a framework's recipes are adapted.

    Attributes:
        make_functions: makes a recipe's functions.
        configure_process: prepares the process before the framework's first operation, as the options say for this
            rank; returns the device that it computes on. Raises UserError if that is not there.
        calls_model: whether the functions' `outputs` calls the model for a recipe without a method `outputs`.
    """

    make_functions: FunctionsFactory
    configure_process: Callable[[StepOptions, World], Device]
    calls_model: bool = False

    def configure_options(self, options: StepOptions, world: World) -> StepOptions:
        """Prepare the process, and return the options with the device that it computes on."""
        device = self.configure_process(options, world)
        return replace(options, device=replace(options.device, device=device))


@dataclass
class Adaptation:
    """What a recipe is adapted with.

    Attributes:
        original: the recipe.
        framework: of the recipe.
        amp: of --amp.
        pass_sizes: most examples of a pass; None: unknown, and batches are not padded.
        bridge, shadow: what scores, and the model; once it was made.
    """

    original: Any
    framework: ForeignFramework
    amp: str = "off"
    pass_sizes: PassSizes | None = None
    bridge: ModelBridge = field(init=False, repr=False)
    shadow: Shadow = field(init=False, repr=False)

    def make_shadow(self) -> Shadow:
        """Make the model, of initial values that are drawn from torch's generator."""
        entropy = torch.randint(1 << 32, (2,)).numpy().astype(np.uint32)
        functions, backend = self.framework.make_functions(self.original, entropy, self.amp, self._load_examples)
        self.bridge = ModelBridge(functions, backend, self.pass_sizes)
        self.shadow = self.bridge.make_shadow()
        return self.shadow

    def _load_examples(self) -> Batch:
        dataset = self.original.dataset("train")
        return self.original.collate([dataset[i] for i in range(min(2, len(dataset)))])


class TorchRecipe:
    """The methods of a torch recipe in terms of another framework's; the first base of an adapted recipe's class."""

    adaptation: ClassVar[Adaptation]
    channels_last: ClassVar[bool] = False

    def model(self) -> Shadow:
        """Return the model as torch parameters and buffers."""
        return self.adaptation.make_shadow()

    def optimizer(self, params: list[torch.nn.Parameter]) -> Any:
        """Return the optimizers. params: of what `model` has returned last."""
        functions, shadow = self.adaptation.bridge.functions, self.adaptation.shadow
        made = {name: BridgeOptimizer(shadow, pure) for name, pure in functions.optimizers.items()}
        return made if functions.several else made["loss"]

    @property
    def buffers(self) -> dict[str, str]:
        """The recipe's own, and a mean for other arrays of numbers with a fraction that training changes."""
        declared: dict[str, str] = self.adaptation.original.buffers
        floating = [name for name, b in self.adaptation.shadow.buffer_by_name.items() if b.is_floating_point()]
        return {
            name: "mean" for name in floating if not any(fnmatch.fnmatchcase(name, pattern) for pattern in declared)
        } | declared

    def current_model(self) -> Any:
        """Return the model as the recipe's author knows it, with present values."""
        return self.adaptation.bridge.export_model(self.adaptation.shadow)

    def score(self, model: Shadow, batch: Any) -> Any:
        """Return the scores of a batch, as torch tensors."""
        return self.adaptation.bridge.score(model, batch)


def adapt_recipe(adaptation: Adaptation, *, has_outputs: bool = False) -> Any:
    """Return a torch recipe that shares its attributes with the recipe that it adapts, and the name of its class.

    has_outputs: give it a method `outputs` even if the recipe has none of its own.
    """
    original = adaptation.original
    cls = type(original)
    namespace: dict[str, object] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "adaptation": adaptation}
    if has_outputs or is_overridden(original, "outputs"):
        namespace["outputs"] = lambda self, model, batch: adaptation.bridge.compute_outputs(model, batch)
    adapted: Any = object.__new__(type(cls.__name__, (TorchRecipe, cls), namespace))
    adapted.__dict__ = original.__dict__
    return adapted
