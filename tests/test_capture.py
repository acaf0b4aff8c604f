"""Any module means any: what cannot be traced runs as it was written, says why, and its children are tried."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import types
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models import Branching, Halved, Plain, ScaleNorm, assert_same, check, patterns_in, ran_fused
from torch import fx, nn

import fxfuse

torch.set_num_threads(1)
X = torch.randn(5, 8)


class Holder(nn.Module):
    """A child that matches, inside a forward given as a function of (self, ...)."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        self.block = Halved()
        for name, value in attributes.items():
            setattr(self, name, value)


def module(forward, **attributes) -> nn.Module:
    """A module with this forward and a `block` that matches linear → relu → / 2."""
    return type("Case", (Holder,), {"forward": forward, "__module__": __name__})(**attributes)


def reason_of(fused) -> str:
    """Why the model itself could not be traced."""
    return next(u.reason for u in fxfuse.report(fused).untraceable if u.where == "")


# --- control flow and Python values ------------------------------------------------------------------------------


def branch(self, x):
    return self.block(x) if x.sum() > 0 else self.block(-x)


def length(self, x):
    return self.block(x) * len(x)


def slice_by_value(self, x):
    return self.block(x[: int(x.abs().max().ceil())])


def loop_over_rows(self, x):
    return torch.stack([self.block(row) for row in x])


def loop_over_size(self, x):
    return sum(self.block(x + i) for i in range(x.size(0)))


def variadic(self, *xs, **more):
    return self.block(xs[0])


def shape_check(self, x):
    assert x.dim() == 2
    return self.block(x)


def swallowed_branch(self, x):
    try:
        if x.sum() > 1e9:
            return x
    except Exception:
        return self.block(x) * 100
    return self.block(x)


def assigns_part(self, x):
    y = self.block(x)
    y[0] = 0
    return y


def type_of_intermediate(self, x):
    y = self.pair(x)
    if isinstance(y, tuple):
        y = y[0]
    return self.block(y)


def hasattr_of_intermediate(self, x):
    y = self.pair(x)
    return self.block(y.last if hasattr(y, "last") else y[0])


def list_of_rows(self, x):
    a, *_ = x.unbind(0)
    return self.block(a)


class Pair(nn.Module):
    def forward(self, x):
        return x, x + 1


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (branch, "branches on the value of gt"),
        (length, "takes len()"),
        (slice_by_value, "makes a Python number of"),
        (loop_over_rows, "iterates over x"),
        (loop_over_size, "integer"),
        (variadic, r"\*args"),
        (shape_check, "branches on the value of eq"),
        (swallowed_branch, "branches on the value of gt"),
        (assigns_part, "assigns to a part of"),
        (list_of_rows, "iterates over unbind"),
    ],
)
def test_untraceable_forward_keeps_its_python_and_its_children_are_fused(forward, why):
    fused = check(module(forward), X)
    assert_reason(fused, why)
    assert patterns_in(fused) == ["linear_activation_scale"]
    assert ran_fused(fused, X)
    assert 'torch.compile(model, backend="fxfuse")' in str(fxfuse.report(fused))


def assert_reason(fused, why):
    import re

    assert re.search(why if "\\" in why else re.escape(why), reason_of(fused)), reason_of(fused)


@pytest.mark.parametrize("forward", [type_of_intermediate, hasattr_of_intermediate])
def test_a_question_about_an_unknown_type_is_not_answered_wrongly(forward):
    class Opaque(Pair):
        """Called as a whole, so that its output is unknown to the trace."""

    pair = Opaque()
    pair.register_forward_hook(lambda m, args, out: None)
    fused = check(module(forward, pair=pair), X)
    assert "type" in reason_of(fused)


def test_isinstance_of_arguments_and_known_results():
    def forward(self, x):
        y = self.fc(x)
        assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        assert not isinstance(x, (list, tuple)) and not hasattr(x, "tensors")
        return self.block(y * 2)

    fused = check(module(forward, fc=nn.Linear(8, 8)), X)
    assert not fxfuse.report(fused).untraceable and ran_fused(fused, X) == ["block"]


# --- arguments ---------------------------------------------------------------------------------------------------


class Out(NamedTuple):
    y: torch.Tensor
    n: int


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: float = 2.0


class Features(collections.UserDict):
    pass


def test_dict_in_and_out():
    def forward(self, batch):
        return {"y": self.block(batch["x"]), "n": 3}

    assert ran_fused(check(module(forward), {"x": X}), {"x": X}) == ["block"]


def test_dataclass_in_and_out():
    def forward(self, batch):
        return Batch(self.block(batch.x) * batch.scale)

    assert ran_fused(check(module(forward), Batch(X)), Batch(X)) == ["block"]


def test_namedtuple_and_own_mapping_out():
    def as_tuple(self, x):
        return Out(F.relu(self.block.fc(x)), 3)

    def as_mapping(self, x):
        return Features(y=self.block(x))

    fused = check(module(as_tuple), X)
    assert isinstance(fused(X), Out) and ran_fused(fused, X) == [""]
    model = module(as_mapping)
    fused = fxfuse.optimize(model)
    assert type(fused(X)) is Features
    assert_same(fused(X)["y"], model(X)["y"])


def test_list_of_tensors():
    def forward(self, xs):
        return [self.block(x) for x in xs]

    assert ran_fused(check(module(forward), [X, X + 1]), [X, X + 1]) == ["block", "block"]


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x, mask=None, *, scale=1.0, act="relu", twice=False, times=1):
        y = self.fc(x)
        y = F.relu(y) if act == "relu" else F.gelu(y)
        if mask is not None:
            y = y * mask
        if twice:
            y = y * 2
        return y * scale + times


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"mask": torch.rand(6)}, {"scale": 0.5}, {"act": "gelu"}, {"twice": True}, {"times": 3}, {"times": True},
     {"mask": None, "act": "gelu", "twice": True}],
)  # fmt: skip
def test_flags_and_optional_arguments_each_get_their_graph(kwargs):
    fused = check(Optional(), X, **kwargs)
    assert ran_fused(fused, X, **kwargs) == [""]


def test_flags_one_after_the_other_on_the_same_module():
    model = Optional()
    fused = fxfuse.optimize(model)
    for kwargs in ({}, {"twice": True}, {"mask": torch.rand(6)}, {"times": 1}, {"times": True}, {"scale": 3.0}, {}):
        assert_same(fused(X, **kwargs), model(X, **kwargs))
        assert ran_fused(fused, X, **kwargs) == [""]
    for n in range(40):  # more graphs than are kept: the rest runs as written
        assert_same(fused(X, times=n), model(X, times=n))


def test_true_and_one_are_different_calls():
    def forward(self, x, times=1):
        return F.relu(self.block.fc(x)) * (10 if isinstance(times, bool) else times)

    model = module(forward)
    fused = fxfuse.optimize(model)
    for times in (1, True, 1, 0, False):
        assert_same(fused(X, times), model(X, times))
        assert ran_fused(fused, X, times) == [""]


def test_wrong_call_raises_what_the_original_raises():
    fused = fxfuse.optimize(Optional())
    for args, kwargs in (((), {}), ((X,), {"nope": 1}), ((X, None, 1.0), {}), ((X,), {"x": X})):
        with pytest.raises(TypeError, match="argument"):
            fused(*args, **kwargs)


def test_a_float_argument_is_not_frozen():
    def forward(self, x, scale: float):
        return F.relu(self.block.fc(x)) * scale

    fused = check(module(forward), X, 0.5)
    for scale in (1.0, 3.0, -2.0):
        assert_same(fused(X, scale), F.relu(fused.block.fc(X)) * scale)
    assert ran_fused(fused, X, 4.0) == [""]


def test_an_int_argument_needs_an_example():
    def forward(self, x, n: int):
        return F.relu(self.block.fc(x)) * n

    assert "give example_inputs" in reason_of(fxfuse.optimize(module(forward)))
    fused = check(module(forward), X, 3, example=(X, 3))
    assert ran_fused(fused, X, 3) == [""]
    assert_same(fused(X, 5), F.relu(fused.block.fc(X)) * 5)


# --- what a trace would freeze or lose ---------------------------------------------------------------------------


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


# --- kinds of modules --------------------------------------------------------------------------------------------


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
