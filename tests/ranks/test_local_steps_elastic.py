"""Losses in rounds of local steps: nobody rolls back, each epoch visits each example once, and the weights are those
of the same rounds computed in one process, in float64.
"""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdtrain.recipe import order
from hvdtrain.recipe.framework import DataSource
from hvdtrain.system.errors import UserError
from hvdtrain.training.streams import refuse_unnumbered_rounds
from tests.ranks.elastic import LEASE, ElasticJob, losses
from tests.ranks.harness import HVDTRAIN
from tests.ranks.local_recipes import BATCH, EXAMPLES, Curve, average_momentum
from tests.ranks.test_local_steps import assert_same_tensors, read_state
from tests.support.worlds import KeptWorld, train

LOSSY = f"{Path(__file__).parent / 'lossy_recipe.py'}:Lossy"
JAX = f"{Path(__file__).parent / 'jax_digits_recipes.py'}:SlowDigits"
COMPARED = 10  # steps after which --diagnose compares the replicas, which ends a round


@dataclass
class Replica:
    """What a rank has."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    own: list[int] = field(default_factory=list)  # places of the epoch's order, of this round

    def train(self, recipe: Curve, data: Sequence[Tensor], places: list[int], ids: Any) -> None:
        """Make a local step of some places."""
        self.own += places
        if places:
            part = torch.from_numpy(ids[places])
            self.optimizer.zero_grad()
            recipe.score(self.net, [column[part] for column in data])["loss"].mean().backward()
            self.optimizer.step()


@dataclass
class LossyRounds:
    """The rounds of a run whose ranks are lost as scripted, one step after the other."""

    recipe: Curve
    ranks: int
    local_steps: int
    kills: dict[int, str]  # by step: the ranks that die in it, and where
    outer: tuple[float, float] = (1.0, 0.0)
    lost: int = 0  # examples

    def train(self) -> dict[str, Tensor]:
        """Return the parameters at the end."""
        self.alive = [Replica(net, self.recipe.optimizer(net.parameters())) for net in self.make_nets()]
        self.anchor = self.copy_weights(self.alive[0])
        self.velocity = [torch.zeros_like(value) for value in self.anchor]
        data, self.step, self.steps_of_round = self.recipe.dataset("train").tensors, 0, 0
        for epoch in range(self.recipe.epochs):
            ids = order.SampleOrder(EXAMPLES, 0, epoch).ids_between(0, EXAMPLES)
            self.owed, self.fed, self.next = list[int](), set[int](), 0
            while self.owed or self.next < EXAMPLES:
                if (self.step + 1, "") in self.script:
                    self.lose(self.script.pop((self.step + 1, "")))
                    continue
                self.make_step(data, ids)
                if self.is_over():
                    self.end_round()
            average_momentum([one.net for one in self.alive], [one.optimizer for one in self.alive])  # a checkpoint
        return {name: p.detach() for name, p in self.alive[0].net.named_parameters()}

    def make_nets(self) -> list[nn.Module]:
        self.script = {(step, where.partition(".")[2]): where.partition(".")[0] for step, where in self.kills.items()}
        return [self.recipe.model() for _ in range(self.ranks)]

    def make_step(self, data: Sequence[Tensor], ids: Any) -> None:
        if self.owed:
            batch, self.owed = self.owed[:BATCH], self.owed[BATCH:]
        else:
            batch = list(range(self.next, min(self.next + BATCH, EXAMPLES)))
            self.next += len(batch)
        for rank, replica in enumerate(self.alive):
            replica.train(self.recipe, data, batch[slice(*order.part_bounds(len(batch), rank, len(self.alive)))], ids)
        self.fed |= set(batch)
        self.step, self.steps_of_round = self.step + 1, self.steps_of_round + 1

    def is_over(self) -> bool:
        is_due = self.steps_of_round == self.local_steps or self.step % COMPARED == 0
        return is_due or (self.next == EXAMPLES and not self.owed)

    def lose(self, ranks: str) -> None:
        """The changes of these ranks are lost; what they were made of is owed."""
        self.alive = [one for rank, one in enumerate(self.alive) if str(rank) not in ranks]
        missing = self.fed - {place for one in self.alive for place in one.own}
        self.fed, self.owed = self.fed - missing, sorted([*self.owed, *missing])
        self.lost += len(missing)

    def end_round(self) -> None:
        if (self.step, "reports") in self.script:
            self.lose(self.script.pop((self.step, "reports")))
            if not self.is_over():  # an epoch that is not over any more
                return
        self.exchange()
        if (self.step, "outer") in self.script:
            self.lose(self.script.pop((self.step, "outer")))  # it has given its change before
            first, second = self.alive  # the second one did not see the end, and takes the state of the first
            second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))

    @torch.no_grad()
    def exchange(self) -> None:
        (rate, momentum), seen = self.outer, sum(len(one.own) for one in self.alive)
        for index, (start, v) in enumerate(zip(self.anchor, self.velocity, strict=True)):
            copies = [list(one.net.parameters())[index] for one in self.alive]
            v.mul_(momentum)
            change = sum((start - p) * (len(one.own) / seen) for one, p in zip(self.alive, copies, strict=True))
            v.add_(change)
            for p in copies:
                p.copy_(start - rate * (change + momentum * v))
        for one in self.alive:
            one.own = []
        self.anchor, self.steps_of_round, self.fed = self.copy_weights(self.alive[0]), 0, set()

    def copy_weights(self, replica: Replica) -> list[Tensor]:
        return [p.detach().clone() for p in replica.net.parameters()]


def run_lossy(folder: Path, kills: str, *options: str, size: int = 3, recipe: str = LOSSY) -> dict[str, Any]:
    """Train with scripted losses; return what `hvdtrain ledger verify --json` says."""
    with ElasticJob(folder, f"localhost:{size}", "--kills", kills, *options, recipe=recipe) as job:
        job.end()
        assert "a lost rank takes along what it has changed" in job.said()
    done = {path.name.partition("done.")[2] for path in folder.glob("fault.done.*")}
    assert done == set(kills.split())
    losses(job.run_dir)
    return read_verdict(job.run_dir)


def read_verdict(run_dir: Path) -> dict[str, Any]:
    done = subprocess.run([*HVDTRAIN, "ledger", "verify", "--json", str(run_dir)], capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["exactly_once"], done.stdout + done.stderr
    return found


SCRIPTS = {
    "in open rounds, a worker and then rank 0": ("1@4 0@7", {4: "1", 7: "0"}),
    "in the exchange of a round, two at once": ("1@8.reports 2@8.reports", {8: "12.reports"}),
    "in the exchange of an epoch's last round": ("0@12.reports", {12: "0.reports"}),
    "in an exchange that one rank has finished": ("1@4.cut 2@4.outer", {4: "2.outer"}),
}


@pytest.mark.parametrize(
    "script", [pytest.param(script, marks=[pytest.mark.slow] * ("epoch" not in script)) for script in SCRIPTS]
)
def test_a_run_with_losses_equals_a_float64_reference(script: str, tmp_path: Path) -> None:
    """12 steps an epoch without losses; what is owed makes others. Replicas are compared every 10 steps."""
    kills, scripted = SCRIPTS[script]
    options = ["--outer", "nesterov:0.7,0.9"] if "epoch" in script else []
    verdict = run_lossy(tmp_path, kills, "--local-steps", "4", "--diagnose", *options)
    reference = LossyRounds(Curve(momentum=0.9), 3, 4, scripted, (0.7, 0.9) if options else (1.0, 0.0))
    expected = reference.train()
    assert not reference.script
    assert (verdict["owed"], verdict["settled"], verdict["epochs"]) == (reference.lost, reference.lost, 2)
    assert verdict["steps"] == reference.step
    found = read_state(tmp_path / "run", reference.step)["model"]
    torch.testing.assert_close(dict(found), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_checkpoint_has_what_is_owed(tmp_path: Path, world1: KeptWorld) -> None:
    """11 steps of which half are lost with a rank; 3 of the 5 steps that they make come before the checkpoint."""
    options = ("--local-steps", "16", "--checkpoint-every", "14", "--keep", "9", "--epochs", "1")
    verdict = run_lossy(tmp_path, "1@12", *options, size=2)
    assert (verdict["owed"], verdict["settled"], verdict["steps"]) == (44, 44, 17)
    checkpoints = tmp_path / "run" / "checkpoints"
    position = json.loads((checkpoints / "step-14" / "meta.json").read_text())["position"]
    assert sum(end - begin for begin, end in position["owed"]) == 44 - 3 * BATCH
    whole = read_state(tmp_path / "run", 17)
    shutil.rmtree(checkpoints / "step-17")
    for done in tmp_path.glob("fault.done.*"):
        done.unlink()
    train(world1, LOSSY, tmp_path / "run", "--resume", "--kills", "")
    resumed = read_state(tmp_path / "run", 17)
    assert_same_tensors([resumed[part] for part in ("model", "optimizer")], [whole["model"], whole["optimizer"]])
    assert read_verdict(tmp_path / "run")["settled"] == 44


@pytest.mark.slow
def test_workers_that_are_killed_and_come_back(tmp_path: Path) -> None:
    """A worker, rank 0 before newcomers have come, and newcomers in the midst of a round that takes in all."""
    options = ("--local-steps", "4", "--diagnose", "--ema", "0.9", "--compression", "int8", "--pause", "0.3")
    with ElasticJob(tmp_path, "localhost:3", *options) as job:
        job.step(6)
        job.kill(1)
        job.more(2)
        job.kill(0)
        job.more(2)
        job.world(3)
        job.more(5)
        job.kill(2)
        job.more(1)
        job.end()
    losses(job.run_dir)
    found, summary = read_verdict(job.run_dir), job.summary()
    assert found["owed"] == found["settled"] > 0
    assert (found["epochs"], found["rest"], summary["samples_seen"]) == (6, 0, 6 * 1437)
    assert summary["eval"]["accuracy"] > 0.9


@pytest.mark.slow
def test_notices_and_newcomers_cost_nothing(tmp_path: Path) -> None:
    """Rounds end before ranks leave and join."""
    with ElasticJob(tmp_path, "localhost:1", "--local-steps", "5", "--pause", "0.3") as job:
        job.step(3)
        job.hosts("localhost:1 127.0.0.1:1")
        job.world(2)
        job.more(2)
        job.supervisor(1).send_signal(signal.SIGTERM)
        job.world(1)
        job.more(2)
        job.end()
    assert len(losses(job.run_dir)) == 72
    assert read_verdict(job.run_dir)["owed"] == 0


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "options",
    [
        "--compression int8,min=1",
        "--compression topk:0.3,min=1,warmup=0 --ema 0.9",
        "--compression powersgd:2,min=1 --outer nesterov:0.7,0.9",
        "--local-after 5st --compression int8,min=1",
        "--micro-batch 2 --clip-norm 0.5",
        "LossyAdam --ema 0.9",
    ],
)
def test_losses_leave_the_ledger_exact_and_replicas_equal(options: str, tmp_path: Path) -> None:
    name, *given = options.split() if options.startswith("Lossy") else ["Lossy", *options.split()]
    recipe = LOSSY.replace(":Lossy", f":{name}")
    kills = "3@7 1@10.sums 0@15"
    verdict = run_lossy(tmp_path, kills, "--local-steps", "3", "--diagnose", *given, size=4, recipe=recipe)
    assert verdict["epochs"] == 2
    assert verdict["owed"] == verdict["settled"]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("options", ["--shares measured", "--outer nesterov:0.7,0.9 --compression int8"])
def test_a_life_of_losses(options: str, tmp_path: Path) -> None:
    given = ("--local-steps", "6", "--diagnose", "--pause", "0.3", *options.split())
    with ElasticJob(tmp_path, "localhost:3", *given) as job:
        job.step(4)
        for victims in ((1,), (0,), (2,), (0, 1)):
            job.world(3)
            job.more(3)
            job.kill(*victims)
            job.more(2)
        job.end()
    losses(job.run_dir)
    found = read_verdict(job.run_dir)
    assert found["owed"] == found["settled"] > 0
    assert (found["epochs"], found["rest"], job.summary()["samples_seen"]) == (6, 0, 6 * 1437)
    assert job.summary()["eval"]["accuracy"] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_jax_recipes_keep_their_rounds(tmp_path: Path) -> None:
    options = ("--local-steps", "6", "--diagnose", "--compression", "int8", "--outer", "nesterov:0.7,0.9")
    with ElasticJob(tmp_path, "localhost:2", *options, "--pause", "0.5", recipe=JAX) as job:
        job.world(2, 120)
        job.step(4)
        job.kill(1)
        job.more(3)
        job.world(2, 120)
        job.more(3)
        job.kill(0)
        job.more(3)
        job.end(timeout=150)
    losses(job.run_dir)
    found = read_verdict(job.run_dir)
    assert found["owed"] == found["settled"] > 0
    assert (found["epochs"], found["rest"]) == (6, 0)
    assert job.summary()["eval"]["accuracy"] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("fault", ["a worker is stopped", "an error", "the state is handed over", "the end"])
def test_other_faults_in_rounds(fault: str, tmp_path: Path) -> None:
    """Of tests.ranks.test_faults. The end: rank 0 dies as it saves; those that are left have no step to make."""
    options = ("--local-steps", "4", "--diagnose", "--pause", "0.3", "--checkpoint-every", "1000")
    with ElasticJob(tmp_path, "localhost:3", *options) as job:
        job.step(6)
        if fault == "a worker is stopped":
            job.kill(0, number=signal.SIGSTOP)
            job.world(2, 30 + LEASE)
        elif fault == "an error":
            job.fault.write_text("score-once")
        elif fault == "the end":
            job.fault.write_text("sync-crash")
        else:
            job.fault.write_text("sync-crash")
            job.kill(1)
            job.until(lambda: not job.fault.exists(), "failure in the hand-over")
            job.world(1)
        job.end()
    losses(job.run_dir)
    found = read_verdict(job.run_dir)
    assert found["owed"] == found["settled"]
    assert (found["epochs"], found["rest"], job.summary()["samples_seen"]) == (6, 0, 6 * 1437)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_all_workers_are_killed_while_something_is_owed(tmp_path: Path) -> None:
    """They come back with the newest checkpoint; what was lost after it is undone with the rest."""
    options = ("--local-steps", "8", "--checkpoint-every", "7", "--pause", "0.3")
    with ElasticJob(tmp_path, "localhost:2", *options) as job:
        job.step(12)
        job.kill(1)
        job.more(1)
        job.kill(0)
        job.more(5)
        job.end()
    losses(job.run_dir)
    found = read_verdict(job.run_dir)
    assert (found["epochs"], found["rest"], found["settled"]) == (6, 0, found["owed"])


@pytest.mark.parametrize("source", [DataSource.STREAM, DataSource.ROLLOUTS])
def test_examples_that_cannot_be_had_again_are_refused(source: DataSource) -> None:
    refuse_unnumbered_rounds(DataSource.NUMBERED, 4)
    with pytest.raises(UserError, match=r"^--local-steps 4: in an elastic run the others train the examples of a lost"):
        refuse_unnumbered_rounds(source, 4)
