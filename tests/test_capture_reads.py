"""What a graph rests on: changes to a model, after it was optimized, that the forward as it is written would see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Halved, assert_same
from torch import nn

import fxfuse
from fxfuse.plan import plan_of

X = torch.randn(5, 8)


class Asking(Halved):
    """A match, and behind it what `forward` asks for by a name that nothing has yet."""

    def __init__(self, ask: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.ask = ask
        self.act, self.inner, self.k = nn.Tanh(), nn.Sequential(nn.Identity()), 2
        self.other = self.act
        self.steps = [self.act]
        self.bias = nn.Parameter(torch.randn(6))
        self.more = nn.ParameterList([nn.Parameter(torch.randn(6))])

    def forward(self, x):
        return self.ask(self, super().forward(x))


def catching(m, y):
    try:
        return m.extra(y)
    except AttributeError:
        return y


def in_a_list(m, y):
    for step in m.steps:
        y = step(y)
    return y


def all_of_a_list(m, y):
    for p in m.more:
        y = y + p
    return y


def cut(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x[:, :6] * layer.weight.sum()


def put(name: str, value: Callable[[], object]) -> Callable[[nn.Module], None]:
    return lambda m: setattr(m, name, value())


CASES = {
    "hasattr": (lambda m, y: m.extra(y) if hasattr(m, "extra") else y, put("extra", nn.Sigmoid)),
    "getattr": (lambda m, y: getattr(m, "extra", m.act)(y), put("extra", nn.Sigmoid)),
    "a number": (lambda m, y: y * getattr(m, "factor", 2.0), put("factor", lambda: 3.0)),
    "a parameter": (lambda m, y: y * getattr(m, "factor", 2.0), put("factor", lambda: nn.Parameter(torch.rand(6)))),
    "except": (catching, put("extra", nn.Sigmoid)),
    "nested": (lambda m, y: m.inner.extra(y) if hasattr(m.inner, "extra") else y,
               lambda m: setattr(m.inner, "extra", nn.Sigmoid())),
    "another name": (lambda m, y: m.other(y), put("act", nn.Sigmoid)),
    "another name, the same type": (lambda m, y: m.other(y), put("act", lambda: nn.Hardtanh(-0.1, 0.1))),
    "in a list": (in_a_list, put("act", nn.Sigmoid)),
    "in a list, the same type": (in_a_list, put("act", lambda: nn.Hardtanh(-0.1, 0.1))),
    "a shorter list": (in_a_list, lambda m: m.steps.clear()),
    "another list": (in_a_list, put("steps", lambda: ())),
    "no list": (lambda m, y: in_a_list(m, y) if m.steps else y, put("steps", lambda: None)),
    "in a list, gone": (in_a_list, lambda m: delattr(m, "act")),
    "a tensor is gone": (lambda m, y: y if m.bias is None else y + m.bias, put("bias", lambda: None)),
    "a number is a parameter": (lambda m, y: y * m.k, put("k", lambda: nn.Parameter(torch.tensor(2.0)))),
    "a number is a tensor": (lambda m, y: y * m.k, put("k", lambda: torch.full((6,), 2.0))),
    "one more parameter": (all_of_a_list, lambda m: m.more.append(nn.Parameter(torch.ones(6)))),
    "a layer's call": (lambda m, y: y, lambda m: setattr(m.fc, "_call_impl", cut(m.fc))),
    "a layer, compiled": (lambda m, y: y, lambda m: setattr(m.fc, "_compiled_call_impl", cut(m.fc))),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_change_is_seen(kind):
    ask, change = CASES[kind]
    model = Asking(ask)
    if "the same type" in kind:
        model.act = model.other = nn.Hardtanh()
        model.steps = [model.act]
    fused = fxfuse.optimize(model)
    assert fxfuse.report(fused).replacements
    assert_same(fused(X), model(X))
    for m in (model, fused):
        torch.manual_seed(0)
        change(m)
    for _ in range(2):
        assert_same(fused(X), model(X))
    fused(X).sum().backward()
    got = [p.grad is None for p in fused.parameters()]
    fused.zero_grad()
    model(X).sum().backward()
    assert got == [p.grad is None for p in model.parameters()]


class ByAutocast(Halved):
    def forward(self, x):
        return super().forward(x).to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)


class ByGradients(Halved):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else -super().forward(x)


@pytest.mark.parametrize("first", [nn.Module.parameters, nn.Module.buffers])
def test_the_dtype_that_a_forward_takes_for_its_own(first):
    class Own(Halved):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("zero", torch.zeros(1))

        def forward(self, x):
            return super().forward(x.to(next(self.parameters() if params else self.buffers()).dtype))

    params = first is nn.Module.parameters
    model = Own()
    fused = fxfuse.optimize(model)
    assert_same(fused(X), model(X))
    (variants,) = plan_of(fused).variants.values()
    for _ in range(2):
        fused.double(), model.double()
        assert_same(fused(X), model(X))
        fused.float(), model.float()
        assert_same(fused(X), model(X))
    assert fxfuse.report(fused).replacements and len(variants) == 2


@pytest.mark.parametrize("enabled", [False, True])
def test_settings_of_torch_that_a_forward_asks_for(enabled):
    model = ByGradients()
    with torch.set_grad_enabled(enabled):
        fused = fxfuse.optimize(model)
    for mode in (enabled, not enabled, enabled):
        with torch.set_grad_enabled(mode):
            assert_same(fused(X), model(X))
    model = ByAutocast()
    with torch.autocast("cpu", enabled=enabled):
        fused = fxfuse.optimize(model)
    assert fxfuse.report(fused).replacements
    for mode, dtype in ((enabled, torch.bfloat16), (not enabled, torch.bfloat16), (True, torch.float16)):
        with torch.autocast("cpu", dtype, mode):
            assert_same(fused(X), model(X))


def test_a_graph_rests_on_what_its_forward_read():
    """Not on what torch.fx reads of any module: children beside those that the forward calls."""
    fused = fxfuse.optimize(Halved())
    plan = plan_of(fused)
    fused(X)
    fused.beside, fused.divisor = nn.ReLU(), float("2.0")
    fused(X)
    (variants,) = plan.variants.values()
    assert len(variants) == 1 and variants[0].holds(fused)
    fused.divisor = 3.0
    assert not variants[0].holds(fused)


def test_children_may_be_named_after_words_of_python():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleDict({"class": nn.BatchNorm1d(6), "in": nn.Linear(8, 6), "is": nn.Softmax(-1)})

        def forward(self, x):
            return self.norms["is"](self.norms["class"](self.norms["in"](x) * 2))

    model = Words()
    fused = fxfuse.optimize(model)
    assert fxfuse.report(fused).replacements
    assert_same(fused(X), model(X))
