"""Keras recipes on two ranks, on the backends JAX and torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.ranks.harness import rows
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, refusal, train

RECIPES = Path(__file__).parent / "keras_recipes.py"


pytestmark = pytest.mark.parametrize("keras_worlds", ["jax", *slow("tensorflow", "torch")], indirect=True)


def check_objective(pairs: bool) -> None:
    """Gradients of two passes add up to the derivative of loss + regularization over all examples."""
    import torch

    from hvdtrain.keras.adaptation import adapt_keras
    from hvdtrain.recipe.registry import load_recipe
    from hvdtrain.torch.scores import get_numerators

    recipe = load_recipe(f"{RECIPES}:Regularized")(pairs=pairs)
    data, entropy = recipe.dataset("train"), np.zeros(2, np.uint32)
    functions, backend = adapt_keras().make_functions(recipe, entropy, "off", lambda: None)
    program = backend.compile_score(functions, ["loss"])
    x, y, weight = recipe.collate([data[i] for i in range(6)])
    total = weight.sum() if pairs else 6.0

    def evaluate(params: dict, part: slice) -> tuple[float, float, dict[str, torch.Tensor]]:
        batch = x[part], y[part], weight[part]
        returned, pull_back = program.score_for_training(params, functions.state, batch, entropy)
        numerators = backend.export_array(get_numerators(returned.scores["loss"]))
        gradients = pull_back({"loss": torch.full((len(batch[0]),), 1 / float(total))})
        exported = {name: backend.export_array(gradient).clone() for name, gradient in gradients.items()}
        return (
            float(numerators.double().sum()),
            float(backend.export_array(returned.scores["regularization"])[0]),
            exported,
        )

    first, second = evaluate(functions.params, slice(0, 4)), evaluate(functions.params, slice(4, 6))
    for name, array in functions.params.items():
        values = backend.export_array(array).clone()
        ends = []
        for sign in (1, -1):
            moved = values.clone()
            moved.view(-1)[0] += sign * 1e-2
            numerators, added, _ = evaluate({**functions.params, name: backend.import_tensor(moved)}, slice(0, 6))
            ends.append(numerators / float(total) + added)
        gradient = (first[2][name] + second[2][name]).view(-1)[0].item()
        assert gradient == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=2e-3), name


@pytest.mark.parametrize("pairs", [False, True])
def test_regularizers_count_once_however_examples_are_divided(keras_world: KeptWorld, pairs: bool) -> None:
    keras_world.run(check_objective, pairs)


def test_what_layers_add_is_a_column_of_its_own(keras_world: KeptWorld, tmp_path: Path) -> None:
    summary = train(keras_world, f"{RECIPES}:Regularized", tmp_path / "run", "--added", "mean", "--log-every", "1")
    assert summary["eval"]["regularization"] > 0
    assert all(row["regularization"] > 0 for row in rows(tmp_path / "run") if "loss" in row)


def test_a_sum_over_a_batch_is_refused(keras_world: KeptWorld, tmp_path: Path) -> None:
    text = refusal(keras_world, f"{RECIPES}:Regularized", tmp_path / "run", "--added", "sum")
    assert "add a mean over the batch's examples" in text
    text = refusal(keras_world, f"{RECIPES}:Regularized", tmp_path / "run", "--added", "mean", "--pairs")
    assert "the loss has denominators of its own" in text
