"""JAX in loops of one's own: gradients summed over ranks between jitted functions, and the root's arrays everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import hvdtrain.jax
from hvdtrain.comm import collectives
from hvdtrain.exchange.buckets import Bucket
from hvdtrain.jax import allreduce_gradients, broadcast
from hvdtrain.jax.gradients import _reductions
from hvdtrain.system.errors import UserError
from hvdtrain.torch import DistributedOptimizer
from tests.support.worlds import KeptWorld, on_ranks

SHAPES = [(3, 3, 8, 16), (), (40, 5), (0, 3)]
DTYPES = ["float32", "bfloat16", "float16", "complex64"]


def rank_values(rank: int, step: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A rank's gradients, as float64 or complex128."""
    made = np.random.default_rng([rank, step])
    found = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            value = made.standard_normal(shape)
            found[f"{dtype}{shape}"] = value + 1j * made.standard_normal(shape) if "complex" in dtype else value
    return found


def rank_tree(rank: int, step: int = 0) -> dict[str, Any]:
    values = rank_values(rank, step)
    arrays = {name: jnp.asarray(value.astype(jnp.dtype(name.partition("(")[0]))) for name, value in values.items()}
    return {"jax": arrays, "numpy": [values["float32(40, 5)"], np.asarray(arrays["bfloat16(40, 5)"])], "none": None}


def to_numpy(array: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(array)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


@on_ranks(1, 2, 3)
def test_gradients_are_the_mean_and_the_sum_in_the_types_that_they_had() -> None:
    rank, size = collectives.rank(), collectives.size()
    for step, average in enumerate((True, False)):
        given = rank_tree(rank, step)
        found = allreduce_gradients(given, average=average)
        assert jax.tree.structure(found) == jax.tree.structure(given)
        trees = [rank_tree(other, step) for other in range(size)]
        for mine, *all_ranks, before in zip(*(jax.tree.leaves(t) for t in (found, *trees, given)), strict=True):
            assert type(mine) is type(before) and mine.dtype == before.dtype and mine.shape == before.shape
            expected = sum(map(to_numpy, all_ranks)) / (size if average else 1)
            digits = {"float16": 1e-2, "bfloat16": 1e-2, "float64": 1e-14}.get(str(mine.dtype), 1e-6)
            np.testing.assert_allclose(to_numpy(mine), expected, rtol=digits, atol=digits)
            np.testing.assert_array_equal(to_numpy(before), to_numpy(all_ranks[rank]))


@on_ranks(2)
def test_a_gradient_is_copied_into_its_bucket_only_and_results_stay_what_they_are() -> None:
    seen = []

    def record(self: Bucket, index: int, gradient: Any, step: int, put: Any = Bucket.put_gradient) -> None:
        seen.append(gradient.data_ptr())
        put(self, index, gradient, step)

    tree = [jnp.full((100, 7), float(collectives.rank() + 1)), jnp.ones(33)]
    for compression in ("none", "fp16,min=1"):
        first = allreduce_gradients(tree, compression=compression)
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bucket, "put_gradient", record)
            second = allreduce_gradients([array * 3 for array in tree], compression=compression)
            again = allreduce_gradients(tree, compression=compression)
        assert set(seen[-2:]) == {array.unsafe_buffer_pointer() for array in tree}
        assert [float(array.mean()) for array in (*first, *second, *again)] == [1.5, 1, 4.5, 3, 1.5, 1]
        flats = [
            (bucket.reducer.flat.data_ptr(), bucket.reducer.flat.data_ptr() + bucket.reducer.flat.nbytes)
            for reduction in _reductions.values()
            if reduction.exchange is not None
            for bucket in reduction.exchange.buckets
        ]
        pointers = [array.unsafe_buffer_pointer() for array in (*first, *second, *again)]
        assert not any(low <= pointer < high for pointer in pointers for low, high in flats)


@on_ranks(2)
@pytest.mark.parametrize("compression", ["topk:0.1,warmup=0,min=1", "powersgd:2,warmup=0,min=1", "bf16,min=1"])
def test_what_is_not_sent_is_kept_as_the_torch_optimizer_keeps_it(compression: str) -> None:
    made = torch.Generator().manual_seed(collectives.rank())
    p = torch.nn.Parameter(torch.zeros(32, 48))
    optimizer = DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("params", p)], compression=compression)
    for _ in range(4):
        gradient = torch.randn(32, 48, generator=made)
        optimizer.zero_grad()
        (p * gradient).sum().backward()
        optimizer.synchronize()
        found = allreduce_gradients(jnp.asarray(gradient.numpy()), compression=compression)
        assert p.grad is not None
        np.testing.assert_array_equal(np.asarray(found), p.grad.numpy())
    assert {np.asarray(found).tobytes()} == set(map(bytes, gather_bytes(np.asarray(found).tobytes())))


def gather_bytes(data: bytes) -> list[list[int]]:
    return [list(map(int, row)) for row in collectives.gather_array(np.frombuffer(data, np.uint8), "test.bytes")]


@on_ranks(2)
def test_a_name_tells_trees_of_the_same_structure_apart() -> None:
    tree = {"w": jnp.asarray(np.random.default_rng(collectives.rank()).standard_normal((20, 30)), jnp.float32)}
    spec = "topk:0.1,warmup=0,min=1"
    first = allreduce_gradients(tree, compression=spec, name="d")["w"]
    other = allreduce_gradients(tree, compression=spec, name="g")["w"]
    later = allreduce_gradients(tree, compression=spec, name="d")["w"]
    np.testing.assert_array_equal(first, other)
    assert np.any(np.asarray(later) != np.asarray(first))


@on_ranks(2)
def test_what_cannot_be_summed_is_refused_by_name() -> None:
    @jax.jit
    def jitted(x: Any) -> Any:
        return allreduce_gradients({"w": x})

    with pytest.raises(UserError, match=r"^allreduce_gradients\(\) was called within jit, .* where 'w' has no values "):
        jitted(jnp.ones(3))
    for bad, text in (
        (jnp.ones(3, jnp.int32), r"'a\.b' is int32; expected float16, "),
        (np.ones(3, bool), r"'a\.b' is bool; expected float16, "),
        (jax.random.key(0), r"'a\.b' is key<fry>; expected float16, "),
        (0.5, r"'a\.b' is a float; expected arrays only "),
        (len, r"'a\.b' is a builtin_function_or_method; expected arrays only "),
    ):
        with pytest.raises(UserError, match=rf"^allreduce_gradients\(\): {text}"):
            allreduce_gradients({"a": {"b": bad}, "c": jnp.ones(2)})


def reduce_unequal(case: str) -> None:
    rank = collectives.rank()
    if case == "shape":
        allreduce_gradients({"w": jnp.ones(4)})  # both know this one
        allreduce_gradients({"w": jnp.ones(4 + rank)})
    elif case == "compression":
        allreduce_gradients({"w": jnp.ones(4)}, compression="fp16" if rank else "none")
    else:
        broadcast({"w": jnp.ones(4)} if rank else {"v": np.ones(4)})


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("shape", "allreduce_gradients(): array 1 is 'w' float32 (5,), rank 0 has 'w' float32 (4,)"),
        ("compression", "allreduce_gradients(): compression is fp16, rank 0 has none"),
        ("tree", "broadcast(): array 1 is 'w' float32 (4,), rank 0 has 'v' float64 (4,)"),
    ],
)
def test_trees_that_differ_are_refused_on_all_ranks(world2: KeptWorld, case: str, text: str) -> None:
    (found,) = {str(error) for error in world2.errors(reduce_unequal, case)}
    assert found.startswith("rank 1 on ") and found.endswith(f": {text}")


@on_ranks(2, 3)
def test_broadcast_gives_all_ranks_the_roots_arrays() -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        step: Any
        params: Any

    def state(rank: int) -> State:
        params = jax.tree.map(lambda x: x, rank_tree(rank))
        extra = {"key": jax.random.key(rank), "mask": np.array([rank == 1, True]), "count": jnp.int32(rank)}
        return State(10 + rank, {**params, **extra, "empty": jnp.zeros((0, 2))})

    root = collectives.size() - 1
    found, expected = broadcast(state(collectives.rank()), root), state(root)
    assert found.step == expected.step and type(found.step) is int
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(mine) is type(theirs)
        if isinstance(mine, jax.Array) and jnp.issubdtype(mine.dtype, jax.dtypes.prng_key):
            mine, theirs = jax.random.key_data(mine), jax.random.key_data(theirs)
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


@on_ranks(2, 3)
def test_a_loop_is_that_of_one_process_with_the_whole_batch() -> None:
    place = hvdtrain.jax.init()
    made = np.random.default_rng(0)
    x, y = made.standard_normal((600, 8), np.float32), made.integers(0, 4, 600)
    tx = optax.adam(1e-2)

    def make(seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed))
        return {"a": jax.random.normal(keys[0], (8, 16)) * 0.3, "b": jax.random.normal(keys[1], (16, 4)) * 0.3}

    @jax.jit
    def gradient(params: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = jnp.tanh(x @ params["a"]) @ params["b"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()

        return jax.grad(loss)(params)

    @jax.jit
    def update(params: Any, state: Any, gradients: Any, count: Any) -> Any:
        updates, state = tx.update(jax.tree.map(lambda g: g / count, gradients), state, params)
        return optax.apply_updates(params, updates), state

    def train(rank: int, size: int) -> Any:
        params = make(rank)
        if size > 1:
            params = broadcast(params)
        state = tx.init(params)
        for step in range(12):
            ids = np.arange(50 * step, 50 * step + 50)  # 50 do not divide by 3
            mine = np.array_split(ids, size)[rank]
            gradients = gradient(params, x[mine], y[mine])
            if size > 1:
                gradients = allreduce_gradients(gradients, average=False)
            params, state = update(params, state, gradients, len(ids))
        return params

    found, alone = train(place.rank, place.size), train(0, 1)
    for name in found:
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(alone[name]), rtol=1e-6, atol=1e-6)
