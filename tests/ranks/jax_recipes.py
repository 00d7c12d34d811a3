"""JAX recipes for tests, which ask for much of the contract: lines through points, in float32."""

import collections
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hvdtrain.data import Arrays, Rollouts
from hvdtrain.jax import Recipe


def is_key(array):
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


SEEN: dict[str, object] = {}  # what hooks of recipes have seen last in this process
EXAMPLES, FEATURES = 23, 3


def make_arrays(split="train"):
    drawn = np.random.default_rng(len(split))
    x = drawn.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    return x, (x @ np.array([1.0, -2.0, 0.5]) + 0.1 * drawn.normal(size=EXAMPLES)).astype(np.float32)


@dataclass(kw_only=True)
class Line(Recipe):
    """Least squares."""

    epochs: int = 1
    batch_size: int = 8
    lr: float = 0.05

    def model(self, key):
        return {"params": {"slope": jnp.linspace(0.5, -0.5, FEATURES), "bias": jnp.zeros(())}}

    def dataset(self, split):
        return Arrays(*make_arrays(split))

    def optimizer(self):
        return optax.sgd(self.lr)

    def score(self, model, batch, key):
        x, y = batch
        return {"loss": (x @ model["params"]["slope"] + model["params"]["bias"] - y) ** 2}

    def evaluated(self, model, metrics):
        model = jax.tree.map(lambda a: jax.random.key_data(a) if is_key(a) else a, model)
        SEEN.update(model=jax.tree.map(np.asarray, model), metrics=metrics)
        return False


@dataclass(kw_only=True)
class Columns(Line):
    """Forty lines at once, by Adam: a matrix."""

    def model(self, key):
        return {"params": {"slope": jax.random.normal(key, (FEATURES, 40)), "bias": jnp.zeros(40)}}

    def optimizer(self):
        return optax.adam(self.lr)

    def score(self, model, batch, key):
        x, y = batch
        return {"loss": ((x @ model["params"]["slope"] + model["params"]["bias"] - y[:, None]) ** 2).mean(1)}


class Marked(collections.namedtuple("Marked", ["x", "y"])):
    """A batch that is a named tuple."""


@dataclasses.dataclass
class Extra:
    """A part of a batch that is a dataclass."""

    half: np.ndarray
    brain: np.ndarray


@dataclass(kw_only=True)
class ManyTypes(Line):
    """Batches with arrays of many types in all containers."""

    def dataset(self, split):
        x, y = make_arrays(split)
        return [
            {
                "marked": Marked(x[i], y[i]),
                "list": [np.bool_(i % 2), np.int64(i), i, 1.5 * i, True, np.uint8(i)],
                "half": (x[i].astype(np.float16), x[i].astype(jnp.bfloat16), np.complex64(1j * i)),
            }
            for i in range(EXAMPLES)
        ]

    def collate(self, examples):
        batch = super().collate(examples)
        half, brain, _ = batch["half"]
        return batch | {"extra": Extra(half, brain)}

    def score(self, model, batch, key):
        assert isinstance(batch["marked"], Marked), type(batch["marked"])
        flag, number, index, fraction, yes, small = batch["list"]
        half, brain, imaginary = batch["half"]
        types = [str(a.dtype) for a in (flag, number, index, fraction, yes, small, half, brain, imaginary)]
        SEEN["types"] = [*types, type(batch["list"]).__name__, type(batch["extra"]).__name__]
        scores = super().score(model, batch["marked"], key)
        same = (batch["extra"].half == half).all(1) & (number == index) & (fraction == 1.5 * index) & yes
        return {**scores, "flag": flag, "small": small, "same": same, "imaginary": jnp.abs(imaginary)}


@dataclass(kw_only=True)
class Two(Line):
    """Two examples only."""

    def dataset(self, split):
        x, y = make_arrays(split)
        return Arrays(x[:2], y[:2])


@dataclass(kw_only=True)
class Packed(Line):
    """Batches whose arrays have different leading dimensions: points of all examples, and whose they are."""

    def dataset(self, split):
        x, y = make_arrays(split)
        return [(np.repeat(x[i : i + 1], 1 + i % 3, 0), y[i]) for i in range(EXAMPLES)]

    def collate(self, examples):
        owners = np.repeat(np.arange(len(examples)), [len(points) for points, _ in examples])
        return {
            "points": np.concatenate([points for points, _ in examples]),
            "owners": owners.astype(np.int32),
            "y": np.array([y for _, y in examples]),
        }

    def score(self, model, batch, key):
        count = len(batch["y"])
        x = jax.ops.segment_sum(batch["points"], batch["owners"], count)
        return super().score(model, (x, batch["y"]), key)


@dataclass(kw_only=True)
class Moving(Line):
    """With a moving mean that the loss reads, which is changed by the batch; and a constant collection."""

    def model(self, key):
        constants = {"empty": {}, "constants": {"scale": jnp.full((FEATURES,), 2.0)}}
        return super().model(key) | {"moving": {"mean": jnp.ones(FEATURES), "seen": jnp.zeros(())}} | constants

    def score(self, model, batch, key):
        x, y = batch
        assert model["empty"] == {}
        kept = model["moving"]
        x = (x - kept["mean"]) * model["constants"]["scale"] / 2
        # A quadratic form of what is kept, so that its old value is a residual of the backward pass.
        scores = super().score(model, (x, y), key)
        loss = scores["loss"] * (1 + (kept["mean"] ** 2).sum() * (model["params"]["bias"] ** 2))
        mean = 0.8 * kept["mean"] + 0.2 * batch[0].mean(0)
        return {"loss": loss}, {"moving": {"mean": mean, "seen": kept["seen"] + 1}}


@dataclass(kw_only=True)
class Queue(Line):
    """With a queue of examples, which the loss reads and the batch is put into."""

    buffers: ClassVar = {"queue.*": "rank0"}

    def model(self, key):
        return super().model(key) | {"queue": {"x": jnp.ones((4, FEATURES)), "calls": jnp.zeros((), jnp.int32)}}

    def score(self, model, batch, key):
        x, _ = batch
        queue = model["queue"]["x"]
        near = ((x @ model["params"]["slope"])[:, None] * (queue @ model["params"]["slope"])[None]).mean(1)
        scores = super().score(model, batch, key)
        pushed = jnp.concatenate([queue, x])[-4:]
        return {"loss": scores["loss"] + 0.1 * near}, {"queue": {"x": pushed, "calls": model["queue"]["calls"] + 1}}


@dataclass(kw_only=True)
class Counter(Line):
    """Counts examples, in a collection that nothing is said of."""

    def model(self, key):
        return super().model(key) | {"counts": {"seen": jnp.zeros((), jnp.int32)}}

    def score(self, model, batch, key):
        return super().score(model, batch, key), {"counts": {"seen": model["counts"]["seen"] + len(batch[1])}}


@dataclass(kw_only=True)
class Counted(Counter):
    buffers: ClassVar = {"counts.seen": "sum"}


@dataclass(kw_only=True)
class LocallyCounted(Counter):
    buffers: ClassVar = {"*seen": "local"}


@dataclass(kw_only=True)
class Contrastive(Line):
    """Each example's loss depends on the others of its batch."""

    def score(self, model, batch, key):
        scores = super().score(model, batch, key)["loss"]
        return {"loss": scores - 0.1 * scores.mean()}


@dataclass(kw_only=True)
class Infinite(Line):
    """Scores of masked tokens that are infinite before they are masked."""

    def score(self, model, batch, key):
        x, y = batch
        mask = y[:, None] < x
        distances = jnp.where(mask, jnp.sqrt(jnp.where(mask, x - y[:, None], 1.0)), 0)
        return {"loss": super().score(model, batch, key)["loss"] + (distances @ model["params"]["slope"])}


@dataclass(kw_only=True)
class OddTrees(Line):
    """Params of odd names, types and shapes; the same initial values twice; one that the loss does not use."""

    def model(self, key):
        ones = jnp.full((FEATURES,), 0.1)
        return {
            "params": {
                "type": {"forward": ones, "0": {"training": ones}},
                "a.b/c": ones,
                "forward": [ones, (ones,)],
                "brain": ones.astype(jnp.bfloat16),
                "half": ones.astype(jnp.float16),
                "wave": jnp.array([0.1 + 0.2j, 0.3, 0.1j]).astype(jnp.complex64),
                "nothing": jnp.zeros((0, 3)),
                "unused": ones,
                "none": None,
                "7": jnp.ones(()),
                "list": [],
            },
        }

    def score(self, model, batch, key):
        x, y = batch
        p = model["params"]
        slope = p["type"]["forward"] + p["type"]["0"]["training"] * 2 + p["a.b/c"] * 3 + p["forward"][0] * 4
        slope = slope + p["forward"][1][0] + p["brain"].astype(jnp.float32) + p["half"].astype(jnp.float32)
        slope = slope + jnp.abs(p["wave"] * 1j + 1) + p["nothing"].sum() + p["7"]
        return {"loss": (x @ slope - y) ** 2}


@dataclass(kw_only=True)
class Deep(Line):
    """A tree of 200 leaves."""

    def model(self, key):
        return {"params": {f"layer{i}": {"w": jnp.full((FEATURES,), 1 / 200)} for i in range(200)}}

    def score(self, model, batch, key):
        x, y = batch
        return {"loss": (x @ sum(part["w"] for part in model["params"].values()) - y) ** 2}


@dataclass(kw_only=True)
class Played(Line):
    """Examples that the model plays: the targets are its own outputs and noise."""

    batch_size: int = 4

    def dataset(self, split):
        return Rollouts(self.play, examples_per_epoch=12)

    def play(self, now, i):
        x = np.random.normal(size=FEATURES).astype(np.float32)
        model = self.current_model()["params"]
        return x, np.float32(x @ np.asarray(model["slope"]) + model["bias"] + i)


@dataclass(kw_only=True)
class Keyed(Line):
    """With a random key, a boolean and small numbers in what training changes."""

    buffers: ClassVar = {"rng.*": "rank0", "flags.*": "rank0"}

    def model(self, key):
        state = {"rng": {"key": jax.random.key(5)}, "flags": {"on": jnp.zeros(2, bool), "n": jnp.zeros(2, jnp.uint8)}}
        return super().model(key) | state

    def score(self, model, batch, key):
        now, later = jax.random.split(model["rng"]["key"])
        noise = 0.1 * jax.random.normal(now, (FEATURES,))
        x, y = batch
        flags = {"on": ~model["flags"]["on"], "n": model["flags"]["n"] + jnp.uint8(1)}
        return super().score(model, (x + noise, y), key), {"rng": {"key": later}, "flags": flags}
