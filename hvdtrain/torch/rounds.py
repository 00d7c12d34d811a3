"""Rounds of local steps: local SGD (Lin et al., 1808.07217) and DiLoCo (Douillard et al., 2311.08105).

    a          the anchor: all ranks' weights when the round began
    w_i        rank i's weights after its own steps; n_i the examples that it saw in them, N those of all ranks
    g          = sum_i n_i/N (a - w_i)      travels as gradients do: in the same buckets, compressed, with residuals
    v          = m v + g                    the outer momentum
    w_i, a    <- a - lr (g + m v)           the same bits on all ranks (the mean of the w_i with lr 1 and m 0)

When a rank of an elastic run is lost in a round, the others keep a, w_i and n_i, and N becomes the sum of theirs; a
newcomer has a as its w_i, and n_i = 0.

The state of each rank's own optimizer stays there; in a checkpoint all ranks take its mean, so that the run continues
as one that is resumed from it. What compression has not sent is in the units of gradients while these are exchanged,
and of weights in rounds: when that changes it is multiplied by the learning rate, as a step of plain SGD would be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.exchange.round_options import OuterStep
from hvdtrain.recipe.framework import RoundResult
from hvdtrain.system.errors import RunError
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.inner_state import average_optimizer_state
from hvdtrain.torch.optimized_loss import OptimizedLoss
from hvdtrain.torch.tensors import all_finite


class Rounds:
    """The rounds of a rank: what it changes between two of its exchanges.

    A local step is `start_step`, and `prepare_update` before each update; after any of them `exchange_changes` and
    `step_outer`.

    Attributes:
        carries_changes: whether what is carried from exchange to exchange is in the units of weights.
        step_examples: of the step, on this rank.
        nonfinite: of each update that this rank has left out in the round, why.
    """

    def __init__(self, losses: Sequence[OptimizedLoss], model: nn.Module, outer: OuterStep) -> None:
        self.losses, self.model, self.outer = losses, model, outer
        self.carries_changes = False
        self.step_examples = 0
        self.nonfinite: list[str] = []
        self._anchor: dict[nn.Parameter, Tensor] = {}  # of what this rank may have changed
        self._momentum: dict[str, Tensor] = {}  # v, by the parameters' names
        self._own_examples = self._steps = 0  # of the round, but for steps that all skip
        self._loss_sums: dict[str, float] = {}  # of those that took part
        self._trained: set[str] = set()  # losses that had a gradient on this rank
        self._states_differ = False  # of the ranks' optimizers
        self._has_changed_units = False  # in the step that was started last
        self._is_shared = False  # the state that is written is for ranks that join the open round

    # A local step.

    def start_step(self, is_local: bool) -> None:
        """Start a step, in which gradients stay on this rank or not."""
        self._has_changed_units = is_local != self.carries_changes
        if self._has_changed_units:
            for loss in self.losses:
                lr = float(loss.optimizer.param_groups[0]["lr"])
                loss.carried.scale(lr if is_local else 1 / lr if lr else 0.0)
            self.carries_changes = is_local

    def undo_step(self) -> None:
        """Be as before a step that was started and is not finished, as a rank was lost."""
        if self._has_changed_units:
            self.start_step(not self.carries_changes)
        self._has_changed_units = False

    def record_loss(self, loss: OptimizedLoss, total: float) -> None:
        """Record that a loss took part in a step, once its gradients are there. total: over the step's examples."""
        self._loss_sums[loss.name] = self._loss_sums.get(loss.name, 0.0) + abs(total)
        if loss.collect_gradients():
            self._trained.add(loss.name)

    @torch.no_grad()
    def prepare_update(self) -> bool:
        """Count a step and remember the parameters that it may change; return whether this rank makes an update."""
        own = self.step_examples
        self._own_examples, self._steps = self._own_examples + own, self._steps + 1
        self._states_differ = True
        if names := self._find_nonfinite():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.nonfinite.append(f"the gradient of {names[0]}{more} is not finite on rank {collectives.rank()}")
        if names or not own:
            return False
        for p in (p for loss in self.losses for p in loss.get_parameters()):
            if p not in self._anchor and (p.requires_grad or p.grad is not None):
                self._anchor[p] = p.detach().clone()
        return True

    def _find_nonfinite(self) -> list[str]:
        """Return the names of parameters whose gradient on this rank is not finite."""
        if all(all_finite(loss.collect_gradients()) for loss in self.losses):
            return []
        params = {p for loss in self.losses for p in loss.get_parameters() if p.grad is not None}
        odd = [name for name, p in self.model.named_parameters() if p in params and not all_finite([p.grad])]  # type: ignore[list-item]
        return odd or ["the sum"]

    # The end of a round.

    def exchange_changes(self) -> RoundResult:
        """Exchange what the ranks have changed. All ranks call it; it can be repeated if a rank is lost meanwhile.

        Raises:
            UserError: no rank's loss has depended on a parameter.
            RunError: the mean change is not finite.
        """
        trained, nonfinite, num_examples = self._compare_reports()
        for loss in (loss for loss in self.losses if loss.name in self._loss_sums):
            loss.gradient_watch.check_gradient(self._loss_sums[loss.name], loss.name in trained)
        share = self._own_examples / max(1, num_examples)
        for loss in self.losses:
            loss.optimizer.zero_grad(set_to_none=True)
            for p in loss.get_parameters():
                if p in self._anchor:
                    p.grad = (self._anchor[p] - p.detach()) * share
        for exchange in (loss.bucketed_exchange for loss in self.losses):
            if exchange is not None:
                exchange.wait_for_sums()  # of all losses, before the first one keeps what it has not sent
        waited = sum(finish_exchange(loss) for loss in self.losses)
        if not all(all_finite(loss.collect_gradients()) for loss in self.losses):
            raise RunError(
                "the change of the weights in a round of --local-steps is not finite: lower --lr, clip with --clip-norm"
            )
        return RoundResult(self._steps, waited, nonfinite)

    def _compare_reports(self) -> tuple[set[str], tuple[str, ...], int]:
        """Compare what the ranks have seen in the round.

        Returns:
            The losses of which some rank had a gradient, all ranks' texts in `nonfinite`, and the number of examples.
        """
        own = [sorted(self._trained), self.nonfinite, self._own_examples]
        trained, nonfinite, examples = zip(*collectives.gather_json(own, "round.reports"), strict=True)
        return (
            {name for names in trained for name in names},
            tuple(t for texts in nonfinite for t in texts),
            sum(examples),
        )

    @torch.no_grad()
    def step_outer(self) -> None:
        """Make the outer step with the changes that were exchanged, and let the next round begin."""
        names = {p: name for name, p in self.model.named_parameters()}
        for loss in self.losses:
            if loss.bucketed_exchange is None and self.outer.is_average:
                continue  # of one rank
            for p in loss.get_parameters():
                gradient, start = p.grad, self._anchor.get(p, p.detach())
                if gradient is None:
                    continue
                if self.outer.momentum:
                    v = self._momentum.setdefault(names[p], torch.zeros_like(gradient))
                    v.mul_(self.outer.momentum).add_(gradient)
                    gradient = gradient + self.outer.momentum * v
                p.copy_(start - self.outer.lr * gradient)
        self.forget_round()

    def forget_round(self) -> None:
        """Let the next round begin, from the weights as they are."""
        for loss in self.losses:
            loss.optimizer.zero_grad(set_to_none=True)
        self._anchor.clear()
        self._loss_sums.clear()
        self._trained.clear()
        self.nonfinite = []
        self._own_examples = self._steps = 0

    # In an elastic run.

    @contextlib.contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Let the parameters be the anchor, and the state that of the open round, for ranks that join it."""
        own = {p: p.detach().clone() for p in self._anchor}
        try:
            self._set_parameters(self._anchor)
            self._is_shared = True
            yield
        finally:
            self._is_shared = False
            self._set_parameters(own)

    @torch.no_grad()
    def _set_parameters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        for p, value in values.items():
            p.copy_(value)

    def rejoin_round(self, state: StateDict | None) -> None:
        """Continue the open round in another world. state: of the rank that is farthest."""
        if not self.carries_changes:
            self.start_step(is_local=True)
        self._steps = (state or {}).get("steps", 0)
        self._states_differ, self._has_changed_units = True, False

    # The state.

    def average_states(self) -> None:
        """Give all ranks' optimizers the mean of their states; all ranks call it."""
        if self._states_differ and collectives.size() > 1:
            for loss in self.losses:
                average_optimizer_state(loss.optimizer, loss.name)
        self._states_differ = False

    def to_state(self) -> StateDict | None:
        """Return what a checkpoint holds of rounds; None before the first."""
        if not self.carries_changes:
            return None
        return {"momentum": self._momentum, **({"steps": self._steps} if self._is_shared else {})}

    def load_state(self, state: StateDict | None) -> None:
        """Load it."""
        self.forget_round()
        self._steps = (state or {}).get("steps", 0)
        self.carries_changes, self._states_differ = state is not None, "steps" in (state or {})
        self._has_changed_units = False
        self._momentum = dict(state["momentum"]) if state is not None and self.outer.momentum else {}


def finish_exchange(loss: OptimizedLoss) -> float:
    """Let the parameters' gradients be their sums over ranks; return the seconds that this rank waited."""
    if loss.bucketed_exchange is None:
        return 0.0
    loss.bucketed_exchange.finish_exchange()
    loss.steps += 1
    loss.optimizer.wire_bytes = loss.bucketed_exchange.wire_bytes
    return loss.bucketed_exchange.waited
