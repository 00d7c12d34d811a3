"""model.fit with hvdtrain.keras.DistributedOptimizer on two ranks, on each backend of Keras."""

from __future__ import annotations

import hashlib
import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld

pytestmark = pytest.mark.parametrize("keras_worlds", ["jax", "tensorflow", *slow("torch")], indirect=True)
STEPS, BATCH = 4, 16  # of an epoch, over all ranks
Weights = list[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Training:
    """A small model and how it is trained.

    Attributes:
        optimizer: the name of Keras's class; momentum is for SGD.
        more: other arguments of the optimizer.
        policy: of all layers.
        compile: other arguments of `compile`.
        spoilt_step: a batch that overflows on rank 1; -1: none.
    """

    optimizer: str = "SGD"
    more: dict[str, Any] = field(default_factory=dict)
    compression: str = "none"
    policy: str = "float32"
    compile: dict[str, Any] = field(default_factory=dict)
    spoilt_step: int = -1

    def make_optimizer(self) -> Any:
        import keras

        momentum = {"momentum": 0.9} if self.optimizer == "SGD" else {}
        return getattr(keras.optimizers, self.optimizer)(0.05, **momentum, **self.more)

    def make_model(self) -> Any:
        """The same on all ranks: Keras's initializers draw their seeds from Python's generator."""
        import keras

        random.seed(1)
        keras.config.set_dtype_policy(self.policy)
        dense = keras.layers.Dense
        model = keras.Sequential([keras.Input((8,)), dense(16, "relu"), dense(16, "relu"), dense(3)])
        keras.config.set_dtype_policy("float32")
        return model


def start_rank() -> int:
    """Initialize as a script does, and return the rank."""
    import hvdtrain.keras as hvd

    # Of Keras on JAX with numpy 2: `Variable.numpy`.
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
    return hvd.init().rank


def make_examples(rank: int | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """STEPS batches: a rank's halves of them, or all of them."""
    generator = np.random.default_rng(0)
    x = generator.random((STEPS, 2, BATCH // 2, 8), np.float32)
    y = generator.random((STEPS, 2, BATCH // 2, 3), np.float32)
    if rank is not None:
        x, y = x[:, rank], y[:, rank]
    return x.reshape(-1, 8), y.reshape(-1, 3)


def digest(weights: Weights) -> str:
    """Of every bit."""
    return hashlib.sha256(b"".join(array.tobytes() for array in weights)).hexdigest()


@dataclass
class Trained:
    """What came of a training.

    Attributes:
        alone: the weights that one process gets from the whole batches.
        steps: that the optimizer made.
        loss_scale: at the end, with float16.
    """

    weights: Weights
    alone: Weights
    steps: int
    loss_scale: float | None


def train_both(training: Training) -> Trained:
    """Train on this rank's halves of the batches, with the other rank, and once more alone on all of them."""
    import keras

    import hvdtrain.keras as hvd

    rank = start_rank()
    model = training.make_model()
    optimizer = hvd.DistributedOptimizer(training.make_optimizer(), compression=training.compression)
    model.compile(optimizer, "mse", **training.compile)
    x, y = make_examples(rank)
    if training.spoilt_step >= 0 and rank == 1:
        x[training.spoilt_step * BATCH // 2] = 1e30
    model.fit(x, y, batch_size=BATCH // 2, epochs=2, shuffle=False, verbose=0)
    alone = training.make_model()
    alone.compile(training.make_optimizer(), "mse", **training.compile)
    alone.fit(*make_examples(None), batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    scale = getattr(model.optimizer, "dynamic_scale", None)
    loss_scale = None if scale is None else float(keras.ops.convert_to_numpy(scale))
    return Trained(model.get_weights(), alone.get_weights(), int(model.optimizer.iterations), loss_scale)


def largest_difference(trained: Trained) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(trained.weights, trained.alone, strict=True))


@pytest.mark.parametrize(
    "training",
    [
        pytest.param(Training(), id="momentum"),
        pytest.param(
            Training("Adam", {"global_clipnorm": 0.05, "gradient_accumulation_steps": 2}),
            id="adam that accumulates and clips",
        ),
        pytest.param(Training(compile={"run_eagerly": True}), id="eager", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_one_process_with_the_whole_batch(keras_world: KeptWorld, training: Training) -> None:
    first, second = keras_world.run(train_both, training)
    assert digest(first.weights) == digest(second.weights)
    assert largest_difference(first) < 1e-5


@pytest.mark.parametrize(
    ("compression", "close"),
    [*slow(("fp16,min=0", 1e-3)), ("powersgd:2,min=0,warmup=0", 1.0)],
)
def test_compression_leaves_replicas_alike(keras_world: KeptWorld, compression: str, close: float) -> None:
    first, second = keras_world.run(train_both, Training(compression=compression))
    assert digest(first.weights) == digest(second.weights)
    assert 0 < largest_difference(first) < close


def test_all_ranks_skip_a_step_whose_gradients_overflow_on_one(keras_world: KeptWorld) -> None:
    """`compile` puts a LossScaleOptimizer around the DistributedOptimizer by itself."""
    first, second = keras_world.run(train_both, Training(policy="mixed_float16", spoilt_step=1))
    assert digest(first.weights) == digest(second.weights)
    assert first.steps == second.steps == 2 * (STEPS - 1)
    assert first.loss_scale == second.loss_scale == 2.0**13


def fit_with_callbacks() -> dict[str, Any]:
    """Train from different weights, with different numbers of examples, under a schedule; return what is reported."""
    import keras

    import hvdtrain.keras as hvd
    from hvdtrain.comm import collectives

    rank = start_rank()
    random.seed(rank)
    layers = [keras.layers.Dense(16, "relu"), keras.layers.Dropout(0.1), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    schedule = hvd.TextSchedule("warmup:1ep cosine", 0.1 * hvd.size(), epochs=2, steps_per_epoch=3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(schedule)), loss, metrics=["accuracy"])
    generator = np.random.default_rng(rank)
    x, y = generator.random((24 - 4 * rank, 8), np.float32), generator.integers(0, 3, 24 - 4 * rank)
    held_out, labels = x[: 20 - 10 * rank], y[: 20 - 10 * rank]
    begin, average = hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()
    options = {"batch_size": 8, "epochs": 2, "validation_data": (held_out, labels), "verbose": 0}
    history = model.fit(x, y, callbacks=[begin, average], **options).history
    here = model.evaluate(held_out, labels, batch_size=8, verbose=0)
    sums = collectives.sum_float64(np.array([*here, 1.0]) * len(labels), "test.evaluated")
    seeds = [v for v in model.variables if v.name == "seed_generator_state"]
    return {
        "history": history,
        "evaluated": (sums[:-1] / sums[-1]).tolist(),
        "weights": digest([keras.ops.convert_to_numpy(v) for v in model.trainable_variables]),
        "seed": keras.ops.convert_to_numpy(seeds[0]).tolist(),
        "rates": [float(schedule(step)) for step in (0, 2, 5, 100)],
    }


def test_callbacks_begin_alike_and_report_all_examples(keras_world: KeptWorld) -> None:
    first, second = keras_world.run(fit_with_callbacks)
    assert first["weights"] == second["weights"]
    assert first["seed"] != second["seed"]
    assert first["history"] == second["history"]
    assert [first["history"][f"val_{name}"][-1] for name in ("loss", "accuracy")] == pytest.approx(
        first["evaluated"], rel=1e-5
    )
    assert first["rates"] == pytest.approx([0.05, 0.15, 0.2 * 0.25, 0.2 * 0.25], rel=1e-5)


def find_refusals(folder: str) -> dict[str, str]:
    """What is refused, and the messages; also saves a model and loads it again."""
    import keras

    import hvdtrain.keras as hvd
    from hvdtrain.system.errors import UserError

    rank = start_rank()
    found = {}

    def refused(name: str, call: Any) -> None:
        with pytest.raises(UserError) as caught:
            call()
        found[name] = str(caught.value)

    def fit(model: Any, *more: Any, rows: int = 32, **options: Any) -> None:
        x, y = make_examples(rank)
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), *more]
        model.fit(x[:rows], y[:rows], batch_size=8, shuffle=False, verbose=0, callbacks=callbacks, **options)

    training = Training()
    model = training.make_model()
    model.compile(hvd.DistributedOptimizer(training.make_optimizer()), "mse")
    fit(model)
    file = Path(folder) / f"{rank}.keras"
    model.save(file)
    plain, loaded = keras.saving.load_model(file), hvd.load_model(file)
    found["plain class"] = type(plain.optimizer).__module__ + type(plain.optimizer).__mro__[1].__module__
    found["steps"] = f"{int(plain.optimizer.iterations)} {int(loaded.optimizer.iterations)}"
    refused("twice", lambda: hvd.DistributedOptimizer(loaded.optimizer))
    copy = type(loaded.optimizer).from_config(loaded.optimizer.get_config())
    refused("copy", lambda: hvd.DistributedOptimizer(copy))
    refused("plain", lambda: fit(plain))
    refused("batches", lambda: fit(loaded, rows=32 - 16 * rank))
    unbuilt = keras.Sequential([keras.layers.Dense(3)])
    unbuilt.compile(hvd.DistributedOptimizer(training.make_optimizer()), "mse")
    if keras.backend.backend() == "tensorflow":
        refused("unbuilt", lambda: fit(unbuilt))
        compiled = training.make_model()
        compiled.compile(hvd.DistributedOptimizer(training.make_optimizer()), "mse", jit_compile=True)
        refused("jit", lambda: fit(compiled))
    elif keras.backend.backend() == "torch":  # builds a model before training begins, as JAX's does
        fit(unbuilt)
    schedule = hvd.callbacks.LearningRateScheduleCallback("linear")
    fit(loaded, schedule, epochs=2, initial_epoch=1)
    found["rate"] = f"{float(keras.ops.convert_to_numpy(loaded.optimizer.learning_rate)):.5f}"
    refused("schedule", lambda: fit(loaded, hvd.callbacks.LearningRateScheduleCallback("cosine")))
    found["weights"] = digest(loaded.get_weights())
    return found


def test_what_would_train_wrongly_is_refused(keras_world: KeptWorld, tmp_path: Path) -> None:
    first, second = keras_world.run(find_refusals, str(tmp_path))
    assert "hvdtrain" not in first["plain class"]
    assert first["steps"] == "4 4"
    assert "SGD is a DistributedOptimizer already" in first["twice"]
    assert first["copy"] == first["twice"]
    assert "compile it with hvdtrain.keras.DistributedOptimizer" in first["plain"]
    assert "2 batches in an epoch, rank 0 has 4" in second["batches"]
    assert first["batches"] == second["batches"]
    assert "begin it with keras.Input" in first.get("unbuilt", "begin it with keras.Input")
    assert "jit_compile=False" in first.get("jit", "jit_compile=False")
    assert first["rate"] == f"{0.05 / 8:.5f}"
    assert "a schedule already, TextSchedule" in first["schedule"]
    assert first["weights"] == second["weights"]
