"""Rounds of local steps against the same rounds in one process, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hvdtrain.comm import collectives
from hvdtrain.recipe import order, schedule
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.torch.tensors import read_tensors
from tests.ranks import several_recipes
from tests.ranks.elastic import verify
from tests.ranks.harness import ROOT
from tests.ranks.local_recipes import BUILT, Curve, CurveAdam, Odd, Rounds, fit
from tests.ranks.test_changing_recipes import check_same
from tests.support.worlds import KeptWorld, on_ranks, train

LEAST = f"{Path(__file__).parent / 'jax_digits_recipes.py'}:Least"
DIGITS = str(ROOT / "recipes" / "digits.py")


def assert_replicas_equal() -> None:
    """Compare the bits of the model's state on all ranks."""
    bits = {name: value.numpy().tobytes().hex() for name, value in BUILT[-1].state_dict().items()}
    assert all(other == bits for other in collectives.gather_json(bits, "test.bits"))


@on_ranks(2, 3)
def test_rounds_equal_a_float64_reference(tmp_path):
    """12 steps an epoch, the last of 2 examples: rounds of 5, 5 and 2 steps."""
    size = collectives.size()
    cases = {
        "average": ({}, {}),
        "nesterov": ({"outer": "nesterov:0.7,0.9", "clip_norm": 0.5}, {"outer": (0.7, 0.9), "clip_norm": 0.5}),
        "after": ({"local_after": "9st", "micro_batch": 2}, {"first_step": 9}),
    }
    for name, (options, own) in cases.items():
        momentum = 0.0 if name == "after" else 0.9  # whose state is the same on all ranks before the first round
        found, _ = fit(Curve(momentum=momentum), tmp_path / name, local_steps=5, **options)
        check_same(found, Rounds(size, 5, **own).train(Curve(momentum=momentum))[0], 1e-12)
        assert_replicas_equal()


@on_ranks(3)
def test_local_losses_are_divided_by_the_denominators_of_their_rank(tmp_path):
    found, _ = fit(Curve(weighted=True), tmp_path / "run", local_steps=4)
    check_same(found, Rounds(3, 4).train(Curve(weighted=True))[0], 1e-12)


@on_ranks(2)
def test_averages_move_as_often_as_there_were_steps(tmp_path):
    fit(Curve(), tmp_path / "run", local_steps=5, ema=0.9)
    state = read_state(tmp_path / "run", 24)
    _, averages = Rounds(2, 5, ema=0.9).train(Curve())
    check_same({name: state["ema"][f"module.{name}"] for name in averages}, averages, 1e-12)


@on_ranks(3)
def test_rounds_of_one_step_are_synchronous_gradient_descent(tmp_path):
    synchronous, _ = fit(Curve(), tmp_path / "synchronous")
    found, _ = fit(Curve(), tmp_path / "local", local_steps=1)
    check_same(found, synchronous, 1e-12)


@on_ranks(1)
def test_one_rank_trains_as_without_rounds(tmp_path):
    plain, _ = fit(CurveAdam(), tmp_path / "plain")
    found, _ = fit(CurveAdam(), tmp_path / "local", local_steps=4)
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    nesterov, _ = fit(Curve(), tmp_path / "nesterov", local_steps=5, outer="nesterov:0.7,0.9")
    check_same(nesterov, Rounds(1, 5, outer=(0.7, 0.9)).train(Curve())[0], 1e-12)


@on_ranks(2)
@pytest.mark.parametrize("compression", ["int8,min=1", "powersgd:2,min=1", "topk:0.3,min=1,warmup=0"])
def test_a_resumed_run_has_the_same_bits(compression, tmp_path):
    """Checkpoints end rounds: after 7 and 14 of 20 steps."""
    options: dict[str, Any] = {"compression": compression, "checkpoint_residuals": "exact", "checkpoint_every": 7}
    options |= {"local_steps": 3, "local_after": "5st", "outer": "nesterov:0.7,0.9", "ema": 0.9, "diagnose": True}
    fit(CurveAdam(), tmp_path / "whole", steps=20, **options)
    assert_replicas_equal()
    fit(CurveAdam(), tmp_path / "run", steps=14, **options)
    collectives.gather_json(None, "test.both")
    fit(CurveAdam(), tmp_path / "run", steps=20, resume=True, **options)
    assert_replicas_equal()
    one, other = read_state(tmp_path / "whole", 20), read_state(tmp_path / "run", 20)
    assert one["rounds"]["momentum"]
    assert_same_tensors(one, other)


def read_state(run_dir: Path, step: int) -> Any:
    return read_tensors((run_dir / "checkpoints" / f"step-{step}" / "state").read_bytes())


def assert_same_tensors(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for own, theirs in zip(one, other, strict=True):
            assert_same_tensors(own, theirs)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@on_ranks(2)
def test_checkpoints_serve_runs_with_and_without_rounds(tmp_path):
    """The state of optimizers is the mean over ranks; what is unsent is in other units."""
    options: dict[str, Any] = {"compression": "topk:0.3,min=1,warmup=0"}
    fit(CurveAdam(), tmp_path / "run", steps=6, local_steps=3, outer="nesterov:0.7,0.9", **options)
    fit(CurveAdam(), tmp_path / "run", steps=12, resume=True, **options)
    assert_replicas_equal()
    fit(CurveAdam(), tmp_path / "run", steps=18, resume=True, local_steps=4, **options)
    assert_replicas_equal()


@on_ranks(2)
def test_several_optimizers_share_the_rounds(tmp_path):
    """Each loss has steps of its own in them, and what its optimizer has changed is exchanged at their ends."""
    found, _ = several_recipes.fit(several_recipes.Duel(turns="d both g", epochs=1), tmp_path / "run", local_steps=4)
    check_same(found, train_duel(several_recipes.Duel(turns="d both g", epochs=1), collectives.size(), 4))


def train_duel(recipe: several_recipes.Duel, ranks: int, local_steps: int) -> dict[str, torch.Tensor]:
    """Train in one process; the parameters after an epoch."""
    nets = [recipe.model() for _ in range(ranks)]
    optimizers = [recipe.optimizer(list(net.parameters()), list(net.named_parameters())) for net in nets]
    data, turns = recipe.dataset("train").tensors, recipe.turns.split()
    batches = list(order.iterate_batches(several_recipes.EXAMPLES, several_recipes.BATCH, 0, 0))
    rates = schedule.parse_schedule(recipe.schedule, len(batches), len(batches))
    turn = {"turn": ""}
    plain: Any = type("Plain", (type(recipe),), {"turn": lambda self: turn["turn"]})(turns=recipe.turns)
    seen = [0] * ranks
    for step, ids in enumerate(batches):
        if step % local_steps == 0:
            anchor = [p.detach().clone() for p in nets[0].parameters()]
        turn["turn"] = turns[step % len(turns)]
        for rank, (net, own) in enumerate(zip(nets, optimizers, strict=True)):
            part = torch.from_numpy(ids[slice(*order.part_bounds(len(ids), rank, ranks))])
            seen[rank] += len(part)
            scores = plain.score(net, [column[part] for column in data])
            present = [name for name in own if name in scores]
            for name in present:
                params = [p for group in own[name].param_groups for p in group["params"]]
                for p, g in zip(
                    params, torch.autograd.grad(scores[name].mean(), params, retain_graph=True), strict=True
                ):
                    p.grad = g
            for name in present:
                for group in own[name].param_groups:
                    group["lr"] = group.setdefault("own_lr", group["lr"]) * rates.factor(step)
                own[name].step()
        if (step + 1) % local_steps == 0 or step + 1 == len(batches):
            with torch.no_grad():
                for start, *copies in zip(anchor, *(net.parameters() for net in nets), strict=True):
                    mean = start + sum((p - start) * (n / sum(seen)) for p, n in zip(copies, seen, strict=True))
                    for p in copies:
                        p.copy_(mean)
            seen = [0] * ranks
    return {name: p.detach() for name, p in nets[0].named_parameters()}


def test_jax_recipes_have_rounds(world2: KeptWorld, tmp_path: Path) -> None:
    """The momentum of rounds of one step is that of the mean gradient: the batches have 3 examples on each rank."""
    plain = ["--steps", "10", "--checkpoint-every", "5", "--diagnose", "--log-every", "1"]
    train(world2, LEAST, tmp_path / "plain", *plain)
    train(world2, LEAST, tmp_path / "one", *plain, "--local-steps", "1")
    expected, found = (read_state(tmp_path / run, 10)["model"] for run in ("plain", "one"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    rounds = ["--local-steps", "3", "--outer", "nesterov:0.7,0.9", "--micro-batch", "2"]
    train(world2, LEAST, tmp_path / "whole", *plain, *rounds)
    train(world2, LEAST, tmp_path / "run", *plain, *rounds, "--steps", "5")
    train(world2, LEAST, tmp_path / "run", "--resume", "--steps", "10")
    assert_same_tensors(read_state(tmp_path / "whole", 10), read_state(tmp_path / "run", 10))


def test_only_changes_travel_and_the_ledger_is_exact(world2: KeptWorld, tmp_path: Path) -> None:
    """int8 sends a quarter of the bytes, and 16 steps a sixteenth."""
    options = ["--epochs", "1", "--width", "256", "--batch-size", "90"]  # 16 steps
    plain = train(world2, DIGITS, tmp_path / "plain", *options)
    found = train(world2, DIGITS, tmp_path / "local", *options, "--local-steps", "16", "--compression", "int8,min=1")
    assert plain["wire_bytes_per_step"] / found["wire_bytes_per_step"] > 55
    assert found["samples_seen"] == 1437
    verify(tmp_path / "local")


@on_ranks(2)
def test_gradients_that_are_not_finite_leave_out_one_ranks_update(tmp_path):
    with pytest.raises(RunError, match=r"the gradient of 0.weight and 3 more is not finite on rank 1, though the loss"):
        fit(Odd(kind="infinite"), tmp_path / "fails", local_steps=4)
    _, summary = fit(Odd(kind="infinite"), tmp_path / "skips", local_steps=4, skip_nonfinite=1)
    assert (summary["skipped_nonfinite"], summary["skipped"]) == (1, 1)
    assert_replicas_equal()


@on_ranks(2)
def test_a_parameter_that_no_rank_uses_stays(tmp_path):
    found, _ = fit(Odd(kind="unused"), tmp_path / "run", local_steps=4)
    assert found["unused"].tolist() == [1.0, 1.0]


@on_ranks(2)
def test_what_rounds_cannot_do_is_refused_by_name(tmp_path):
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (Odd(kind="detached"), {}, r"'loss' depends on no parameter"),
        (
            Odd(kind="collective"),
            {},
            r"Odd.score calls collectives, and in --local-steps 4 ranks have different weights",
        ),
        (Odd(kind="clamps"), {}, r"--local-steps 4: Odd.score changes the parameter '0.weight'"),
        (Curve(), {"compression": "topk,momentum=0.9"}, r"--local-steps with --compression topk,momentum=0.9"),
        (Curve(), {"local_after": "3ep"}, r"--local-after 3ep is step 36, and the run has 24"),
    ]
    for number, (recipe, options, text) in enumerate(refused):
        with pytest.raises(UserError, match=text):
            fit(recipe, tmp_path / str(number), local_steps=4, **options)
