"""--shard optimizer with byte codecs: gradients and updates are both encoded, each with what is unsent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.compression.codec import RandomKey
from hvdtrain.compression.codecs.int8 import Int8
from hvdtrain.exchange.partition import Partition
from hvdtrain.torch import DistributedOptimizer
from hvdtrain.torch.shard_update import await_updates, conclude_updates, step_pieces
from hvdtrain.torch.shards import OptimizerShards
from tests.ranks.test_sharded_optimizer import SHARD, SHARDED, assert_same, flatten, state
from tests.support.worlds import KeptWorld, KeptWorlds, on_ranks, refusal, train

INT8 = ("--compression", "int8,min=1")
KEY = RandomKey(0, 0, 0, 0)


def send(rows: Tensor) -> Tensor:
    """What arrives of (parts, values)."""
    codec = Int8()
    return codec.decode(codec.encode(rows, KEY), rows.shape[1], KEY)


@on_ranks(2, 3)
def test_both_rounds_send_what_a_plain_loop_sends() -> None:
    """48 x 64 values: whole blocks on each rank, so that there is no padding. SGD with momentum."""
    size, rank, lr, momentum = collectives.size(), collectives.rank(), 0.1, 0.9
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(48, 64))
    gradients = torch.randn(5, size, 48, 64)
    w, velocity, unsent = (torch.empty(3, 48 * 64).fill_(0)[i].view(size, -1).clone() for i in range(3))
    w += p.detach().view(size, -1)
    residuals = torch.zeros(size, size, 48 * 64 // size)  # of each rank, by parts

    inner = torch.optim.SGD([p], lr=lr, momentum=momentum)
    optimizer = DistributedOptimizer(inner, [("p", p)], average=False, compression="int8,min=1")
    shards = OptimizerShards(optimizer, Partition(size, "elements"), optimizer.exchange, "", ["p"])
    for step in range(5):
        optimizer.zero_grad()
        (p * gradients[step, rank]).sum().backward()
        optimizer.synchronize()
        shards.take_gradients()
        with step_pieces(shards):
            optimizer.step()
        conclude_updates([shards], await_updates([shards]))

        total = torch.zeros_like(w)
        for i in range(size):
            residuals[i] += gradients[step, i].reshape(size, -1)
            sent = send(residuals[i])
            residuals[i] -= sent
            total += sent
        velocity = momentum * velocity + total
        change = unsent - lr * velocity
        sent = send(change)
        unsent = change - sent
        w += sent
        torch.testing.assert_close(p.detach().view(size, -1), w, rtol=1e-5, atol=1e-5)
    (own,) = (values for _, values in shards.buckets[0].own)
    torch.testing.assert_close(optimizer.state[own]["unsent"], unsent[rank], rtol=1e-4, atol=1e-5)
    optimizer.exchange.close()


@pytest.mark.parametrize(
    ("options", "compression"),
    [
        (("--kind", "adamw", "--skips"), "int8,min=1"),
        (("--kind", "adamw", "--skips", "--amp", "fp16", "--ema", "0.9", "--micro-batch", "4"), "int8,min=1"),
        (("--kind", "lars", "--bucket-mib", "0.001"), "qsgd:4bit,min=1"),
        (("--kind", "sgd", "--skips", "--clip-norm", "0.5"), "onebit,min=1,warmup=3"),
        (("--kind", "adamw"), "bf16,min=1"),
        (("--kind", "adamw", "--dtype", "float64"), "fp16,min=1,feedback=on"),
    ],
    ids=["int8", "int8-fp16-ema", "qsgd-whole", "onebit-warmup", "bf16", "fp16-feedback"],
)
def test_all_ranks_have_the_same_weights(
    options: tuple[str, ...], compression: str, worlds: KeptWorlds, tmp_path: Path
) -> None:
    """`--diagnose` ends a run whose replicas differ."""
    world = worlds[3]
    more = ("--compression", compression, "--diagnose", "--log-every", "1", "--threads", "1", *options)
    train(world, SHARDED, tmp_path / "run", *more, *SHARD)
    train(world, SHARDED, tmp_path / "plain", "--threads", "1", *options)
    losses = [json.loads((tmp_path / name / "summary.json").read_text())["eval"]["loss"] for name in ("run", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=0.3), "it trains about as well"


def test_a_run_resumes_bit_for_bit(world2: KeptWorld, tmp_path: Path) -> None:
    options = [*SHARD, *INT8, "--checkpoint-residuals", "exact", "--threads", "1", "--kind", "adamw"]
    train(world2, SHARDED, tmp_path / "whole", *options, "--steps", "8")
    train(world2, SHARDED, tmp_path / "parts", *options, "--steps", "4")
    train(world2, SHARDED, tmp_path / "parts", "--resume", "--steps", "8")
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert any(key.endswith(".unsent") for key in flatten(state(tmp_path / "whole")))


def test_what_is_unsent_is_settled_without_a_codec(worlds: KeptWorlds, tmp_path: Path) -> None:
    """On another number of ranks, without shards: it is in the weights then."""
    folder = tmp_path / "run"
    train(worlds[3], SHARDED, folder, *SHARD, *INT8, "--steps", "4", "--threads", "1", "--kind", "sgd")
    saved = state(folder)
    names = [name for group in saved["parameters"] for name in group]
    states = saved["optimizer"]["state"].items()  # of matrices: what has one axis travels as it is
    unsent = {names[number]: kept["unsent"] for number, kept in states if "unsent" in kept}
    assert unsent and any(part.any() for part in unsent.values())
    plainly = ("--shard", "none", "--compression", "none", "--lr", "1e-20")
    train(worlds[2], SHARDED, folder, "--resume", "--steps", "5", *plainly)
    after = state(folder)
    assert not any(key.endswith(".unsent") for key in flatten(after))
    for name, part in unsent.items():
        torch.testing.assert_close(after["model"][name], saved["model"][name] + part, rtol=1e-6, atol=1e-7, msg=name)
    train(worlds[2], SHARDED, folder, "--resume", "--steps", "7", *SHARD, *INT8)


def test_a_quarter_of_the_bytes_travels(world2: KeptWorld, tmp_path: Path) -> None:
    sent = {}
    for name, more in (("plain", ()), ("int8", INT8)):
        summary = train(world2, "mlp", tmp_path / name, "--steps", "3", "--threads", "1", *SHARD, *more)
        sent[name] = summary["wire_bytes_per_step"]
    assert 0.2 < sent["int8"] / sent["plain"] < 0.3


@pytest.mark.parametrize("method", ["topk:0.1", "randomk", "powersgd:4", "auto"])
def test_methods_that_reduce_to_every_rank_are_refused(method: str, world2: KeptWorld, tmp_path: Path) -> None:
    found = refusal(world2, SHARDED, tmp_path / "run", *SHARD, "--compression", method)
    assert found.startswith(f"--shard optimizer with --compression {method}: ") and "\n" not in found
    assert "bf16, fp16, int8, onebit or qsgd" in found
