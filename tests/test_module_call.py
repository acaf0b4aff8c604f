"""A fused module is called as nn.Module calls one: whatever hangs on its call is run, though it takes a shorter way."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from models import Halved, ScaleNorm
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.nn.utils import parametrize

import fxfuse
from fxfuse.plan import fused_class, plan_of


@pytest.fixture(params=["fused", "aside"])
def fused(request):
    """Halved, that runs its graph, or steps aside for calls of 5 rows."""
    if request.param == "aside":
        request.getfixturevalue("as_on_a_gpu")
    made = fxfuse.optimize(Halved())
    made(torch.randn(5, 8))
    assert (plan_of(made).aside.latest is not None) is (request.param == "aside")
    return made


@pytest.fixture
def x():
    return torch.randn(5, 8, requires_grad=True)


def test_the_short_way_is_taken(fused, x, monkeypatch):
    want = nn.Module.__call__(fused, x)
    monkeypatch.setattr(type(fused), "forward", None)  # which nn.Module's would call
    torch.testing.assert_close(fused(x), want)


def test_hooks_of_the_module(fused, x):
    seen, want = [], fused(x).detach()
    handles = [
        fused.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        fused.register_forward_hook(lambda module, args, out: out + 1),
        fused.register_full_backward_pre_hook(lambda module, grads: seen.append("before")),
        fused.register_full_backward_hook(lambda module, inputs, grads: seen.append("after")),
    ]
    doubled = Halved.forward(fused, 2 * x) + 1
    out = fused(x)
    torch.testing.assert_close(out, doubled)
    out.sum().backward()
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(fused(x).detach(), want)


@pytest.mark.parametrize("which", range(4))
def test_each_hook_of_the_module_alone(fused, x, which):
    seen = []
    register = (
        fused.register_forward_pre_hook, fused.register_forward_hook, fused.register_full_backward_pre_hook,
        fused.register_full_backward_hook,
    )[which]  # fmt: skip
    register(lambda *args: seen.append(len(args)))
    fused(x).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("register", [
    register_module_forward_pre_hook, register_module_forward_hook, register_module_full_backward_pre_hook,
    register_module_full_backward_hook,
])  # fmt: skip
def test_hooks_of_all_modules(fused, x, register):
    seen = []
    with register(lambda module, *args: seen.append(module)):
        fused(x).sum().backward()
    assert sorted(map(id, seen)) == sorted(map(id, (fused, fused.fc)))


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
def test_a_call_of_all_modules_that_was_replaced(fused, x, monkeypatch, name):
    seen, real = [], getattr(nn.Module, name)

    def call(self, *args, **kwargs):
        seen.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, name, call)
    fused(x)
    assert seen[0] is fused


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
def test_a_call_of_all_modules_that_was_replaced_before_fxfuse_came(name):
    program = f"""
import torch
from torch import nn
seen, real = [], nn.Module.{name}
def call(self, *args, **kwargs):
    seen.append(self)
    return real(self, *args, **kwargs)
nn.Module.{name} = call
import fxfuse
made = fxfuse.optimize(nn.Sequential(nn.Linear(8, 6), nn.ReLU()))
made(torch.randn(5, 8)), seen.clear(), made(torch.randn(5, 8))
print(seen[0] is made)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"], run.stderr


@pytest.mark.parametrize("name", ["forward", "_call_impl", "_compiled_call_impl"])
def test_a_call_of_this_module_that_was_replaced(fused, x, name):
    setattr(fused, name, lambda x: -x)
    assert torch.equal(fused(x), -x)


def test_a_module_that_was_compiled_in_place(fused, x):
    fused.compile(backend="eager")
    torch.testing.assert_close(fused(x), Halved.forward(fused, x))


def test_a_class_with_a_call_of_its_own(x):
    class Doubled(Halved):
        def __call__(self, x):
            return 2 * super().__call__(x)

    fused = fxfuse.optimize(Doubled())
    torch.testing.assert_close(fused(x), 2 * Halved.forward(fused, x))
    assert fxfuse.report(fused).replacements


def test_a_subclass_made_later(fused, x):
    class Negative(type(fused)):
        def forward(self, x):
            return -super().forward(x)

    want = Halved.forward(fused, x)
    fused.__class__ = Negative
    torch.testing.assert_close(fused(x), -want)


def test_a_parametrized_module(x):
    class Doubling(nn.Module):
        def forward(self, weight):
            return 2 * weight

    fused = fxfuse.optimize(ScaleNorm()).eval()
    fused(x)
    parametrize.register_parametrization(fused, "scale", Doubling())
    torch.testing.assert_close(fused(x), ScaleNorm.forward(fused, x))


def test_a_traced_module_keeps_its_scope(fused, x):
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fused

        def forward(self, x):
            return self.inner(x) + 1

    traced = torch.jit.trace(Parent(), x)
    torch.testing.assert_close(traced(x), Halved.forward(fused, x) + 1)
    assert dict(traced.named_children()).keys() == {"inner"}
    assert "inner" in traced.code


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_called_alike(fused, x, how):
    other = how(fused)
    assert type(other) is type(fused)
    assert torch.equal(other(x), fused(x))


def test_a_module_without_a_plan(x):
    made = fused_class(Halved)()
    assert torch.equal(made(x), Halved.forward(made, x))


def test_arguments_by_keyword_and_wrong_ones(fused, x):
    torch.testing.assert_close(fused(x=x), fused(x))
    for args, kwargs in (((), {}), ((x, x), {}), ((x,), {"y": x})):
        with pytest.raises(TypeError) as found:
            fused(*args, **kwargs)
        with pytest.raises(TypeError) as wanted:
            Halved.forward(fused, *args, **kwargs)
        assert str(found.value) == str(wanted.value)
