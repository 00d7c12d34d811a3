"""A line fitted with JAX over several processes, as JAX's documentation of multi-process programs shows it.

srun --ntasks 2 python jax_distributed.py
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@jax.jit
def train_step(weights, data, target):
    def loss_of(weights):
        return jnp.mean((data @ weights - target) ** 2)

    loss, gradient = jax.value_and_grad(loss_of)(weights)
    return weights - 0.1 * gradient, loss


def main(args):
    jax.distributed.initialize()
    rank, size = jax.process_index(), jax.process_count()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def global_sum(x):
        return jax.lax.psum(jnp.sum(x), "data")

    ranks = jax.make_array_from_process_local_data(sharded, np.full(jax.local_device_count(), rank, np.float32))
    assert global_sum(ranks) == jax.local_device_count() * sum(range(size))

    generator = np.random.default_rng(rank)
    weights = jax.device_put(jnp.zeros(8), replicated)
    losses = []
    step = 0
    while step < args.steps or args.wait:
        if step == args.steps // 2 and rank == args.fail_on:
            raise ValueError(f"planted fault on rank {rank}")
        inputs = generator.normal(size=(16, 8)).astype(np.float32)
        data = jax.make_array_from_process_local_data(sharded, inputs)
        target = jax.make_array_from_process_local_data(sharded, inputs @ np.arange(8, dtype=np.float32))
        weights, loss = train_step(weights, data, target)
        losses.append(float(loss))
        if rank == 0 and step % 10 == 0:
            print(f"step {step} loss {losses[-1]:.3f}", flush=True)
        step += 1

    assert losses[-1] < losses[0] / 2, losses
    own = np.asarray(weights.addressable_data(0))
    everyone = jax.make_array_from_process_local_data(sharded, own[None])
    assert float(jnp.max(jnp.abs(everyone - own))) == 0, "processes have different weights"
    if rank == 0:
        print(f"done: {size} ranks, loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fail-on", type=int, metavar="RANK", help="raise on this rank, halfway")
    parser.add_argument("--wait", action="store_true", help="train until stopped")
    main(parser.parse_args())
