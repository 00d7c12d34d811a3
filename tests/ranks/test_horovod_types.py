"""Horovod's operations take bfloat16 and bool, over Gloo and MPI, and objects of any type (patches 84 to 86)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

from tests.support.worlds import KeptWorld, on_ranks

ROUNDOFF = 2.0**-8  # of a bfloat16: a rounding changes a value by at most this part of it
FACTOR = 0.3  # not a power of two: scaling by it rounds


@pytest.fixture(scope="module")
def mpi_world() -> Iterator[KeptWorld]:
    """Two ranks that mpirun has started."""
    with KeptWorld(2, kind="mpirun") as started:
        yield started


def draw(rank: int, *shape: int) -> Tensor:
    """The bfloat16 values of a rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).bfloat16()


def draw_all(*shape: int) -> Tensor:
    """(ranks, *shape) float64: what all ranks draw."""
    return torch.stack([draw(rank, *shape) for rank in range(hvd.size())]).double()


def assert_rounded(found: Tensor, exact: Tensor, magnitude: Tensor, roundings: int) -> None:
    """Check a sum in which at most `roundings` results were rounded; magnitude: the sum of absolute values."""
    assert found.dtype == torch.bfloat16
    bound = ((1 + ROUNDOFF) ** roundings - 1) * magnitude.double()
    assert ((found.double() - exact).abs() <= bound).all(), (found, exact)


def check_reductions() -> None:
    others = hvd.size() - 1  # additions of a sum
    for shape in ((), (1,), (7, 3), (50_001,)):
        values = draw_all(*shape)
        exact, magnitude = values.sum(0), values.abs().sum(0)
        mine = draw(hvd.rank(), *shape)
        assert_rounded(hvd.allreduce(mine, op=hvd.Sum, name=f"sum.{shape}"), exact, magnitude, others)
        average = hvd.allreduce(mine, name=f"average.{shape}")
        assert_rounded(average, exact / hvd.size(), magnitude / hvd.size(), others + 1)
        scaled = hvd.allreduce(mine, op=hvd.Sum, prescale_factor=FACTOR, postscale_factor=FACTOR, name=f"s.{shape}")
        assert_rounded(scaled, exact * FACTOR**2, magnitude * FACTOR**2, others + 2)
        assert torch.equal(mine, draw(hvd.rank(), *shape)), "the input was changed"
        assert hvd.allreduce_(mine, op=hvd.Sum, name=f"in_place.{shape}") is mine
        assert_rounded(mine, exact, magnitude, others)
        mine = draw(hvd.rank(), *shape)
        assert torch.equal(hvd.allreduce(mine, op=hvd.Min, name=f"min.{shape}").double(), values.amin(0))
        assert torch.equal(hvd.allreduce(mine, op=hvd.Max, name=f"max.{shape}").double(), values.amax(0))
        product = hvd.allreduce(mine, op=hvd.Product, name=f"product.{shape}")
        assert_rounded(product, values.prod(0), values.prod(0).abs(), others)
        everybody = hvd.allgather(product.reshape(1, -1), name=f"product.all.{shape}")
        assert (everybody == everybody[:1]).all(), "the ranks have different results"


def check_groups() -> None:
    shapes = [(3,), (4, 5), (1,)]
    mine = [draw(hvd.rank(), *shape) for shape in shapes]
    for found in (
        hvd.grouped_allreduce(mine, op=hvd.Sum, name="group"),
        hvd.synchronize(hvd.grouped_allreduce_async(mine, op=hvd.Sum, name="group.async")),
        hvd.grouped_allreduce_([t.clone() for t in mine], op=hvd.Sum, name="group.in_place"),
    ):
        for t, shape in zip(found, shapes, strict=True):
            assert_rounded(t, draw_all(*shape).sum(0), draw_all(*shape).abs().sum(0), hvd.size() - 1)
    gathered = hvd.grouped_allgather(mine, name="group.gather")
    assert all(torch.equal(t.double(), draw_all(*s).flatten(0, 1)) for t, s in zip(gathered, shapes, strict=True))
    rows = draw(hvd.rank(), 2 * hvd.size(), 3)
    everything = draw_all(2 * hvd.size(), 3)
    part = slice(2 * hvd.rank(), 2 * hvd.rank() + 2)
    scattered = [hvd.reducescatter(rows, op=hvd.Sum, name="scatter")]
    scattered += hvd.grouped_reducescatter([rows, rows], op=hvd.Sum, name="group.scatter")
    for t in scattered:
        assert_rounded(t, everything.sum(0)[part], everything.abs().sum(0)[part], hvd.size() - 1)
    mean = hvd.reducescatter(rows, name="scatter.mean")
    assert_rounded(mean, everything.mean(0)[part], everything.abs().mean(0)[part], hvd.size())


def check_rounding() -> None:
    step = 2.0**-7  # between 1 and the next bfloat16
    largest = torch.finfo(torch.bfloat16).max
    first = torch.tensor([1.0, 1 + step, 1.0, largest, torch.inf, torch.inf, torch.nan, -0.0, 2.0**-133])
    second = torch.tensor([step / 2, step / 2, step * 0.75, largest, 1.0, -torch.inf, 1.0, -0.0, 2.0**-133])
    expected = torch.tensor([1.0, 1 + 2 * step, 1 + step, torch.inf, torch.inf, torch.nan, torch.nan, -0.0, 2.0**-132])
    mine = (first, second, torch.full_like(first, -0.0))[hvd.rank()].bfloat16()
    found = hvd.allreduce(mine, op=hvd.Sum, name="rounding").float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(found[7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool], ids=str)
@on_ranks(2, 3)
def test_values_travel_as_they_are(dtype: torch.dtype) -> None:
    check_moves(dtype)


def check_moves(dtype: torch.dtype) -> None:
    ranks, rank = hvd.size(), hvd.rank()
    values = [(draw(r, r + 1, 3) > 0).to(dtype) if dtype == torch.bool else draw(r, r + 1, 3) for r in range(ranks)]
    gathered = hvd.allgather(values[rank], name=f"gather.{dtype}")
    assert gathered.dtype == dtype and torch.equal(gathered, torch.cat(values))
    first = values[0] if rank == 0 else torch.zeros_like(values[0])
    assert torch.equal(hvd.broadcast(first, 0, name=f"broadcast.{dtype}"), values[0])
    other = values[-1].clone() if rank == ranks - 1 else torch.zeros_like(values[-1])
    hvd.broadcast_(other, ranks - 1, name=f"broadcast_.{dtype}")
    assert torch.equal(other, values[-1])
    rows = torch.cat([values[rank][:1]] * ranks)
    received, splits = hvd.alltoall(rows, torch.ones(ranks, dtype=torch.int32), name=f"alltoall.{dtype}")
    assert received.dtype == dtype and splits.tolist() == [1] * ranks
    assert torch.equal(received, torch.cat([v[:1] for v in values]))
    empty = hvd.allgather(values[rank][: 1 if rank else 0], name=f"empty.{dtype}")
    assert torch.equal(empty, torch.cat([v[:1] for v in values[1:]]))


def check_bool() -> None:
    values = torch.stack([draw(rank, 50) > 0 for rank in range(hvd.size())])
    mine = values[hvd.rank()]
    for op, expected in ((hvd.Min, values.all(0)), (hvd.Product, values.all(0)), (hvd.Max, values.any(0))):
        found = hvd.allreduce(mine, op=op, name=f"bool.{op}")
        assert found.dtype == torch.bool and torch.equal(found, expected)
    (grouped,) = hvd.grouped_allreduce([mine], op=hvd.Max, name="bool.group")
    assert torch.equal(grouped, values.any(0))
    for refused in (
        lambda: hvd.allreduce(mine),
        lambda: hvd.allreduce(mine, op=hvd.Sum),
        lambda: hvd.allreduce_(mine, op=hvd.Max, postscale_factor=2.0),
        lambda: hvd.grouped_allreduce([mine.float(), mine]),
        lambda: hvd.reducescatter(mine, op=hvd.Sum),
    ):
        with pytest.raises(ValueError, match=r"torch\.bool tensors.* convert them, as in tensor\.int\(\)"):
            refused()


@on_ranks(2, 3)
def test_bfloat16_is_reduced_as_float32_rounded_at_each_addition() -> None:
    check_reductions()
    check_groups()
    check_rounding()


@on_ranks(2)
def test_bool_is_reduced_by_logical_operations_only() -> None:
    check_bool()


@on_ranks(2)
def test_a_bfloat16_model_is_broadcast_and_trained() -> None:
    check_training()


def check_training() -> None:
    torch.manual_seed(hvd.rank())
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).bfloat16()
    model.register_buffer("mask", torch.rand(16) > 0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    torch.manual_seed(0)
    assert torch.equal(model[0].weight, nn.Linear(8, 16).bfloat16().weight)
    assert torch.equal(*hvd.allgather(model.mask[None], name="mask"))
    adam = torch.optim.Adam(model.parameters())
    hvd.broadcast_optimizer_state(adam, root_rank=0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    examples = draw(hvd.rank(), 4, 8)
    # Not from `backward`, which starts to reduce them in place.
    mine = torch.autograd.grad(model(examples).float().square().mean(), list(model.parameters()))
    model(examples).float().square().mean().backward()
    optimizer.synchronize()
    everybody = hvd.allgather_object(mine)
    for index, p in enumerate(model.parameters()):
        values = torch.stack([grads[index] for grads in everybody]).double()
        assert_rounded(p.grad, values.mean(0), values.abs().mean(0), 2)
    with optimizer.skip_synchronize():
        optimizer.step()
    assert all(torch.equal(p, q - p.grad) for p, q in zip(model.parameters(), before, strict=True))


@on_ranks(2)
def test_adasum_over_gloo_is_refused_at_once_with_what_to_use() -> None:
    tensor = torch.ones(3)
    optimizer = torch.optim.SGD([nn.Parameter(tensor)], lr=1.0)
    for refused in (
        lambda: hvd.allreduce(tensor, op=hvd.Adasum),
        lambda: hvd.grouped_allreduce([tensor], op=hvd.Adasum),
        lambda: hvd.DistributedOptimizer(optimizer, op=hvd.Adasum),
    ):
        with pytest.raises(NotImplementedError, match=r"only over MPI.*mpirun or horovodrun --mpi.*op=hvd\.Average"):
            refused()


@on_ranks(2, 3)
def test_objects_of_any_types_are_broadcast_and_gathered() -> None:
    check_objects()


def check_objects() -> None:
    rank, last = hvd.rank(), hvd.size() - 1
    sent = {"a": [1, "b"], "t": torch.ones(2, dtype=torch.bool)}
    got = hvd.broadcast_object(sent if rank == last else None, root_rank=last)
    assert got["a"] == [1, "b"] and got["t"].all()
    assert hvd.broadcast_object(None if rank == 0 else "x" * 1000) is None
    mine = [None, (1, 2), {"three": 3}][rank]
    assert hvd.allgather_object(mine) == [None, (1, 2), {"three": 3}][: hvd.size()]


@on_ranks(2)
def test_different_optimizer_states_are_an_error_on_all_ranks() -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9 * hvd.rank())
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 is .* on rank 1 and .* on rank 0: make the"):
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)


CHECKS: list[Callable[..., None]] = [
    check_reductions, check_groups, check_rounding, check_bool, check_training, check_objects,
]  # fmt: skip


@pytest.mark.slow
def test_all_of_it_over_mpi(mpi_world: KeptWorld) -> None:
    for check in CHECKS:
        mpi_world.run(check)
    for dtype in (torch.bfloat16, torch.bool):
        mpi_world.run(check_moves, dtype)
    mpi_world.run(check_adasum)


def check_adasum() -> None:
    """Adasum of orthogonal gradients is their sum, of equal ones their mean; bfloat16 and float16 as float32."""
    assert hvd.mpi_enabled()
    same, own = torch.full((8,), 3.0), torch.zeros(8)
    own[hvd.rank()] = 2.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = hvd.allreduce(same.to(dtype), op=hvd.Adasum, name=f"adasum.same.{dtype}")
        assert found.dtype == dtype and torch.equal(found.float(), same)
        found = hvd.allreduce(own.to(dtype), op=hvd.Adasum, name=f"adasum.own.{dtype}")
        assert found.float().tolist() == [2.0, 2.0] + [0.0] * 6
    mine = draw(hvd.rank(), 1000)
    found, exact = (hvd.allreduce(t, op=hvd.Adasum, name=f"adasum.{t.dtype}").float() for t in (mine, mine.float()))
    torch.testing.assert_close(found, exact, rtol=ROUNDOFF, atol=1e-6)
