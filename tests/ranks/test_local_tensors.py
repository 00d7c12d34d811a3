"""The exchange of DTensors: two ranks hold a model together, and two such pairs train it, each on half of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import horovod.torch as hvd
import pytest
import torch
import torch.distributed as dist
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore

from hvdtrain.comm.signed_store import open_store
from hvdtrain.comm.torch_group import TorchGroup
from hvdtrain.comm.torch_ranks import connect_ranks
from hvdtrain.compression.spec import parse_compression
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.buckets import ExchangeConfig
from hvdtrain.exchange.local_tensors import is_split_dtensor, local_tensor
from hvdtrain.exchange.state import (
    ExchangeState,
    gather_exchange_state,
    load_exchange_state,
    local_exchange_state,
    restore_local_state,
)
from hvdtrain.torch.replica_norm import compute_replica_norm
from tests.ranks.test_torch_ranks import CPU, make_world
from tests.support.worlds import on_ranks

STEPS = 4


class Perceptron(nn.Module):
    """(B, 12) -> (B, 12), with a norm whose parameters tensor parallelism leaves whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 30), nn.Linear(30, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(Perceptron(), Perceptron()).to(dtype)


@contextlib.contextmanager
def pairs_of_four() -> Iterator[TorchGroup]:
    """Let pairs of ranks be torch's default process group; yield the group of this rank's place in both pairs."""
    world, store = make_world(), open_store()
    pair, place = divmod(world.rank, 2)
    column = connect_ranks(store, "column", [place, place + 2], world, CPU)
    assert column is not None
    dist.init_process_group("gloo", store=PrefixStore(f"pair{pair}", store), rank=place, world_size=2)
    try:
        yield column
    finally:
        hvd.allreduce(torch.ones(1), name="all are done")
        dist.destroy_process_group()
        store.close()


def divide(model: nn.Module, way: str) -> None:
    """Divide a model between the ranks of a pair."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    if way == "tensor":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        parallelize_module(model, mesh, {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()})
        return
    from torch.distributed.fsdp import fully_shard

    for module in (*model, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def train_pairs(way: str, compression: str, dtype: torch.dtype, column: TorchGroup) -> nn.Module:
    """Train on four ranks; `way` "fsdp" gives each rank a part of the batch of its own, "tensor" each pair."""
    model = make_model(dtype)
    divide(model, way)
    named = list(model.named_parameters())
    assert all(is_split_dtensor(p) for _, p in named) == (way == "fsdp")
    exchange = BucketedExchange(
        named, ExchangeConfig(average=False, spec=parse_compression(compression), group=column, bucket_bytes=1000)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rank, parts = (hvd.rank(), 4) if way == "fsdp" else (hvd.rank() // 2, 2)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = make_batch(step, dtype)
        model(batch[rank * len(batch) // parts :][: len(batch) // parts]).square().sum().div(len(batch)).backward()
        exchange.finish_exchange()
        optimizer.step()
    exchange.close()
    return model


def make_batch(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def train_alone(dtype: torch.dtype) -> nn.Module:
    """The same on one process."""
    model = make_model(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(make_batch(step, dtype)).square().sum().div(16).backward()
        optimizer.step()
    return model


def gather_whole(p: Tensor) -> Tensor:
    """The whole of a parameter."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p  # type: ignore[no-any-return]


@on_ranks(4)
def test_gradients_of_dtensors_are_summed_over_the_ranks_that_hold_the_same_part() -> None:
    reference = train_alone(torch.float64)
    with pairs_of_four() as column:
        for way in ("tensor", "fsdp"):
            model = train_pairs(way, "none", torch.float64, column)
            for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
                torch.testing.assert_close(gather_whole(p), q[1], rtol=1e-10, atol=1e-10, msg=f"{way} {name}")


@on_ranks(4)
def test_compressed_gradients_of_dtensors_keep_all_copies_the_same_to_the_bit() -> None:
    """Parts are the same in both pairs; what is whole, on all four ranks."""
    reference = torch.cat([p.detach().reshape(-1) for p in train_alone(torch.float32).parameters()])
    with pairs_of_four() as column:
        for way in ("tensor", "fsdp"):
            for compression, near in (("int8,min=8", 0.02), ("powersgd:2,warmup=1,min=8", 0.3)):
                model = train_pairs(way, compression, torch.float32, column)
                for name, p in model.named_parameters():
                    local = local_tensor(p).detach().reshape(1, -1)
                    copies = column.start_all_gather(local).wait()
                    assert torch.equal(copies[0], copies[1]), (way, compression, name)
                    if not is_split_dtensor(p):
                        found = hvd.allgather(local, name=f"{way}.{compression}.{name}")
                        assert torch.equal(found, found[:1].expand(4, -1)), (way, compression, name)
                whole = torch.cat([gather_whole(p).detach().reshape(-1) for p in model.parameters()])
                assert (whole - reference).norm() < near * reference.norm(), (way, compression)


@on_ranks(4)
def test_the_norm_of_a_replica_counts_what_its_ranks_share_once() -> None:
    made = torch.Generator().manual_seed(1)
    shared, halves = torch.randn(5, generator=made), torch.randn(2, 7, generator=made, dtype=torch.complex128)
    embedding = torch.zeros(3, 2).index_fill_(0, torch.tensor([1]), 2.0).to_sparse(1)
    with pairs_of_four():
        own = halves[dist.get_rank()]
        norm = compute_replica_norm([own, embedding], [shared], CPU)
        torch.testing.assert_close(
            norm, (halves.abs().square().sum() + 2 * 8 + shared.double().square().sum()).sqrt(), rtol=1e-12, atol=0
        )
        if dist.get_rank() == 1:
            own = own * torch.inf
        assert not torch.isfinite(compute_replica_norm([own], [shared], CPU))


@on_ranks(4)
def test_what_is_unsent_is_saved_whole_and_divided_again() -> None:
    """Of int8 with FSDP2, then on ranks that hold the model otherwise."""
    with pairs_of_four() as column:
        config = ExchangeConfig(average=False, spec=parse_compression("int8,min=1"), group=column)
        saved = None
        for way in ("fsdp", "tensor", "whole"):
            model = make_model(torch.float32)
            if way != "whole":
                divide(model, way)
            exchange = BucketedExchange(list(model.named_parameters()), config)
            if saved is not None:
                load_exchange_state(exchange, ExchangeState.from_checkpoint(saved))
                found = gather_exchange_state(exchange, exact=False).to_checkpoint()["debts"]
                assert found.keys() == saved["debts"].keys()
                for name, part in saved["debts"].items():
                    torch.testing.assert_close(found[name], part, rtol=1e-6, atol=1e-7, msg=f"{way} {name}")
            batch = make_batch(3, torch.float32)[4 * hvd.rank() :][:4]
            model(batch).square().sum().div(16).backward()
            exchange.finish_exchange()
            saved = gather_exchange_state(exchange, exact=False).to_checkpoint()
            shapes = {f"{name}.residual": p.numel() for name, p in model.named_parameters() if p.dim() > 1}
            assert {name: len(part) for name, part in saved["debts"].items()} == shapes
            assert any(part.any() for part in saved["debts"].values())
            exchange.close()


@on_ranks(4)
def test_what_a_rank_has_not_sent_stays_with_it_in_another_world() -> None:
    with pairs_of_four() as column:
        config = ExchangeConfig(average=False, spec=parse_compression("int8,min=1"), group=column)
        for way in ("fsdp", "tensor"):
            model = make_model(torch.float32)
            divide(model, way)
            unsent: list[list[Tensor]] = []
            state: ExchangeState | None = None
            for _ in range(2):
                exchange = BucketedExchange(list(model.named_parameters()), config)
                if state is not None:
                    load_exchange_state(exchange, ExchangeState(state.steps, state.build_orders))
                    restore_local_state(exchange, state)
                else:
                    model(make_batch(3, torch.float32)[4 * hvd.rank() :][:4]).square().sum().div(16).backward()
                    exchange.finish_exchange()
                found = [bucket.reducer.total_unsent() for bucket in exchange.buckets]
                unsent.append([part.clone() for part in found if part is not None])
                state = local_exchange_state(exchange)
                exchange.close()
            assert any(part.any() for part in unsent[0])
            assert all(torch.equal(one, other) for one, other in zip(*unsent, strict=True)), way


@on_ranks(4)
def test_a_lost_rank_is_reported_after_the_backward_pass_that_others_are_in() -> None:
    """Of the same replica: they would wait for the rest of it."""
    with pairs_of_four() as column:
        config = ExchangeConfig(average=False, spec=parse_compression("none"), group=column, bucket_bytes=100)
        for way in ("tensor", "fsdp"):
            model = make_model(torch.float32)
            divide(model, way)
            exchange = BucketedExchange(list(model.named_parameters()), config)
            model(make_batch(0, torch.float32)).square().sum().backward()
            exchange.finish_exchange()
            lost = 0

            def lose(step: int) -> None:
                nonlocal lost
                lost += 1
                raise HorovodInternalError("lost")

            assert len(exchange.buckets) > 1
            for bucket in exchange.buckets:
                bucket.start_reduction = lose  # type: ignore[method-assign]
            model(make_batch(1, torch.float32)).square().sum().backward()
            assert lost == 1, "nothing more is sent"
            with pytest.raises(HorovodInternalError):
                exchange.wait_for_sums()
            exchange.close()
