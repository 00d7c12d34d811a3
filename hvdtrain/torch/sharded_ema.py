"""The exponential moving average of a model's weights, of which each rank has a part, as of the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.torch.divided_model import DividedModel
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.local_average import LocalAverage
from hvdtrain.torch.pieces import ShardedBucket, cut_piece
from hvdtrain.torch.shards import OptimizerShards
from hvdtrain.torch.tensors import load_module_state


class ShardedAverage(AveragedModel):
    """An averaged model whose parameters are whole in evaluations only, from `gather_average` to `free_average`.

    Parameters that are in no optimizer, or not averaged, are whole on every rank.
    """

    def __init__(self, model: nn.Module, decay: float, shards: Sequence[OptimizerShards]) -> None:
        """Average a model on all ranks, whose optimizers have been divided."""
        super().__init__(model, decay)
        self._shards = shards
        self._pieces: dict[nn.Parameter, Tensor] = {}  # the averages, by what the optimizer has of the parameter
        self._own = dict(zip(model.parameters(), self.module.parameters(), strict=True))
        self._averaged = {p for p, averaged in zip(model.parameters(), self._is_averaged, strict=True) if averaged}
        self._names = dict(model.named_parameters(remove_duplicate=False))
        self._host_state: StateDict = {}  # of the whole average, on rank 0, until it is saved
        self._num_buckets = [0] * len(shards)
        self._adopt_buckets()
        self.is_whole = True
        self.free_average()

    def _buckets(self) -> Iterable[tuple[str, ShardedBucket]]:
        for shards, count in zip(self._shards, self._num_buckets, strict=True):
            for number, bucket in enumerate(shards.buckets[:count]):
                yield f"{shards.name}average.{number}", bucket

    def _adopt_buckets(self) -> None:
        """Keep this rank's part only of the average of what has been divided since."""
        for shards, count in zip(self._shards, list(self._num_buckets), strict=True):
            for bucket in shards.buckets[count:]:
                for piece, values in bucket.held:
                    self._pieces[values] = cut_piece(piece, self._own[piece.param].detach()).clone()
        self._num_buckets = [len(shards.buckets) for shards in self._shards]

    def _divided(self) -> set[nn.Parameter]:
        return {p for _, bucket in self._buckets() for p in bucket.params} & self._averaged

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, steps: int = 1) -> None:
        if any(len(shards.buckets) > count for shards, count in zip(self._shards, self._num_buckets, strict=True)):
            self._adopt_buckets()
            self.is_whole = True
            self.free_average()
        divided = self._divided()
        pairs = [(average, values.detach()) for values, average in self._pieces.items()]
        pairs += [(self._own[p].detach(), p.detach()) for p in self._averaged - divided]
        self._move_averages([average for average, _ in pairs], [current for _, current in pairs], steps)

    def gather_average(self) -> None:
        """Let every rank have the average whole; all ranks call this."""
        if self.is_whole:
            return
        for name, bucket in self._buckets():
            for p, value in self._gather_bucket(name, bucket):
                self._own[p].data = value.clone(memory_format=torch.preserve_format)
        self.is_whole = True

    def gather_host_state(self) -> None:
        """Let rank 0 have the average whole in host memory, for `state_dict`; all ranks call this."""
        if self.is_whole:
            return
        found = {}
        for name, bucket in self._buckets():
            for p, value in self._gather_bucket(name, bucket):
                if collectives.rank() == 0:
                    found[p] = value.cpu().clone(memory_format=torch.preserve_format)
        self._host_state = {f"module.{name}": found[p] for name, p in self._names.items() if p in found}

    def _gather_bucket(self, name: str, bucket: ShardedBucket) -> list[tuple[nn.Parameter, Tensor]]:
        handle = bucket.start_gathering(name, [self._pieces[values] for _, values in bucket.own])
        return [(p, value) for p, value in bucket.cut_gathered(handle) if p in self._averaged]

    def free_average(self) -> None:
        """Free the memory of what other ranks have."""
        if self.is_whole:
            for p in self._divided():
                self._own[p].data = p.new_empty(0)
        self.is_whole = False

    # Another world.

    def release_pieces(self) -> Mapping[nn.Parameter, Tensor]:
        """Return this rank's part of the average, by what the optimizer has of the parameter; keep nothing."""
        self.free_average()
        self._host_state = {}
        pieces, self._pieces = self._pieces, {}
        return pieces

    def divide_again(self, shards: Sequence[OptimizerShards]) -> None:
        """Make room for this rank's part, which `fill_pieces` or `load_average` brings, in other optimizers' shards."""
        self._shards, self._num_buckets = shards, [len(own.buckets) for own in shards]
        for _, bucket in self._buckets():
            self._pieces |= {values: torch.empty_like(values.detach()) for _, values in bucket.held}

    @torch.no_grad()
    def fill_pieces(self, averages: Mapping[nn.Parameter, Tensor]) -> None:
        """Take this rank's part of the average."""
        for values, average in averages.items():
            self._pieces[values].copy_(average)

    @torch.no_grad()
    def repeat_move(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Move parts of the average towards the parameters', as it has done that was loaded from another rank."""
        self.n_averaged -= 1
        self._move_averages([average for average, _ in pairs], [current for _, current in pairs], 1)

    def state_dict(self, *args: Any, **kwargs: Any) -> StateDict:  # type: ignore[override]
        whole, self._host_state = {**super().state_dict(*args, **kwargs), **self._host_state}, {}
        return whole

    @torch.no_grad()
    def load_average(self, state: StateDict) -> None:
        divided = self._divided()
        names = {f"module.{name}" for name, p in self._names.items() if p in divided}
        by_param = {p: state[f"module.{name}"] for name, p in self._names.items()}
        for _, bucket in self._buckets():
            for piece, values in bucket.held:
                if by_param[piece.param].shape == piece.param.shape:  # else from a rank that has its part only
                    self._pieces[values].copy_(cut_piece(piece, by_param[piece.param]))
        self.free_average()
        rest = {name: value for name, value in state.items() if name not in names}
        placeholders = {name: value for name, value in super().state_dict().items() if name in names}
        load_module_state(self, {**rest, **placeholders})


def make_average(divided: DividedModel, decay: float | None, shards: Sequence[OptimizerShards]) -> AveragedModel | None:
    """Return a model's average on all ranks, of which each has a part if it has one of the model, or its optimizer.

    None: there is no decay.
    """
    if decay is None:
        return None
    if divided.is_divided:
        return LocalAverage(divided, decay)
    return ShardedAverage(divided.model, decay, shards) if shards else AveragedModel(divided.model, decay)
