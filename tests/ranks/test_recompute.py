"""`--recompute`: the bits of a run without it, fewer tensors kept for backward, and what it cannot do refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.system.errors import UserError
from hvdtrain.torch.recompute import check_blocks, recompute_blocks
from hvdtrain.training.options import make_run_options
from tests.ranks import recompute_recipes as recipes
from tests.ranks.recompute_recipes import fit
from tests.ranks.test_several_optimizers import assert_same_state
from tests.support.worlds import KeptWorld, on_ranks, refusal

OWN = str(Path(__file__).parent / "recompute_recipes.py")
CHARLM = str(Path(__file__).parents[2] / "recipes" / "charlm.py")
LINE = f"{Path(__file__).parent / 'jax_recipes.py'}:Line"


@on_ranks(1, 2)
@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 2, "clip_norm": 0.5, "ema": 0.9}, {"amp": "bf16"}, {"deterministic": True, "virtual_shards": 3}],
    ids=["accumulated", "bf16", "deterministic"],
)
def test_a_recomputed_run_has_the_same_bits(options, tmp_path):
    plain = fit(recipes.Stack(), tmp_path / "plain", **options)
    for spec in ("all", "every:3"):
        assert_same_state(fit(recipes.Stack(), tmp_path / spec[:3], recompute=spec, **options), plain)
    assert not [name for block in recipes.BUILT[-1].blocks for name in vars(block) if name == "forward"]


@on_ranks(2)
@pytest.mark.parametrize("kind", ["Several", "Gathers", "Containers"])
def test_shared_graphs_collectives_and_containers_are_recomputed(kind, tmp_path):
    made = getattr(recipes, kind)
    found = fit(made(), tmp_path / "all", recompute="all")
    assert_same_state(found, fit(made(), tmp_path / "plain"))


def measure_kept_bytes(spec: str | None) -> int:
    """Return the bytes that a forward pass of 64 examples keeps for the backward pass, without parameters."""
    recipe = recipes.Stack()
    model = recipe.model()
    own, kept = {p.data_ptr() for p in model.parameters()}, dict[int, int]()

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.data_ptr()] = x.nbytes if x.data_ptr() not in own else 0
        return x

    with (
        recompute_blocks(recipe, model, make_run_options({"recompute": spec})),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        loss = model(torch.randn(64, 6)).sum()
    assert loss.requires_grad
    return sum(kept.values())


def test_fewer_bytes_are_kept_for_backward(world1: KeptWorld) -> None:
    plain, some, most = (world1.run(measure_kept_bytes, spec)[0] for spec in (None, "every:2", "all"))
    assert most < 0.3 * plain < some < 0.7 * plain


def train_printing(folder: Path) -> None:
    from tests.support.worlds import train_here

    options = ("--files", "10", "--steps", "1", "--width", "8", "--depth", "3", "--recompute", "every:2")
    train_here(CHARLM, folder, options)


def test_the_plan_says_how_many_blocks_are_recomputed(world1: KeptWorld, tmp_path: Path) -> None:
    world1.run(train_printing, tmp_path / "run")
    assert "recompute 2 of 3 blocks" in world1.printed[0]


def refused(how: str, folder: Path, options: dict[str, Any]) -> None:
    fit(recipes.Wrong(how=how), folder / str(collectives.size()), recompute="all", **options)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("batch norm", "a BatchNorm1d in the block 'blocks.0' changes its buffer '1.running_mean' in each forward"),
        ("in place", "the block 'blocks.0' changes its input in place, so that it cannot run again"),
        ("in a list", "the block 'blocks.0.0' changes its input in place, so that it cannot run again"),
        ("counts", "does not return the same the second time (such as one that counts its calls): leave it out"),
        ("counts values", "the block 'blocks.1' does not return the same the second time"),
        ("foreign", "Wrong.blocks()[0] is Linear(in_features=6, out_features=6, bias=True), which is not a module of"),
        ("twice", "Wrong.blocks()[1], 'blocks.0', is there twice: return each block once"),
        ("nested", "Wrong.blocks() has 'blocks.0.0', which is in its block 'blocks.0': return one of the two"),
        ("list", "Wrong.blocks()[0], 'blocks', is a ModuleList, without a forward: return what is in it"),
        ("none", "Wrong.blocks() returned no module; expected some, such as list(model.layers)"),
        ("generator", "Wrong.blocks() returned generator; expected a list of modules of the model"),
    ],
)
def test_blocks_that_cannot_be_recomputed_are_refused(how: str, text: str, world2: KeptWorld, tmp_path: Path) -> None:
    for error in world2.errors(refused, how, tmp_path, {}):
        assert text in str(error)


def test_a_block_of_torchscript_is_refused() -> None:
    model = nn.Sequential(torch.jit.ScriptModule())
    with pytest.raises(UserError, match=r"blocks\(\)\[0\], '0', is compiled by torch.jit"):
        check_blocks("R.blocks()", list(model), model)


def test_batch_norm_over_all_ranks_can_be_recomputed(world2: KeptWorld, tmp_path: Path) -> None:
    world2.run(refused, "batch norm", tmp_path, {"sync_batchnorm": True})


def test_recipes_without_blocks_are_refused(world1: KeptWorld, tmp_path: Path) -> None:
    text = refusal(world1, "mlp", tmp_path / "a", "--recompute", "all")
    assert "has no method blocks(self, model), which returns the model's blocks" in text
    assert "--recompute is for torch, and Line is not" in refusal(world1, LINE, tmp_path / "b", "--recompute", "all")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"recompute": "every:0"},
            "--recompute every:0: expected 'all', or 'every:2' for the first of each two blocks",
        ),
        ({"recompute": "some"}, "--recompute some: expected 'all', or 'every:2'"),
        ({"recompute": "all", "compile": True}, "--recompute all with --compile: the compiler decides itself"),
    ],
)
def test_other_specs_and_the_compiler_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text.replace("(", r"\(")):
        make_run_options(options)
