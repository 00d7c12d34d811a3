"""Loops of one's own: several optimizers, freezing, groups added later, schedulers and optimizers of any kind."""

import copy
import warnings

import pytest
import torch
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.torch import DistributedOptimizer, broadcast_state
from tests.ranks.changing_recipes import Delegating, Lion, Lookahead
from tests.support.worlds import on_ranks

binary_cross_entropy = nn.functional.binary_cross_entropy_with_logits


def wrap(model, optimizer, **options):
    return DistributedOptimizer(optimizer, model.named_parameters(), **options)


def batch(step, columns, rank=None):
    """A rank's 4 examples of a step; all ranks' for None."""
    made = torch.Generator().manual_seed(step)
    whole = torch.randn(4 * collectives.size(), columns, generator=made, dtype=torch.float64)
    return whole if rank is None else whole[4 * rank : 4 * rank + 4]


def same(model, reference, tolerance=1e-12):
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def gan_losses(generator, discriminator, step, rank):
    """The discriminator's two losses and the generator's, each a function to be called when it is needed."""
    real, noise = batch(step, 4, rank), batch(100 + step, 2, rank)
    ones = torch.ones(len(real), 1, dtype=torch.float64)
    fake = generator(noise)
    return (
        lambda: binary_cross_entropy(discriminator(real), ones),
        lambda: binary_cross_entropy(discriminator(fake.detach()), 0 * ones),
        lambda: binary_cross_entropy(discriminator(fake), ones),
    )


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("way", ["two passes", "paused", "frozen"])
def test_a_gan_with_two_optimizers(way):
    """The generator's backward pass goes through the discriminator, whose optimizer must not take it for its own."""

    def make():
        torch.manual_seed(0)
        nets = nn.Linear(2, 4).double(), nn.Linear(4, 1).double()
        return nets, [torch.optim.Adam(net.parameters(), lr=0.05) for net in nets]

    (g_net, d_net), (g_plain, d_plain) = make()
    (g_reference, d_reference), plain = make()
    g = wrap(g_net, g_plain)
    d = wrap(d_net, d_plain, backward_passes_per_step=2 if way == "two passes" else 1)
    for step in range(5):
        on_real, on_fake, fooled = gan_losses(g_net, d_net, step, collectives.rank())
        d.zero_grad()
        if way == "two passes":
            on_real().backward()
            on_fake().backward()
        else:
            (on_real() + on_fake()).backward()
        d.step()
        g.zero_grad()
        if way == "paused":
            with d.paused():
                fooled().backward()
        else:
            d_net.requires_grad_(way != "frozen")
            fooled().backward()
            d_net.requires_grad_(True)
        g.step()

        on_real, on_fake, fooled = gan_losses(g_reference, d_reference, step, None)
        plain[1].zero_grad()
        (on_real() + on_fake()).backward()
        plain[1].step()
        plain[0].zero_grad()
        fooled().backward()
        plain[0].step()
    same(g_net, g_reference)
    same(d_net, d_reference)


@on_ranks(2)
def test_a_gan_without_pausing_gets_an_error_that_names_the_remedy():
    (generator, discriminator) = nn.Linear(2, 4).double(), nn.Linear(4, 1).double()
    d = wrap(discriminator, torch.optim.Adam(discriminator.parameters()))
    for step in range(2):
        on_real, on_fake, fooled = gan_losses(generator, discriminator, step, collectives.rank())
        if step == 1:
            with pytest.raises(RuntimeError, match=r"run it within `with optimizer.paused\(\):` of this one"):
                d.zero_grad()
            d.synchronize()
        d.zero_grad()
        (on_real() + on_fake()).backward()
        d.step()
        fooled().backward()
    d.synchronize()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        for loss in gan_losses(generator, discriminator, step, collectives.rank())[:2]:
            loss().backward()
    d.synchronize()
    d.exchange.close()


@on_ranks(1, 2, 3)
def test_freezing_and_groups_added_later():
    model, reference = two_layers(), two_layers()
    nets = (model, reference)
    extras = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in nets]
    own = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for net in nets:
        net[0].requires_grad_(False)
    for step in range(40):
        if step == 2:
            for optimizer, extra in zip((own, plain), extras, strict=True):
                optimizer.add_param_group({"params": [extra], "lr": 0.01})
        for net in nets:
            net[0].requires_grad_(5 <= step < 10 or step >= 35)
            net[2].weight.requires_grad_(step % 3 > 0)
        for optimizer, net, extra, rank in zip((own, plain), nets, extras, (collectives.rank(), None), strict=True):
            inputs = batch(step, 4, rank)
            optimizer.zero_grad()
            (net(inputs).pow(2).mean() + (extra * inputs.mean()).sum()).backward()
            optimizer.step()
        if collectives.size() > 1 and step == 34:
            asleep = [name for bucket in own.exchange.buckets if bucket.suspended for name in bucket.names]
            assert set(asleep) == {"0.weight", "0.bias"}, "frozen layers travel for ever"
    same(model, reference)
    torch.testing.assert_close(extras[0], extras[1])


@on_ranks(2)
def test_a_parameter_added_with_other_values_or_on_one_rank_only_is_refused():
    for case in ("values", "missing"):
        model = two_layers()
        extra = nn.Parameter(
            torch.full((2,), float(collectives.rank()) if case == "values" else 1.0, dtype=torch.float64)
        )
        own = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if case == "values" or collectives.rank() == 1:
            own.add_param_group({"params": [extra]})
        (model(batch(0, 4, collectives.rank())).pow(2).mean() + extra.sum()).backward()
        with pytest.raises(RunError, match=r"parameter group1\.0 is .* on rank 0 and .* on rank 1: add it"):
            own.step()
        own.exchange.close()


@on_ranks(1, 2)
def test_compression_remembers_through_frozen_steps():
    """What a frozen layer's bucket has not sent is sent when it is trained again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    own = wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.0), compression="topk:0.1,min=1,warmup=0", bucket_bytes=1
    )
    given, applied = torch.zeros(64, 64), torch.zeros(64, 64)
    for step in range(30):
        trained = step < 4 or step >= 25
        model[0].requires_grad_(trained)
        own.zero_grad()
        made = torch.Generator().manual_seed(step * 10 + collectives.rank())
        weights = torch.randn(64, 64, generator=made)
        loss = model[1].weight.sum()
        if trained:
            loss = loss + (model[0].weight * weights).sum()
            given += weights / collectives.size()
        loss.backward()
        own.step()
        if model[0].weight.grad is not None:
            applied += model[0].weight.grad
    if collectives.size() == 1:
        torch.testing.assert_close(applied, given)
        return
    bucket = next(bucket for bucket in own.exchange.buckets if bucket.names == ["0.weight"])
    left = bucket.reducer.residual.view(64, 64) / collectives.size()
    both = torch.stack([given, left])
    collectives.wait(collectives.all_reduce_async_(both, "test.both"))
    torch.testing.assert_close(applied + both[1], both[0], rtol=1e-4, atol=1e-4)
    assert both[1].abs().sum() > 0
    own.exchange.close()


@on_ranks(1, 2)
def test_any_optimizer_and_scheduler():
    """The object stays itself, with its hooks and attributes; a scheduler made before counts and is not shadowed."""
    makers = (
        lambda ps: Lion(ps, 0.01, 0.9),
        lambda ps: Lookahead(torch.optim.SGD(ps, lr=0.1, momentum=0.9)),
        lambda ps: Delegating(torch.optim.Adam(ps, lr=0.1)),
        lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.2, amsgrad=True),
    )
    for make in makers:
        model, reference = two_layers(), two_layers()
        inner, plain = make(model.parameters()), make(reference.parameters())
        inner.note = "kept"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (inner, plain)]
            own = wrap(model, inner)
            assert own is inner
            assert own.note == "kept"
            broadcast_state(model, own)
            for step in range(4):
                for optimizer, net, rank in ((own, model, collectives.rank()), (plain, reference, None)):
                    optimizer.zero_grad()
                    net(batch(step, 4, rank)).pow(2).mean().backward()
                    optimizer.step()
                for scheduler in schedulers:
                    scheduler.step()
        same(model, reference)
        saved = copy.deepcopy(own.state_dict())
        own.load_state_dict(saved)
        broadcast_state(model, own)
        assert own.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == pytest.approx(saved["param_groups"][0]["lr"])
        if hasattr(own, "base"):
            assert own.base.param_groups[0] is own.param_groups[0], "the optimizer within would not follow the other"


@on_ranks(2)
def test_order_of_parameters_must_be_the_same():
    """Before anything is overwritten, and where gradients are exchanged without a broadcast."""
    names = ["a", "b"] if collectives.rank() == 0 else ["b", "a"]
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"^rank 1 on .*: parameter 1 is 'b.weight' .*, rank 0 has 'a.weight' "):
        broadcast_state(model)
    assert all(map(torch.equal, before, model.parameters()))
