"""Float32 products on the tensor cores of Hopper, against float64 and beside the library's own float32 products."""

from __future__ import annotations

import math

import pytest
import torch
from products import LAYOUTS, LEAST, lay
from torch.nn import functional as F
from uninitialised import fill_with_nan

from fxfuse.kernels import float32_gemm, gemm, loader
from fxfuse.kernels import linear_activation_scale as las
from fxfuse.kernels import linear_scale_batchnorm1d as lsb

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]

#: Tiles of 128 and 256 rows, and so large that the library does not split along K (``gemm.float32_pays``).
SIZES = [(1030, 2052, 16), (1000, 2056, 100), (2049, 1156, 1000), (1030, 2052, 4100), (1024, 2048, 8192)]
#: Awkward ones: less than a narrow tile, just over one, short and long K; and just too many of those.
SMALL = [(256, 128, 32), (1, 4, 8), (77, 140, 2052), (130, 260, 1000), (300, 132, 2049), (257, 132, 4100),
         (1024, 1000, 96), (127, 8444, 513), (130, 8260, 1000), (257, 5508, 2100)]  # fmt: skip
#: Narrow tiles, where the library does split along K, so that its sums are shorter.
SHARED_OUT = [(256, 2048, 2048), (384, 1024, 3000), (128, 512, 8192)]
UNIT = 2.0**-24


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    assert loader.library() is not None, loader.why_unavailable()
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(gemm, "float32_pays", lambda m, n, k: True)
    fill_with_nan(monkeypatch)


def random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda")


def positive(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns, device="cuda")


def scaled(rows: int, columns: int) -> torch.Tensor:
    return random(rows, columns) * torch.exp2(torch.randint(-20, 21, (rows, columns), device="cuda").float())


def cancelling(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each product nearly cancels with another: a result 2^-10 of its terms."""
    a, b = random(m, k // 2), random(k // 2, n)
    return torch.cat([a, a], 1), torch.cat([b, -b * (1 + 2.0**-10 * torch.rand_like(b))], 0)


KINDS = {
    "random": lambda m, n, k: (random(m, k), random(k, n)),
    "positive": lambda m, n, k: (positive(m, k), positive(k, n)),
    "scaled": lambda m, n, k: (scaled(m, k), scaled(k, n)),
    "cancelling": cancelling,
}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def elementwise(got: torch.Tensor, want: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """The worst error of an element in units of 2^-24 of its sum of |a| |b|."""
    size = a.double().abs() @ b.double().abs()
    return float(((got.double() - want).abs() / size).max()) / UNIT


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), [*SIZES, *SHARED_OUT, (512, 3076, 65536)])
def test_error_is_no_larger_than_sgemm(m, n, k, kind, layout):
    a, b = lay(*KINDS[kind](m, n, k), layout)
    want = a.double() @ b.double()
    assert float32_gemm.why_not(a, b) is None
    got, library = float32_gemm.matmul(a, b), a @ b
    assert error(got, want) <= 1.25 * error(library, want)
    assert elementwise(got, want, a, b) <= elementwise(library, want, a, b)
    assert torch.equal(got, float32_gemm.matmul(a, b)), "not deterministic"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SMALL)
def test_awkward_sizes(m, n, k, kind, layout):
    a, b = lay(*KINDS[kind](m, n, k), layout)
    want = a.double() @ b.double()
    got = float32_gemm.matmul(a, b)
    assert elementwise(got, want, a, b) <= 16
    assert error(got, want) <= 4 * UNIT * float((a.double().abs() @ b.double().abs()).norm() / want.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_numbers_are_exact(layout):
    a, b = (torch.randint(-100, 101, s, device="cuda").float() for s in ((300, 1500), (1500, 200)))
    a, b = lay(a, b, layout)
    assert torch.equal(float32_gemm.matmul(a, b).double(), a.double() @ b.double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [64, 1000, 5000])
def test_infinity_and_nan_stand_where_sgemm_has_them(k, layout):
    a, b = random(700, k), random(k, 516)
    a[3, 5], a[300, 0], b[7, 9], b[k - 1, 300] = math.inf, math.nan, -math.inf, math.nan
    a[600, 8], b[8, 515] = math.inf, 0.0  # inf * 0
    a[650, 1], b[1, 400] = 3.4e38, 3.4e38  # overflows
    a[699, 2] = torch.finfo(torch.float32).min  # -FLT_MAX: its first term is infinite, the product mostly not
    a, b = lay(a, b, layout)
    got, want = float32_gemm.matmul(a, b), a @ b
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf() * got.sign().nan_to_num(), want.isinf() * want.sign().nan_to_num())
    finite = want.isfinite()
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-3, atol=1e-3)
    again = float32_gemm.matmul(a, b)
    assert torch.equal(got.nan_to_num(), again.nan_to_num())


def test_the_largest_floats():
    largest = torch.finfo(torch.float32).max
    a = torch.full((256, 64), largest, device="cuda") * torch.eye(256, 64, device="cuda")
    b = random(64, 128).clamp(-1, 1)
    want = a @ b
    assert torch.equal(float32_gemm.matmul(a, b), want)


def test_small_numbers_and_subnormals():
    """Down to 2^-110 an operand is held exactly; below that to within 2^-134, for bf16 ends at 2^-133."""
    identity = torch.eye(256, device="cuda")
    for exponent in (-60, -100, -110):
        x = torch.ldexp(1 + positive(256, 256), torch.tensor(exponent, device="cuda"))
        assert torch.equal(float32_gemm.matmul(x, identity), x)
        assert torch.equal(float32_gemm.matmul(identity, x), x)
    for exponent in (-120, -126, -130, -140):
        x = torch.ldexp(1 + positive(256, 256), torch.tensor(exponent, device="cuda"))
        got = float32_gemm.matmul(x, identity)
        assert float((got.double() - x.double()).abs().max()) <= 2.0**-134


def test_what_does_not_fit_stays_with_the_library(monkeypatch):
    a, b = random(512, 512), random(512, 512)
    assert float32_gemm.why_not(a, b) is None
    assert "16-byte" in str(float32_gemm.why_not(a[:, 1:], b[1:]))
    assert "multiple" in str(float32_gemm.why_not(a, b[:, :510]))
    assert "float32" in str(float32_gemm.why_not(a.half(), b.half()))
    monkeypatch.setenv("FXFUSE_FLOAT32", "library")
    assert "FXFUSE_FLOAT32" in str(float32_gemm.why_not(a, b))
    monkeypatch.delenv("FXFUSE_FLOAT32")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert "TF32" in str(float32_gemm.why_not(a, b))


@pytest.mark.parametrize(("m", "n", "k"), [(256, 512, 512), (1000, 520, 328), (77, 264, 40), (4000, 1024, 136)])
def test_activation_in_the_epilogue(m, n, k):
    x, weight, bias = random(m, k), random(n, k) / k**0.5, random(1, n)[0]
    x[5, 1] = math.inf
    for act in (las.Act("relu", 0, 0, 1.0, 0.5), las.Act("gelu", 0, 0, 0.7, 1.0)):
        assert gemm.why_not_product(x, weight) is None
        got = las.forward(x, weight, bias, act)
        z = F.linear(x.double(), weight.double(), bias.double()) * act.pre_scale
        want = (F.relu(z) if act.activation == "relu" else F.gelu(z)) * act.scale
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6, equal_nan=True)
        assert torch.equal(got.nan_to_num(), las.forward(x, weight, bias, act).nan_to_num())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(2, 64, 64), (77, 264, 40), (513, 1032, 8), (129, 4160, 72), (1000, 520, 328), (256, 2048, 1032),
     (1023, 2056, 520)],
)  # fmt: skip
def test_training_in_the_epilogue(m, n, k, keep):
    x, weight, (bias, gamma, beta) = random(m, k), random(n, k) / k**0.5, random(3, n)
    scale, running = random(1, n)[0].abs() + 0.5, (random(1, n)[0], random(1, n)[0].abs())
    eager_running, want_running = [r.clone() for r in running], [r.double() for r in running]

    def original(x, weight, mean, var):
        b, s, g, h = (t.to(x.dtype) for t in (bias, scale, gamma, beta))
        return F.batch_norm(F.linear(x, weight, b) * s, mean, var, g, h, True, 0.3, 1e-5)

    eager = original(x, weight, *eager_running)
    want = original(x.double(), weight.double(), *want_running)
    c = lsb.Columns(bias, scale, None, 1.0, gamma, beta, 1e-5)
    assert gemm.why_not_product(x, weight, "training") is None
    out, acc, _ = lsb.train(x, weight, c, *running, 0.3, keep)
    least = LEAST[torch.float32]
    assert error(out, want) <= 1.25 * max(error(eager, want), least)
    for got, best, peer in zip(running, want_running, eager_running, strict=True):
        assert error(got, best) <= 1.25 * max(error(peer, best), least)
    assert (acc is not None) is keep
    if keep:
        product = x.double() @ weight.double().T
        assert error(acc, product) <= 1.25 * max(error(x @ weight.T, product), least)
    assert torch.equal(lsb.train(x, weight, c, None, None, 0.3, keep)[0], out), "not deterministic"
