"""Copies and pickles run fused, threads agree, other tracers read a fused module as any other."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from models import Branching, Halved, ScaleNorm, assert_same, patterns_in, ran_fused
from torch import fx, nn

import fxfuse
from fxfuse.plan import plan_of

torch.set_num_threads(1)
X = torch.randn(5, 8)
BUILDS = [ScaleNorm, Halved, Branching]
EXPECTED = {ScaleNorm: [""], Halved: [""], Branching: ["first", "second"]}


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("build", BUILDS)
def test_copies_run_fused(build, way):
    fused = fxfuse.optimize(build())
    copied = way(fused)
    assert not any(a is b for a, b in zip(copied.parameters(), fused.parameters(), strict=True))
    assert list(copied.state_dict()) == list(fused.state_dict())
    for mode in (True, False):
        copied.train(mode), fused.train(mode)
        copied.load_state_dict(fused.state_dict())
        assert_same(copied(X), fused(X))
        assert ran_fused(copied, X) == EXPECTED[build]
    assert patterns_in(copied) == patterns_in(fused)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert any(p.abs().sum() > 0 for p in fused.parameters())
    assert_same(way(copied)(X), copied(X))  # a copy of a copy


def test_a_pickle_holds_no_code_of_the_graph():
    data = pickle.dumps(fxfuse.optimize(Halved()))
    assert b"def forward" not in data and b"variants" not in data


def test_a_fused_graph_module_pickles():
    fused = fxfuse.optimize(fx.symbolic_trace(ScaleNorm()))
    for way in (copy.deepcopy, through_pickle):
        copied = way(fused)
        assert_same(copied.eval()(X), fused.eval()(X))
        assert "linear_scale_batchnorm1d" in copied.code


def test_a_pickle_with_a_pattern_that_is_missing_warns_and_runs():
    from fxfuse.match import op, variables

    a, b = variables("a b")
    mine = fxfuse.Pattern("mine_alone", op.mul(op.tanh(a), b), _tanh_mul)
    fused = fxfuse.optimize(nn.Sequential(TanhMul()), patterns=[mine])
    assert patterns_in(fused) == ["mine_alone"] and ran_fused(fused, X) == ["0"]
    fused.eval()  # another graph is needed for this one, of a pattern that was never registered
    assert ran_fused(fused, X) == ["0"]
    data = pickle.dumps(fused)
    with pytest.warns(UserWarning, match="'mine_alone'"):
        loaded = pickle.loads(data)
    assert_same(loaded(X), fused(X))
    assert ran_fused(loaded, X) == []


def _tanh_mul(a, b):
    return torch.tanh(a) * b


class TanhMul(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * (2.0 if self.training else 3.0)


def test_the_same_plan_serves_new_kinds_of_calls_after_a_deepcopy():
    class Masked(Halved):
        def forward(self, x, mask=None):
            y = F.relu(self.fc(x))
            return y if mask is None else y * mask

    fused = copy.deepcopy(fxfuse.optimize(Masked()))
    assert ran_fused(fused, X, torch.ones(6)) == [""] and ran_fused(fused, X) == [""]


# --- threads -----------------------------------------------------------------------------------------------------


def in_threads(*works) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work):
        try:
            barrier.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(w,)) for w in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_threads_call_a_fresh_plan_at_once():
    with torch.no_grad():
        for _ in range(10):
            model = Branching().eval()
            fused = through_pickle(fxfuse.optimize(model))  # no graph yet: both threads want to make it
            got = [None, None]

            def call(i, fused=fused, got=got):
                got[i] = fused(X)

            in_threads(*[lambda i=i: call(i) for i in range(2)])
            expected = model(X)
            assert_same(got[0], expected, rtol=1e-4, atol=1e-5)
            assert_same(got[1], expected, rtol=1e-4, atol=1e-5)
            for part in fused.modules():
                if plan_of(part):
                    assert all(len(v) == 1 for v in plan_of(part).variants.values())
            assert ran_fused(fused, X) == ["first", "second"]


def test_a_thread_runs_models_while_others_optimize():
    """torch.fx patches nn.Module for the whole process while it traces; what others run then must not notice."""
    model = nn.Sequential(*[Halved(8 if i == 0 else 6) for i in range(5)]).eval()
    other = Branching().eval()
    fused = fxfuse.optimize(other)
    expected, fused_expected = model(X), fused(X)
    call = nn.Module.__call__
    stop = threading.Event()

    def serve():
        count = 0
        while not stop.is_set() or count < 20:
            assert torch.equal(model(X), expected) and torch.equal(fused(X), fused_expected)
            count += 1

    def build():
        try:
            for _ in range(15):
                again = fxfuse.optimize(model)
                assert len(fxfuse.report(again).replacements) == 5
                assert torch.equal(again(X), expected) or torch.allclose(again(X), expected)
        finally:
            stop.set()

    in_threads(serve, build, build)
    assert nn.Module.__call__ is call


# --- other tracers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS[:2])
@pytest.mark.parametrize("mode", [True, False])
def test_symbolic_trace_of_an_optimized_module(build, mode):
    fused = fxfuse.optimize(build()).train(mode)
    graph = fx.symbolic_trace(fused)
    assert any("fxfuse.ops" in getattr(n.target, "__module__", "") for n in graph.graph.nodes)
    assert_same(graph(X), fused(X), rtol=1e-4, atol=1e-5)
    inside = fx.symbolic_trace(nn.Sequential(nn.Identity(), fused))
    assert_same(inside(X), fused(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", BUILDS[:2])
def test_jit_trace_of_an_optimized_module(build):
    fused = fxfuse.optimize(build()).eval()
    assert_same(torch.jit.trace(fused, X)(X + 1), fused(X + 1))
    assert_same(torch.jit.trace(through_pickle(fused), X)(X), fused(X))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("build", BUILDS[:2])
def test_export_of_an_optimized_module(build, strict):
    fused = fxfuse.optimize(build()).eval()
    program = torch.export.export(fused, (X,), strict=strict, dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert_same(program.module()(X[:3]), fused(X[:3]), rtol=1e-4, atol=1e-5)
    assert any("fxfuse" in str(n.target) for n in program.graph.nodes)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("build", BUILDS[:2])
def test_compile_of_an_optimized_module(build, backend):
    torch._dynamo.reset()
    fused = fxfuse.optimize(build())
    reference = copy.deepcopy(fused)
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    for mode in (True, False):
        fused.train(mode), reference.train(mode)
        a, b = compiled(X), reference(X)
        assert_same(a, b, rtol=1e-4, atol=1e-5)
        fused.zero_grad(), reference.zero_grad()
        a.square().sum().backward(), b.square().sum().backward()
        for p, q in zip(fused.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


def test_compile_sees_what_changes_later():
    torch._dynamo.reset()
    fused = fxfuse.optimize(Halved())
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    before = compiled(X)
    fused.divisor = 8.0
    assert_same(compiled(X), before / 4)


@pytest.mark.slow
def test_inductor_compiles_an_optimized_module():
    torch._dynamo.reset()
    fused = fxfuse.optimize(Halved())
    assert_same(torch.compile(fused, fullgraph=True)(X), fused(X), rtol=1e-4, atol=1e-5)


def test_the_forward_keeps_its_signature():
    import inspect

    class Named(Halved):
        def forward(self, input_ids, *, scale=1.0):
            return F.relu(self.fc(input_ids)) * scale

    fused = fxfuse.optimize(Named())
    assert list(inspect.signature(fused.forward).parameters) == ["input_ids", "scale"]
    assert fused.forward.__doc__ == Named.forward.__doc__


def test_functional_call_and_vmap():
    model = Halved()
    fused = fxfuse.optimize(model)
    params = {k: torch.randn_like(v) for k, v in model.named_parameters()}
    expected = torch.func.functional_call(model, params, (X,))
    assert_same(torch.func.functional_call(fused, params, (X,)), expected)
    assert_same(torch.vmap(fused)(X[None].repeat(3, 1, 1)), model(X).expand(3, 5, 6))
    loss = lambda p, m: torch.func.functional_call(m, p, (X,)).sum()  # noqa: E731
    assert_same(*[torch.func.grad(loss)(params, m) for m in (fused, model)])
