"""Rounds of local steps: local SGD (Lin et al., 1808.07217) and DiLoCo (Douillard et al., 2311.08105).

    a          the anchor: all ranks' weights when the round began
    w_i        rank i's weights after its own steps; n_i the examples that it saw in them, N those of all ranks
    g          = sum_i n_i/N (a - w_i)      travels as gradients do: in the same buckets, compressed, with residuals
    v          = m v + g                    the outer momentum
    w_i, a    <- a - lr (g + m v)           the same bits on all ranks (the mean of the w_i with lr 1 and m 0)

The state of each rank's own optimizer stays there; in a checkpoint all ranks take its mean, so that the run continues
as one that is resumed from it. What compression has not sent is in the units of gradients while these are exchanged,
and of weights in rounds: when that changes it is multiplied by the learning rate, as a step of plain SGD would be.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    A local step is `start_step`, and `prepare_update` before each update; `end_round` after any of them.

    Attributes:
        carries_changes: whether what is carried from exchange to exchange is in the units of weights.
        step_examples: of the step, on this rank and on all.
        nonfinite: of each update that this rank has left out in the round, why.
    """

    def __init__(self, losses: Sequence[OptimizedLoss], model: nn.Module, outer: OuterStep) -> None:
        self.losses, self.model, self.outer = losses, model, outer
        self.carries_changes = False
        self.step_examples = (0, 0)
        self.nonfinite: list[str] = []
        self._anchor: dict[nn.Parameter, Tensor] = {}  # of what this rank may have changed
        self._momentum: dict[str, Tensor] = {}  # v, by the parameters' names
        self._own_examples = self._all_examples = self._steps = 0  # of the round, but for steps that all skip
        self._loss_sums: dict[str, float] = {}  # of those that took part
        self._trained: set[str] = set()  # losses that had a gradient on this rank
        self._states_differ = False  # of the ranks' optimizers

    # A local step.

    def start_step(self, is_local: bool) -> None:
        """Start a step, in which gradients stay on this rank or not."""
        if is_local != self.carries_changes:
            for loss in self.losses:
                lr = float(loss.optimizer.param_groups[0]["lr"])
                loss.carried.scale(lr if is_local else 1 / lr if lr else 0.0)
            self.carries_changes = is_local

    def record_loss(self, loss: OptimizedLoss, total: float) -> None:
        """Record that a loss took part in a step, once its gradients are there. total: over the step's examples."""
        self._loss_sums[loss.name] = self._loss_sums.get(loss.name, 0.0) + abs(total)
        if loss.collect_gradients():
            self._trained.add(loss.name)

    @torch.no_grad()
    def prepare_update(self) -> bool:
        """Count a step and remember the parameters that it may change; return whether this rank makes an update."""
        own, count = self.step_examples
        self._own_examples, self._all_examples, self._steps = (
            self._own_examples + own,
            self._all_examples + count,
            self._steps + 1,
        )
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

    def end_round(self) -> RoundResult:
        """Exchange what the ranks have changed, and make the outer step. All ranks call it.

        Raises:
            UserError: no rank's loss has depended on a parameter.
            RunError: the mean change is not finite.
        """
        trained, nonfinite = self._compare_reports()
        for loss in (loss for loss in self.losses if loss.name in self._loss_sums):
            loss.gradient_watch.check_gradient(self._loss_sums[loss.name], loss.name in trained)
        share = self._own_examples / max(1, self._all_examples)
        for loss in self.losses:
            loss.optimizer.zero_grad(set_to_none=True)
            for p in loss.get_parameters():
                if p in self._anchor:
                    p.grad = (self._anchor[p] - p.detach()) * share
        waited = sum(exchange_changes(loss) for loss in self.losses)
        if not all(all_finite(loss.collect_gradients()) for loss in self.losses):
            raise RunError(
                "the change of the weights in a round of --local-steps is not finite: lower --lr, clip with --clip-norm"
            )
        self._step_outer()
        steps = self._steps
        self.forget_round()
        return RoundResult(steps, waited, nonfinite)

    def _compare_reports(self) -> tuple[set[str], tuple[str, ...]]:
        """Return the losses of which some rank had a gradient in the round, and all ranks' texts in `nonfinite`."""
        reports = collectives.gather_json([sorted(self._trained), self.nonfinite], "round.reports")
        return {name for names, _ in reports for name in names}, tuple(text for _, texts in reports for text in texts)

    @torch.no_grad()
    def _step_outer(self) -> None:
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

    def forget_round(self) -> None:
        """Let the next round begin, from the weights as they are."""
        for loss in self.losses:
            loss.optimizer.zero_grad(set_to_none=True)
        self._anchor.clear()
        self._loss_sums.clear()
        self._trained.clear()
        self.nonfinite = []
        self._own_examples = self._all_examples = self._steps = 0

    # The state, between two rounds.

    def average_states(self) -> None:
        """Give all ranks' optimizers the mean of their states; all ranks call it."""
        if self._states_differ and collectives.size() > 1:
            for loss in self.losses:
                average_optimizer_state(loss.optimizer, loss.name)
        self._states_differ = False

    def to_state(self) -> StateDict | None:
        """Return what a checkpoint holds of rounds; None before the first."""
        return {"momentum": self._momentum} if self.carries_changes else None

    def load_state(self, state: StateDict | None) -> None:
        """Load it."""
        self.forget_round()
        self.carries_changes, self._states_differ = state is not None, False
        self._momentum = dict(state["momentum"]) if state is not None and self.outer.momentum else {}


def exchange_changes(loss: OptimizedLoss) -> float:
    """Sum what is in the parameters' gradients over ranks; return the seconds that this rank waited."""
    if loss.bucketed_exchange is None:
        return 0.0
    loss.bucketed_exchange.finish_exchange()
    loss.steps += 1
    loss.optimizer.wire_bytes = loss.bucketed_exchange.wire_bytes
    return loss.bucketed_exchange.waited
