"""The ops against the unfused code: values, buffers, errors no larger than eager's; and the machinery under them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from _op_samples import EVERY, NAMES, SMALL, Sample, copies, first_of, plain_kl_div, samples
from torch import Tensor, nn

from fxfuse import ops
from fxfuse.ops import linear_scale_batchnorm1d as bn_file
from fxfuse.ops._op import Op
from fxfuse.ops._road import Road

DRAWS = 24
DRAWN = [list(samples(size=11, seed=seed)) for seed in range(DRAWS)]


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm())


# Meaning


@EVERY
def test_values_and_buffers(sample: Sample, closed_form: None) -> None:
    mine, theirs = copies(sample.args), copies(sample.args)
    out, expected = sample.fused(*mine), sample.plain(*theirs)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    assert out.stride() == expected.stride()
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if isinstance(a, Tensor):  # the running statistics follow eager's; nothing else moves
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=f"argument {i} changed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", range(len(SMALL)), ids=lambda place: str(SMALL[place]))
def test_error_is_no_larger_than_eagers(place: int, dtype: torch.dtype, closed_form: None) -> None:
    """The result's and each gradient's error against float64, norm-wise over several draws: 1.25 times eager's at most.

    Over several draws, because one number is often exact by luck. An error within half an ulp is no error.
    """
    mine_sq: dict[str, float] = {}
    eager_sq: dict[str, float] = {}
    exact_sq: dict[str, float] = {}
    for seed in range(DRAWS):
        sample = DRAWN[seed][place]
        low = sample.to(dtype)
        exact = tuple(a.double() if isinstance(a, Tensor) else a for a in low)
        runs = []
        for function, base in ((sample.fused, low), (sample.plain, low), (sample.plain, exact)):
            args = copies(base, sample.differentiable)
            out = function(*args)
            up = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
            out.backward(up.to(out.dtype))
            grads = {f"gradient {i}": args[i].grad for i in sample.differentiable}
            runs.append({"result": out.detach(), **grads})
        for what, got in runs[0].items():
            eager, truth = runs[1][what], runs[2][what]
            assert (got.dtype, got.stride()) == (eager.dtype, eager.stride()), what
            mine_sq[what] = mine_sq.get(what, 0.0) + error(got, truth) ** 2
            eager_sq[what] = eager_sq.get(what, 0.0) + error(eager, truth) ** 2
            floor = 0.5 * torch.finfo(got.dtype).eps * float(truth.norm())
            exact_sq[what] = exact_sq.get(what, 0.0) + floor**2
    for what, square in mine_sq.items():
        assert square <= max(1.25**2 * eager_sq[what], 0.3 * exact_sq[what]), (
            f"{what}: error {square**0.5:.3e}, eager's {eager_sq[what] ** 0.5:.3e}"
        )


@pytest.mark.parametrize("kind", ["positive", "signs", "cancelling"])
def test_collapsed_float32_error(kind: str) -> None:
    gen = torch.Generator().manual_seed(5)
    x, w = torch.randn(64, 2048, generator=gen), torch.randn(512, 2048, generator=gen)
    if kind == "positive":
        x, w = x.abs(), w.abs()
    if kind == "cancelling":
        w -= w.mean(0)
    exact = (x.double() @ w.double().t()).sum(-1)
    eager = (x @ w.t()).sum(-1)
    mine = ops.get("matmul_div_sum_scale").call(x, w)
    assert error(mine, exact) <= 1.25 * error(eager, exact)


def test_batchnorm_of_columns_far_from_zero(closed_form: None) -> None:
    gen = torch.Generator().manual_seed(7)
    x, w = torch.randn(256, 8, generator=gen), torch.randn(16, 8, generator=gen)
    bias = torch.full((16,), 1e4)
    w[3] = 0  # a constant column
    args = (x, w, bias, torch.rand(16, generator=gen) + 0.5, None, 1.0, None, None)
    args += (torch.zeros(16), torch.ones(16), True, 0.1, 1e-5)
    exact = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    plain = first_of("linear_scale_batchnorm1d").plain
    truth, eager = plain(*copies(exact)), plain(*copies(args))
    assert error(bn_file.linear_scale_batchnorm1d(*copies(args)), truth) <= 1.25 * error(eager, truth)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("log_input", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_kl_div_is_finite_where_eager_is(log_target: bool, log_input: bool, reduction: str, closed_form: None) -> None:
    special = torch.tensor([0.0, -0.5, 0.3, 1.0, float("inf"), -float("inf"), float("nan"), 1e-42, -0.0])
    p, t = (v.reshape(-1).contiguous() for v in torch.meshgrid(special, special, indexing="ij"))
    for p_one, t_one in zip(p.split(1), t.split(1), strict=True) if reduction == "sum" else [(p, t)]:
        mine, theirs = copies((p_one, t_one), (0, 1)), copies((p_one, t_one), (0, 1))
        a = ops.get("kl_div").call(*mine, reduction, log_target, log_input)
        b = plain_kl_div(*theirs, reduction, log_target, log_input)
        torch.testing.assert_close(a, b, equal_nan=True)
        a.sum().backward()
        b.sum().backward()
        for i in (0, 1):
            torch.testing.assert_close(mine[i].grad, theirs[i].grad, equal_nan=True)


@pytest.mark.parametrize("log_target", [False, True])
def test_distillation_with_masked_logits(log_target: bool, closed_form: None) -> None:
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    s[0, 1] = t[0, 1] = t[1, 2] = s[2, 3] = -float("inf")
    t[3] *= 400  # probabilities that underflow
    sample = first_of("distillation_kl", "none")
    rest = (-1, 2.0, 1.0, 1.0, "none", log_target)
    mine, theirs = copies((s, t), (0, 1)), copies((s, t), (0, 1))
    a, b = sample.fused(*mine, *rest), sample.plain(*theirs, *rest)
    torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
    a.sum().backward()
    b.sum().backward()
    for i in (0, 1):
        torch.testing.assert_close(mine[i].grad, theirs[i].grad, equal_nan=True, rtol=1e-4, atol=1e-5)


# BatchNorm read at run time


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_batchnorm_module_over_a_sequence(
    momentum: float | None, affine: bool, tracked: bool, closed_form: None
) -> None:
    torch.manual_seed(11)
    linear = nn.Linear(5, 4).double()
    scale = torch.rand(4, dtype=torch.float64) + 0.5
    options = {"momentum": momentum, "affine": affine, "track_running_stats": tracked, "dtype": torch.float64}
    mine, theirs = nn.BatchNorm1d(4, **options), nn.BatchNorm1d(4, **options)
    for step in range(6):
        mine.train(step % 3 != 2)
        theirs.train(step % 3 != 2)
        x = torch.randn(7, 5, dtype=torch.float64)
        a = bn_file.linear_scale_batchnorm1d_module(mine, x, linear.weight, linear.bias, scale)
        b = theirs(linear(x) * scale)
        torch.testing.assert_close(a, b)
        for (key, left), (_, right) in zip(mine.state_dict().items(), theirs.state_dict().items(), strict=True):
            torch.testing.assert_close(left, right, msg=key)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        bn_file.linear_scale_batchnorm1d_module(mine, x[0], linear.weight)


# Machinery


def test_an_op_of_ones_own_in_a_few_lines() -> None:
    def reference(x: Tensor, y: Tensor, a: float) -> Tensor:
        return a * x.sin() + y

    op = Op("fxfuse_test::axpy", "(Tensor x, Tensor y, float a=2.0) -> Tensor", reference)
    x, y = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(op.call(x, y=y), 2 * x.sin() + y)
    compiled = torch.compile(op.call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, a=3.0), 3 * x.sin() + y)
    assert torch.autograd.gradgradcheck(op.call, (x, y))
    torch.library.opcheck(op.overload, (x, y, 2.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert op.call(x, y).dtype == torch.float64
    assert op.road(x, y) == ("composed", "this op is its reference")


def test_an_op_with_a_forward_but_no_backward() -> None:
    def reference(x: Tensor, y: Tensor) -> Tensor:
        return x * y.exp()

    def forward(road: Road, x: Tensor, y: Tensor, *, wanted: Any = ()) -> Any:
        return torch.exp(y).mul_(x), ()

    op = Op("fxfuse_test::forward_only", "(Tensor x, Tensor y) -> Tensor", reference, forward=forward)
    args = tuple(torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(op.call, args) and torch.autograd.gradgradcheck(op.call, args)
    torch.library.opcheck(op.overload, args)


@NAMES
def test_roads_say_why(name: str) -> None:
    sample = first_of(name)
    road = ops.get(name).road(*sample.args)
    assert road.name in ("kernel", "closed", "composed") and road.why


def test_blocks_need_no_memory_of_the_inputs_size() -> None:
    """No allocation inside a reduced forward or a backward comes near the inputs' size, but the gradient itself."""
    x, t = torch.randn(2048, 4096), torch.randn(2048, 4096)
    size = x.numel() * x.element_size()
    for name in ("kl_div", "distillation_kl"):
        args = (x, t) if name == "distillation_kl" else (x.log_softmax(-1), t.softmax(-1))
        leaf = args[0].clone().requires_grad_()
        with torch.profiler.profile(profile_memory=True) as prof:
            loss = ops.get(name).call(leaf, args[1], reduction="batchmean")
        assert max(e.self_cpu_memory_usage for e in prof.events()) < size / 4
        with torch.profiler.profile(profile_memory=True) as prof:
            torch.autograd.grad(loss, leaf)
        # One allocation, the gradient, and nothing beside it.
        assert sum(e.self_cpu_memory_usage > size / 4 for e in prof.events()) == 1


def test_import_is_lazy() -> None:
    code = """
import sys
import fxfuse.ops
assert fxfuse.ops.names() and "fxfuse.ops.kl_div" not in sys.modules
fxfuse.ops.get("kl_div")
assert "fxfuse.kernels.loader" not in sys.modules or sys.modules["fxfuse.kernels.loader"]._loaded is None
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
