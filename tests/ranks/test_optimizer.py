"""hvdtrain.torch.DistributedOptimizer in a loop of one's own, against one process with the whole batch."""

import pytest
import torch
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.system.errors import UserError
from hvdtrain.torch import DistributedOptimizer, broadcast_state
from tests.support.worlds import on_ranks

STEPS = 5


def make_model(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def examples(step, dtype=torch.float64):
    """The global batch of a step, and this rank's equal part of it."""
    made = torch.Generator().manual_seed(step)
    inputs = torch.randn(12 * collectives.size(), 6, generator=made, dtype=torch.float64).to(dtype)
    return inputs, inputs[collectives.rank() * 12 : collectives.rank() * 12 + 12]


def loss_of(model, inputs):
    return (model(inputs) - inputs[:, :3]).square().sum(1).mean()


def wrap(model, optimizer, **options):
    return DistributedOptimizer(optimizer, model.named_parameters(), **options)


def same(model, reference, tolerance=1e-12):
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@on_ranks(1, 2, 3)
def test_training_loop_equals_one_process_on_the_whole_batch():
    """Adam, momentum and all: the mean over ranks is the gradient of the whole batch."""
    for cls in (torch.optim.SGD, torch.optim.AdamW):
        model, reference = make_model(), make_model()
        optimizer, plain = wrap(model, cls(model.parameters(), lr=0.1)), cls(reference.parameters(), lr=0.1)
        for step in range(STEPS):
            whole, mine = examples(step)
            for each, m, inputs in ((optimizer, model, mine), (plain, reference, whole)):
                each.zero_grad(set_to_none=bool(step % 2))
                loss_of(m, inputs).backward()
                each.step()
        same(model, reference)


@on_ranks(1, 2, 3)
def test_clipping_after_synchronize():
    model, reference = make_model(), make_model()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(STEPS):
        whole, mine = examples(step)
        optimizer.zero_grad()
        loss_of(model, mine).backward()
        optimizer.synchronize()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        plain.zero_grad()
        loss_of(reference, whole).backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        plain.step()
        torch.testing.assert_close(norm, expected)
        assert norm > 0.05, "the clipping must bite"
    same(model, reference)


@on_ranks(1, 2, 3)
def test_scaler_unscales_what_is_reduced():
    """No synchronize(): the scaler must not unscale gradients that are in flight, nor see this rank's overflow only."""
    model, reference = make_model(torch.float32), make_model(torch.float32)
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(STEPS):
        whole, mine = examples(step, torch.float32)
        overflow = step == 2
        optimizer.zero_grad()
        loss = loss_of(model, mine)
        if overflow and collectives.rank() == collectives.size() - 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        if overflow:
            assert scaler.get_scale() < before, "every rank must see the overflow of one"
            continue
        plain.zero_grad()
        loss_of(reference, whole).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        plain.step()
    same(model, reference, 1e-5)


@on_ranks(1, 2, 3)
def test_accumulated_passes_equal_one_pass_on_the_whole_batch():
    model, reference = make_model(), make_model()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), backward_passes_per_step=3)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(STEPS):
        whole, mine = examples(step)
        optimizer.zero_grad()
        for part in mine.chunk(3):
            (loss_of(model, part) / 3).backward()
        optimizer.step()
        plain.zero_grad()
        loss_of(reference, whole).backward()
        plain.step()
    same(model, reference)


@on_ranks(2, 3)
def test_one_backward_too_many_is_an_error():
    model = make_model()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), name="only.")
    _, mine = examples(0)
    loss_of(model, mine).backward()
    with pytest.raises(RuntimeError, match="backward_passes_per_step=1"):
        loss_of(model, mine).backward()
    optimizer.step()
    optimizer.exchange.close()


@on_ranks(2, 3)
def test_a_parameter_is_wrapped_once():
    """Twice is an error that names it, until the first exchange is closed; which then takes no part any more."""
    model, reference = make_model(), make_model()
    optimizer = first = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(STEPS):
        if step == 2:
            with pytest.raises(ValueError, match=r"^2.weight is in another DistributedOptimizer"):
                DistributedOptimizer(torch.optim.SGD(model[2].parameters(), lr=0.1), model[2].named_parameters("2"))
        if step == 3:
            first.exchange.close()
            optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
        whole, mine = examples(step)
        for each, m, inputs in ((optimizer, model, mine), (plain, reference, whole)):
            each.zero_grad(set_to_none=step != 3)
            loss_of(m, inputs).backward()
            each.step()
    assert (first.exchange.steps, optimizer.exchange.steps) == (3, STEPS - 3)
    assert not first.exchange.has_pending_gradients
    same(model, reference)


class Branches(nn.Module):
    """Uses `left` on some ranks only, `never` nowhere; `frozen` does not train; `shared` is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right, self.never = (nn.Linear(6, 3, dtype=torch.float64) for _ in range(3))
        self.frozen = nn.Linear(6, 6, dtype=torch.float64).requires_grad_(False)
        self.shared = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, inputs, left):
        inputs = self.frozen(inputs)
        out = self.right(inputs) * self.shared
        return (out + self.left(inputs)) * self.shared if left else out


@on_ranks(1, 2, 3)
def test_unused_frozen_and_shared_parameters():
    """With weight decay, an unused parameter must not move: its gradient stays None, as in one process."""
    model, reference = Branches(), Branches()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(STEPS):
        whole, mine = examples(step)
        left = step != 2  # in step 2 no rank uses it
        optimizer.zero_grad()
        loss = (model(mine, left and collectives.rank() == 0) - mine[:, :3]).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        plain.zero_grad()
        parts = whole.chunk(collectives.size())
        total = sum(
            (reference(part, left and rank == 0) - part[:, :3]).square().sum(1).mean()
            for rank, part in enumerate(parts)
        )
        (total / collectives.size()).backward()
        plain.step()
    assert model.never.weight.grad is None
    same(model, reference)


@on_ranks(1, 2, 3)
def test_channels_last_half_precision_and_scalar_parameters_train():
    """Channels-last weights, bfloat16 and float16 parameters, a 0-dim parameter."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        torch.manual_seed(4)
        make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2))  # noqa: E731
        model = make().to(dtype=dtype, memory_format=torch.channels_last)
        reference = make().to(dtype=dtype, memory_format=torch.channels_last)
        model.scale = nn.Parameter(torch.ones((), dtype=dtype))
        reference.scale = nn.Parameter(torch.ones((), dtype=dtype))
        broadcast_state(model)
        reference.load_state_dict(model.state_dict())
        assert not model[0].weight.is_contiguous()
        with pytest.raises(UserError, match=r"0\.weight"):  # Horovod's own exchange would fail later, with no message
            wrap(model, torch.optim.SGD(model.parameters(), lr=0.05), exchange="horovod")
        optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.05))
        plain = torch.optim.SGD(reference.parameters(), lr=0.05)
        for step in range(STEPS):
            made = torch.Generator().manual_seed(step)
            whole = torch.randn(4 * collectives.size(), 3, 6, 6, generator=made).to(dtype)
            mine = whole[collectives.rank() * 4 : collectives.rank() * 4 + 4]
            for each, m, inputs in ((optimizer, model, mine), (plain, reference, whole)):
                each.zero_grad()
                (nn.Sequential.forward(m, inputs) * m.scale).square().mean().backward()
                each.step()
        assert model[0].weight.grad.stride() == model[0].weight.stride()
        same(model, reference, tolerance)


@on_ranks(1, 2, 3)
def test_broadcast_brings_everything():
    torch.manual_seed(collectives.rank())
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=torch.bfloat16))
    model.register_buffer("mask", torch.rand(5) > 0.5)
    plain = torch.optim.AdamW(model.parameters(), lr=0.1 * (collectives.rank() + 1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    plain.step()
    optimizer = wrap(model, plain)
    assert optimizer.state, "the wrapper must keep the state"
    broadcast_state(model, optimizer)
    import horovod.torch as hvd

    mine = [*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())]
    everyone = hvd.allgather_object([[str(t.dtype), t.double().tolist()] for t in mine])
    assert all(other == everyone[0] for other in everyone)
    assert optimizer.param_groups[0]["lr"] == 0.1


@on_ranks(1, 2, 3)
def test_schedulers_and_closures():
    model = make_model()
    optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loss_of(model, examples(0)[1]).backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    if collectives.size() > 1:
        with pytest.raises(ValueError, match="closure"):
            optimizer.step(lambda: 0.0)


class Own(torch.optim.SGD):
    """An optimizer whose step is its own, with torch's inside."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.5)


@on_ranks(1, 2, 3)
def test_a_step_is_torchs_and_its_hooks_run_once():
    for cls, scale in ((torch.optim.SGD, 1), (Own, 0.5), (torch.optim.Adam, None)):
        model, plain = make_model(), make_model()
        ours, theirs = wrap(model, cls(model.parameters(), lr=0.1)), cls(plain.parameters(), lr=0.1)
        ran = []
        ours.register_step_pre_hook(lambda *_, ran=ran: ran.append("before"))
        ours.register_step_post_hook(lambda *_, ran=ran: ran.append("after"))
        before = [p.detach().clone() for p in plain.parameters()]
        for net in (model, plain):
            loss_of(net, torch.ones(4, *examples(0)[1].shape[1:], dtype=torch.float64)).backward()
        gradients = [p.grad.clone() for p in plain.parameters()]
        ours.step()
        theirs.step()
        assert cls is Own or ran == ["before", "after"]  # torch itself runs them again for a step within a step
        same(model, plain)
        for p, old, gradient in zip(plain.parameters(), before, gradients, strict=True):
            assert scale is None or torch.allclose(p, (old - 0.1 * gradient) * scale, rtol=1e-14)
        assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
        ours.exchange and ours.exchange.close()
