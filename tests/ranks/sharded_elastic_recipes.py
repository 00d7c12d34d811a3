"""A sharded recipe whose ranks die at chosen points of chosen steps, for elastic runs with --shard optimizer."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch import option, update
from hvdtrain.torch.pieces import HeldPiece, ShardedBucket
from hvdtrain.torch.shards import OptimizerShards
from tests.ranks.mortal import Faults

Sharded: Any = load_recipe(f"{Path(__file__).with_name('sharded_recipes.py')}:Sharded")


FUNCTIONS = (OptimizerShards.start_gathering, update.await_updates, update.conclude_updates)
ORIGINALS: Any = [getattr(function, "original", function) for function in FUNCTIONS]  # in a process that has others


@dataclass(kw_only=True)
class Mortal(Faults, Sharded):  # type: ignore[misc]
    """Float64 throughout. Points: forward, updated, gathered, some, concluded."""

    dtype: str = "float64"
    compares: bool = option(False, "whether each step compares what ranks mirror with what they have")

    def model(self) -> Any:
        inject_faults(self)
        return super().model()

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        if model.training:
            self.suffer("forward")
            self.take_time()
        model.optimizer = self.made
        inputs, targets = batch
        outputs = model.body(inputs).squeeze(1)
        if not self.skips or self.now.step % 2:
            outputs = outputs + model.extra(inputs).squeeze(1)
        return {"loss": (outputs - targets).square()}


@dataclass(kw_only=True)
class Twins(Mortal):
    """Two optimizers, of which one is left out of every third step."""

    def optimizer(self, params: Any, named: Any) -> dict[str, Any]:
        self.made = torch.optim.AdamW([p for name, p in named if name.startswith("body.")], lr=self.lr)
        extra = [p for name, p in named if name.startswith("extra.")]
        return {"loss_body": self.made, "loss_extra": torch.optim.SGD(extra, lr=self.lr, momentum=0.9)}

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        inputs, targets = batch
        losses = {"loss_body": super().score(model, batch)["loss"]}
        if not model.training or self.now.step % 3:
            losses["loss_extra"] = (model.extra(inputs).squeeze(1) - targets).square()
        return losses


def inject_faults(recipe: Mortal) -> None:
    """Let an update call `suffer` before its gather, and at its end; with "some" one rank does not see that end."""
    start, await_updates, conclude = ORIGINALS

    def start_gathering(self: OptimizerShards, hooks: Any) -> None:
        recipe.suffer("updated")
        start(self, hooks)

    def await_or_miss(shards: Any) -> Any:
        arrived = await_updates(shards)
        if recipe.is_due("some"):
            time.sleep(0.5)
            raise collectives.PeersLost("as if the gather had not reached this rank")
        recipe.suffer("gathered")
        return arrived

    def conclude_and_compare(shards: Any, arrived: Any) -> None:
        conclude(shards, arrived)
        if recipe.compares and shards[0].partition.mirrors:
            for number, one in enumerate(shards):
                compare_mirrors(one, f"test.mirrors.{number}")
        recipe.suffer("concluded")

    changed: list[Any] = [start_gathering, await_or_miss, conclude_and_compare]
    for function, original in zip(changed, ORIGINALS, strict=True):
        function.original = original
    OptimizerShards.start_gathering, update.await_updates, update.conclude_updates = changed  # type: ignore[method-assign]


def compare_mirrors(shards: OptimizerShards, name: str) -> None:
    """Fail unless each mirrored part has the bits of its owner's, values and state."""
    own, mirrored = ([hash_part(shards, part(bucket)) for bucket in shards.buckets] for part in (get_own, get_mirrored))
    answers = collectives.gather_json([own, mirrored], name)
    for rank, (_, theirs) in enumerate(answers):
        assert theirs == answers[shards.partition.mirrors[rank]][0]
    assert any(text for _, theirs in answers for text in theirs)


def get_own(bucket: ShardedBucket) -> list[HeldPiece]:
    return bucket.own


def get_mirrored(bucket: ShardedBucket) -> list[HeldPiece]:
    return bucket.mirrored


def hash_part(shards: OptimizerShards, held: list[HeldPiece]) -> str:
    digest = hashlib.sha256()
    for piece, values in held:
        digest.update(shards.names[piece.param].encode())
        for tensor in (values.detach(), *shards.optimizer.state.get(values, {}).values()):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest() if held else ""
