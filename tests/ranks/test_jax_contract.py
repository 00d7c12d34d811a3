"""The contract of recipes, of JAX recipes: against plain loops in one process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hvdtrain
from hvdtrain.comm import collectives
from hvdtrain.recipe import order
from hvdtrain.system.errors import KnownError, RecipeError, UserError
from tests.ranks import jax_recipes as recipes
from tests.ranks import jax_token_recipes
from tests.ranks.harness import rows
from tests.ranks.jax_optimizer_recipes import OPTIMIZERS, Duel, Optax, OtherKeys
from tests.ranks.jax_spoiled_recipe import Spoiled
from tests.ranks.test_scores import EVERY_STEP, final_weights, largest_difference, reference
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, on_ranks, train, train_here

TOKENS = f"{jax_token_recipes.__file__}:Tokens"
SOME_OPTIMIZERS = ["noisy"]


def fit(recipe: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Train with hvdtrain on this world; the model at the end, and the summary."""
    recipes.SEEN.clear()
    summary = hvdtrain.fit(recipe, run_dir=folder, quiet=True, **options)
    return recipes.SEEN["model"], summary


def train_plainly(recipe: Any, optimizer: Any = None) -> Any:
    """Train in one process, step by step, with a linear schedule if the recipe has it; return the model."""
    model, data = recipe.model(jax.random.key(0)), recipe.dataset("train")
    tx, params = optimizer or recipe.optimizer(), model.pop("params")
    state = tx.init(params)
    epochs = range(recipe.epochs)
    steps = [ids for epoch in epochs for ids in order.iterate_batches(len(data), recipe.batch_size, 0, epoch)]

    def objective(params: Any, rest: Any, batch: Any) -> Any:
        returned = recipe.score({"params": params, **rest}, batch, jax.random.key(1))
        scores, changed = returned if isinstance(returned, tuple) else (returned, {})
        return scores["loss"].mean(), changed

    for step, ids in enumerate(steps):
        batch = recipe.collate([data[i] for i in ids])
        gradients, changed = jax.grad(objective, has_aux=True)(params, model, batch)
        model |= changed
        changes, state = tx.update(jax.tree.map(jnp.conj, gradients), state, params)
        factor = 1 - step / len(steps) if recipe.schedule == "linear" and optimizer is None else 1
        changes = jax.tree.map(lambda change, factor=factor: change * jnp.asarray(factor, change.dtype), changes)
        params = optax.apply_updates(params, changes)
    model = jax.tree.map(lambda a: jax.random.key_data(a) if recipes.is_key(a) else a, {"params": params, **model})
    return jax.tree.map(np.asarray, model)


def check_same(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        rounding = 2.0**-7 if one.dtype in (jnp.bfloat16, np.float16) else tolerance
        np.testing.assert_allclose(one.astype(complex), other.astype(complex), rounding, rounding, err_msg=str(path))


# Scores.


def train_in_float64(recipe: str, folder: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Train on a kept world, with JAX's 64-bit types."""
    with jax.enable_x64(True):
        return train_here(recipe, folder, options)


WAYS = [
    (2, "--clip-norm 0.1 --weighted"),
    *slow((3, "--micro-batch 2"), (1, "--micro-batch 3"), (2, "--deterministic --virtual-shards 4 --weighted")),
]


@pytest.mark.parametrize(("ranks", "options"), WAYS)
def test_a_mean_over_tokens_is_that_of_the_whole_batch(
    ranks: int, options: str, worlds: KeptWorlds, tmp_path: Path
) -> None:
    """The plain loop of the torch recipe, in float64."""
    weights, losses = reference(0.1 if "--clip-norm" in options else None, weighted="--weighted" in options)
    folder = tmp_path / "run"
    worlds[ranks].run(train_in_float64, TOKENS, folder, (*EVERY_STEP, *options.split()))
    assert largest_difference(final_weights(folder), weights) <= 1e-12
    found = rows(folder)
    assert [row["loss"] for row in found] == pytest.approx(losses, rel=1e-12)
    assert [row["perplexity"] for row in found] == pytest.approx(np.exp(losses).tolist(), rel=1e-12)


@on_ranks(3)
@pytest.mark.parametrize("name", ["Line", "Packed", "Moving", "Infinite", "OddTrees"])
def test_a_recipe_trains_as_in_a_plain_loop(name, tmp_path):
    """The last batch has 7 examples: with ragged batches, and one in which arrays have different numbers of rows."""
    recipe = getattr(recipes, name)()
    found, _ = fit(recipe, tmp_path / "run")
    # Ranks' gradients in bfloat16 are rounded before they are added.
    check_same(found, train_plainly(dataclasses.replace(recipe)), 2e-3 if name == "OddTrees" else 2e-6)


@pytest.mark.slow
@on_ranks(1, 2)
def test_recipes_train_as_in_a_plain_loop_on_fewer_ranks(tmp_path):
    for name in ("Line", "Packed", "Moving", "Infinite", "OddTrees"):
        recipe = getattr(recipes, name)()
        found, _ = fit(recipe, tmp_path / name)
        check_same(found, train_plainly(dataclasses.replace(recipe)), 2e-3 if name == "OddTrees" else 2e-6)


@pytest.mark.slow
@on_ranks(2)
def test_a_deep_tree_trains_as_in_a_plain_loop(tmp_path):
    found, _ = fit(recipes.Deep(), tmp_path / "run", micro_batch=2)
    check_same(found, train_plainly(recipes.Deep()))


@on_ranks(3)
def test_fewer_examples_than_ranks(tmp_path):
    recipe = recipes.Two(epochs=2)
    check_same(fit(recipe, tmp_path / "run")[0], train_plainly(recipe))


@on_ranks(2)
def test_batches_have_all_types_and_containers(tmp_path):
    found, summary = fit(recipes.ManyTypes(), tmp_path / "run")
    types = ["bool", "int32", "int32", "float32", "bool", "uint8", "float16", "bfloat16", "complex64", "list", "Extra"]
    assert recipes.SEEN["types"] == types
    check_same(found, train_plainly(recipes.Line()))
    assert (summary["eval"]["flag"], summary["eval"]["same"], summary["eval"]["imaginary"]) == (11 / 23, 1, 11)


@on_ranks(2)
def test_nothing_is_compiled_again(tmp_path):
    _, summary = fit(recipes.Line(epochs=5), tmp_path / "run", micro_batch=3, eval_every=2)
    assert summary["compilations"] == 4  # score, gradients, evaluation, update


def test_a_score_that_mixes_examples_keeps_its_batches(world2: KeptWorld, tmp_path: Path) -> None:
    """Also if there is one example a pass: in an elastic run there may be more."""
    for batch_size in ("8", "2"):
        train(world2, f"{recipes.__file__}:Contrastive", tmp_path / batch_size, "--batch-size", batch_size)
        assert "score mixes examples" in world2.printed[0]


@on_ranks(2)
def test_examples_are_played_by_the_model(tmp_path):
    found, _ = fit(recipes.Played(), tmp_path / "run")
    # Each step's errors are 4 * step + [0, 1, 2, 3], whatever the model is: the bias moves by 2 lr of their mean.
    assert found["params"]["bias"] == pytest.approx(0.05 * 2 * 1.5 * 3, rel=1e-6)


def test_a_model_is_there_in_a_training_only() -> None:
    with pytest.raises(UserError, match=r"current_model\(\) has a model in a training only"):
        recipes.Played().current_model()


# What training changes.


@on_ranks(2)
def test_counters_are_combined_as_declared(tmp_path):
    assert fit(recipes.Counted(), tmp_path / "sum")[0]["counts"]["seen"] == recipes.EXAMPLES
    assert fit(recipes.LocallyCounted(), tmp_path / "own")[0]["counts"]["seen"] == [12, 11][collectives.rank()]
    fit(recipes.Queue(), tmp_path / "queue")
    with pytest.raises(UserError, match=r"add to Counter: buffers = \{\"counts.seen\": \"rank0\"\}"):
        fit(recipes.Counter(), tmp_path / "undeclared")
    with pytest.raises(UserError, match=r"--deterministic: training changes the buffer 'moving\.mean'"):
        fit(recipes.Moving(), tmp_path / "deterministic", deterministic=True)


@on_ranks(2)
def test_random_keys_and_flags_are_state_that_is_resumed(tmp_path):
    recipe = recipes.Keyed(epochs=2)
    whole, _ = fit(recipe, tmp_path / "whole")
    check_same(whole, train_plainly(recipes.Keyed(epochs=2)))
    fit(recipe, tmp_path / "parts", steps=3)
    check_same(fit(recipe, tmp_path / "parts", steps=6, resume=True)[0], whole, 0)


# Optimizers.


@on_ranks(2)
@pytest.mark.parametrize("options", [{}, {"micro_batch": 2, "deterministic": True}], ids=["buckets", "deterministic"])
def test_each_loss_is_minimized_by_its_own_parameters(options, tmp_path):
    recipe = Duel()
    found, _ = fit(recipe, tmp_path / "run", **options)
    data, params, optimizers = recipe.dataset("train"), recipe.model(None)["params"], recipe.optimizer()
    states = {key: tx.init(params[key]) for key, tx in optimizers.items()}
    for ids in order.iterate_batches(len(data), recipe.batch_size, 0, 0):
        batch, updated = recipe.collate([data[i] for i in ids]), {}
        for key, tx in optimizers.items():

            def objective(params, key=key, batch=batch):
                return recipe.score({"params": params}, batch, None)[f"loss_{key}"].mean()

            changes, states[key] = tx.update(jax.grad(objective)(params)[key], states[key], params[key])
            updated[key] = optax.apply_updates(params[key], changes)
        params = updated
    check_same(found, jax.tree.map(np.asarray, {"params": params}))


@on_ranks(2)
def test_optimizers_of_other_keys_are_refused(tmp_path):
    with pytest.raises(UserError, match="'generator', 'critic'; expected one for each top-level key of params: 'disc"):
        fit(OtherKeys(), tmp_path / "run")


@on_ranks(2)
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in SOME_OPTIMIZERS else pytest.mark.slow) for kind in OPTIMIZERS],
)
def test_an_optimizer_of_optax_is_as_in_a_plain_loop_and_resumed(kind, tmp_path):
    recipe = Optax(kind=kind, epochs=2)
    found, summary = fit(recipe, tmp_path / "run")
    assert summary["compilations"] == 4
    # The schedule is inside the momentum, where it cannot be a factor.
    inside = optax.rmsprop(lambda step: recipe.lr * (1 - step / 6), momentum=0.9) if kind == "injected" else None
    if kind != "noisy":  # whose noise is drawn for other trees
        check_same(found, train_plainly(dataclasses.replace(recipe), inside), 1e-5)
    constant = Optax(kind=kind, epochs=2, schedule="constant")
    whole, _ = fit(constant, tmp_path / "whole", ema=0.9)
    fit(constant, tmp_path / "parts", ema=0.9, steps=3)
    check_same(fit(constant, tmp_path / "parts", ema=0.9, steps=6, resume=True)[0], whole, 0)


# What is refused.


def get_refusal(what: str, folder: Path) -> tuple[str, str]:
    os.environ["HVDTRAIN_TEST_SPOIL"] = what
    try:
        fit(Spoiled(), folder)
    except KnownError as error:
        return str(error), error.trace if isinstance(error, RecipeError) else ""
    return "trained", ""


REFUSALS = {
    "integer": "the parameter 'n' is int32, which has no gradient",
    "function": "Spoiled.model() returned 'params.f', a PjitFunction; expected arrays only: keep the rest on self",
    "twice": "two arrays of the model are called 'a.b', by keys joined with dots: rename one",
    "tuple model": 'Spoiled.model() returned tuple; expected {"params": a tree of arrays that is trained}',
    "empty params": 'Spoiled.model() returned no array in "params": there is nothing to train',
    "model raises": "Spoiled.model() raised ValueError: of model",
    "structure": "Spoiled.score returned another 'batch_stats': its structure is PyTreeDef({'var': *}); expected",
    "shape": "Spoiled.score returned 'batch_stats.mean' of shape (",
    "state type": 'add to Spoiled: buffers = {"batch_stats.n": "rank0"}',
    "typo": "Spoiled.score() returned 'batch_stat' next to the scores; expected what training changes of",
    "optimizer raises": "Spoiled.optimizer() raised ValueError: of optimizer",
    "no optimizer": "Spoiled.optimizer() returned NoneType; expected an optax.GradientTransformation: does",
    "torch optimizer": "Spoiled.optimizer() returned SGD; expected an optax.GradientTransformation",
    "polyak": "Spoiled.optimizer() returned an optimizer that needs more than gradients (TypeError: scale_by_polyak",
    "step": "Spoiled.score() raised AttributeError: now.step in score would be the same in all steps",
    "branch": "Spoiled.score() raised TracerBoolConversionError: Attempted boolean conversion of traced array",
    "key error": "Spoiled.score() raised KeyError: 'offset'",
    "mismatch": "Spoiled.score() raised TypeError: dot_general requires contracting dimensions to have the same shape",
    "scalar": "one value per example: 'loss' should have shape (2,) for 2 examples, got shape ()",
    "none": "Spoiled.score must return a dict with 'loss', got NoneType",
    "array": "Spoiled.score must return a dict with 'loss', got ",
    "no loss": "Spoiled.score must return a dict with 'loss', got a dict of 'accuracy'",
    "vector loss": "'loss' should have shape (2,) for 2 examples, got shape (2, 1)",
    "three": "'loss' is a tuple of 3; expected one value per example, or a pair (numerators, denominators)",
    "complex": "'hits' should be real, got complex64: take its abs()",
    "float score": "'hits' should have shape (2,)",
}


def test_what_is_not_as_it_should_be_is_refused_by_name(world2: KeptWorld, tmp_path: Path) -> None:
    for number, (what, text) in enumerate(REFUSALS.items()):
        ((message, trace),) = set(world2.run(get_refusal, what, tmp_path / str(number)))
        assert text in message, what
        assert "\n" not in message, what
        assert trace.count("  File ") in (0, 1), trace  # the recipe's own line
        assert "recipe" in trace or not trace
        assert "JAX has removed" not in trace
