"""The kernels of linear_activation_scale and linear_scale_batchnorm1d against float64: products with their epilogues,
and the memory passes, over awkward sizes, with poisoned outputs."""

from __future__ import annotations

import math

import products
import pytest
import torch
from products import ACTS, randn
from torch.nn import functional as F
from uninitialised import fill_with_nan

from fxfuse.kernels import gemm, loader
from fxfuse.kernels import linear_activation_scale as las
from fxfuse.kernels import linear_scale_batchnorm1d as lsb

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
PRODUCTS = [(256, 512, 512), (1000, 520, 328), (77, 264, 40), (513, 1032, 8), (4000, 1024, 136), (1, 64, 64),
            (129, 4160, 72), (300, 3080, 264), (9000, 72, 520)]  # fmt: skip
MATRICES = [(2, 8), (5, 3), (64, 64), (257, 40), (1000, 333), (300, 136), (512, 72),
            (600, 1096), (1024, 512), (1025, 512), (5000, 96), (70000, 8)]  # fmt: skip


#: float32 is TF32 in this file.
LEAST = {**products.LEAST, torch.float32: products.LEAST_TF32}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    torch.manual_seed(torch.initial_seed() % 1000)
    assert loader.library() is not None, loader.why_unavailable()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    fill_with_nan(monkeypatch)


def activate(act: las.Act, z: torch.Tensor) -> torch.Tensor:
    z = z * act.pre_scale
    value = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "leaky_relu": lambda t: F.leaky_relu(t, act.alpha),
        "hardtanh": lambda t: F.hardtanh(t, act.alpha, act.beta),
        "clamp": lambda t: t.clamp(act.alpha, act.beta),
    }[act.activation](z)
    return value * act.scale


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
def test_activation_product(m, n, k, dtype):
    x, weight, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5, randn(n, dtype=dtype)
    for act in ACTS:
        for b in (bias, None):
            want = activate(act, F.linear(x.double(), weight.double(), None if b is None else b.double()))
            eager = activate(act, F.linear(x, weight, b))
            got = las.forward(x, weight, b, act)
            assert error(got, want) <= 1.25 * max(error(eager, want), LEAST[dtype]), act
            assert torch.equal(got, las.forward(x, weight, b, act)), "not deterministic"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS, ids=lambda a: a.activation)
def test_activation_passes(act, dtype):
    for count in (1, 7, 8, 1001, 1 << 16):
        least = 8e-7 if count > 1000 or dtype == torch.float32 else 0.8 * torch.finfo(dtype).eps
        z = 3 * randn(count, dtype=dtype)
        grad = randn(count, dtype=dtype)
        exact = z.double().requires_grad_()
        want = activate(act, exact)
        (want_grad,) = torch.autograd.grad(want, exact, grad.double())
        eager_z = z.clone().requires_grad_()
        eager = activate(act, eager_z)
        (eager_grad,) = torch.autograd.grad(eager, eager_z, grad)
        out = las.apply(z, act, torch.empty_like(z))
        assert error(out, want.detach()) <= 1.25 * max(error(eager.detach(), want.detach()), least)
        assert error(las.backward(grad, z, act, False)[0], want_grad) <= 1.25 * max(error(eager_grad, want_grad), least)
        if las.from_output(act):
            got = las.backward(grad, out, act, True)[0]
            assert error(got, want_grad) <= 1.25 * max(error(eager_grad, want_grad), least)
        assert torch.equal(las.apply(z, act, z), out)


def test_nan_and_infinity_go_through_activations():
    z = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], device="cuda")
    for act in ACTS:
        torch.testing.assert_close(las.apply(z, act, torch.empty_like(z)), activate(act, z), equal_nan=True)


def columns(n, dtype, eps=1e-5, bias=True):
    return lsb.Columns(
        randn(n, dtype=dtype) if bias else None,
        randn(n, dtype=torch.float32),
        randn(n, dtype=dtype).abs() + 0.5,
        -1.3,
        randn(n, dtype=torch.float32),
        randn(n, dtype=torch.float32),
        eps,
    )


def batch_norm(acc, c: lsb.Columns, running, training, momentum, dtype):
    """The op on a finished product, as the original says it, in `dtype`."""
    z = acc.to(dtype) if c.bias is None else acc.to(dtype) + c.bias.to(dtype)
    z = z * c.alpha * c.scale.to(dtype) / c.divisor.to(dtype)
    weight, shift = c.weight.to(dtype), c.shift.to(dtype)
    return F.batch_norm(
        z, *(r.to(dtype) if r.dtype != dtype else r for r in running), weight, shift, training, momentum, c.eps
    )


@on_hopper
@pytest.mark.parametrize(("dtype", "out_dtype"), [*((d, d) for d in DTYPES), *((d, torch.float32) for d in HALF)])
@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
def test_eval_product(m, n, k, dtype, out_dtype):
    x, weight, c = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5, columns(n, dtype)
    running = randn(n, dtype=torch.float32), randn(n, dtype=torch.float32).abs() + 0.1
    want = batch_norm(x.double() @ weight.double().T, c, running, False, 0.1, torch.float64)
    eager = batch_norm(F.linear(x, weight), c, running, False, 0.1, torch.float32).to(out_dtype)
    got = lsb.eval_product(x, weight, c, *running, out_dtype)
    assert error(got, want) <= 1.25 * max(error(eager, want), LEAST[dtype])


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_product_statistics(m, n, k, dtype, offset):
    x, weight = randn(m, k, dtype=dtype) + offset, randn(n, k, dtype=dtype) / k**0.5
    acc, (partials, rows) = lsb.train_product(x, weight)
    want = x.double() @ weight.double().T
    assert error(acc, want) <= 1.25 * max(error(x @ weight.T, want), LEAST[dtype])
    counts = torch.full((partials.size(0), 1), float(rows), device="cuda", dtype=torch.float64)
    counts[-1] = m - rows * (partials.size(0) - 1)
    mean = (partials[..., 0].double() * counts).sum(0) / m
    m2 = partials[..., 1].double().sum(0) + (counts * (partials[..., 0].double() - mean).square()).sum(0)
    assert error(mean, want.mean(0)) < (2e-3 if dtype == torch.float32 else 1e-5)
    if m > 1:
        assert error(m2, (want - want.mean(0)).square().sum(0)) < (5e-3 if dtype == torch.float32 else 1e-4)


ONE_ROUND = [(1024, 8192, 256), (1023, 4104, 1096), (1000, 520, 328), (77, 264, 40), (513, 1032, 8), (2, 64, 64),
             (129, 4160, 72), (300, 3080, 264), (256, 2048, 1032)]  # fmt: skip
BEHIND = [(1024, 16384, 72), (900, 16648, 520), (640, 8200, 2056), (1025, 264, 40), (3000, 1032, 200),
          (4096, 4096, 512), (16400, 2056, 136), (70000, 64, 16), (9000, 72, 520)]  # fmt: skip


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), ONE_ROUND + BEHIND)
def test_train_in_one_kernel(m, n, k, keep, dtype):
    x, weight, c = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5, columns(n, dtype)
    running = randn(n, dtype=torch.float32), randn(n, dtype=torch.float32).abs()
    want_running, eager_running = tuple(r.double() for r in running), tuple(r.clone() for r in running)
    product = x.double() @ weight.double().T
    want = batch_norm(product, c, want_running, True, 0.3, torch.float64)
    eager = batch_norm(F.linear(x, weight), c, eager_running, True, 0.3, torch.float32).to(dtype)
    out, acc, saved = lsb.train(x, weight, c, *running, 0.3, keep)
    assert error(out, want) <= 1.25 * max(error(eager, want), LEAST[dtype])
    for got, best, e in zip(running, want_running, eager_running, strict=True):
        assert error(got, best) <= 1.25 * max(error(e, best), LEAST[dtype])
    assert error(saved[0], product.mean(0)) < 5e-3
    if keep:
        assert error(acc, product) <= 1.25 * max(error(x @ weight.T, product), LEAST[dtype])
    assert torch.equal(lsb.train(x, weight, c, None, None, 0.3, keep)[0], out), "not deterministic"


@on_hopper
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("m", [300, 1024, 3000])
def test_columns_of_less_spread_than_rounding(m, keep, dtype):
    """Rounding leaves nothing of such columns, or two values; they are normalised by what is left, as eager's are."""
    n, k = 2048, 128
    fine = torch.finfo(dtype).eps  # of numbers from 8 to 16, an eighth of what two neighbours differ by
    x, weight = randn(m, k, dtype=dtype) * fine / k**0.5, randn(n, k, dtype=dtype)
    x[:, :2] = 1
    weight[:, 0] = 9 + 6 * torch.rand(n, device="cuda")
    weight[:, 1] = 8 * fine * torch.rand(n, device="cuda")  # between two neighbours
    c, running = columns(n, dtype, eps=1e-7), (torch.zeros(n, device="cuda"), torch.ones(n, device="cuda"))
    want = batch_norm(x.double() @ weight.double().T, c, running, True, 0.3, torch.float64)
    eager = batch_norm(F.linear(x, weight), c, running, True, 0.3, torch.float32).to(dtype)
    out, *_ = lsb.train(x, weight, c, None, None, 0.3, keep)
    assert error(out, want) <= 1.25 * max(error(eager, want), LEAST[dtype])


@pytest.mark.parametrize(("dtype", "out_dtype"), [*((d, d) for d in DTYPES), *((d, torch.float32) for d in HALF)])
@pytest.mark.parametrize(("m", "n"), MATRICES)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_train_passes(m, n, dtype, out_dtype, offset):
    acc, c = randn(m, n, dtype=dtype) + offset, columns(n, dtype, eps=1e-3)
    grad = randn(m, n, dtype=out_dtype)
    running = randn(n, dtype=torch.float32), randn(n, dtype=torch.float32).abs()
    exact = acc.double().requires_grad_()
    parameters = [t.double().requires_grad_() for t in (c.scale, c.weight, c.shift)]
    exact_c = c._replace(
        bias=None if c.bias is None else c.bias.double(),
        scale=parameters[0],
        weight=parameters[1],
        shift=parameters[2],
        divisor=c.divisor.double(),
    )
    want_running = tuple(r.double() for r in running)
    want = batch_norm(exact, exact_c, want_running, True, 0.3, torch.float64)
    d_acc, d_scale, d_weight, d_shift = torch.autograd.grad(want, [exact, *parameters], grad.double())

    eager_acc = acc.float().requires_grad_()
    eager_parameters = [t.clone().requires_grad_() for t in (c.scale, c.weight, c.shift)]
    eager_c = c._replace(scale=eager_parameters[0], weight=eager_parameters[1], shift=eager_parameters[2])
    eager_running = tuple(r.clone() for r in running)
    eager = batch_norm(eager_acc, eager_c, eager_running, True, 0.3, torch.float32)
    eager_grads = torch.autograd.grad(eager, [eager_acc, *eager_parameters], grad.float())

    out = torch.empty(m, n, dtype=out_dtype, device="cuda")
    saved = lsb.train_apply(acc, None, c, *running, 0.3, out)
    least = products.LEAST[torch.float32]
    assert error(out, want.detach()) <= 1.25 * max(error(eager.detach().to(out_dtype), want.detach()), least)
    for got, best, e in zip(running, want_running, eager_running, strict=True):
        assert error(got, best) <= 1.25 * max(error(e, best), least)
    got = lsb.backward(grad, acc, saved, c, weight=True, shift=True, s=True, scale=True, bias=True)
    assert error(got.acc, d_acc) <= 1.25 * max(error(eager_grads[0].to(dtype), d_acc), least)
    assert error(got.weight, d_weight) <= 1.25 * max(error(eager_grads[2], d_weight), least)
    assert error(got.shift, d_shift) <= 1.25 * max(error(eager_grads[3], d_shift), least)
    for got_scale in (got.s * c.alpha / c.divisor.float(), got.scale):
        assert error(got_scale, d_scale) <= 1.25 * max(error(eager_grads[1], d_scale), least)
    assert got.bias is None if c.bias is None else not got.bias.any() and got.bias.dtype == c.bias.dtype
    if dtype == out_dtype:
        again = torch.empty_like(saved)
        again.copy_(lsb.train_apply(acc, None, c, None, None, 0.3, acc))
        assert torch.equal(acc, out) and torch.equal(again, saved), "not deterministic, or wrong in place"


@pytest.mark.parametrize(("dtype", "out_dtype"), [*((d, d) for d in DTYPES), *((d, torch.float32) for d in HALF)])
@pytest.mark.parametrize(("m", "n"), [(200, 64), (512, 200), (1000, 4104)])
def test_backward_in_one_launch_and_in_passes(m, n, dtype, out_dtype):
    """The same gradients from a block that holds its columns as from passes over them, which a gradient off 16 bytes
    goes by; the one launch gives the same bits again."""
    acc, c = randn(m, n, dtype=dtype), columns(n, dtype)
    grad = randn(m * n + 1, dtype=out_dtype)[:-1].view(m, n)
    off = torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(m, n)
    saved = lsb.train_apply(acc, None, c, None, None, 0.3, torch.empty(m, n, dtype=out_dtype, device="cuda"))
    every = {"weight": True, "shift": True, "bias": True, "s": True, "scale": True}
    whole, again, passes = (lsb.backward(g, acc, saved, c, **every) for g in (grad, grad, off))
    launches = [lsb.backward_scratch(m, n, aligned, dtype, out_dtype, 0) == 0 for aligned in (True, False)]
    assert launches == [dtype == out_dtype or m <= 512, False]
    for one, two, other in zip(whole, again, passes, strict=True):
        if one is not None:
            assert torch.equal(one, two), "not deterministic"
            assert error(one, other.double()) < {torch.float32: 3e-6}.get(one.dtype, torch.finfo(one.dtype).eps)


@pytest.mark.parametrize(("dtype", "out_dtype"), [*((d, d) for d in DTYPES), *((d, torch.float32) for d in HALF)])
@pytest.mark.parametrize(("m", "n"), MATRICES)
def test_eval_pass(m, n, dtype, out_dtype):
    acc, c = randn(m, n, dtype=dtype), columns(n, dtype)
    running = randn(n, dtype=torch.float32), randn(n, dtype=torch.float32).abs() + 0.1
    want = batch_norm(acc, c, running, False, 0.1, torch.float64)
    eager = batch_norm(acc, c, running, False, 0.1, torch.float32).to(out_dtype)
    got = lsb.eval_apply(acc, c, *running, torch.empty(m, n, dtype=out_dtype, device="cuda"))
    assert error(got, want) <= 1.25 * max(error(eager, want), products.LEAST[torch.float32])


def test_constant_columns_have_no_variance():
    acc = torch.full((3000, 64), 1234.5, device="cuda")
    c = columns(64, torch.float32, eps=1e-12)
    out = torch.empty_like(acc)
    lsb.train_apply(acc, None, c, None, None, 0.1, out)
    torch.testing.assert_close(out, c.shift.expand_as(out))


def test_what_the_copy_engine_takes():
    t = torch.zeros(64, 72, device="cuda", dtype=torch.bfloat16)
    assert gemm.rows(t) is not None and gemm.rows(t[:, :64]) is not None
    assert gemm.rows(t[:, 1:65]) is None and gemm.rows(t.t()) is None
    assert gemm.rows(t[:, :63]) is not None, "K itself need not be a multiple: the pitch is"
    assert gemm.rows(torch.zeros(64, 63, device="cuda", dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 8), (7, 24), (63, 256), (1024, 2048), (4099, 136), (70000, 64), (300, 8192)]
)
def test_column_sums_with_the_gradient_of_an_activation(rows, columns, dtype):
    """Of dz before it is rounded, the same bits every time; dz is what it is without them."""
    act, judge = las.Act("gelu", 0, 0, 1.0, 0.5), torch.float64
    for draw in range(3):
        grad, z = (randn(rows, columns, dtype=dtype) for _ in range(2))
        dz, db = las.backward(grad, z, act, False, True)
        assert torch.equal(dz, las.backward(grad, z, act, False)[0]) and db.dtype == dtype
        leaf = z.to(judge).requires_grad_()
        (exact,) = torch.autograd.grad(F.gelu(leaf) * 0.5, leaf, grad.to(judge))
        terms = exact.abs().sum(0)
        allowed = 0.51 * torch.finfo(dtype).eps * exact.sum(0).abs() + 2e-6 * terms + torch.finfo(dtype).tiny
        assert bool(((db.to(judge) - exact.sum(0)).abs() <= allowed).all()), draw
        assert torch.equal(db, las.backward(grad, z, act, False, True)[1])
    assert las.backward(grad[:, :1].contiguous(), z[:, :1].contiguous(), act, False, True)[1] is None
