"""A rank's part of a pipeline: micro-batches pass the stages by the schedules of torch.distributed.pipelining.

    rank 0   score(note, batch) -> inputs -> [stage 0] --.          .-- backward
    rank 1                                               `-> [stage 1] -> outputs -> score(outputs, batch) -> loss

Every rank of a replica has loaded every micro-batch. One with fewer examples than the others is filled up where it
enters the first stage, and the outputs of what was filled in are left out before `score` sees them: their gradients are
zero. Loaded only when stages are asked for: torch.distributed.pipelining takes time to import.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage as TorchStage
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from hvdtrain.comm import collectives
from hvdtrain.comm.torch_group import is_lost_peer, reporting_lost_peers
from hvdtrain.system.errors import KnownError, UserError
from hvdtrain.system.recipe_errors import in_recipe
from hvdtrain.torch.data import seed_all
from hvdtrain.torch.model_chain import Passed, pack_tensors
from hvdtrain.torch.scorer import Scorer
from hvdtrain.torch.stages import Stage, StagePlan, make_example
from hvdtrain.torch.stand_in import StandIn, note_inputs

SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL = {"interleaved": ScheduleInterleaved1F1B, "zerobubble": ScheduleInterleavedZeroBubble}


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of a step.

    Attributes:
        batch: as it was loaded.
        count: of its examples.
        seed: of its randomness.
    """

    batch: Any
    count: int
    seed: Sequence[int]


class SeededStage(TorchStage):
    """torch's stage, whose randomness is drawn by the micro-batch, and which reports its backward passes."""

    pipeline: Pipeline

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        micro_batches = self.pipeline.micro_batches
        cast(Stage, self.submod).seed = micro_batches[min(fwd_chunk_id, len(micro_batches) - 1)].seed
        with self.pipeline.computing():
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        self.pipeline.on_backward(bwd_chunk_id == self.pipeline.num_micro_batches - 1)
        with self.pipeline.computing():
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> None:
        with self.pipeline.computing():
            super().backward_weight_one_chunk(*args, **kwargs)


class Pipeline:
    """Runs micro-batches through the stages of this rank's replica.

    Attributes:
        num_micro_batches: of each step; those that a step lacks are filled in.
        micro_batches: of the step.
        waited: seconds that the last step's schedule was not computing; 0 on a GPU, where that is not known.
        on_backward: called before each backward pass of a stage, with whether it is its last one of the step.
    """

    def __init__(
        self, kind: str, plans: Sequence[StagePlan], result: Passed, scorer: Scorer, num_micro_batches: int
    ) -> None:
        """Make a pipeline; nothing is sent yet.

        Args:
            kind: of the schedule.
            plans: of this rank's stages.
            result: what the last stage returns of a micro-batch.
            scorer: of the recipe.
            num_micro_batches: of a step.
        """
        self.kind, self.plans, self.scorer, self.num_micro_batches = kind, plans, scorer, num_micro_batches
        self.result = result
        self.micro_batches: Sequence[MicroBatch] = []
        self.on_backward: Callable[[bool], None] = lambda is_last: None
        self._compute_loss: Callable[[MicroBatch, StandIn], Tensor] = lambda micro_batch, model: torch.zeros(())
        self.waited = 0.0
        self._training: Any = None
        self._evaluations: dict[int, Any] = {}

    @property
    def has_last(self) -> bool:
        """Whether this rank has the last stage, and so the scores."""
        return self.plans[-1].is_last

    def _make_schedule(self, model: nn.Module, num_micro_batches: int, *, trains: bool) -> Any:
        stages: list[Any] = []
        for plan in self.plans:
            stage = SeededStage(
                Stage(plan, model, self.scorer),
                plan.number,
                plan.count,
                self.scorer.device,
                input_args=make_example(plan.given, self.scorer.device),
                output_args=make_example(plan.returned, self.scorer.device),
            )
            stage.pipeline = self
            stages.append(stage)
        loss = self._score_outputs if trains else None
        if self.kind in SINGLE:
            return SINGLE[self.kind if trains else "gpipe"](stages[0], num_micro_batches, loss, scale_grads=False)
        kind = self.kind if trains else "interleaved"
        return SEVERAL[kind](stages, num_micro_batches, loss, scale_grads=False)

    # A training step.

    def train(
        self,
        model: nn.Module,
        micro_batches: Sequence[MicroBatch],
        compute_loss: Callable[[MicroBatch, StandIn], Tensor],
    ) -> None:
        """Add the gradients of a step's micro-batches to those of this rank's parameters.

        Args:
            model: of which this rank has its stages.
            micro_batches: of the step, the same on all ranks of the replica; at least one.
            compute_loss: returns what is differentiated of a micro-batch, (), by what stands in for the model.

        Raises:
            UserError, RecipeError: on this rank, for what the recipe does.
            PeersLost: another rank of the replica has failed.
        """
        if self._training is None:
            self._training = self._make_schedule(model, self.num_micro_batches, trains=True)
        self._compute_loss = compute_loss
        self.waited, begin = 0.0, time.perf_counter()
        self._run(self._training, micro_batches, partial(self._note_inputs, training=True), trains=True)
        self.waited += time.perf_counter() - begin
        if self.scorer.device.type == "cuda":
            self.waited = 0.0

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Count the time of a block as work."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.waited -= time.perf_counter() - begin

    def _run(
        self,
        schedule: Any,
        micro_batches: Sequence[MicroBatch],
        find_inputs: Callable[[MicroBatch], Sequence[Tensor]],
        *,
        trains: bool,
    ) -> Any:
        """Run a schedule; return the outputs of its one micro-batch on the last stage, unless it trains.

        find_inputs: returns what the model is given of a micro-batch; called where the first stage is.
        """
        self.micro_batches = micro_batches
        given: dict[str, object] = {}
        if self.plans[0].is_first:
            with self.computing():
                inputs = [self._fill_up(find_inputs(one), one.count) for one in micro_batches]
            given["arg_mbs"] = inputs + [inputs[0]] * (schedule._n_microbatches - len(inputs))
        if trains and self.has_last:
            given["target_mbs"] = list(range(self.num_micro_batches))
        try:
            return schedule.step(**given, return_outputs=False) if trains else schedule.eval(**given)
        except RuntimeError as error:
            if isinstance(error.__cause__, KnownError):  # of a stage, which torch has wrapped
                raise error.__cause__ from None
            if is_lost_peer(error):
                raise collectives.PeersLost(str(error)) from error
            raise

    # An evaluation.

    def evaluate(self, model: nn.Module, micro_batch: MicroBatch) -> StandIn | None:
        """Return what stands in for the model in an evaluation, on the rank with the last stage; None on the others.

        model: of which this rank has its stages, the trained one or its average.
        """
        find_inputs = partial(self._note_inputs, training=False)
        outputs = self._run(self._find_evaluation(model), [micro_batch], find_inputs, trains=False)
        return self._stand_in(micro_batch, outputs, training=False) if self.has_last else None

    def _find_evaluation(self, model: nn.Module) -> Any:
        """Return the schedule of one micro-batch forward through a model."""
        if id(model) not in self._evaluations:
            self._evaluations[id(model)] = self._make_schedule(model, 1, trains=False)
        return self._evaluations[id(model)]

    def call_model(self, model: nn.Module, inputs: Sequence[Tensor], seed: Sequence[int]) -> Any:
        """Return what the whole model returns for tensors (B, ...), on all ranks of the replica, which all call this.

        Args:
            model: as for `evaluate`.
            inputs: the same on all of them; they pass the stages in micro-batches.
            seed: of the randomness of modules.
        """
        size, found = len(self.plans[0].given.tensors[0]), list[Sequence[Tensor]]()
        for first in range(0, len(inputs[0]), size):
            part = [x[first : first + size] for x in inputs]
            micro_batch = MicroBatch(part, len(part[0]), (*seed, first))
            outputs = self._run(self._find_evaluation(model), [micro_batch], lambda one: one.batch, trains=False)
            found.append(self._broadcast(outputs, micro_batch.count))
        return pack_tensors(self.result.structure, [torch.cat(parts) for parts in zip(*found, strict=True)])

    def _broadcast(self, outputs: Sequence[Tensor], count: int) -> list[Tensor]:
        """Return the outputs of a micro-batch's `count` examples on all ranks of the replica.

        outputs: on the rank with the last stage.
        """
        shared = []
        with reporting_lost_peers(True):
            for number, x in enumerate(self.result.tensors):
                shape = (count, *x.shape[1:])
                own = outputs[number][:count].contiguous() if self.has_last else None
                received = torch.empty(shape, dtype=x.dtype, device=self.scorer.device) if own is None else own
                dist.broadcast(received, dist.get_world_size() - 1)
                shared.append(received)
        return shared

    def _note_inputs(self, micro_batch: MicroBatch, *, training: bool) -> Sequence[Tensor]:
        """Return what `score` gives to the model."""
        recipe, batch = self.scorer.recipe, self.scorer.move_batch(micro_batch.batch)
        seed_all(micro_batch.seed)
        with self.scorer.session.refuse_calls(), self.scorer.autocast_context(), in_recipe(recipe, "score()"):
            return note_inputs(recipe, batch, training)

    def _fill_up(self, inputs: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
        """Return what the model is given of `count` examples, filled up to a whole micro-batch. Raises UserError."""
        name, given = type(self.scorer.recipe).__name__, self.plans[0].given.tensors
        if [(x.shape[1:], x.dtype) for x in inputs] != [(x.shape[1:], x.dtype) for x in given]:
            found, first = (", ".join(str(tuple(x.shape[1:])) for x in some) for some in (inputs, given))
            raise UserError(
                f"--stages: {name} gives the model examples of shape {found}, after {first} before the first step; "
                "stages take one shape: pad examples to a fixed length in collate()"
            )
        if any(len(x) != count for x in inputs):
            raise UserError(
                f"--stages: {name} gives the model {[len(x) for x in inputs]} examples of {count}; expected as many "
                "as it is given"
            )
        missing = len(given[0]) - count
        padded = [torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x for x in inputs]
        return tuple(x.detach() for x in padded)

    def _score_outputs(self, outputs: tuple[Tensor, ...], number: int) -> Tensor:
        """Return what is differentiated of a micro-batch; zero of one that was filled in."""
        if number >= len(self.micro_batches):
            return sum((x * 0).sum() for x in outputs if x.requires_grad)  # type: ignore[return-value]
        micro_batch = self.micro_batches[number]
        with self.computing():
            seed_all(micro_batch.seed)
            return self._compute_loss(micro_batch, self._stand_in(micro_batch, outputs, training=True))

    def _stand_in(self, micro_batch: MicroBatch, outputs: Sequence[Tensor], *, training: bool) -> StandIn:
        """Return what `score` is given as the model, which returns the outputs of the micro-batch's examples."""
        own = [x[: micro_batch.count] for x in outputs]
        value = pack_tensors(self.plans[-1].returned.structure, own)
        return StandIn(self.scorer.recipe, lambda args: value, training)
