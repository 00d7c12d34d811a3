"""Predictions of a finished run's model: without optimizer, training data or exchange of gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.data.input_file import InputFile
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.base import check_split, is_overridden
from hvdtrain.recipe.framework import Chunk, Split
from hvdtrain.recipe.order import Ids
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.torch.data import BatchDataset, BatchRequest, seed_all
from hvdtrain.torch.loader import BatchLoader
from hvdtrain.torch.loading import restore_model
from hvdtrain.torch.outputs import Outputs, make_arrays
from hvdtrain.torch.process import ProcessSettings
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.setup import choose_device, configure_torch, load_datasets


class TorchPredictor:
    """`hvdtrain.recipe.framework.Predictor` for a torch recipe."""

    def __init__(self, recipe: Recipe, state: bytes, world: World, options: StepOptions) -> None:
        """Load the model on all ranks. Raises UserError, RecipeError: on all ranks alike."""
        self.recipe, self.world, self.options = recipe, world, options
        self._loader: BatchLoader | None = None
        self._reads_file = False
        with contextlib.ExitStack() as undo:
            undo.callback(ProcessSettings().restore_settings)
            configure_torch(options, options.resolve_threads(world.local_size).count)
            device = choose_device(options.device.device, world.local_rank)
            self.scorer = Scorer(recipe, device, options)
            undo.callback(self.scorer.close)
            self.model = collectives.on_all_ranks(
                "model", lambda: restore_model(recipe, state, options.data.seed, str(device))
            )
            self._exit_stack = undo.pop_all()
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        self._dtype = next(floating, torch.get_default_dtype())

    def open_examples(self, source: Split | InputFile) -> int:
        self._reads_file = isinstance(source, InputFile)
        dataset = source if isinstance(source, InputFile) else self._load_split(source)
        examples = BatchDataset(self.recipe, "--input" if isinstance(source, InputFile) else source, dataset)
        self._loader = BatchLoader(examples, self.options.data.workers)
        self._exit_stack.callback(self._loader.close)
        self._loader.start_workers()
        return len(examples)

    def _load_split(self, split: Split) -> Any:
        check_split(self.recipe, split)
        call = name_call(self.recipe, f"dataset({split!r})")
        dataset = load_datasets(self.recipe, self.world, self.options.data.seed, (split,)).get(split)
        if dataset is None:
            raise UserError(f"{call} returned None: it has no examples")
        if not hasattr(dataset, "__getitem__"):
            raise UserError(
                f"{call} is a {type(dataset).__name__}, whose examples have no numbers; give a file: --input"
            )
        return dataset

    def load_batches(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Ids, Any]]:
        assert self._loader is not None, "open_examples comes first"
        entropy = (self.options.data.seed, 0)
        return self._loader.load_requests(BatchRequest(c.ids, entropy, c.now, c.first_index) for c in chunks)

    def predict_batch(self, batch: Any, count: int, seed: Sequence[int]) -> Outputs:
        seed_all(seed)
        batch = self.scorer.move_batch(convert_floating(batch, self._dtype) if self._reads_file else batch)
        outputs, call = self._call_outputs(batch)
        arrays = make_arrays(call, outputs, count)
        return {name: a.astype(np.float32) if a.dtype == np.float16 else a for name, a in arrays.items()}

    def _call_outputs(self, batch: Any) -> tuple[Any, str]:
        """Return what `outputs` returns, or else what the model does, and the name of the call for messages."""
        recipe, name = self.recipe, type(self.recipe).__name__
        if is_overridden(recipe, "outputs"):
            call, outputs = name_call(recipe, "outputs()"), self.scorer.call_outputs(recipe, self.model, batch)
        else:
            if not isinstance(batch, (Tensor, tuple, list)) or (isinstance(batch, (tuple, list)) and not batch):
                raise RunError(
                    f"a batch of {name} is a {type(batch).__name__}, and it is not known what of it the model takes: "
                    f"write {name}.outputs(self, model, batch), which returns {{name: (B, ...)}}"
                )
            call = f"the model of {name}"
            with torch.no_grad(), self.scorer.autocast_context(), in_recipe(recipe, "model()'s model"):
                outputs = self.model(batch if isinstance(batch, Tensor) else batch[0])
            outputs = {"output": outputs} if isinstance(outputs, Tensor) else outputs
        if not isinstance(outputs, Mapping) or not outputs:
            raise RunError(
                f"{call} returned {type(outputs).__name__}; expected {{name: (B, ...)}}: write "
                f"{name}.outputs(self, model, batch)"
            )
        return outputs, call

    def close(self) -> None:
        self._exit_stack.close()


def convert_floating(batch: Any, dtype: torch.dtype) -> Any:
    """Return a nested batch with its floating tensors in the model's type: files have float64 or float32."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: convert_floating(value, dtype) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(convert_floating(value, dtype) for value in batch)
    return batch
