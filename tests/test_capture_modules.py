"""Kinds of modules: patched, shared, scripted, compiled, lazy, wrapped for many devices, of unusual classes."""

from __future__ import annotations

import functools
import types
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from models import (
    Branching,
    Halved,
    Holder,
    Plain,
    ScaleNorm,
    assert_same,
    check,
    module,
    patterns_in,
    ran_fused,
    reason_of,
)
from torch import fx, nn

import fxfuse

X = torch.randn(5, 8)


def test_forward_patched_on_the_instance():
    model = Halved()
    model.forward = types.MethodType(lambda self, x: F.relu(self.fc(x)) / 4, model)
    fused = check(model, X)
    assert "replaced on the instance" in reason_of(fused)
    fused.fc.bias.data.fill_(1.0)
    assert_same(fused(X), F.relu(fused.fc(X)) / 4)


def test_forward_patched_on_a_called_layer():
    model = Halved()
    model.fc.forward = lambda x: F.linear(x, model.fc.weight) * 3
    assert_same(fxfuse.optimize(model)(X), model(X))


def test_plain_list_of_modules():
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.block(x)

    model = module(forward, layers=[nn.Linear(8, 8), nn.ReLU()])
    fused = check(model, X)
    assert "not registered" in reason_of(fused) and ran_fused(fused, X) == ["block"]
    fused.eval()
    assert model.layers[0].training


class Shared(nn.Module):
    """One block called twice and known under two names, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Halved(8)
        self.up = nn.Linear(6, 8)
        self.b = self.a
        self.tied = nn.Linear(8, 6)
        self.tied.weight = self.a.fc.weight

    def forward(self, x):
        y = self.b(self.up(self.a(x)))
        return y + torch.tanh(self.tied(x)) + self.a(x)


def test_shared_submodules_called_twice_and_tied_weights():
    fused = check(Shared(), X)
    assert fused.a is fused.b and fused.tied.weight is fused.a.fc.weight
    assert len(patterns_in(fused)) >= 2 and ran_fused(fused, X)


def test_shared_submodule_under_an_untraceable_parent():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Halved()
            self.b = self.a

        def forward(self, x):
            return self.a(x) + self.b(x) if len(x) else x

    fused = check(Two(), X)
    assert fused.a is fused.b and len(fxfuse.report(fused).replacements) == 1
    assert ran_fused(fused, X) == ["a", "a"]


def test_recursion_closures_lambdas_and_helpers():
    def power(x, n):
        return x if n == 0 else power(x * 1.5, n - 1)

    def forward(self, x):
        def inner(v):
            return self.helper(v)

        return power(inner(x), 3)

    def helper(self, x):
        return F.relu(self.block.fc(x)) / 2

    model = type("Recursive", (Holder,), {"forward": forward, "helper": helper})()
    assert ran_fused(check(model, X), X) == [""]


class Callable_:
    def __call__(self, x):
        return torch.relu(x)


@pytest.mark.parametrize("act", [F.relu, torch.relu, functools.partial(F.leaky_relu, negative_slope=0.3),
                                 Callable_(), lambda x: x.relu(), nn.ReLU()])  # fmt: skip
def test_activations_kept_as_any_callable(act):
    def forward(self, x):
        return self.act(self.block.fc(x))

    assert ran_fused(check(module(forward, act=act), X), X) == [""]


def test_lambda_attribute_that_closes_over_the_module():
    model = module(lambda self, x: self.block(self.pre(x)), norm=nn.BatchNorm1d(8))
    model.pre = lambda x: model.norm(x)
    fused = fxfuse.optimize(model)
    fused.eval()
    before = model.norm.running_mean.clone()
    fused(X)
    assert torch.equal(model.norm.running_mean, before)  # eval of the result, not the original's train mode
    assert model.norm.training


def test_containers():
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Halved(8), Halved(6)])
            self.named = nn.ModuleDict({"x": nn.Linear(6, 6), "act": nn.ReLU()})
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(6)) for _ in range(2)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            x = self.named["act"](self.named["x"](x))
            for scale in self.scales:
                x = x * scale
            return x

    fused = check(Boxes(), X)
    assert len(fxfuse.report(fused).replacements) == 3 and ran_fused(fused, X)
    fused = check(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 4), nn.GELU())), X)
    assert len(fxfuse.report(fused).replacements) == 2 and ran_fused(fused, X)


def test_children_behind_a_hook_and_in_torch_blocks_are_tried():
    model = nn.Sequential(Halved(8), nn.Linear(6, 8), Halved(8))
    model[2].register_forward_hook(lambda m, args, out: out + 1)
    fused = check(model, X)
    assert len(fxfuse.report(fused).replacements) == 2 and "2" in ran_fused(fused, X)

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    check(nn.Sequential(layer), torch.randn(2, 3, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 6), nn.ReLU()))
    before = set(scripted.__dict__)
    fused = fxfuse.optimize(scripted)
    assert_same(fused(X), scripted(X))
    assert set(scripted.__dict__) == before and "TorchScript" in reason_of(fused)

    model = nn.Sequential(Halved(), torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.ReLU())), Halved())
    fused = fxfuse.optimize(model)
    assert_same(fused(X), model(X))
    assert len(ran_fused(fused, X)) == 2

    traced = torch.jit.trace(Halved(), X)
    assert_same(fxfuse.optimize(traced)(X), traced(X))


def test_compiled_modules():
    inside = torch.compile(Halved(), backend="eager")
    norm = torch.compile(ScaleNorm(), backend="eager")
    model = nn.Sequential(norm, nn.Linear(6, 8), inside)
    fused = check(model, X)
    assert list(fused.state_dict()) == list(model.state_dict())
    fused.eval()
    mean = model[0]._orig_mod.bn.running_mean.clone()
    fused(X)
    assert torch.equal(mean, fused[0]._orig_mod.bn.running_mean) and model[0]._orig_mod.bn.training

    whole = torch.compile(ScaleNorm(), backend="eager")
    assert_same(fxfuse.optimize(whole)(X), whole._orig_mod(X), rtol=1e-4, atol=1e-5)

    in_place = Branching()
    in_place.first.compile(backend="eager")
    fused = check(in_place, X)
    assert "compiled in place" in str(fxfuse.report(fused))


def test_graph_modules_and_nested_ones():
    fused = check(fx.symbolic_trace(ScaleNorm()), X)
    assert isinstance(fused, fx.GraphModule) and patterns_in(fused) == ["linear_scale_batchnorm1d"]
    nested = nn.Sequential(fx.symbolic_trace(Halved()), nn.Linear(6, 8), fx.symbolic_trace(Plain()))
    fused = check(nested, X)
    assert patterns_in(fused) == ["linear_activation_scale"]
    shared = fx.symbolic_trace(Halved(8))
    fused = check(nn.Sequential(shared, nn.Linear(6, 8), shared), X)
    assert fused[0] is fused[2] and "linear_activation_scale" in fused[0].code


@pytest.mark.parametrize("mode", [True, False])
def test_exported_programs(mode):
    model = ScaleNorm().train(mode)
    program = torch.export.export(model, (X,))
    state = {k: v.clone() for k, v in program.state_dict.items()}
    fused = fxfuse.optimize(program)
    assert patterns_in(fused) == ["linear_scale_batchnorm1d"]
    expected = program.module()(X)
    for name, value in state.items():  # the program's module updates the program's own buffers in training
        program.state_dict[name].data.copy_(value)
    assert_same(fused(X), expected, rtol=1e-4, atol=1e-5)


def test_lazy_modules_before_and_after_they_know_their_sizes():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyBatchNorm1d())

    model = build()
    fused = fxfuse.optimize(model)
    torch.manual_seed(1)
    got = fused(X)
    other = build()
    torch.manual_seed(1)
    assert_same(got, other(X))
    assert type(fused[0]) is nn.Linear and not fused[0]._forward_pre_hooks
    assert_same(fused(X), other(X))

    check(other, X)
    assert patterns_in(fxfuse.optimize(other)) == ["linear_activation_scale"]


def test_meta_device():
    with torch.device("meta"):
        model = Branching()
    fused = fxfuse.optimize(model)
    assert fused.first(torch.empty(5, 8, device="meta")).shape == (5, 6)
    assert len(patterns_in(fused)) == 2


def test_data_parallel_before_and_after():
    model = nn.DataParallel(Branching())
    fused = check(model, X)
    assert len(ran_fused(fused, X)) == 2
    after = nn.DataParallel(fxfuse.optimize(Branching()))
    assert len(ran_fused(after, X)) == 2
    replica = fxfuse.optimize(Halved())._replicate_for_data_parallel()
    replica._modules = dict(replica._modules)
    assert replica(X).shape == (5, 6)


@pytest.fixture
def gloo(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_before_and_after(gloo):
    torch.manual_seed(0)
    plain, before, after = Branching(), Branching(), Branching()
    before.load_state_dict(plain.state_dict()), after.load_state_dict(plain.state_dict())
    ddp_first = fxfuse.optimize(nn.parallel.DistributedDataParallel(before))
    ddp_last = nn.parallel.DistributedDataParallel(fxfuse.optimize(after))
    for model in (plain, ddp_first, ddp_last):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    assert len(ran_fused(ddp_first, X)) == 2 and len(ran_fused(ddp_last, X)) == 2
    for name, value in plain.named_parameters():
        torch.testing.assert_close(before.get_parameter(name), value, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after.get_parameter(name), value, rtol=1e-3, atol=1e-4)


class Registered(nn.Module):
    names: ClassVar[list[str]] = []

    def __init_subclass__(cls, /, tag, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.names.append(cls.__name__)


class Tagged(Registered, tag="x"):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        return F.relu(self.fc(x))


class NeedsArgument(nn.Module):
    def __new__(cls, width):
        return super().__new__(cls)

    def __init__(self, width) -> None:
        super().__init__()
        self.fc = nn.Linear(8, width)

    def forward(self, x):
        return F.relu(self.fc(x))


class Slotted(nn.Module):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        return F.relu(self.fc(x))


def test_unusual_classes():
    names = list(Registered.names)
    assert ran_fused(check(Tagged(), X), X) == [""]
    assert Registered.names == names, "a registry of classes was told of the compiler's own"
    needs = NeedsArgument(6)
    assert_same(fxfuse.optimize(needs)(X), needs(X))  # nor can deepcopy make one
    assert_same(fxfuse.optimize(Slotted())(X).shape, torch.Size([5, 6]))

    class Static(nn.Module):
        @staticmethod
        def forward(x):
            return x + 1

    assert_same(fxfuse.optimize(Static())(X), X + 1)
    fused = check(Halved(), X)
    assert isinstance(fused, Halved) and type(fused)().divisor == 2.0
    assert type(fused)()(X).shape == (5, 6)  # made by calling the result's class: runs as written
