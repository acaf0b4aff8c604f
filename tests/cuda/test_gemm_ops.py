"""linear_activation_scale and linear_scale_batchnorm1d as ops on a GPU: every road against the original in float64."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from products import LEAST, LEAST_TF32, Errors
from torch import nn
from torch.nn import functional as F
from uninitialised import fill_with_nan

from fxfuse.kernels import linear_scale_batchnorm1d as kernels
from fxfuse.kernels import loader, small_gemm
from fxfuse.ops.linear_activation_scale import OP as ACTIVATION
from fxfuse.ops.linear_activation_scale import linear_activation_scale
from fxfuse.ops.linear_scale_batchnorm1d import linear_scale_batchnorm1d_module

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SIZES = [(512, 1024, 512), (1500, 2048, 1024), (33, 40, 24), (130, 37, 51)]


def error(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


@pytest.fixture(autouse=True, params=["", "1"], ids=["hopper", "portable"])
def road(request, monkeypatch):
    monkeypatch.setenv("FXFUSE_PORTABLE", request.param)
    assert loader.library() is not None, loader.why_unavailable()
    fill_with_nan(monkeypatch)
    torch.manual_seed(0)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "hardtanh"])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_activation(m, n, k, activation, dtype, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    value = {"relu": F.relu, "gelu": F.gelu, "hardtanh": F.hardtanh}[activation]
    x, w = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, k, device="cuda", dtype=dtype) / k**0.5
    tensors = [x, w, torch.randn(n, device="cuda", dtype=dtype)]
    grad = torch.randn(m, n, device="cuda", dtype=dtype)

    def run(function, dtype):
        inputs = [t.to(dtype).detach().requires_grad_() for t in tensors]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    def original(x, w, b):
        return value(0.7 * F.linear(x, w, b)) * 0.5

    want = run(original, torch.float64)
    eager = run(original, dtype)
    args = (activation, -1.0, 1.0, 0.7, 0.5)
    assert ACTIVATION.road(*tensors, *args).name == "kernel"
    got = run(lambda *t: linear_activation_scale(*t, *args), dtype)
    least = LEAST_TF32 if tf32 and dtype == torch.float32 else LEAST[dtype]
    for g, w_, e in zip(got, want, eager, strict=True):
        assert error(g, w_) <= 1.25 * max(error(e, w_), least)
    with torch.no_grad():
        assert error(linear_activation_scale(*tensors, *args), want[0]) <= 1.25 * max(error(eager[0], want[0]), least)


class Block(nn.Module):
    def __init__(self, k, n):
        super().__init__()
        self.linear, self.bn = nn.Linear(k, n), nn.BatchNorm1d(n, momentum=0.2)
        # Away from 0: a column whose variance is that of eps would decide the whole gradient's error.
        self.scale = nn.Parameter(torch.randn(n).sign() * (torch.rand(n) + 0.5))
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.bias)

    def forward(self, x):
        return self.bn(self.linear(x) * self.scale)


class Fused(Block):
    def forward(self, x):
        return linear_scale_batchnorm1d_module(self.bn, x, self.linear.weight, self.linear.bias, self.scale)


@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16", "autocast", "module in bfloat16"])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_batchnorm_over_steps(m, n, k, kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", kind == "tf32")
    everything = torch.bfloat16 if kind == "module in bfloat16" else torch.float32
    eager = Block(k, n).cuda().to(everything)
    fused = Fused(k, n).cuda().to(everything)
    fused.load_state_dict(eager.state_dict())
    judge = copy.deepcopy(eager).double()
    least = {"float32": LEAST[torch.float32], "tf32": LEAST_TF32}.get(kind, LEAST[torch.bfloat16])
    errors = Errors()
    for training in (True, True, False, True, False):
        x = torch.randn(m, k, device="cuda").to(everything) + 1
        grad = torch.randn(m, n, device="cuda")
        results = []
        for model in (judge, eager, fused):
            model.train(training).zero_grad()
            inner = x.double() if model is judge else x
            inner = inner.clone().requires_grad_()
            with torch.autocast(
                "cuda", torch.bfloat16, enabled=kind in ("autocast", "bfloat16") and model is not judge
            ):
                out = model(inner)
            out.backward(grad.to(out.dtype))
            grads = {name: p.grad for name, p in model.named_parameters()}
            results.append((out.detach(), inner.grad, grads, dict(model.named_buffers())))
        want, base, got = results
        assert got[0].dtype == base[0].dtype
        errors.add("output", got[0], base[0], want[0], least)
        errors.add("gradient of x", got[1], base[1], want[1], least)
        for name, g in got[2].items():
            if name == "linear.bias" and training:
                assert g.abs().max() == 0, "its gradient is zero: eager's is rounding noise"
                continue
            errors.add(f"gradient of {name}", g, base[2][name], want[2][name], least)
        for name, b in got[3].items():
            errors.add(name, b, base[3][name], want[3][name], least)
    errors.check()


@pytest.mark.captures
def test_running_statistics_move_on_every_graph_replay():
    model = Fused(512, 1024).cuda()
    x = torch.randn(512, 512, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        before = copy.deepcopy(model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        graph.replay()
        before(x)
        want = before(x)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(model.bn.running_mean, before.bn.running_mean)
    torch.testing.assert_close(model.bn.running_var, before.bn.running_var)
    assert int(model.bn.num_batches_tracked) == int(before.bn.num_batches_tracked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_far_from_spread(dtype):
    """Columns whose mean is 1e4 times their spread."""
    n = 256
    model, x = Fused(n, n).cuda(), torch.randn(2000, n, device="cuda") * 1e-2
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(n))
        model.linear.bias.zero_()
    x = (x + 100).to(dtype)
    model.linear.to(dtype)
    judge = copy.deepcopy(model).double()
    with torch.no_grad():
        want = Block.forward(judge, x.double())
        base = Block.forward(copy.deepcopy(model), x)
        got = model(x)
    assert error(got, want) <= 1.25 * max(error(base, want), LEAST[torch.float32])


def test_strides_and_misalignment():
    memory = torch.randn(600, 1100, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16)
    for x in (memory[:, :512], memory[:, 1:513], memory[:, 3:515].t()[:512, :512], memory[:1, :512].expand(512, 512)):
        want = F.relu(F.linear(x.double(), w.double()))
        got = linear_activation_scale(x, w, None, "relu")
        assert error(got, want) <= 1.25 * max(error(F.relu(F.linear(x, w)), want), LEAST[x.dtype])
    assert linear_activation_scale(memory[:0, :512], w, None, "relu").shape == (0, 1024)


@pytest.mark.captures
@pytest.mark.launches_count
def test_a_training_step_bound_by_the_host_goes_by_eagers_own_operations():
    x, w, b = (torch.randn(s, device="cuda", requires_grad=True) for s in ((64, 64), (64, 64), (64,)))
    args = (x, w, b, "relu", 0.0, 0.0, 1.0, 0.5)
    assert ACTIVATION.road(*args).name == "composed" and "host" in ACTIVATION.road(*args).why
    with torch.no_grad():
        assert ACTIVATION.road(*args).name == "kernel"
    large = torch.empty(4096, 8192, device="cuda", requires_grad=True)
    assert ACTIVATION.road(large, torch.empty(8192, 8192, device="cuda"), None, *args[3:]).name == "kernel"
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        linear_activation_scale(*args)
    with torch.cuda.graph(graph):  # replayed without the host
        assert ACTIVATION.road(*args).name == "kernel"
        x * 2


def test_a_step_that_cannot_have_all_its_blocks_at_once_takes_several_kernels(monkeypatch):
    real = kernels.functions()

    def refuse(*args):
        raise loader.KernelError("no room", 720)

    monkeypatch.setattr(kernels, "functions", lambda: real._replace(train=refuse))
    x, layer, bn = torch.randn(512, 512, device="cuda").bfloat16(), nn.Linear(512, 6400), nn.BatchNorm1d(6400)
    layer, bn = layer.to("cuda", torch.bfloat16), bn.cuda()
    original = copy.deepcopy(bn)
    got = linear_scale_batchnorm1d_module(bn, x, layer.weight, layer.bias)
    want = original.double()(x.double() @ layer.weight.double().T + layer.bias.double())
    assert error(got, want) < 3e-3
    torch.testing.assert_close(bn.running_var.double(), original.running_var, rtol=3e-3, atol=1e-4)


@pytest.mark.parametrize("refused", ["", "no room", "portable"])
@pytest.mark.parametrize(("m", "n", "k"), [(512, 6400, 512), (4100, 2048, 520), (640, 1024, 520)])
def test_kept_training_calls_without_a_gradient(m, n, k, refused, monkeypatch):
    eager = Block(k, n).to("cuda", torch.bfloat16)
    fused = Fused(k, n).to("cuda", torch.bfloat16)
    fused.load_state_dict(eager.state_dict())
    judge = copy.deepcopy(eager).double()
    real = kernels.functions()

    def refuse(*args):
        raise loader.KernelError("no room", 720)

    call = small_gemm.LargeTraining.__call__

    def no_room(launch, *args):
        launch._function = lambda *args: 720
        return call(launch, *args)

    with torch.no_grad():
        for step in range(4):
            if refused == "no room" and step == 2:  # a call is kept by now
                monkeypatch.setattr(kernels, "functions", lambda: real._replace(train=refuse))
                monkeypatch.setattr(small_gemm.LargeTraining, "__call__", no_room)
            if refused == "portable" and step == 2:
                monkeypatch.setenv("FXFUSE_PORTABLE", "1")
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16) + 1
            want, base, got = judge(x.double()), eager(x), fused(x)
            assert got.dtype == base.dtype
            assert error(got, want) <= 1.25 * error(base, want)
            for name in ("running_mean", "running_var"):
                exact, other, ours = (getattr(model.bn, name) for model in (judge, eager, fused))
                assert error(ours, exact) <= 1.25 * error(other, exact), name
            assert int(fused.bn.num_batches_tracked) == step + 1


@pytest.mark.memory
@pytest.mark.parametrize("retain", [False, True])
def test_the_backward_lets_go_of_the_product(retain):
    """Once its gradient is there; not where the graph is retained, which gives the same gradients again."""
    m, n, k = 1024, 2048, 2048
    model = Fused(k, n).to("cuda", torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = [x, *model.parameters()]
    torch.autograd.grad(model(x).sum(), leaves)
    out = model(x)
    grad = torch.randn_like(out)
    gc.collect()  # what other tests left is not to be freed meanwhile
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad(out, leaves, grad, retain_graph=retain)
    extra = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in found)
    assert (extra > 3 * out.nbytes // 4) == retain
    if retain:
        again = torch.autograd.grad(out, leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("m", "n", "k"), [(16, 64, 64), (512, 6400, 512), (4100, 2048, 520)])
def test_the_second_device(m, n, k):
    eager = Block(k, n).to("cuda:1", torch.bfloat16)
    fused = Fused(k, n).to("cuda:1", torch.bfloat16)
    fused.load_state_dict(eager.state_dict())
    judge = copy.deepcopy(eager).double()
    weight, bias = eager.linear.weight, eager.linear.bias
    for training, gradient in ((True, True), (True, False), (True, False), (False, False), (False, False)):
        x = torch.randn(m, k, device="cuda:1", dtype=torch.bfloat16) + 1
        with torch.set_grad_enabled(gradient):
            want, base, got = (model.train(training)(i) for model, i in ((judge, x.double()), (eager, x), (fused, x)))
        assert got.device == x.device
        assert error(got, want) <= 1.25 * error(base, want)
        if gradient:
            for model, out in ((judge, want), (eager, base), (fused, got)):
                model.zero_grad()
                out.sum().backward()
            exact, other, ours = (model.scale.grad for model in (judge, eager, fused))
            assert error(ours, exact) <= 1.25 * error(other, exact)
        with torch.no_grad():
            args = (x, weight, bias, "relu", 0.0, 0.0, 1.0, 0.5)
            want = F.relu(F.linear(*(t.double() for t in args[:3]))) * 0.5
            base = F.relu(F.linear(*args[:3])) * 0.5
            assert error(linear_activation_scale(*args), want) <= 1.25 * error(base, want)
    assert int(fused.bn.num_batches_tracked) == 3
