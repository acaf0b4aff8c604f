"""The original is untouched, the result shares its tensors, and everything PyTorch users rely on stays where it was."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from models import (
    Branching,
    Halved,
    LinearNorm,
    Plain,
    ScaleNorm,
    assert_same,
    assert_untouched,
    check,
    fingerprint,
    patterns_in,
    ran_fused,
)
from torch import nn

import fxfuse
from fxfuse.twin import twin

torch.set_num_threads(1)
X = torch.randn(5, 8)
MODELS = [ScaleNorm, Halved, Plain, Branching]


@pytest.mark.parametrize("build", MODELS)
def test_the_original_is_untouched_by_making_and_by_running(build):
    model = build()
    model.register_forward_hook(lambda m, args, out: None)
    before = fingerprint(model)
    fused = fxfuse.optimize(model, X)
    assert_untouched(before, model)
    fused.eval()
    fused(X)
    fused.anything = 3
    fused.register_buffer("more", torch.zeros(1))
    fused.register_forward_hook(lambda m, args, out: None)
    assert_untouched(before, model)


@pytest.mark.parametrize("build", MODELS)
def test_state_dict_both_ways(build):
    model, other = build(), build()
    fused = fxfuse.optimize(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in model.named_modules()]
    fused.load_state_dict(other.state_dict(), strict=True)
    for value, wanted in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(value, wanted)
    build().load_state_dict(fused.state_dict(), strict=True)
    fxfuse.optimize(other).load_state_dict(fused.state_dict(), strict=True)
    assert_same(fused.eval()(X), model.eval()(X), rtol=1e-4, atol=1e-5)


def test_parameters_and_buffers_are_the_same_objects():
    model = Branching()
    fused = fxfuse.optimize(model)
    for (name, a), (other, b) in zip(fused.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and a is b
    for (name, a), (other, b) in zip(fused.named_buffers(), model.named_buffers(), strict=True):
        assert name == other and a is b


def test_modes_are_the_results_own():
    model = ScaleNorm()
    fused = fxfuse.optimize(model)
    fused.eval()
    assert model.training and model.bn.training and not fused.bn.training
    before = model.bn.running_mean.clone()
    fused(X)
    assert torch.equal(model.bn.running_mean, before)
    model.eval(), fused.train()
    fused(X)
    assert not torch.equal(model.bn.running_mean, before) and fused.bn.num_batches_tracked == 1


def test_one_child_in_another_mode():
    """A frozen batch norm in a training model."""
    for build, x in ((ScaleNorm, X), (lambda: LinearNorm(8, 6), torch.randn(2, 3, 8))):
        model = build()
        fused = fxfuse.optimize(model)
        for part in (model, fused):
            part.train()
            part.bn.eval()
        assert_same(fused(x), model(x), rtol=1e-4, atol=1e-5)
        assert fused.bn.num_batches_tracked == 0 and ran_fused(fused, x) == [""]


def test_an_optimizer_built_before_trains_the_result():
    torch.manual_seed(0)
    model = Branching()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    fused = fxfuse.optimize(model)
    other = torch.optim.Adam(reference.parameters(), lr=0.05)
    for _ in range(5):
        for module, opt in ((fused, optimizer), (reference, other)):
            opt.zero_grad()
            (module(X) - 1).square().mean().backward()
            opt.step()
    assert ran_fused(fused, X)
    skip = "fc.bias"  # behind a batch norm: its gradient is rounding noise in eager and exactly zero here
    for name, value in reference.named_parameters():
        if name != "first." + skip:
            torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-2, atol=1e-3)


# --- conversions: what is shared and what is not -----------------------------------------------------------------


@pytest.mark.parametrize("convert", [lambda m: m.double(), lambda m: m.to(torch.float64), lambda m: m.bfloat16()])
def test_conversions_work_and_reach_the_original_through_its_parameters(convert):
    model = ScaleNorm()
    identities = [id(p) for p in model.parameters()]
    fused = convert(fxfuse.optimize(model))
    dtype = fused.fc.weight.dtype
    assert fused(X.to(dtype)).dtype == dtype and ran_fused(fused, X.to(dtype)) == [""]
    # documented in optimize: torch converts a Parameter in place, so the original's change, too; buffers do not
    assert [id(p) for p in model.parameters()] == identities and model.fc.weight.dtype == dtype
    assert model.bn.running_mean.dtype == torch.float32 and fused.bn.running_mean.dtype == dtype
    assert model.training


def test_half_keeps_running_fused():
    model = Halved()
    fused = fxfuse.optimize(model).half()
    expected = (F.relu(F.linear(X.half(), model.fc.weight, model.fc.bias)) / 2).float()
    torch.testing.assert_close(fused(X.half()).float(), expected, rtol=2e-3, atol=2e-3)
    assert ran_fused(fused, X.half()) == [""]


def test_requires_grad_is_shared_and_honoured():
    model = Halved()
    fused = fxfuse.optimize(model)
    fused.requires_grad_(False)
    assert not model.fc.weight.requires_grad and not fused(X).requires_grad
    model.fc.bias.requires_grad_(True)
    fused(X).sum().backward()
    assert fused.fc.weight.grad is None and fused.fc.bias.grad is not None


# --- references inside the tree ----------------------------------------------------------------------------------


class Tangle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.order = [self.bn, {"a": self.a}]
        self.bound = self.step
        self.partial = functools.partial(F.relu, inplace=False)
        self.__dict__["parent"] = self

    def step(self, x):
        return self.bn(x)

    def forward(self, x):
        return self.partial(self.bound(self.order[1]["a"](x)) + self.order[0](x))


def test_references_to_modules_follow():
    model = Tangle()
    copied = twin(list(model.modules()))[0]
    assert copied.order[0] is copied.bn and copied.order[1]["a"] is copied.a
    assert copied.bound.__self__ is copied and copied.__dict__["parent"] is copied
    assert model.order[0] is model.bn and model.bound.__self__ is model
    copied.order.append(1)
    assert len(model.order) == 2
    check(model, X)


def test_shared_lists_stay_shared_in_the_twin():
    a, b = Plain(), Plain()
    a.log = b.log = []
    copied = twin([*nn.Sequential(a, b).modules()])[0]
    assert copied[0].log is copied[1].log and copied[0].log is not a.log


# --- hooks -------------------------------------------------------------------------------------------------------


def test_hooks_on_what_a_fusion_would_skip_are_refused_with_a_reason():
    model = ScaleNorm()
    seen = []
    model.fc.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    fused = check(model, X)
    assert patterns_in(fused) == [] and len(seen) == 6
    assert any("'fc' has forward hooks" in note for note in fxfuse.report(fused).notes)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("child", ["fc", "bn"])
def test_hooks_added_later_are_honoured_and_fusion_returns_when_they_go(register, child):
    fused = fxfuse.optimize(ScaleNorm())
    assert ran_fused(fused, X) == [""]
    seen = []
    handle = getattr(fused.get_submodule(child), f"register_{register}")(lambda *a: seen.append(1))
    fused(X).sum().backward()
    assert seen == [1]
    handle.remove()
    assert ran_fused(fused, X) == [""] and seen == [1]


def test_hooks_of_the_fused_module_itself_run():
    model, seen = ScaleNorm(), []
    model.register_forward_pre_hook(lambda m, args: seen.append("before"))
    model.register_forward_hook(lambda m, args, out: seen.append("after"))
    fused = fxfuse.optimize(model)
    assert ran_fused(fused, X) == [""] and seen == ["before", "after"] * 2


def test_hooks_for_every_module_are_honoured():
    fused, seen = fxfuse.optimize(Branching()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        fused(X)
    finally:
        handle.remove()
    assert seen == ["Linear", "BatchNorm1d", "ScaleNorm", "Linear", "Halved", "Branching"]
    assert len(ran_fused(fused, X)) == 2


def test_a_hook_bound_to_a_module_of_the_tree_follows():
    class Counts(Halved):
        calls = 0

        def note(self, module, args, out):
            self.calls += 1

    model = Counts()
    model.fc.register_forward_hook(model.note)
    fused = fxfuse.optimize(model)
    fused(X)
    assert fused.calls == 1 and model.calls == 0


# --- parametrizations and their kin ------------------------------------------------------------------------------


def prune(m):
    torch.nn.utils.prune.random_unstructured(m, "weight", 0.5)


def zero_first_row(m):
    nn.utils.parametrize.register_parametrization(m, "weight", Zeroed())


class Zeroed(nn.Module):
    def forward(self, w):
        return w * torch.arange(w.shape[0]).clamp(max=1)[:, None]


WAYS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "pruning": prune,
    "parametrization": zero_first_row,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", [ScaleNorm, Halved])
def test_parametrized_weights(way, build):
    import torch.nn.utils.prune

    torch.manual_seed(0)
    model = build()
    WAYS[way](model.fc)
    if way in ("old weight_norm", "pruning"):  # torch itself cannot deepcopy it: compare without a copy
        fused = fxfuse.optimize(model)
        assert_same(fused.eval()(X), model.eval()(X))
    else:
        fused = check(model, X)
    notes = " ".join(fxfuse.report(fused).notes)
    assert patterns_in(fused) == [] and "'fc' has " in notes and ("parametriz" in notes or "hooks" in notes), notes


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_parametrized_after_optimize(way):
    import torch.nn.utils.prune

    torch.manual_seed(0)
    fused = fxfuse.optimize(Halved())
    assert ran_fused(fused, X) == [""]
    WAYS[way](fused.fc)
    assert_same(fused.eval()(X), F.relu(fused.fc(X)) / 2)
    if way == "parametrization":
        assert (fused(X)[:, 0] == F.relu(fused.fc.bias[0]) / 2).all()


# --- changes afterwards ------------------------------------------------------------------------------------------


class Settings:
    def __init__(self) -> None:
        self.scale, self.steps = 2.0, [1, 2]


class Tunable(nn.Module):
    """Reads every kind of attribute there is."""

    kind = "relu"

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(8, 6), nn.LeakyReLU(0.1)
        self.temperature, self.flag, self.sizes, self.config = 2.0, False, [1, 2], Settings()
        self.layers = nn.ModuleList([nn.Linear(6, 6)])
        self.tail = nn.Sequential(nn.ReLU())
        self.extra = None
        self.register_parameter("gain", None)

    def finish(self, x):
        return x + 1

    def forward(self, x):
        x = self.act(self.fc(x)) / self.temperature
        if self.flag:
            x = -x
        x = x * self.sizes[0] * self.config.scale * self.config.steps[1]
        for layer in self.layers:
            x = layer(x)
        x = self.tail(x)
        if self.extra is not None:
            x = self.extra(x)
        if self.gain is not None:
            x = x * self.gain
        return self.finish(x if self.kind == "relu" else x * 3)


def swap_bias(m):
    m.fc.bias = None


def swap_weight(m):
    m.fc.weight = nn.Parameter(torch.ones(6, 8))


CHANGES = {
    "number": lambda m: setattr(m, "temperature", 3.0),
    "flag": lambda m: setattr(m, "flag", True),
    "list": lambda m: m.sizes.__setitem__(0, 5),
    "config": lambda m: setattr(m.config, "scale", -1.0),
    "list in config": lambda m: m.config.steps.append(m.config.steps.pop() + 1),
    "class attribute hidden": lambda m: setattr(m, "kind", "other"),
    "method hidden": lambda m: setattr(m, "finish", lambda x: x - 1),
    "layer's setting": lambda m: setattr(m.act, "negative_slope", 0.9),
    "layer replaced": lambda m: setattr(m, "act", nn.Tanh()),
    "layer of another kind": lambda m: setattr(m, "fc", nn.Sequential(nn.Linear(8, 6), nn.Sigmoid())),
    "layer's forward replaced": lambda m: setattr(m.fc, "forward", lambda x: x[:, :6]),
    "weight replaced": swap_weight,
    "bias removed": swap_bias,
    "module appended": lambda m: m.layers.append(nn.Linear(6, 6)),
    "module removed": lambda m: m.layers.__delitem__(0),
    "module in sequence": lambda m: m.tail.append(nn.Tanh()),
    "None filled": lambda m: setattr(m, "extra", nn.Linear(6, 6)),
    "parameter filled": lambda m: setattr(m, "gain", nn.Parameter(torch.full((6,), 4.0))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_optimize_are_honoured(change):
    torch.manual_seed(0)
    fused = fxfuse.optimize(Tunable())
    before = fused(X)
    assert ran_fused(fused, X) == [""]
    torch.manual_seed(1)
    CHANGES[change](fused)
    expected = Tunable.forward(fused, X)
    assert_same(fused(X), expected)
    assert before.shape != expected.shape or not torch.equal(before, expected), "the change shows"


GAIN = 2.0


def test_globals_read_by_a_forward_are_honoured(monkeypatch):
    class Global(Halved):
        def forward(self, x):
            return F.relu(self.fc(x)) * GAIN

    fused = fxfuse.optimize(Global())
    before = fused(X)
    assert ran_fused(fused, X) == [""]
    monkeypatch.setitem(globals(), "GAIN", 6.0)
    assert_same(fused(X), before * 3)


def test_batch_norm_settings_are_read_at_run_time():
    model = ScaleNorm()
    reference = copy.deepcopy(model)
    fused = fxfuse.optimize(model)
    for module in (fused, reference):
        module.bn.momentum, module.bn.eps = 0.7, 0.1
        module.train()
    assert_same(fused(X), reference(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.bn.running_mean, reference.bn.running_mean)
    for module in (fused, reference):
        module.bn.momentum = None
    fused(X + 1), reference(X + 1)
    torch.testing.assert_close(fused.bn.running_var, reference.bn.running_var)


def test_method_patched_onto_the_result():
    fused = fxfuse.optimize(Halved())
    fused.forward = types.MethodType(lambda self, x: self.fc(x) * 0, fused)
    assert (fused(X) == 0).all()
