"""The captured forward as straight-line calls: bit for bit what the module's own Python gives, or just that."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from models import Halved, ScaleNorm
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

import fxfuse
from fxfuse import straight
from fxfuse.codegen import compile_graph
from fxfuse.plan import plan_of
from fxfuse.straight import batch_norm, open_layers

torch.set_num_threads(1)


class Layers(nn.Module):
    """linear · 0.5 → BatchNorm1d, linear → ReLU → · 3: [N, 8] -> [N, 6]."""

    def __init__(self, bias: bool = True, inplace: bool = False, **norm: object) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 7, bias=bias), nn.Linear(7, 6, bias=bias)
        self.norm, self.act = nn.BatchNorm1d(7, **norm), nn.ReLU(inplace)

    def forward(self, x):
        return self.act(self.second(self.norm(self.first(x) * 0.5))) * 3


MODELS = {
    "scale and norm": ScaleNorm,
    "halved": Halved,
    "layers": Layers,
    "in place": lambda: Layers(inplace=True),
    "no bias": lambda: Layers(bias=False),
    "cumulative": lambda: Layers(momentum=None),
    "no statistics": lambda: Layers(track_running_stats=False),
    "no affine": lambda: Layers(affine=False, momentum=0.3, eps=0.1),
}


pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


@pytest.fixture
def forwards(monkeypatch):
    """The calls of nn.Linear.forward."""
    calls: list[nn.Linear] = []
    real = nn.Linear.forward

    def forward(self, x):
        calls.append(self)
        return real(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return calls


def learnt(model: nn.Module, rows: int = 5) -> nn.Module:
    """The model, optimized, that steps aside for as many rows."""
    fused = fxfuse.optimize(model)
    fused(torch.randn(rows, 8, requires_grad=True))
    assert plan_of(fused).aside.find((torch.randn(rows, 8),)) is not None
    return fused


def step(model: nn.Module, x: torch.Tensor, seed: int) -> list[torch.Tensor | None]:
    """Result, gradients and buffers of one step."""
    x = x.clone().requires_grad_()
    out = model(x)
    torch.manual_seed(seed)
    grads = torch.autograd.grad(out, [x, *model.parameters()], torch.randn_like(out), allow_unused=True)
    return [out, *grads, *[b.clone() for b in model.buffers()]]


@pytest.mark.parametrize("kind", MODELS)
def test_bit_for_bit_the_forward_as_it_was_written(kind, forwards):
    fused = learnt(MODELS[kind]())
    model = copy.deepcopy(fused)
    model.__class__ = type(fused)._fxfuse_original
    for i, training in enumerate((True, True, False, True, False, False, True)):
        fused.train(training), model.train(training)
        x = torch.randn(5, 8)
        fused(x)  # another mode may be another graph, which has to learn first
        model(x)
        forwards.clear()
        got = step(fused, x, i)
        assert not forwards, "a layer was called"
        want = step(model, x, i)
        assert forwards
        for a, b in zip(got, want, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_a_forward_without_layers_is_called_as_it_is_written(monkeypatch):
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x):
            return torch.relu(nn.functional.linear(x, self.weight)) * 2

    fused = learnt(Bare())
    assert plan_of(fused).aside.find((torch.randn(5, 8),)).run is None
    original, x = Bare.forward, torch.randn(5, 8)
    want = fused(x)
    monkeypatch.setattr(Bare, "forward", lambda self, x: -original(self, x))
    assert torch.equal(fused(x), -want), "as it is written now"


def test_a_frozen_graph_is_not_straightened():
    fused = fxfuse.optimize(Halved(), freeze=True)
    fused(torch.randn(5, 8, requires_grad=True))
    assert plan_of(fused).aside.find((torch.randn(5, 8),)).run is None


def test_hooks_of_a_layer_and_of_all_layers_are_run():
    fused, x = learnt(ScaleNorm()), torch.randn(5, 8)
    seen = []
    handle = fused.fc.register_forward_hook(lambda module, args, out: seen.append(module))
    fused(x)
    assert seen == [fused.fc]
    handle.remove()
    fused(x)
    assert seen == [fused.fc]
    with register_module_forward_hook(lambda module, args, out: seen.append(module)):
        fused(x)
    assert seen[1:] == [fused.fc, fused.bn, fused]


def test_a_layer_beside_the_match_is_called():
    class Beside(Halved):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 6)

        def forward(self, x):
            return self.last(super().forward(x))

    model, seen = Beside(), []
    model.last.register_forward_hook(lambda module, args, out: seen.append(module))
    fused, x = learnt(model), torch.randn(5, 8)
    seen.clear()
    assert torch.equal(fused(x), model(x))
    assert seen == [fused.last, model.last]


def test_a_layer_put_in_later_is_called():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    fused, x = learnt(Halved()), torch.randn(5, 8)
    before = fused(x)
    weight, bias = fused.fc.weight, fused.fc.bias
    fused.fc = Twice(8, 6)
    fused.fc.weight, fused.fc.bias = weight, bias
    assert torch.equal(fused(x), 2 * before)
    fused.fc.forward = lambda x: x[:, :6]
    assert torch.equal(fused(x), x[:, :6].relu() / 2)


def test_tensors_are_read_at_each_call():
    fused, x = learnt(Halved()), torch.randn(5, 8)
    other = {"fc.weight": torch.randn(6, 8), "fc.bias": torch.randn(6)}
    want = torch.relu(x @ other["fc.weight"].T + other["fc.bias"]) / 2
    torch.testing.assert_close(torch.func.functional_call(fused, other, (x,)), want)
    fused.fc.weight, fused.fc.bias = map(nn.Parameter, other.values())
    torch.testing.assert_close(fused(x), want)
    fused.fc.bias = None
    torch.testing.assert_close(fused(x), torch.relu(x @ other["fc.weight"].T) / 2)


def test_an_argument_may_have_any_name():
    class Named(Halved):
        def forward(this, torch, self, _m):
            return F.relu(this.fc(torch)) / 2 + self * _m

    model, args = Named(), [torch.randn(5, 8), torch.randn(5, 6), torch.randn(5, 6)]
    fused = fxfuse.optimize(model)
    for _ in range(3):
        assert torch.equal(fused(*args), model(*args))
    assert fxfuse.report(fused).replacements


@pytest.mark.parametrize("training", [0, 1])
def test_a_mode_that_is_a_number(training):
    fused = learnt(ScaleNorm())
    model = copy.deepcopy(fused)
    model.__class__ = type(fused)._fxfuse_original
    for norm in (fused.bn, model.bn):
        norm.training = training
    x = torch.randn(5, 8)
    assert torch.equal(fused(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


def test_subclasses_see_the_functions_that_eager_calls():
    class Seen(torch.Tensor):
        calls: ClassVar[list[tuple[str | None, str]]] = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls.append((getattr(function, "__module__", None), function.__name__))
            return super().__torch_function__(function, types, args, kwargs or {})

    fused = learnt(Layers())
    model = copy.deepcopy(fused)
    model.__class__ = type(fused)._fxfuse_original
    x, called = torch.randn(5, 8), []
    for module in (fused, model):
        for layer in (module.second, module.norm):
            layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Seen))
        Seen.calls.clear()
        module(x)
        called.append([call for call in Seen.calls if call[1] in ("linear", "relu", "batch_norm")])
    assert called[0] == called[1] and {name for _, name in called[0]} == {"linear", "relu", "batch_norm"}


def test_one_row_in_training_is_refused_as_by_eager():
    fused = learnt(ScaleNorm().eval(), rows=1)
    fused.train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(torch.randn(1, 8))
    assert fused.bn.num_batches_tracked == 1, "eager counts before it refuses"


def test_nothing_of_a_module_is_kept():
    fused = learnt(ScaleNorm())
    other = copy.deepcopy(fused)
    gone = weakref.ref(fused.fc.weight)
    del fused
    gc.collect()
    assert gone() is None and plan_of(other) is not None
    assert plan_of(other).aside.find((torch.randn(5, 8),)) is not None


def test_threads_make_one_function(monkeypatch):
    fused = fxfuse.optimize(ScaleNorm())
    (variants,) = plan_of(fused).variants.values()
    opened, real = [], straight.open_layers

    def slowly(*args):
        opened.append(args)
        time.sleep(0.05)
        return real(*args)

    monkeypatch.setattr(straight, "open_layers", slowly)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(variants[0].straight.function, [fused] * 4))
    assert made[0] is not None and made.count(made[0]) == 4 and len(opened) == 1


NORMS = {
    "usual": {}, "cumulative": {"momentum": None}, "momentum": {"momentum": 0.5}, "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False}, "eps": {"eps": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (2, 4), (1, 4), (3, 4, 2), (1, 4, 2), (0, 4), (4,), (5, 3)])
@pytest.mark.parametrize("settings", NORMS)
def test_batch_norm_is_the_layers_forward(settings, shape, training):
    layer = nn.BatchNorm1d(4, **NORMS[settings]).train(training)
    if layer.affine:
        nn.init.normal_(layer.weight)
    other, x = copy.deepcopy(layer), torch.randn(shape)
    results = []
    for bn, call in ((layer, batch_norm), (other, nn.BatchNorm1d.forward)):
        for _ in range(2):
            try:
                results.append(call(bn, x))
            except Exception as error:
                results.append((type(error), str(error)))
    for got, want in zip(results[:2], results[2:], strict=True):
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        else:
            assert got == want
    for got, want in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def refusing(x: torch.Tensor) -> None:
    raise ValueError("no")


def test_batch_norm_whose_buffers_are_gone_or_elsewhere():
    layer, x = nn.BatchNorm1d(4), torch.randn(5, 4)
    want = copy.deepcopy(layer)(x)
    layer._check_input_dim = refusing
    with pytest.raises(ValueError, match="no"):
        batch_norm(layer, x)
    del layer._check_input_dim
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    assert torch.equal(batch_norm(layer, x), want)
    assert torch.equal(batch_norm(layer.eval(), x), want), "by the batch, for there is nothing else"
    replica = copy.deepcopy(layer)
    for name, value in replica._parameters.items():
        replica.__dict__[name] = value
    replica._parameters = {}
    assert torch.equal(batch_norm(replica, x), want)


def test_batch_norm_told_to_leave_its_statistics_alone():
    layer = nn.BatchNorm1d(4)
    layer.track_running_stats = False
    batch_norm(layer, torch.randn(5, 4))
    assert layer.num_batches_tracked == 0 and torch.equal(layer.running_mean, torch.zeros(4))


@pytest.mark.parametrize("inplace", [True, False])
def test_relu_in_place_is_in_place(inplace):
    model, x = nn.Sequential(nn.ReLU(inplace)), torch.randn(5, 8)
    graph = fx.symbolic_trace(model).graph
    assert open_layers(graph, model, ["0"]) == 1
    out = compile_graph(graph, model)(model, x)
    assert (out is x) is inplace and torch.equal(out, x.relu())
