"""optimize and report: models, functions, patterns by name or object, examples, optimizing twice."""

from __future__ import annotations

import copy
import functools
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import (
    BertLayer,
    Branching,
    Halved,
    LeViTBlock,
    MixerBlock,
    Plain,
    ScaleNorm,
    assert_same,
    check,
    patterns_in,
    ran_fused,
)
from torch import nn

import fxfuse
from fxfuse.match import op, variables
from fxfuse.plan import plan_of

torch.set_num_threads(1)
X = torch.randn(5, 8)


def collapse(x, w):
    """Function to optimize: the sum over a product."""
    return (x @ w.t() / 2).sum(-1) * 3


def flagged(x, w, double=False, *, scale: float = 1.0):
    y = F.relu(F.linear(x, w)) * scale
    return y * 2 if double else y


@functools.wraps(collapse)
def rebound(x, w):
    return collapse(x, w)


def plain_function(x):
    return F.relu(F.linear(x, torch.ones(2, 8))) + len(x)


# --- optimizing twice, nothing to do -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [ScaleNorm, Halved, Branching, LeViTBlock, MixerBlock])
def test_twice_is_once(build):
    model = build()
    once = fxfuse.optimize(model)
    twice = fxfuse.optimize(once)
    assert str(fxfuse.report(twice)) == str(fxfuse.report(once))
    assert fxfuse.report(twice).replacements == fxfuse.report(once).replacements
    for (name, a), (_, b) in zip(once.named_modules(), twice.named_modules(), strict=True):
        assert type(a) is type(b) and (plan_of(a) is None) == (plan_of(b) is None), name
    assert all(plan_of(m) is None for m in model.modules())


def test_twice_for_a_function_and_a_graph():
    once = fxfuse.optimize(collapse)
    assert fxfuse.optimize(once).__wrapped__ is collapse
    graph = fxfuse.optimize(torch.fx.symbolic_trace(Halved()))
    again = fxfuse.optimize(graph)
    assert again.code == graph.code and fxfuse.report(again).replacements == []


def test_nothing_to_fuse_comes_back_working_with_what_came_nearest():
    fused = check(Plain(), X)
    report = fxfuse.report(fused)
    assert report.replacements == [] and report.near_misses[0].pattern == "linear_scale_batchnorm1d"
    assert "Came nearest" in str(report)
    assert fxfuse.report(fxfuse.optimize(nn.Identity())).near_misses == []


# --- which patterns ----------------------------------------------------------------------------------------------


def test_patterns_by_name():
    fused = fxfuse.optimize(Branching(), patterns=["linear_activation_scale"])
    assert patterns_in(fused) == ["linear_activation_scale"]
    fused = fxfuse.optimize(Branching(), patterns="linear_scale_batchnorm1d")
    assert patterns_in(fused) == ["linear_scale_batchnorm1d"]
    assert patterns_in(fxfuse.optimize(Branching(), patterns=[])) == []


def double_of(a, b):
    return torch.tanh(a) * b


class TanhMul(nn.Module):
    def forward(self, x, twice=False):
        return torch.tanh(x) * (x if self.training else 2.0) + int(twice)


def test_patterns_by_object_serve_later_graphs_too():
    a, b = variables("a b")
    mine = fxfuse.Pattern("tanh_times", op.mul(op.tanh(a), b), double_of)
    fused = check(TanhMul(), X)
    assert patterns_in(fused) == []
    fused = fxfuse.optimize(TanhMul(), patterns=[mine])
    assert patterns_in(fused) == ["tanh_times"]
    assert ran_fused(fused, X) == [""] and ran_fused(fused.eval(), X) == [""]
    assert ran_fused(fused, X, twice=True) == [""]
    fxfuse.register(mine)
    try:
        assert patterns_in(fxfuse.optimize(TanhMul())) == ["tanh_times"]
        assert patterns_in(fxfuse.optimize(TanhMul(), patterns=["tanh_times"])) == ["tanh_times"]
    finally:
        fxfuse.unregister("tanh_times")


# --- example inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [X, (X,), [X], {"x": X}])
def test_ways_to_give_examples(example):
    assert patterns_in(fxfuse.optimize(ScaleNorm(), example)) == ["linear_scale_batchnorm1d"]


def test_examples_bind_nothing_to_their_sizes():
    class Shaped(Halved):
        def forward(self, x):
            y = F.relu(self.fc(x)) / 2
            return y.view(x.shape[0], -1) + x.size(0)

    model = Shaped()
    fused = check(model, X, example=X)
    for rows in (1, 3, 17):
        assert_same(fused(torch.ones(rows, 8)), model(torch.ones(rows, 8)))
    assert ran_fused(fused, torch.ones(9, 8)) == [""]
    batched = torch.randn(2, 3, 8)
    fused = fxfuse.optimize(Halved(), X)  # of rank 2
    assert_same(fused(batched), F.relu(fused.fc(batched)) / 2)
    assert ran_fused(fused, batched) == [""]


def test_examples_are_read_without_running_anything():
    calls = []
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Dropout())
    model[2].register_forward_hook(lambda m, args, out: calls.append(out))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fxfuse.optimize(model, X)
    assert calls == [] and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_examples_through_what_depends_on_values():
    class Selects(Halved):
        def forward(self, x):
            y = F.relu(self.fc(x)) / 2
            return y[y.sum(-1) > 0], x.nonzero()

    check(Selects(), X, example=X)


def test_examples_for_an_untraceable_model_still_help_nobody_and_hurt_nobody():
    check(Branching(), X, example=X)


# --- functions ---------------------------------------------------------------------------------------------------


def test_a_function_runs_fused_with_gradients():
    fused = fxfuse.optimize(collapse)
    assert patterns_in(fused) == ["matmul_div_sum_scale"] and fused.__name__ == "collapse" and "sum" in fused.__doc__
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    assert_same(fused(x, w), collapse(x, w), rtol=1e-4, atol=1e-5)
    assert_same(torch.autograd.grad(fused(x, w).sum(), (x, w)), torch.autograd.grad(collapse(x, w).sum(), (x, w)),
                rtol=1e-4, atol=1e-5)  # fmt: skip
    assert ran_fused(fused, x, w) == [""]


def test_a_function_called_in_new_ways():
    fused = fxfuse.optimize(flagged)
    w = torch.randn(6, 8)
    for kwargs in ({}, {"double": True}, {"scale": 4.0}, {"double": True, "scale": 0.5}):
        assert_same(fused(X, w, **kwargs), flagged(X, w, **kwargs))
        assert ran_fused(fused, X, w, **kwargs) == [""]
    assert_same(fused(w=w, x=X), flagged(X, w))


def test_a_closure_over_tensors_and_numbers():
    weight, scale = torch.randn(6, 8, requires_grad=True), 2.0

    def closure(x):
        return F.relu(F.linear(x, weight)) * scale

    fused = fxfuse.optimize(closure)
    assert ran_fused(fused, X) == [""]
    fused(X).sum().backward()
    assert weight.grad is not None
    before = fused(X)
    scale = 6.0
    assert_same(fused(X), before * 3)
    with torch.no_grad():
        weight.mul_(0)
    assert (fused(X) == 0).all()
    weight = torch.ones(6, 8)
    assert_same(fused(X), closure(X))


class Scorer:
    def __init__(self) -> None:
        self.w = torch.randn(6, 8)

    def score(self, x):
        return F.relu(F.linear(x, self.w))

    def __call__(self, x):
        return self.score(x) * 2


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (lambda x: F.relu(F.linear(x, torch.ones(2, 8))), (X,)),
        (functools.partial(flagged, w=torch.ones(2, 8)), (X,)),
        (Scorer().score, (X,)),
        (Scorer(), (X,)),
        (torch.relu, (X,)),
        (operator.neg, (X,)),
        (len, (X,)),
        (torch.Tensor.relu, (X,)),
        (Halved().forward, (X,)),
        (lambda *xs: xs[0] + 1, (X,)),
        (lambda x, n=[1]: x * n[0], (X,)),
        (plain_function, (X,)),
    ],
)
def test_every_callable_works(function, args):
    fused = fxfuse.optimize(function)
    assert_same(fused(*args), function(*args))
    report = fxfuse.report(fused)
    if not report.replacements and report.untraceable:
        assert "torch.compile" in str(report)


def test_functions_pickle_and_copy():
    fused = fxfuse.optimize(collapse, patterns=["matmul_div_sum_scale"])
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    loaded = pickle.loads(pickle.dumps(fused))
    assert patterns_in(loaded) == ["matmul_div_sum_scale"] and ran_fused(loaded, x, w) == [""]
    assert ran_fused(copy.deepcopy(fused), x, w) == [""]


def test_a_function_rebound_under_its_own_name_pickles(monkeypatch):
    fused = fxfuse.optimize(collapse)
    monkeypatch.setitem(globals(), "collapse", fused)
    assert pickle.loads(pickle.dumps(fused)) is fused


def test_a_function_as_a_method():
    class Model:
        score = fxfuse.optimize(lambda self, x, w: (x @ w.t()).sum(-1))

    assert Model().score(X, torch.ones(2, 8)).shape == (5,)


# --- blocks of real models ---------------------------------------------------------------------------------------


def test_levit_block():
    x = torch.randn(2, 4, 16)
    fused = check(LeViTBlock(), x)
    assert patterns_in(fused) == ["linear_scale_batchnorm1d"] * 4
    assert len(ran_fused(fused, x)) == 4
    dropped = check(LeViTBlock(drop=0.3), x)  # torch.rand in training: the block keeps its Python, its layers are fused
    assert len(ran_fused(dropped, x)) == 4
    stack = check(nn.Sequential(*[LeViTBlock() for _ in range(3)]), x, modes=(True, False))
    assert len(patterns_in(stack)) == 12


def test_mixer_block():
    x = torch.randn(2, 6, 16)
    fused = check(MixerBlock(), x)
    assert patterns_in(fused) == ["linear_activation_scale"] * 2 and len(ran_fused(fused, x)) == 2


def test_bert_layer():
    x, mask = torch.randn(2, 4, 16), torch.randn(2, 1, 1, 4)
    for kwargs in ({}, {"attention_mask": mask}, {"output_attentions": True}):
        fused = check(BertLayer(), x, **kwargs)
        assert "linear_activation_scale" in patterns_in(fused) and ran_fused(fused, x, **kwargs)


# --- what the result offers --------------------------------------------------------------------------------------


def test_report_belongs_to_what_optimize_returned():
    model = Branching()
    fused = fxfuse.optimize(model)
    assert len(fxfuse.report(fused).replacements) == 2
    with pytest.raises(TypeError, match="part of an optimized model"):
        fxfuse.report(nn.Sequential(fused))
    for thing in (model, nn.Linear(1, 1), collapse, 3):
        with pytest.raises(TypeError, match="did not return"):
            fxfuse.report(thing)
    assert patterns_in(pickle.loads(pickle.dumps(fused))) == patterns_in(fused)


def test_a_fused_model_inside_another_one():
    fused = fxfuse.optimize(Halved(8))
    outer = nn.Sequential(fused, nn.Linear(6, 6), nn.ReLU())
    again = check(outer, X)
    assert len(fxfuse.report(again).replacements) == 2
    assert ran_fused(outer, X) == ["0"]


def test_autocast_and_inference_mode():
    model = Halved()
    fused = fxfuse.optimize(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = fused(X), model(X)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    for region in (torch.no_grad, torch.inference_mode):
        with region():
            assert_same(fused(X), model(X), rtol=1e-4, atol=1e-5)
            assert not fused(X).requires_grad
            assert ran_fused(fused, X) == [""]
    with torch.inference_mode():
        assert fused(X).is_inference()
        inside = fxfuse.optimize(model)
    assert fused(X).requires_grad and inside(X).requires_grad
    with torch.no_grad():
        made = fxfuse.optimize(model)
    assert made(X).requires_grad
