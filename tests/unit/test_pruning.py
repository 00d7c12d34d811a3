"""The schedule of pruning, and which weights are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvdtrain.recipe.pruning import NUM_PRUNINGS, parse_pruning
from hvdtrain.torch.pruning import Pruner


def test_the_share_rises_as_the_cubic_of_zhu_and_gupta() -> None:
    schedule = parse_pruning("0.8,from:2ep,to:10ep", 50)
    assert (schedule.begin, schedule.end) == (100, 500)
    shares = [schedule.sparsity_after(step) for step in range(601)]
    assert shares[:101] == [0.0] * 101
    assert shares[500:] == [0.8] * 101
    assert shares == sorted(shares)
    assert len(set(shares)) == NUM_PRUNINGS + 1
    for step in range(100, 501, 4):
        assert shares[step] == pytest.approx(0.8 * (1 - (1 - (step - 100) / 400) ** 3), abs=1e-15)
    short = parse_pruning("0.5,from:2,to:9", 50)
    assert [short.sparsity_after(step) for step in range(2, 10)] == [0.5 * (1 - (1 - i / 7) ** 3) for i in range(8)]
    assert short.describe(5) == (
        "prune     0.5 of the weights are zero at step 9, the first after step 2; 0.4067 at the end, step 5"
    )


def test_exactly_so_many_are_chosen_the_first_of_equal_ones() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.5)
        net[0].weight[1, 2] = -0.1
    pruner = Pruner("Mine", net, set(net.parameters()))
    assert pruner.prune_to(4 / 14)
    assert net[0].weight.tolist() == [[0, 0, 0], [0.5, 0.5, 0]]
    assert not pruner.prune_to(3 / 14)
    with torch.no_grad():
        net[0].weight.fill_(0.01)  # as an optimizer could
    assert pruner.prune_to(0.7)
    assert (pruner.num_pruned, pruner.sparsity) == (10, 10 / 14)
    assert int((net[0].weight == 0).sum()) == 6
    assert net[1].weight.flatten().tolist() == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]
    assert (net[0].bias == 0.5).all()


def test_masks_are_saved_in_bits_and_loaded_back() -> None:
    nets = [nn.Linear(5, 3), nn.Linear(5, 3)]
    pruners = [Pruner("Mine", net, set(net.parameters())) for net in nets]
    pruners[0].prune_to(0.5)
    state = pruners[0].get_state()
    assert {name: (t.dtype, t.numel()) for name, t in state.items()} == {"weight": (torch.uint8, 2)}
    pruners[1].load_state(state)
    assert pruners[1].num_pruned == 8
    assert torch.equal(pruners[1].masks[nets[1].weight], nets[0].weight == 0)
