"""Products of few rows in one launch: against float64, with poisoned outputs; awkward sizes, strides and dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from draws import times
from products import ACTS, KINDS, Errors, dtype_of, poison, randn
from torch.nn import functional as F

from fxfuse.kernels import linear_activation_scale as las
from fxfuse.kernels import linear_scale_batchnorm1d as lsb
from fxfuse.kernels import small_gemm
from fxfuse.ops import linear_activation_scale as las_op

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SIZES = [
    (1, 1, 1), (1, 64, 64), (3, 17, 63), (17, 65, 255), (63, 1, 17), (64, 63, 65), (255, 65, 63), (65, 255, 3),
    (256, 64, 1), (2, 2, 2048), (16, 256, 256), (33, 48, 128), (100, 130, 520), (128, 16, 264), (129, 2200, 72),
    (256, 520, 512), (64, 1600, 96), (200, 4096, 64),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(request, monkeypatch):
    poison(request, monkeypatch)


def draws(elements: int) -> int:
    return times(min(100, max(2, -(-6000 // elements))))


def activate(act: las.Act, x, weight, bias):
    """As the op's reference has it."""
    return las_op.reference(x, weight, bias, *act)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_activation(m, n, k, kind):
    dtype, errors = dtype_of(kind), Errors()
    for draw in range(draws(m * n)):
        x, w, b = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5, randn(n, dtype=dtype)
        for act in ACTS if (m, n, k) == (100, 130, 520) else (ACTS[0], ACTS[1]):
            bias = b if draw % 2 else None
            got = small_gemm.activation(x, w, bias, act)(x)
            want = activate(act, x.double(), w.double(), None if bias is None else bias.double())
            errors.add(act.activation, got, activate(act, x, w, bias), want)
            assert torch.equal(got, small_gemm.activation(x, w, bias, act)(x)), "not the same bits"
    errors.check()


def columns(n, dtype, form):
    full = form % 2 == 0
    return lsb.Columns(
        randn(n, dtype=dtype) if full else None,
        randn(n, dtype=dtype).abs() + 0.5,
        randn(1 if full else n, dtype=dtype).abs() + 0.5 if form % 3 else None,
        -1.3,
        randn(n, dtype=dtype) if full else None,
        randn(n, dtype=dtype) if form % 3 else None,
        1e-5,
    )


def batch_norm(x, w, c, mean, var, training, dtype):
    """The original, operation by operation, in `dtype`; mean and var are updated in training."""
    to = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    z = F.linear(x.to(dtype), w.to(dtype), to(c.bias)) * c.alpha * to(c.scale)
    z = z if c.divisor is None else z / to(c.divisor)
    return F.batch_norm(z, mean, var, to(c.weight), to(c.shift), training, 0.2, c.eps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_batchnorm(m, n, k, kind):
    dtype, errors = dtype_of(kind), Errors()
    for draw in range(draws(m * n)):
        x, w = randn(m, k, dtype=dtype) + 0.5, randn(n, k, dtype=dtype) / k**0.5
        c = columns(n, dtype, draw)
        mean, var = randn(n, dtype=dtype), randn(n, dtype=dtype).abs() + 0.1
        for training in (False, True) if m > 1 else (False,):
            means = [t.clone() for t in (mean, mean, mean.double())]
            vars_ = [t.clone() for t in (var, var, var.double())]
            batches = torch.tensor(41, device="cuda")
            got = small_gemm.batchnorm(x, w, c, means[0], vars_[0], dtype, training, 0.2, batches)(x)
            eager = batch_norm(x, w, c, means[1], vars_[1], training, dtype)
            want = batch_norm(x, w, c, means[2], vars_[2], training, torch.float64)
            errors.add(f"output, {training=}", got, eager, want)
            assert int(batches) == 41 + training
            if training:
                errors.add("running mean", means[0], means[1], means[2])
                errors.add("running variance", vars_[0], vars_[1], vars_[2])
                again = mean.clone(), var.clone()
                assert torch.equal(got, small_gemm.batchnorm(x, w, c, *again, dtype, True, 0.2)(x)), "not the same bits"
                assert torch.equal(again[0], means[0]) and torch.equal(again[1], vars_[0])
                assert torch.equal(got, small_gemm.batchnorm(x, w, c, None, None, dtype, True)(x))
            else:
                assert torch.equal(means[0], mean) and torch.equal(vars_[0], var)
                assert torch.equal(got, small_gemm.batchnorm(x, w, c, mean, var, dtype, False)(x))
    errors.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_a_float32_scale_makes_a_float32_result(dtype, training):
    errors = Errors()
    x, w = randn(48, 200, dtype=dtype), randn(70, 200, dtype=dtype)
    c = lsb.Columns(None, randn(70, dtype=torch.float32), None, 1.0, None, randn(70, dtype=torch.float32), 1e-5)
    mean, var = randn(70, dtype=torch.float32), randn(70, dtype=torch.float32).abs()
    kept = mean.clone(), var.clone()
    got = small_gemm.batchnorm(x, w, c, *kept, torch.float32, training, 0.2)(x)
    eager = F.batch_norm(F.linear(x, w) * c.scale, mean.clone(), var.clone(), None, c.shift, training, 0.2, 1e-5)
    exact = [t.double() for t in (mean, var)]
    want = batch_norm(x, w, c, *exact, training, torch.float64)
    errors.add("output", got, eager, want)
    errors.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [64, 63])
def test_any_base_and_pitch(kind, k):
    dtype, errors = dtype_of(kind), Errors()
    memory, weights = randn(40 * 80 + 9, dtype=dtype), randn(50 * 90 + 9, dtype=dtype)
    for base_x, base_w, pitch_x, pitch_w in [
        (0, 0, 64, 72),
        (1, 0, 64, 64),
        (0, 3, 65, 80),
        (8, 8, 64, 90),
        (0, 0, 0, 64),
    ]:
        x = memory.as_strided((40, k), (pitch_x, 1), base_x)
        w = weights.as_strided((50, k), (pitch_w, 1), base_w)
        errors.add("product", small_gemm.activation(x, w, None, ACTS[0])(x), activate(ACTS[0], x, w, None),
                   activate(ACTS[0], x.double(), w.double(), None))  # fmt: skip
    for _ in range(times(60)):
        for shape in ((2, 3, 5, k), (k,)):
            x, w = randn(*shape, dtype=dtype), randn(50, k, dtype=dtype)
            got, eager = small_gemm.activation(x, w, None, ACTS[0])(x), activate(ACTS[0], x, w, None)
            errors.add(f"rank {len(shape)}", got, eager, activate(ACTS[0], x.double(), w.double(), None))
    errors.check()


def test_nothing_is_written_beside_the_result():
    memory = torch.full((40, 50), math.nan, device="cuda")
    x, w = randn(17, 33, dtype=torch.float32), randn(21, 33, dtype=torch.float32)
    flat = memory.view(-1)
    out = flat[64 : 64 + 17 * 21].view(17, 21)
    launch = small_gemm.activation(x, w, None, ACTS[0])
    code = launch._function(launch._address, x.data_ptr(), out.data_ptr(), torch.cuda.current_stream().cuda_stream)
    assert code == 0 and not out.isnan().any()
    assert flat[:64].isnan().all() and flat[64 + 17 * 21 :].isnan().all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_mean_far_from_spread(kind):
    """Columns whose mean is 1e4 times their spread."""
    n, dtype = 64, dtype_of(kind)
    x = (torch.randn(200, n, device="cuda") * 1e-2 + 100).to(dtype)
    w = torch.eye(n, device="cuda", dtype=dtype)
    c = lsb.Columns(None, None, None, 1.0, None, None, 1e-5)
    got = small_gemm.batchnorm(x, w, c, None, None, dtype, True)(x)
    eager = F.batch_norm(F.linear(x, w), None, None, training=True)
    want = F.batch_norm(F.linear(x.double(), w.double()), None, None, training=True)
    errors = Errors()
    errors.add("output", got, eager, want)
    errors.check()


def test_a_bad_call_says_so():
    x = randn(300, 8, dtype=torch.float32)
    c = lsb.Columns(None, None, None, 1.0, None, None, 1e-5)
    launch = small_gemm.batchnorm(x, x[:8], c, None, None, torch.float32, True)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        launch(x)
