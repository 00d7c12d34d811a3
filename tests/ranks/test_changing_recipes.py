"""What is trained, or how, changes during a training: right on any number of ranks, against plain torch in float64."""

import json

import pytest
import torch

from hvdtrain.comm import collectives
from hvdtrain.system.errors import RunError
from tests.ranks import changing_recipes as recipes
from tests.ranks.changing_recipes import fit, train_plainly
from tests.support.worlds import on_ranks

CHANGED = ["Unfrozen", "InTurns", "Gradual", "BiasesOnly", "LoRA", "Grown", "InScore"]
ODD_OPTIMIZERS = ["Required", "Around", "Delegated", "Twice"]
ODD_SCORES = ["Reentrant", "NotReentrant", "Complex", "WithoutGraph", "Forces", "NanGradient"]


def check_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, p in found.items():
        torch.testing.assert_close(p, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    sums = collectives.gather_json([p.abs().sum().item() for p in found.values()], "test.sums")
    assert all(other == sums[0] for other in sums), "the ranks differ"


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("name", [*CHANGED, *ODD_OPTIMIZERS, *ODD_SCORES])
def test_changing_recipes_train_as_in_plain_torch(name, tmp_path):
    found, _ = fit(getattr(recipes, name), tmp_path / "run", skip_nonfinite=1)
    check_same(found, train_plainly(getattr(recipes, name)()))


@on_ranks(2)
@pytest.mark.parametrize("name", ["Unfrozen", "LoRA", "Complex", "NanGradient"])
def test_changing_recipes_clipped_train_as_in_plain_torch(name, tmp_path):
    """The norm is of what is trained at the time."""
    found, _ = fit(getattr(recipes, name), tmp_path / "run", skip_nonfinite=1, clip_norm=0.5)
    check_same(found, train_plainly(getattr(recipes, name)(), clip=0.5))


@on_ranks(2)
@pytest.mark.parametrize("name", ["Unfrozen", "InTurns", "LoRA", "NanGradient"])
def test_changing_recipes_compressed_train_close_to_plain_torch(name, tmp_path):
    """Values that round to float32 on the way, and memories that outlive steps without them and NaN."""
    for spec, tolerance in (("fp16,min=1", 5e-3), ("topk:1.0,min=1,warmup=0", 1e-5)):
        found, _ = fit(getattr(recipes, name), tmp_path / spec[:4], compression=spec, skip_nonfinite=1)
        check_same(found, train_plainly(getattr(recipes, name)()), tolerance)


def deterministic_bits(name, folder):
    found, _ = fit(getattr(recipes, name), folder / f"run{collectives.size()}", deterministic=True, skip_nonfinite=1)
    return {n: p.resolve_conj().numpy().tobytes() for n, p in found.items()}


@pytest.mark.parametrize("name", [*CHANGED[:-1], "Complex", "Around", "Reentrant"])
def test_deterministic_bits_do_not_depend_on_the_ranks(worlds, name, tmp_path):
    runs = [bits for size in (1, 2, 3) for bits in worlds[size].run(deterministic_bits, name, tmp_path)]
    assert len(runs) == 6
    assert all(bits == runs[0] for bits in runs)


@on_ranks(1, 2)
def test_a_step_whose_gradient_is_not_finite_is_named(tmp_path):
    with pytest.raises(RunError) as raised:
        fit(recipes.NanGradient, tmp_path / "ends")
    assert str(raised.value) == (
        "the gradient of 2.bias is not finite, though the loss is, at step 3 (epoch 3); look in score for a root, "
        "norm or division at 0, or skip such steps with --skip-nonfinite N"
    )
    _, summary = fit(recipes.NanGradient, tmp_path / "skips", skip_nonfinite=1)
    assert summary["skipped_nonfinite"] == 1
    rows = [json.loads(line) for line in (tmp_path / "skips" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == recipes.STEPS


@on_ranks(1, 2)
def test_two_trainings_with_one_model(tmp_path):
    """The first leaves neither hooks nor a class: the second trains the same objects."""
    net = recipes.Base().model()
    reference = recipes.Base().model()

    class Again(recipes.Base):
        def model(self):
            recipes.BUILT.append(net)
            return net

    class Plain(recipes.Base):
        def model(self):
            recipes.BUILT.append(reference)
            return reference

    for phase in range(3):
        for each in (net, reference):
            each[0].requires_grad_(phase != 0)
        check_same(fit(Again, tmp_path / f"run{phase}")[0], train_plainly(Plain()))
    assert all(not p._post_accumulate_grad_hooks for p in net.parameters())
