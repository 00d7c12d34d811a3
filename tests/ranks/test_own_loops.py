"""Loops of one's own: several optimizers, freezing, groups added later, schedulers and optimizers of any kind."""

import contextlib
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


@on_ranks(1, 2, 3)
@pytest.mark.parametrize(
    "way", ["zero_grad", "the module's zero_grad", "five steps of the critic", "compressed", "named"]
)
def test_a_gan_as_it_is_written_for_one_process(way):
    """What the generator's loss adds to the discriminator's gradients is dropped, also if it is being reduced."""

    def make():
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Linear(a, 64), nn.Tanh(), nn.Linear(64, b)).double() for a, b in ((2, 4), (4, 1))]
        return nets, [torch.optim.Adam(net.parameters(), lr=0.01) for net in nets]

    def train(nets, g, d, rank):
        g_net, d_net = nets
        for step in range(6):
            for turn in range(5 if way == "five steps of the critic" else 1):
                on_real, on_fake, _ = gan_losses(g_net, d_net, 10 * step + turn, rank)
                (d_net if "module" in way else d).zero_grad()
                if way == "named":
                    (on_real() + on_fake()).backward()
                else:
                    on_real().backward()
                    on_fake().backward()
                d.step()
            fooled = gan_losses(g_net, d_net, 10 * step + 9, rank)[2]
            (g_net if "module" in way else g).zero_grad()
            fooled().backward()
            g.step()

    nets, (g_plain, d_plain) = make()
    spec = "topk:0.5,warmup=0,min=1" if way == "compressed" else "none"
    names = ("g.", "d.") if way == "named" else ("", "")  # their buckets are sent during backward passes
    passes = 2 if way in ("five steps of the critic", "compressed") else 1
    g = wrap(nets[0], g_plain, compression=spec, name=names[0])
    d = wrap(nets[1], d_plain, compression=spec, name=names[1], backward_passes_per_step=passes)
    train(nets, g, d, collectives.rank())
    if collectives.size() > 1:
        g.exchange.close()
        d.exchange.close()
    if way != "compressed":
        reference, (g, d) = make()
        train(reference, g, d, None)
        same(nets[0], reference[0])
        same(nets[1], reference[1])
    else:
        for net in nets:  # the same on all ranks
            for p in net.parameters():
                every = collectives.wait(collectives.all_gather_async(p.detach().reshape(1, -1), "test.p"))
                assert (every == every[0]).all()


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("names", [("", ""), ("a.", "b.")], ids=["step", "overlapped"])
def test_two_optimizers_of_one_model_from_one_backward_pass(names):
    """As matrices have one and all else another; with names of their own they are exchanged during the pass."""

    def make(model):
        biases = [p for p in model.parameters() if p.ndim == 1]
        matrices = [p for p in model.parameters() if p.ndim == 2]
        return torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.Adam(biases, lr=0.01)

    model, reference = two_layers(), two_layers()
    wrapped = [wrap(model, inner, name=name) for inner, name in zip(make(model), names, strict=True)]
    plain = make(reference)
    for step in range(5):
        for net, optimizers, rank in ((model, wrapped, collectives.rank()), (reference, plain, None)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            net(batch(step, 4, rank)).pow(2).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    same(model, reference)
    for optimizer in wrapped if collectives.size() > 1 else ():
        optimizer.exchange.close()


class Interrupted(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("spec", ["none", "int8"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_dropped_leave_nothing_behind(spec, set_to_none):
    """Steps are skipped by agreement, passes fail half-way, `step` comes without `backward`; buckets are sent early."""

    def train(model, optimizer, rank, disturbed):
        for step in range(12):
            inputs = batch(step, 4, rank)
            if disturbed and step % 3 == 1:  # skipped
                model(7 * inputs).sum().backward()
                optimizer.zero_grad(set_to_none)
            if disturbed and step % 3 == 2:  # on each rank somewhere else, or twice
                cut = Interrupted.apply if rank != 1 else lambda x: x
                for _ in range(2):
                    with contextlib.suppress(ArithmeticError):
                        model[2](cut(torch.tanh(model[0](inputs)))).sum().backward()
                    optimizer.zero_grad(set_to_none)
            if disturbed and step == 7:
                model(inputs).sum().backward()
                optimizer.synchronize()  # and no step
            optimizer.zero_grad(set_to_none)
            if step != 5:
                model(inputs).pow(2).mean().backward()
            optimizer.step()

    models = [two_layers() for _ in range(2)]
    for model, disturbed in zip(models, (True, False), strict=True):
        own = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), bucket_bytes=1, compression=f"{spec},warmup=0")
        train(model, own, collectives.rank(), disturbed)
        if collectives.size() > 1:
            own.exchange.close()
    same(*models, tolerance=0)
    if spec == "none":
        reference = two_layers()
        train(reference, torch.optim.SGD(reference.parameters(), lr=0.1), None, disturbed=False)
        same(models[0], reference)


@on_ranks(2, 3)
@pytest.mark.parametrize("sent", ["some", "all"])
def test_gradients_dropped_on_one_rank_only_are_an_error(sent):
    """At once if the rank had not sent all; else in the next step, which would add up gradients of different steps."""
    model = two_layers()
    own = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), bucket_bytes=1)
    rank = collectives.rank()

    def backward():
        model(batch(0, 4, rank)).pow(2).mean().backward()

    backward()
    own.step()
    own.zero_grad()
    error = pytest.raises(RunError, match=r"zero_grad\(\) has dropped gradients on some ranks that others use")
    if rank == 1:
        out = model[0](batch(0, 4, rank))
        with contextlib.suppress(ArithmeticError):
            model[2](torch.tanh(Interrupted.apply(out) if sent == "some" else out)).sum().backward()
        own.zero_grad()
    else:
        backward()
        with error if sent == "some" else contextlib.nullcontext():
            own.step()
    if sent == "all":
        backward()
        with error:
            own.step()
    own.exchange.close()


@on_ranks(2)
def test_a_scaler_that_skips_a_step_and_a_module_that_zeroes_its_gradients():
    """A new backward pass is exchanged, though the step that the last exchange was for never came."""
    model = two_layers()
    own = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    reference = two_layers()
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(4):
        for net, optimizer, rank in ((model, own, collectives.rank()), (reference, plain, None)):
            net.zero_grad()
            net(batch(step, 4, rank)).pow(2).mean().backward()
            if optimizer is own:
                own.synchronize()
            if step % 2:
                optimizer.step()
    same(model, reference)
    own.exchange.close()


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
