"""What a trace would freeze or lose: gradients and autocast switched, random numbers, state that a forward writes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from models import Holder, assert_same, check, module, ran_fused, reason_of
from torch import nn

import fxfuse

X = torch.randn(5, 8)


class Reverse(torch.autograd.Function):
    """Gradient reversal: the forward is nothing, the backward is the point."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def own_backward(self, x):
    return F.relu(self.block.fc(Reverse.apply(self.pre(x))))


def without_gradient(self, x):
    with torch.no_grad():
        x = self.pre(x)
    return F.relu(self.block.fc(x))


@torch.no_grad()
def decorated_without_gradient(self, x):
    return F.relu(self.block.fc(x))


def with_gradient_switched(self, x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = self.pre(x)
    torch.set_grad_enabled(before)
    return F.relu(self.block.fc(y))


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(self.block.fc(x.float()))


def with_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.relu(self.block.fc(x))


def checkpointed(self, x):
    return torch.utils.checkpoint.checkpoint(lambda v: F.relu(self.block.fc(v)), x, use_reentrant=False)


def saved_elsewhere(self, x):
    with torch.autograd.graph.save_on_cpu():
        return F.relu(self.block.fc(x))


def random_in_torch(self, x):
    if torch.rand(1).item() < 0.5:
        return F.relu(self.block.fc(x)) * 2
    return F.relu(self.block.fc(x))


def random_in_python(self, x):
    return F.relu(self.block.fc(x)) * random.choice([2.0, 3.0, 4.0, 5.0])


def noise(self, x):
    return F.relu(self.block.fc(x + torch.randn(8)))


def makes_constant(self, x):
    return F.relu(self.block.fc(x)) * torch.arange(6)


def counts(self, x):
    self.calls = self.calls + 1
    return F.relu(self.block.fc(x))


def counts_in_buffer(self, x):
    self.count += 1
    return F.relu(self.block.fc(x)) * self.count


def keeps_in_list(self, x):
    y = F.relu(self.block.fc(x))
    self.kept.append(y)
    return y


def keeps_in_dict(self, x):
    self.cache["last"] = x
    return F.relu(self.block.fc(x))


KEPT: list[torch.Tensor] = []


def keeps_in_global(self, x):
    KEPT.append(x)
    return F.relu(self.block.fc(x))


@pytest.mark.parametrize(
    ("forward", "attributes", "why"),
    [
        (own_backward, {"pre": nn.Linear(8, 8)}, "autograd.Function Reverse"),
        (without_gradient, {"pre": nn.Linear(8, 8)}, "switches gradients off"),
        (decorated_without_gradient, {}, "switches gradients off"),
        (with_gradient_switched, {"pre": nn.Linear(8, 8)}, "switches gradients"),
        (without_autocast, {}, "autocast"),
        (with_autocast, {}, "autocast"),
        (checkpointed, {}, ""),
        (saved_elsewhere, {}, "saved"),
        (random_in_torch, {}, "rand"),
        (random_in_python, {}, "random numbers"),
        (noise, {}, "randn"),
        (makes_constant, {}, "arange"),
        (counts, {"calls": 0}, "writes self.calls"),
        (keeps_in_list, {"kept": []}, "keeps a value"),
        (keeps_in_dict, {"cache": {}}, "keeps a value"),
        (keeps_in_global, {}, "keeps a value"),
    ],
)
def test_what_a_trace_would_lose_runs_as_written(forward, attributes, why):
    model = module(forward, **attributes)
    KEPT.clear()
    fused = fxfuse.optimize(model)
    assert why in reason_of(fused), reason_of(fused)
    assert not KEPT

    def run(m):
        torch.manual_seed(1), random.seed(1)
        y = m(X)
        params = list(model.parameters())
        return y, torch.autograd.grad(y.sum(), params, allow_unused=True) if y.requires_grad else ()

    for _ in range(3):
        assert_same(run(fused), run(model), rtol=1e-4, atol=1e-5)


def test_optimize_draws_no_random_numbers():
    torch.manual_seed(0), random.seed(0)
    before, python = torch.get_rng_state(), random.getstate()
    model = module(random_in_torch, drop=nn.Dropout())
    made = torch.get_rng_state()
    fxfuse.optimize(model)
    fxfuse.optimize(module(random_in_python))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python
    torch.set_rng_state(made)
    fxfuse.optimize(model, X)
    assert torch.equal(torch.get_rng_state(), made)


def test_state_written_by_the_forward_goes_on():
    model = module(counts, calls=0)
    fused = fxfuse.optimize(model)
    fused(X), fused(X)
    assert fused.calls == 2 and model.calls == 0

    model = module(keeps_in_list, kept=[])
    fused = fxfuse.optimize(model)
    fused(X), fused(X)
    assert len(fused.kept) == 2 and model.kept == [] and all(type(k) is torch.Tensor for k in fused.kept)


def test_buffer_counted_in_forward():
    model = module(counts_in_buffer)
    model.register_buffer("count", torch.zeros(()))
    fused = fxfuse.optimize(model)
    a, b = fused(X), fused(X)
    assert_same(b, a * 2)

    class InPlace(Holder):
        def forward(self, x):
            self.count.add_(1)
            return F.relu(self.block.fc(x)) * self.count

    model = InPlace()
    model.register_buffer("count", torch.zeros(()))
    fused = check(model, X)
    assert ran_fused(fused, X) == [""]
