"""Callbacks for `model.fit` on several ranks, by the names that scripts for horovod.keras use.

BroadcastGlobalVariablesCallback    all begin with the root's variables, and with as many batches
MetricAverageCallback               metrics of all ranks' examples; put it before callbacks that use metrics
LearningRateScheduleCallback        a schedule of hvdtrain
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import ConsistentPart, check_agreement
from hvdtrain.keras.optimizer import is_distributed
from hvdtrain.keras.schedules import TextSchedule
from hvdtrain.keras.variables import broadcast_variables
from hvdtrain.system.errors import UserError

Logs = dict[str, float]
FIT_LENGTHS = {"epochs": "epochs", "steps": "batches in an epoch"}  # of a callback's params


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Overwrites the variables of the model and its optimizer with the root's when training begins.

    Variables of random generators, as of Dropout, stay each rank's own.

    Raises, from `model.fit` on all ranks:
        UserError: the optimizer is not a DistributedOptimizer, the model has no variables yet, or ranks differ in
            variables, epochs or batches of an epoch.
    """

    def __init__(self, root_rank: int = 0) -> None:
        """root_rank: whose variables all ranks get."""
        super().__init__()
        self.root_rank = root_rank

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Compare the ranks and broadcast."""
        if collectives.size() == 1:
            return
        model, optimizer = self.model, self.model.optimizer
        if not is_distributed(optimizer):
            raise UserError(
                f"this model would train on each rank alone: its optimizer is a plain {type(optimizer).__name__}; "
                "compile it with hvdtrain.keras.DistributedOptimizer(optimizer)"
            )
        if not model.built or not model.variables:
            raise UserError(
                "the model has no variables to broadcast yet: begin it with keras.Input(shape), or call it on a batch "
                "before model.fit"
            )
        lengths = {what: str(self.params.get(name)) for name, what in FIT_LENGTHS.items()}
        message = (
            "{who}: model.fit has {here} {key}, {base} has {there}, and would wait for the other for ever: give all "
            "ranks the same, for instance by steps_per_epoch"
        )
        check_agreement("keras.fit", [ConsistentPart("lengths", lengths, message)])
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        broadcast_variables([*model.variables, *optimizer.variables], self.root_rank)


class LearningRateScheduleCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Gives the optimizer the learning rates of a schedule of hvdtrain when training begins.

    The optimizer computes them itself, from its own count of steps (`TextSchedule`): what a callback changes within an
    epoch, a compiled step on JAX does not see. A training that is continued, with `initial_epoch`, continues where the
    schedule was.

    Raises, from `model.fit`:
        UserError: the number of batches is not known, the learning rate is another schedule already, or the text is not
            a schedule.
    """

    def __init__(self, text: str) -> None:
        """text: such as "warmup:5ep cosine" (`hvdtrain.recipe.schedule`), of which 1 is the optimizer's rate."""
        super().__init__()
        self.text = text

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Replace the optimizer's learning rate."""
        optimizer, steps, epochs = self.model.optimizer, self.params.get("steps"), self.params["epochs"]
        current = getattr(optimizer, "inner_optimizer", optimizer)._learning_rate
        if isinstance(current, TextSchedule) and current.text == self.text:
            rate = current.learning_rate
        elif isinstance(current, keras.Variable):
            rate = float(keras.ops.convert_to_numpy(current))
        else:
            raise UserError(
                f"the learning rate is a schedule already, {type(current).__name__}: make the optimizer with a number, "
                "or leave LearningRateScheduleCallback out"
            )
        if steps is None:
            raise UserError("LearningRateScheduleCallback needs the number of batches: call fit(..., steps_per_epoch=)")
        optimizer.learning_rate = TextSchedule(self.text, rate, epochs=epochs, steps_per_epoch=steps)
        self.model.make_train_function(force=True)  # one that has been compiled knows another learning rate


@dataclass(frozen=True)
class EpochMetrics:
    """The metrics of a model after its batches of an epoch."""

    local: Logs  # of this rank's examples
    total: Logs  # of all ranks'
    examples: float  # of this rank, as the loss counts them


class MetricAverageCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Replaces the metrics of an epoch by those of all ranks' examples, however many each rank had.

    The states of Keras's metrics are sums and counts, which are added over ranks before the metric is computed. That is
    exact for means (loss, accuracy) and for what is computed from counts (Precision, AUC, IoU). What else an epoch
    reports is averaged, weighted by the ranks' numbers of examples.
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_epoch = False
        self._trained: EpochMetrics | None = None  # once it is known
        self._validated: EpochMetrics | None = None

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Forget the last epoch."""
        self._in_epoch, self._trained, self._validated = True, None, None

    def on_test_begin(self, logs: Logs | None = None) -> None:
        """Take the metrics of training before validation resets them."""
        if self._in_epoch:
            self._trained = sum_metrics(self.model)

    def on_test_end(self, logs: Logs | None = None) -> None:
        """Take the metrics of validation."""
        if self._in_epoch:
            self._validated = sum_metrics(self.model)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Replace this rank's metrics in `logs`, which callbacks after this one get, too."""
        self._in_epoch = False
        trained = self._trained or sum_metrics(self.model)
        if logs is not None and collectives.size() > 1:
            logs.update(combine_logs(logs, trained, self._validated or trained))


def sum_metrics(model: keras.Model) -> EpochMetrics:
    """Return a model's metrics, of this rank and of all; all ranks call it."""
    local = read_metrics(model)
    counts = [metric.count for metric in model.metrics if metric.name == "loss" and hasattr(metric, "count")]
    examples = float(keras.ops.convert_to_numpy(counts[0])) if counts else 0.0
    variables = model.metrics_variables
    own = [keras.ops.convert_to_numpy(variable) for variable in variables]
    flat = np.concatenate([np.asarray(array, np.float64).reshape(-1) for array in own] or [np.zeros(0)])
    total = collectives.sum_float64(flat, "keras.metrics")
    begin = 0
    for variable, array in zip(variables, own, strict=True):
        variable.assign(total[begin : begin + array.size].reshape(array.shape).astype(array.dtype))
        begin += array.size
    try:
        return EpochMetrics(local, read_metrics(model), examples)
    finally:
        for variable, array in zip(variables, own, strict=True):
            variable.assign(array)


def read_metrics(model: keras.Model) -> Logs:
    """Return a model's metrics by name, as an epoch reports them; those that are one number."""
    results = {name: keras.ops.convert_to_numpy(value) for name, value in model.get_metrics_result().items()}
    return {name: float(value) for name, value in results.items() if value.size == 1}


def combine_logs(logs: Logs, trained: EpochMetrics, validated: EpochMetrics) -> Logs:
    """Return what replaces numbers of this rank's epoch; all ranks call it, with the same names.

    Args:
        logs: what the epoch reports.
        trained: the metrics of its training.
        validated: those of its validation, whose names in `logs` begin with "val_".
    """
    names = sorted(name for name, value in logs.items() if isinstance(value, float))
    sources = [(validated, name[4:]) if name.startswith("val_") else (trained, name) for name in names]
    # Without examples, as if `train_step` reports what it likes, all ranks count alike.
    weights = np.array([source.examples or 1e-9 for source, _ in sources])
    values = np.array([logs[name] for name in names])
    sums = collectives.sum_float64(np.concatenate([values * weights, weights]), "keras.logs")
    combined = dict(zip(names, (sums[: len(names)] / sums[len(names) :]).tolist(), strict=True))
    for name, (source, metric) in zip(names, sources, strict=True):
        if metric in source.local and np.array_equal(source.local[metric], logs[name], equal_nan=True):
            combined[name] = source.total[metric]
    return combined
