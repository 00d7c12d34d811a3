"""Where in a run a state belongs, and how that is read back from a checkpoint's meta.json."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hvdtrain.recipe import order
from hvdtrain.recipe.metrics import MetricValue
from hvdtrain.recipe.ranges import Ranges, subtract_ranges
from hvdtrain.system.errors import UserError
from hvdtrain.system.strict_json import check_count, check_entries, check_finite_number

# Fields that meta.json of the format "hvdtrain checkpoint 1" may lack.
FIELDS_SINCE_FORMAT_1 = (
    *("eval", "evaluated", "saved", "examples", "seed", "rows", "order_version", "first_examples"),
)
# Fields that came after the format "hvdtrain checkpoint 2", which may lack them.
FIELDS_SINCE_FORMAT_2 = (
    *("evals", "order", "division", "best_value", "since_best", "since_drop", "lr_drops", "ended"),
    *("skipped", "score_layout", "row_sums", "row_examples", "row_skipped", "shares", "owed"),
)


@dataclass
class Position:
    """Where in a run a state belongs: after `step` steps, with example `offset` of epoch `epoch`'s order to come."""

    step: int = 0
    epoch: int = 0
    offset: int = 0
    samples: int = 0
    epoch_loss_sum: float = 0.0  # over the epoch's examples so far, without skipped steps
    epoch_loss_count: float = 0.0  # what that is divided by: examples, or the loss's own denominators
    train_loss: float = 0.0  # mean over the current, or else the last, epoch's examples so far
    skipped_nonfinite: int = 0
    skipped: int = 0  # steps that did not update the model, for whatever reason
    score_layout: str = ""  # hvdtrain.recipe.metrics.ScoreLayout.describe() of the sums
    row_sums: list[float] = field(default_factory=list)  # of scores since the last row, without skipped steps; []: none
    row_examples: int = 0  # of these steps
    row_skipped: int = 0  # steps since the last row that did not update the model
    eval: dict[str, MetricValue] = field(default_factory=dict)  # of the last evaluation; NaN for what was not finite
    evals: dict[str, dict[str, MetricValue]] = field(default_factory=dict)  # of each evaluation set but the first
    evaluated: int = 0  # the step after which that was
    best_value: float | None = None  # of the recipe's `best`, over all evaluations
    since_best: int = 0  # evaluations since then
    since_drop: int = 0  # the same, or since the schedule "plateau" has last lowered the learning rate
    lr_drops: int = 0  # how often it has
    ended: str = ""  # why the training ends here, before its last step; "": it does not
    saved: int = 0  # the step of the last checkpoint
    examples: int = 0  # of an epoch; with the seed, what the order is drawn from
    seed: int = 0
    rows: int | None = 0  # of metrics.jsonl so far; None: unknown, of an hvdtrain that did not count them
    order_version: int = 1  # of hvdtrain.recipe.order, that drew it; 1 also if it was not written
    first_examples: dict[str, str] = field(default_factory=dict)  # hashes of some of its examples; {}: not known
    division: str = ""  # what the ranks' parts of a divided stream depend on
    shares: str = ""  # of the batch by rank, of the step to come: "683:341" of 1,024; "": even
    order: str = ""  # the key of what the recipe's sampler gave for the epoch; "": the epoch is shuffled
    owed: Ranges = field(default_factory=list)  # before `offset`, but lost with a rank: the next steps are made of them

    @property
    def is_epoch_over(self) -> bool:
        """Whether the epoch has nothing left, though it may not have been ended yet."""
        return self.offset == self.examples and not self.owed

    def all_metrics(self) -> dict[str, MetricValue]:
        """Return the metrics of the last evaluation: of the first set by their names, of others as "test/loss"."""
        return join_metrics(self.eval, self.evals)

    def set_example_order(self, examples: int, seed: int) -> None:
        """Set the order of examples to that of `examples` examples and a seed.

        Raises UserError in mid-epoch if it was begun in another order: some examples would come twice, others never.
        """
        if self.offset and self.order_version != order.ORDER_VERSION:
            raise UserError(
                f"cannot resume at example {self.offset} of an epoch that another version of hvdtrain has shuffled "
                "differently; resume from a checkpoint at the end of an epoch, or with that version"
            )
        if self.offset and (examples, seed) != (self.examples, self.seed):
            raise UserError(
                f"cannot resume at example {self.offset} of an epoch: it began with {self.examples} examples (--seed "
                f"{self.seed}), the data now has {examples} (--seed {seed}); use the original data and seed"
            )
        self.examples, self.seed, self.order_version = examples, seed, order.ORDER_VERSION

    def set_score_layout(self, layout: str) -> None:
        """Forget sums of other scores: those of a run that is resumed with a changed recipe."""
        if self.score_layout and self.score_layout != layout:
            self.start_row()
            self.epoch_loss_sum = self.epoch_loss_count = 0.0
        self.score_layout = layout

    def start_row(self) -> None:
        """Let the sums of the next row of metrics.jsonl begin."""
        self.row_sums, self.row_examples, self.row_skipped = [], 0, 0

    def add_to_row(self, sums: list[float], count: int) -> None:
        """Add a step's sums of scores over `count` examples to those since the last row."""
        self.row_sums = [total + one for total, one in zip(self.row_sums, sums, strict=True)] if self.row_sums else sums
        self.row_examples += count

    def advance_past_step(self, count: int, loss: tuple[float, float] | None, owed: Ranges | None = None) -> None:
        """Move past a step; `end_epoch` follows.

        Args:
            count: its examples.
            loss: the sum of its losses, and what that is divided by; None: the step is not counted in losses.
            owed: what it was made of, if that was owed.
        """
        self.step += 1
        self.samples += count
        if owed:
            self.owed = subtract_ranges(self.owed, owed)
        else:
            self.offset += count
        if loss is not None:
            self.epoch_loss_sum += loss[0]
            self.epoch_loss_count += loss[1]
            self.train_loss = self.epoch_loss_sum / self.epoch_loss_count

    def end_epoch(self) -> None:
        """Let the next epoch begin, if this one is over."""
        if self.is_epoch_over:
            self.epoch, self.offset, self.epoch_loss_sum, self.epoch_loss_count = self.epoch + 1, 0, 0.0, 0.0
            self.order = ""


def join_metrics(
    first: Mapping[str, MetricValue], others: Mapping[str, Mapping[str, MetricValue]]
) -> dict[str, MetricValue]:
    """Return the metrics of all evaluation sets: of the first by their names, of others as "test/loss"."""
    joined = {f"{name}/{key}": value for name, metrics in others.items() for key, value in metrics.items()}
    return {**first, **joined}


def parse_position(content: Any, allow_missing: tuple[str, ...] = ()) -> Position:
    """Return a Position from JSON. Raises ValueError for a missing, unknown or invalid field."""
    known = {field.name: field.type for field in fields(Position)}
    if isinstance(content, dict):
        known = {name: kind for name, kind in known.items() if name in content or name not in allow_missing}
    values: dict[str, object] = {}
    for name, value in check_entries(content, "position.", *known).items():
        kind, where = known[name], f"position.{name}"
        if kind == "int" or (kind == "int | None" and value is not None):
            values[name] = check_count(value, where)
        elif kind == "float" or (kind == "float | None" and value is not None):
            values[name] = check_finite_number(value, where)
        elif kind == "str":
            if not isinstance(value, str):
                raise ValueError(f"has {reprlib.repr(value)} as {where}; expected a string")
            values[name] = value
        elif kind == "list[float]":
            if not isinstance(value, list):
                raise ValueError(f"has no list {where!r}")
            values[name] = [_parse_metric_number(one, where) for one in value]
        elif kind == "Ranges":
            values[name] = _parse_ranges(value, where)
        elif kind == "dict[str, str]":
            if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
                raise ValueError(f"has no object of texts {where!r}")
            values[name] = value
        elif kind == "dict[str, MetricValue]":
            values[name] = _parse_metrics(value, where)
        elif kind == "dict[str, dict[str, MetricValue]]":
            if not isinstance(value, dict):
                raise ValueError(f"has no object {where!r}")
            values[name] = {key: _parse_metrics(one, f"{where}.{key}") for key, one in value.items()}
        elif kind in ("int | None", "float | None"):
            values[name] = None
        else:
            raise AssertionError(f"{where} of type {kind} cannot be read back")
    if "rows" not in values:
        values["rows"] = None
    return Position(**values)  # type: ignore[arg-type]


def _parse_ranges(content: Any, where: str) -> Ranges:
    """Return ranges of positions from JSON. Raises ValueError for anything else."""
    if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise ValueError(f"has no list of ranges {where!r}")
    ranges = [[check_count(place, where) for place in pair] for pair in content]
    places = [place for pair in ranges for place in pair]
    if places != sorted(set(places)):
        raise ValueError(f"has {reprlib.repr(content)} as {where}; expected sorted, disjoint ranges")
    return ranges


def _parse_metrics(content: Any, where: str) -> dict[str, MetricValue]:
    """Return metrics from JSON. Raises ValueError for anything else."""
    if not isinstance(content, dict):
        raise ValueError(f"has no object {where!r}")
    return {key: parse_metric_value(one, where) for key, one in content.items()}


def parse_metric_value(value: object, where: str) -> MetricValue:
    """Return a metric from JSON, NaN for each number that was not finite. Raises ValueError for anything else."""
    if isinstance(value, list):
        return [_parse_metric_number(one, where) for one in value]
    return _parse_metric_number(value, where)


def _parse_metric_number(value: object, where: str) -> float:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return math.nan
    return check_finite_number(value, where)
