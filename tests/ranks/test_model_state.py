"""What training changes besides the optimizer's update: right on any number of ranks, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hvdtrain
from hvdtrain.system.errors import UserError
from hvdtrain.torch.tensors import read_tensors
from tests.ranks import state_recipes
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds

State = dict[str, torch.Tensor]
SIZES = [2, *slow(1)]  # ranks


def fit(recipe: str, folder: Path, fields: dict[str, Any], options: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    """Train on this rank; the model's part of the last checkpoint, and the summary."""
    summary = hvdtrain.fit(getattr(state_recipes, recipe)(**fields), run_dir=folder, threads=1, **options)
    path = folder / "checkpoints" / f"step-{summary['steps']}" / "state"
    state = read_tensors(path.read_bytes())["model"]
    return {
        name: value if value.layout == torch.strided else value.to_dense() for name, value in state.items()
    }, summary


def trained(world: KeptWorld, recipe: str, folder: Path, options: dict[str, Any] | None = None, **fields: Any) -> State:
    return world.run(fit, recipe, folder / str(world.size), fields, options or {})[0][0]


def refused(world: KeptWorld, recipe: str, folder: Path, options: dict[str, Any] | None = None, **fields: Any) -> str:
    """The message, the same on all ranks."""
    errors = world.errors(fit, recipe, folder / str(world.size), fields, options or {})
    assert all(isinstance(error, UserError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert not list((folder / str(world.size)).glob("checkpoints/*"))
    return str(errors[0])


def compare(one: State, other: State, tolerance: float = 2e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=tolerance, atol=tolerance, equal_nan=True)


NAMES = ("seen", "small", "total", "phase", "queue", "at", "full", "mean")
ALL = ", ".join(f'"{name}": "rank0"' for name in NAMES)


def test_declared_buffers_of_any_type_are_what_their_modes_say(worlds: KeptWorlds, tmp_path: Path) -> None:
    """41 examples: in the last step rank 1 has none."""
    states = [trained(worlds[size], "Declared", tmp_path, examples=41) for size in (1, 2, 3)]
    x = state_recipes.Base(examples=41).dataset("train").tensors[0]
    for state in states:
        assert state["seen"].item() == 2**53 + 1 + 41
        assert state["small"].item() == 41
        torch.testing.assert_close(state["total"], x.double().sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["phase"].real, x.sum().expand(2), rtol=1e-5, atol=1e-5)
        assert state["full"].item() is True
        torch.testing.assert_close(state["mean"], states[0]["mean"], rtol=1e-7, atol=1e-9)
        rows = {tuple(row) for row in x.tolist()}
        kept = state["queue"][: state["at"]]
        assert all(tuple(row) in rows for row in kept.tolist())
        torch.testing.assert_close(state["f.weight"], states[0]["f.weight"], rtol=1e-5, atol=1e-6)
    assert [int(state["at"]) for state in states] == [41, 21, 16]  # rank 0's examples


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "Undeclared",
            "training changes the buffer 'seen' of a Stateful, and how its values on 2 ranks are to be combined is not "
            f"known: add to Undeclared: buffers = {{{ALL}}}"
            '  # or "mean", "sum", "local"',
        ),
        ("Misspelled", "Misspelled.buffers: the model has no buffer 'qeue'; did you mean 'queue'?"),
        (
            "WrongMode",
            "WrongMode.buffers: 'average' for 'queue' is not a mode; expected one of mean, sum, rank0, local",
        ),
        (
            "BoolSum",
            "BoolSum.buffers: 'full' is bool, which has no sum; expected 'rank0' or 'local', or an integer buffer that "
            "counts",
        ),
        (
            "SparseSum",
            "SparseSum.buffers: 'adjacency' cannot be written in place (sparse, quantized or expanded); expected "
            "'local', or a dense buffer",
        ),
    ],
)
def test_buffers_that_cannot_be_combined_are_refused(
    recipe: str, message: str, worlds: KeptWorlds, tmp_path: Path
) -> None:
    assert refused(worlds[2], recipe, tmp_path) == message
    if recipe != "Undeclared":
        assert refused(worlds[1], recipe, tmp_path) == message


def test_one_rank_trains_with_undeclared_buffers_and_a_warning(worlds: KeptWorlds, tmp_path: Path) -> None:
    state = trained(worlds[1], "Undeclared", tmp_path)
    assert state["seen"].item() == 2**53 + 1 + 40
    (line,) = [line for line in worlds[1].printed[0].splitlines() if line.startswith("buffers")]
    assert line == (
        "buffers   training changes the buffer 'seen' of a Stateful; before it is trained on several ranks, add to "
        f'Undeclared: buffers = {{{ALL}}}  # or "mean", "sum", "local"'
    )
    state = trained(worlds[2], "Local", tmp_path, {"diagnose": True})
    assert state["seen"].item() == 2**53 + 1 + 20  # rank 0's


@pytest.mark.parametrize("how", ["in place", "data", "set", "silent", "one rank", "hook"])
def test_a_buffer_that_begins_to_change_later_is_refused_then(how: str, world2: KeptWorld, tmp_path: Path) -> None:
    assert refused(world2, "Later", tmp_path, how=how).startswith(
        "training changes the buffer 'scale' of an Observer, and how its values on 2 ranks are to be combined is not "
        'known: add to Later: buffers = {"scale": "rank0"}  # or'
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "rebound",
            "training rebinds the buffer 'scale' of an Observer to another tensor, so that it cannot",
        ),
        ("registered", "training registers the buffer 'other' of an Observer, so that it cannot be kept the same"),
    ],
)
def test_a_buffer_that_is_replaced_later_is_refused(how: str, message: str, world2: KeptWorld, tmp_path: Path) -> None:
    assert refused(world2, "Later", tmp_path, how=how).startswith(message)


def test_a_declared_buffer_that_begins_to_change_later_is_combined(worlds: KeptWorlds, tmp_path: Path) -> None:
    """From its first change on: 7 steps of which each adds a tenth of the mean of the ranks' largest values."""
    for how in ("in place", "silent"):
        state = trained(worlds[2], "LaterMean", tmp_path / how, how=how)
        x = state_recipes.Base().dataset("train").tensors[0]
        expected = torch.ones(4, dtype=torch.float64)
        from hvdtrain.recipe import order

        for epoch in range(2):
            for step, ids in enumerate(order.iterate_batches(40, 8, 0, epoch)):
                if epoch or step >= 3:
                    halves = x[torch.from_numpy(ids.copy())].double().abs().view(2, 4, 4).amax(1)
                    expected = 0.9 * expected + 0.1 * halves.mean(0)
        torch.testing.assert_close(state["scale"].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}])
def test_constants_of_any_kind_stay_what_they_are(options: dict[str, Any], worlds: KeptWorlds, tmp_path: Path) -> None:
    one, two = (trained(worlds[size], "Constant", tmp_path, options) for size in (1, 2))
    fresh = state_recipes.Constants().state_dict()
    assert one.keys() == two.keys() == fresh.keys()
    for name, value in fresh.items():
        if name in ("f.weight", "f.bias", "scale", "none"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
            continue
        for state in (one, two):
            dense = value if value.layout == torch.strided else value.to_dense()
            assert torch.equal(state[name].nan_to_num(nan=7), dense.nan_to_num(nan=7)), name
    for size in (1, 2):
        folder, more = tmp_path / str(size), {**options, "epochs": 3, "resume": True}
        (_, summary), *_ = worlds[size].run(fit, "Constant", folder, {}, more)
        assert summary["steps"] == 15 and summary["resumed_from"] == 10


@pytest.mark.parametrize("how", ["data", "memory", "in place"])
def test_parameters_set_from_examples_are_refused(how: str, worlds: KeptWorlds, tmp_path: Path) -> None:
    trained(worlds[1], "DataInit", tmp_path, how=how)
    assert refused(worlds[2], "DataInit", tmp_path, how=how) == (
        "DataInit.score changes the parameter '0.bias' of an ActNorm differently on each rank: what it is changed to "
        "must not depend on the examples; initialise it from dataset('train') in model(), or train on one rank"
    )


def test_max_norm_is_refused(worlds: KeptWorlds, tmp_path: Path) -> None:
    trained(worlds[1], "MaxNorm", tmp_path)
    assert refused(worlds[2], "MaxNorm", tmp_path).startswith(
        "MaxNorm.score changes the parameter '0.weight' of an Embedding differently on each rank"
    )


@pytest.mark.parametrize(
    ("recipe", "fields"), [("Momentum", {}), ("Momentum", {"silent": True}), ("Clamped", {})], ids=str
)
def test_parameters_changed_alike_on_all_ranks_are_right(
    recipe: str, fields: dict[str, Any], worlds: KeptWorlds, tmp_path: Path
) -> None:
    """Also with 41 examples, where rank 1 has none in the last step of an epoch."""
    for examples in (40, 41):
        folder = tmp_path / str(examples)
        states = [
            trained(worlds[size], recipe, folder, {"diagnose": size > 1}, examples=examples, **fields)
            for size in (1, 2)
        ]
        compare(*states)


@pytest.mark.parametrize("size", SIZES)
def test_deterministic_runs_refuse_parameters_that_score_changes(size: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    message = refused(worlds[size], "Momentum", tmp_path, {"deterministic": True, "virtual_shards": 4})
    assert message.startswith("--deterministic: score changes the parameter 'teacher.")
    assert message.endswith(
        "', as often as it is called, which depends on the number of ranks; leave out --deterministic, or change it in "
        "the optimizer's step"
    )


@pytest.mark.parametrize("size", SIZES)
def test_deterministic_runs_refuse_buffers_that_change_later(size: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    assert refused(worlds[size], "LaterMean", tmp_path, {"deterministic": True, "virtual_shards": 4}).startswith(
        "--deterministic: training changes the buffer 'scale' of an Observer, which depends on the number of ranks"
    )


@pytest.mark.parametrize("how", ["eval", "train", "score", "whole"])
@pytest.mark.parametrize("size", SIZES)
def test_layers_in_evaluation_mode_stay_in_it(how: str, size: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    state = trained(worlds[size], "FrozenNorm", tmp_path, {"eval_every": 2}, how=how)
    assert torch.equal(state["0.1.running_var"], torch.ones(4))
    assert torch.equal(state["0.1.running_mean"], torch.zeros(4))
    assert state["0.1.num_batches_tracked"] == 0
    told = "model() returns the model in evaluation mode, in which it stays" in worlds[size].printed[0]
    assert told == (how == "whole")


def test_batch_norm_is_right_with_a_rank_without_examples(worlds: KeptWorlds, tmp_path: Path) -> None:
    """Its statistics move once per step, also where rank 1 of 2 or more has no example; the count is exact."""
    for size in (1, 2, 3):
        state = trained(worlds[size], "Norm", tmp_path, {"eval_every": 3}, examples=41, epochs=3)
        assert state["1.1.num_batches_tracked"] == 18


@pytest.mark.parametrize("size", SIZES)
def test_torch_sync_batch_norm_is_refused(size: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    assert refused(worlds[size], "SyncNorm", tmp_path) == (
        "'1.1' is a torch.nn.SyncBatchNorm, which needs torch.distributed: use hvdtrain.torch.SyncBatchNorm, "
        "or BatchNorm2d with --sync-batchnorm, which makes it one; or GroupNorm"
    )


def test_lazy_modules_train_on_several_ranks_as_on_one(worlds: KeptWorlds, tmp_path: Path) -> None:
    states = [trained(worlds[size], "Lazy", tmp_path, {"steps": 1}, lr=0.0) for size in (1, 2)]
    assert states[0]["0.weight"].shape == (4, 4)
    for name in ("0.weight", "3.weight", "1.num_batches_tracked"):
        assert torch.equal(states[0][name], states[1][name])
    assert states[0]["1.num_batches_tracked"] == 1  # the trial left no trace
    torch.testing.assert_close(states[0]["1.running_mean"], states[1]["1.running_mean"])


def test_parametrized_layers_train_on_several_ranks_as_on_one(worlds: KeptWorlds, tmp_path: Path) -> None:
    """torch's power iterations depend on the weights only: nothing has to be declared."""
    for examples in (40, 41):
        folder = tmp_path / str(examples)
        compare(*(trained(worlds[size], "Parametrized", folder, examples=examples) for size in (1, 2)))


@pytest.mark.parametrize("uncopyable", [False, True])
def test_a_recipe_cannot_observe_its_trial(uncopyable: bool, worlds: KeptWorlds, tmp_path: Path) -> None:
    """Wherever it counts its calls, the first one counts 1, and its random numbers are the first step's."""
    drawn = []
    for size in (1, 2):
        world = worlds[size]
        trained(world, "Counted", tmp_path, {"steps": 2}, uncopyable=uncopyable)
        for printed in world.printed:
            lines = [line for line in printed.splitlines() if line.startswith("counts")]
            # The calls of the trial and of the first step; what is printed while a graph is drawn is not shown.
            firsts = [line for line in lines if line.startswith("counts [1, 1, 1, 1, 1, 1]")]
            assert firsts == lines[:2]
            drawn.append(firsts[-1])
    assert drawn[0] == drawn[1]  # rank 0's, with one and with two ranks
    notes = [line for line in worlds[2].printed[0].splitlines() if line.startswith("graph")]
    expected = (
        "graph     not drawn: the recipe or its model cannot be copied (TypeError: cannot pickle '_thread.lock' object)"
    )
    assert notes == ([expected] if uncopyable else [])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("how", "which"), [("exponential", ""), ("plateau", " (ReduceLROnPlateau)")])
def test_learning_rate_schedulers_of_a_recipe_are_refused(
    how: str, which: str, size: int, worlds: KeptWorlds, tmp_path: Path
) -> None:
    assert refused(worlds[size], "Scheduled", tmp_path, how=how) == (
        f"Scheduled makes a learning-rate scheduler{which}, and hvdtrain sets the learning rate in each step itself: "
        "leave it out, and name a schedule instead, e.g. schedule = 'warmup:5ep cosine' or --schedule"
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_learning_rate_that_score_changes_is_refused(size: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    assert refused(worlds[size], "Scheduled", tmp_path, how="by hand") == (
        "Scheduled changes the learning rate of its optimizer itself, which hvdtrain sets in each step: leave out its "
        "scheduler, and name a schedule instead, e.g. schedule = 'warmup:5ep cosine' or --schedule"
    )


@pytest.mark.parametrize("dicts", [False, True])
def test_collectives_in_score_work_in_even_steps_and_are_refused_in_others(
    dicts: bool, worlds: KeptWorlds, tmp_path: Path
) -> None:
    compare(*(trained(worlds[size], "Collective", tmp_path, dicts=dicts) for size in (1, 2)))
    trained(worlds[2], "Collective", tmp_path / "short", {"steps": 5}, dicts=dicts, examples=42)  # ends before
    assert refused(worlds[2], "Collective", tmp_path / "odd", dicts=dicts, examples=41) == (
        "Collective.score calls collectives, so all ranks must call it equally often; in a step of 1 examples rank 0 "
        "calls it 1 times and rank 1 0 times: choose another --batch-size than 8, or let dataset() leave out the last "
        "examples"
    )
