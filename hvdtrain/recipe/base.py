"""What a recipe is, for every framework: a dataclass whose fields are its command-line options, and four methods."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from hvdtrain.recipe.now import Now
from hvdtrain.recipe.options import option
from hvdtrain.system.errors import UserError, suggest_nearest

if TYPE_CHECKING:
    # launch looks into files before it starts anything: it needs no numpy for that.
    from numpy.typing import NDArray

    from hvdtrain.recipe.metrics import MetricMeans

FRAMEWORK_NAMES = ("torch", "jax", "keras")  # those of hvdtrain's own; FRAMEWORKS has other packages' too, loaded
FRAMEWORK_RECIPES = tuple(f"hvdtrain.{name}.Recipe" for name in FRAMEWORK_NAMES)

ReturnedMetrics: TypeAlias = Mapping[str, Any]  # by name: a number, or a vector (k,) of numbers
StateValues: TypeAlias = dict[str, Any]  # by name: JSON values and tensors, nested


@dataclass(kw_only=True)
class Recipe:
    """A model, its data, its optimizer and its score.

    A framework's Recipe (FRAMEWORK_RECIPES) adds the methods. Subclass that, with `@dataclass(kw_only=True)`; a field
    that is overridden keeps its help text.
    """

    framework: ClassVar[str] = ""
    # The field that it is of, under which `hvdtrain list` shows it, such as "vision" or "text".
    domain: ClassVar[str] = ""
    # The metric of the evaluation by which the best checkpoint is kept.
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("loss", "min")
    # The evaluation sets, by the names that `dataset` is called with; () for none.
    evals: ClassVar[tuple[str, ...]] = ("eval",)

    epochs: int = option(10, "passes over the training examples", at_least=1, section="Data")
    batch_size: int = option(
        64, "examples per step over all ranks together, on any number of ranks", at_least=1, section="Data"
    )
    lr: float = option(0.1, "learning rate, before the schedule", section="Optimization")
    schedule: str = option(
        "constant",
        "learning-rate schedule, e.g. 'warmup:5ep cosine', 'step:30ep,60ep x0.1', 'plateau:3 x0.5', 'onecycle', "
        "'cosine restarts:10ep x2', 'invsqrt:4000', 'linear', 'constant'",
        section="Optimization",
    )

    @property
    def now(self) -> Now:
        """Where the training is; in `model`, `dataset` and `optimizer` only `folder`, `rank` and `size` are known."""
        try:
            return vars(self)["now"]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"{type(self).__name__}.now is known in a training only") from None

    def metrics(self, means: MetricMeans) -> ReturnedMetrics:
        """Return metrics that are functions of exact means, such as F1 or perplexity; they are added to the means.

        It is called on all ranks, for evaluations and for each row of metrics.jsonl. A name of `means` is replaced. A
        value is a number, or a vector (k,), which is neither printed nor plotted. What is not finite becomes null.

        Args:
            means: of each score the mean over all examples, a numpy.float64, or float64 (k,) of a score (B, k).
        """
        return {}

    def summarise(self, outputs: dict[str, NDArray[Any]]) -> ReturnedMetrics:
        """Return metrics of an evaluation that need all its examples at once, such as an exact area under the curve.

        It is called on rank 0, after each evaluation; what it returns is added to the metrics on all ranks, as that of
        `metrics` is. `best` may name one.

        Args:
            outputs: numpy arrays (examples, ...) by name, example i in row i: of the method `outputs`, or of `score`.
        """
        return {}

    def lr_factor(self, now: Now) -> float:
        """Return what multiplies the learning rate of the step to come; defined instead of `schedule`, not with it.

        It is called on all ranks and must return the same, a finite number from 0 on. now: the same as `self.now`.
        """
        raise NotImplementedError

    def state(self) -> StateValues:
        """Return what the recipe remembers besides the model: JSON values and tensors, by name.

        It is saved with each checkpoint as rank 0 has it, and given to `load_state`.
        """
        return {}

    def load_state(self, state: StateValues) -> None:
        """Take over what `state` has returned: on all ranks after a resume, or when ranks were lost or have joined.

        state: its tensors lie on the CPU.
        """

    def evaluated(self, model: Any, metrics: dict[str, Any]) -> bool:
        """Return whether the training ends here, finished and saved: to stop early, or to give up a bad trial.

        It is called on all ranks after each evaluation, and must return the same on all.

        Args:
            model: as it was evaluated: with --ema the average; in evaluation mode.
            metrics: those of the evaluation, the same on all ranks; of other sets than the first as "test/loss". What
                is not finite is NaN.
        """
        return False

    def logged(self, row: dict[str, Any]) -> None:
        """Take a row of metrics.jsonl, on rank 0, as it was written: for a tracker of experiments.

        If it raises, the error is printed as a warning and it is not called again. After a resume, rows of steps that
        were undone come again.
        """


def is_overridden(recipe: Recipe, name: str) -> bool:
    """Return whether a recipe defines a method that every recipe has, so that calling it makes a difference."""
    first = next(cls for cls in reversed(type(recipe).__mro__) if issubclass(cls, Recipe) and name in vars(cls))
    return getattr(type(recipe), name) is not getattr(first, name)


def refuse_two_schedules(cls: type[Recipe], schedule: str) -> None:
    """Raise UserError if a recipe that sets its learning rate by `lr_factor` is given a schedule too."""
    if cls.lr_factor is not Recipe.lr_factor:
        raise UserError(
            f"--schedule {schedule!r}, but {cls.__name__}.lr_factor sets the learning rate: leave out one of them"
        )


def check_methods(cls: type[Recipe]) -> None:
    """Raise UserError if a recipe lacks a method that its framework's Recipe declares abstract, or `evals` is wrong."""
    check_evals(cls)
    if (cls.state is Recipe.state) != (cls.load_state is Recipe.load_state):
        has, lacks = ("load_state", "state") if cls.state is Recipe.state else ("state", "load_state")
        raise UserError(f"{cls.__name__} has a method {has} and no {lacks}: a recipe that remembers needs both")
    for name in dir(cls):
        method = inspect.getattr_static(cls, name, None)  # getattr would give a class without fields `__annotations__`
        if getattr(method, "__isabstractmethod__", False):
            arguments = ", ".join(inspect.signature(method).parameters)
            raise UserError(f"{cls.__name__} has no method {name}({arguments}), which a recipe needs: define it")


def check_split(recipe: Recipe, split: str) -> None:
    """Raise UserError, with the nearest name, unless a split is "train" or one of the recipe's `evals`."""
    splits = ("train", *recipe.evals)
    if split not in splits:
        raise UserError(f"{type(recipe).__name__} has no split {split!r}{suggest_nearest(split, splits)}")


def check_evals(cls: type[Recipe]) -> None:
    """Raise UserError unless `evals` is a tuple of names, each once, none of them a prefix of other columns.

    The metrics of the first set are columns `eval_loss`, whatever its name; those of a set "test" are `test_loss`.
    """
    evals, expected = cls.evals, "expected a tuple of names, for example ('eval', 'test')"
    if not isinstance(evals, (tuple, list)) or not all(isinstance(name, str) for name in evals):
        raise UserError(f"{cls.__name__}.evals is {evals!r}; {expected}")
    for i, name in enumerate(evals):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in ("train", "speed"):
            raise UserError(f"{cls.__name__}.evals: {name!r} cannot be the name of an evaluation set; {expected}")
        if name in evals[:i]:
            raise UserError(f"{cls.__name__}.evals has {name!r} twice; {expected}")
        if name == "eval" and i > 0:
            raise UserError(f"{cls.__name__}.evals: 'eval' comes first, as columns eval_* are those of the first set")
