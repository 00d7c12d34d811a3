"""The ways of JAX: hvdtrain's recipe, JAX's own processes with its own collectives, and one process by itself."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.benchmarks.framework_ways.models import LR, MOMENTUM, SHAPES, make_examples, uniform_bound
from tests.benchmarks.framework_ways.pace import Pace


def make_params(name, key):
    """The parameters: {"conv0": {"kernel": (3, 3, I, O), "bias": (O,)}, ..., "dense0": {"kernel": (I, O), ...}}"""
    shape = SHAPES[name]
    kernels = {f"conv{i}": (3, 3, *sizes) for i, sizes in enumerate(shape.convolutions)}
    kernels |= {f"dense{i}": sizes for i, sizes in enumerate(shape.dense_layers)}
    params = {}
    for layer, kernel in kernels.items():
        key, own = jax.random.split(key)
        bound = uniform_bound(int(np.prod(kernel[:-1])))
        values = jax.random.uniform(own, kernel, minval=-bound, maxval=bound)
        params[layer] = {"kernel": values, "bias": jnp.zeros(kernel[-1])}
    return params


def compute_logits(name, params, x):
    """(B, side, side, 3) -> (B, 10)"""
    shape = SHAPES[name]
    for i in range(len(shape.channels)):
        layer = params[f"conv{i}"]
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x + layer["bias"])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(len(x), -1)
    for i in range(len(shape.widths) + 1):
        layer = params[f"dense{i}"]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def compute_losses(name, params, images, labels):
    """(B,)"""
    return optax.softmax_cross_entropy_with_integer_labels(compute_logits(name, params, images), labels)


def make_step(name):
    """A jitted step: parameters, state of the optimizer and batch -> new parameters, new state, mean loss."""
    optimizer = optax.sgd(LR, momentum=MOMENTUM)

    def step(params, state, images, labels):
        loss, gradients = jax.value_and_grad(lambda p: compute_losses(name, p, images, labels).mean())(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return optimizer, jax.jit(step, donate_argnums=(0, 1))


def train_alone(name: str, examples: int, pace: Pace) -> None:
    """Train by a step of one jit, without other processes."""
    optimizer, step = make_step(name)
    images, labels = (jnp.asarray(x[:examples]) for x in make_examples(SHAPES[name]))
    params = make_params(name, jax.random.key(0))
    run_steps(step, params, optimizer.init(params), images, labels, pace)


def train_with_jax_distributed(name: str, examples: int, pace: Pace) -> None:
    """Train by the same step on JAX's own processes: the batch is sharded over them, the parameters are replicated."""
    rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"{os.environ['BENCH_MASTER']}:{os.environ['BENCH_PORT']}", size, rank)
    mesh = Mesh(np.array(jax.devices()), ("ranks",))
    sharded, replicated = NamedSharding(mesh, PartitionSpec("ranks")), NamedSharding(mesh, PartitionSpec())
    batch = (x[:examples] for x in make_examples(SHAPES[name]))
    images, labels = (jax.make_array_from_process_local_data(sharded, x) for x in batch)
    optimizer, step = make_step(name)
    params = jax.jit(lambda: make_params(name, jax.random.key(0)), out_shardings=replicated)()
    state = jax.jit(optimizer.init, out_shardings=replicated)(params)
    run_steps(step, params, state, images, labels, pace)


def run_steps(step, params, state, images, labels, pace: Pace) -> None:
    """Train on one batch, and read each step's loss, as a loop that reports it does."""
    while True:
        pace.begin_step()
        params, state, loss = step(params, state, images, labels)
        float(loss)
