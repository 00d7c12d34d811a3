"""Scores of another framework's model, as torch tensors that the trainer can sum and differentiate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.bridge.functions import Arrays, Backend, Functions, ScoreProgram
from hvdtrain.bridge.gradients import ScoredPass
from hvdtrain.bridge.padding import count_rows, describe_rows, iterate_arrays, map_arrays, pad_rows, select_rows
from hvdtrain.bridge.shadow import Shadow
from hvdtrain.exchange.step_options import PassSizes
from hvdtrain.torch.scores import get_numerators, replace_numerators
from hvdtrain.torch.tensors import has_same_bits

ProgramName: TypeAlias = Literal["training", "evaluation", "outputs"]
NO_ENTROPY = np.zeros(2, dtype=np.uint32)


class ModelBridge:
    """A recipe's functions, compiled, for all shadows of its model.

    Attributes:
        functions: of the recipe.
        backend: compiles them.
        pass_sizes: most examples of a pass, to which batches are padded; None: they are not.
        mixes_examples: whether what is computed of an example depends on the others of its batch, by the program:
            then batches keep their own sizes. It is not known before its first smaller batch.
        examples: some of the training set, to find that out; None: there are none.
        copies_gradients: whether no exchange copies gradients, so that torch may write into them.
    """

    def __init__(self, functions: Functions, backend: Backend, pass_sizes: PassSizes | None) -> None:
        self.functions, self.backend, self.pass_sizes = functions, backend, pass_sizes
        self.losses = tuple(functions.optimizers)
        self._trained = {name: frozenset(one.parameters) for name, one in functions.optimizers.items()}
        self.mixes_examples: dict[ProgramName, bool] = {}
        self.examples: Any = None
        self.copies_gradients = True
        self._program: ScoreProgram | None = None

    @property
    def program(self) -> ScoreProgram:
        """The compiled score."""
        if self._program is None:
            self._program = self.backend.compile_score(self.functions, self.losses)
        return self._program

    def make_shadow(self) -> Shadow:
        """Return the model with its initial values."""

        def export(arrays: Arrays) -> dict[str, Tensor]:
            return {name: self.backend.export_array(array).clone() for name, array in arrays.items()}

        return Shadow(self.backend, export(self.functions.params), export(self.functions.state))

    def export_model(self, shadow: Shadow) -> Any:
        """Return the model as the recipe's author knows it."""
        return self.functions.export_model(shadow.read_params(), shadow.read_buffers())

    # Scores of a batch.

    def score(self, shadow: Shadow, batch: Any) -> Any:
        """Return what the recipe's `score` returns, of torch tensors; in training with their graph.

        In training mode also what training changes otherwise is written to the shadow's buffers. Raises RunError for a
        batch that is not one of arrays, and whatever the recipe's `score` raises.
        """
        training = shadow.training and torch.is_grad_enabled()
        batch, count = self._pad_batch(shadow, batch, "training" if training else "evaluation")
        if training:
            entropy = torch.randint(1 << 32, (2,)).numpy().astype(np.uint32)
            returned, pullback = self.program.score_for_training(
                shadow.read_params(), shadow.read_buffers(), batch, entropy
            )
        else:
            returned = self.program.score_for_evaluation(shadow.read_params(), shadow.read_buffers(), batch)
        scores = self._export_scores(returned.scores)
        if training and isinstance(scores, dict):
            losses = {name: get_numerators(scores[name]) for name in self.losses if name in scores}
            losses = {name: values for name, values in losses.items() if _is_loss(values)}
            scores = _cut_rows(scores, count)
            if losses:
                rows = next(iter(losses.values())).shape[0] if count is None else count
                attached = ScoredPass(
                    shadow, pullback, losses, self._trained, rows, self.copies_gradients
                ).attach_gradients()
                scores |= {name: replace_numerators(scores[name], values) for name, values in attached.items()}
            shadow.write_buffers(returned.state)
        else:
            scores = _cut_rows(scores, count)
        if returned.outputs is None:
            return scores
        return scores, _cut_rows(self._export_scores(returned.outputs), count)

    def compute_outputs(self, shadow: Shadow, batch: Any) -> Any:
        """Return what the recipe's `outputs` returns, of torch tensors."""
        batch, count = self._pad_batch(shadow, batch, "outputs")
        outputs = self.program.compute_outputs(shadow.read_params(), shadow.read_buffers(), batch)
        return _cut_rows(self._export_scores(outputs), count)

    def _export_scores(self, values: Any) -> Any:
        """Return a dict of arrays or of pairs of them as torch tensors; anything else as it is."""
        if isinstance(values, Mapping):
            return {name: self._export_scores(value) for name, value in values.items()}
        if isinstance(values, (tuple, list)):
            return tuple(map(self._export_scores, values))
        return self.backend.export_array(values) if hasattr(values, "dtype") and hasattr(values, "shape") else values

    # The sizes of batches.

    def _pad_batch(self, shadow: Shadow, batch: Any, program: ProgramName) -> tuple[Any, int | None]:
        """Return the batch as arrays, padded if that changes nothing, and how many rows are its own; None: all."""
        count, size = count_rows(batch), self._pass_size(program)
        if count is None or size is None or count >= size:
            return map_arrays(_keep, batch), None
        if program not in self.mixes_examples:
            # The same examples on all ranks, if they will do: so that all decide alike.
            alike = self.examples is not None and describe_rows(self.examples) == describe_rows(batch)
            self.find_mixing(shadow, self.examples if alike else batch, program)
        if self.mixes_examples[program]:
            return map_arrays(_keep, batch), None
        return pad_rows(batch, count, size), count

    def _pass_size(self, program: ProgramName) -> int | None:
        if self.pass_sizes is None:
            return None
        return self.pass_sizes.training if program == "training" else self.pass_sizes.evaluation

    def find_mixing(self, shadow: Shadow, batch: Any, program: ProgramName) -> bool:
        """Find out whether what is computed of an example depends on the others of its batch; note it, and return it.

        The first example is computed next to another one and next to copies of itself, in batches of the size that is
        compiled anyway. If no two examples of the batch differ, or state is changed by it, it counts as mixing.
        """
        count = count_rows(batch)
        if count is None or (other := _find_other_row(batch, count)) is None:
            mixes = True
        else:
            size = max(2, self._pass_size(program) or 2)  # of 1 there may be more in an elastic run
            one, both = np.zeros(size, np.int64), np.minimum(np.arange(size), 1) * other
            first, second = (self._compute_first_row(shadow, select_rows(batch, rows), program) for rows in (one, both))
            mixes = first is None or second is None or not all(map(has_same_bits, first, second))
        self.mixes_examples[program] = mixes
        return mixes

    def _compute_first_row(self, shadow: Shadow, batch: Any, program: ProgramName) -> list[Tensor] | None:
        """Return what is computed of the first row; None if state is changed, as by counting rows."""
        params, buffers, rows = shadow.read_params(), shadow.read_buffers(), count_rows(batch)
        if program == "outputs":
            values = self.program.compute_outputs(params, buffers, batch)
        elif program == "evaluation":
            values = self.program.score_for_evaluation(params, buffers, batch).scores
        else:
            returned, _ = self.program.score_for_training(params, buffers, batch, NO_ENTROPY)
            state = {name: self.backend.export_array(array) for name, array in returned.state.items()}
            if any(not has_same_bits(after, shadow.buffer_by_name[name]) for name, after in state.items()):
                return None
            values = returned.scores
        return _first_rows(self._export_scores(values), rows or 0)


def _is_loss(values: Any) -> bool:
    """Return whether a score can be differentiated: anything else is refused later."""
    return isinstance(values, Tensor) and values.dim() == 1 and values.is_floating_point()


def _keep(array: NDArray[Any]) -> NDArray[Any]:
    return array


def _find_other_row(batch: Any, count: int) -> int | None:
    """Return the first row that differs from row 0; None if there is none."""
    arrays = list(iterate_arrays(batch))
    return next((row for row in range(1, count) if any((a[row] != a[0]).any() for a in arrays)), None)


def _cut_rows(values: Any, count: int | None) -> Any:
    """Return the first `count` rows of tensors, nested; None: all."""
    return values if count is None else _map_tensors(lambda t: t[:count] if t.dim() and len(t) >= count else t, values)


def _first_rows(values: Any, rows: int) -> list[Tensor]:
    """Return the first row of each tensor that has this number of rows."""
    found: list[Tensor] = []
    _map_tensors(lambda t: found.append(t[:1]) if t.dim() and len(t) == rows else None, values)
    return found


def _map_tensors(function: Callable[[Tensor], Any], values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _map_tensors(function, value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_map_tensors(function, value) for value in values)
    return function(values) if isinstance(values, Tensor) else values
