"""Products of 16-bit matrices by the Hopper GEMM, either of which lies the other way round, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from products import LAYOUTS, lay
from torch import Tensor, nn
from uninitialised import fill_with_nan

import fxfuse
from fxfuse.kernels import gemm, half_gemm, loader

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]

DTYPES = (torch.bfloat16, torch.float16)
#: Rounds of tiles and parts of them, blocks of K and parts of them; the last is d_weight's of a batch of 1000.
SIZES = [(1024, 8192, 512), (4097, 1032, 1000), (1000, 6664, 2049), (3328, 1032, 8192), (2056, 4104, 1000)]
#: Less than a tile, just over one, hardly any K, more stages than blocks.
SMALL = [(2, 8, 3), (77, 136, 24), (257, 264, 63), (129, 8, 4100), (130, 520, 65), (1, 4096, 256), (512, 256, 200)]


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader.library() is not None, loader.why_unavailable()
    monkeypatch.setattr(gemm, "pays", lambda *sizes: True)
    fill_with_nan(monkeypatch)


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def positive(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.rand(*shape, device="cuda").to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("draw", [random, positive])
@pytest.mark.parametrize(("m", "n", "k"), SIZES + SMALL)
def test_error_is_no_larger_than_the_library_s(m, n, k, draw, layout, dtype):
    a, b = lay(draw(dtype, m, k), draw(dtype, k, n), layout)
    want = a.double() @ b.double()
    assert half_gemm.why_not(a, b) is None
    got, library = half_gemm.matmul(a, b), a @ b
    assert got.dtype is dtype and got.is_contiguous()
    # A half unit in the last place is what rounding the result costs anybody.
    assert error(got, want) <= 1.25 * max(error(library, want), torch.finfo(dtype).eps / 8)
    size = a.double().abs() @ b.double().abs()
    # Sums of 16 products are cut off at float32's 2^-24, not rounded.
    of = torch.finfo(dtype)
    bound = of.eps / 2 * want.abs() + (k / 16 + 8) * 2.0**-23 * size + of.smallest_normal
    assert bool(((got.double() - want).abs() <= bound).all())
    assert torch.equal(got, half_gemm.matmul(a, b)), "not deterministic"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_numbers_are_exact_until_they_are_rounded(layout, dtype):
    a, b = (torch.randint(-30, 31, s, device="cuda").to(dtype) for s in ((300, 1500), (1500, 520)))
    a, b = lay(a, b, layout)
    want = a.double() @ b.double()
    assert torch.equal(half_gemm.matmul(a, b), want.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [64, 1000])
def test_infinity_and_nan_stand_where_the_library_has_them(k, layout):
    a, b = random(torch.bfloat16, 700, k), random(torch.bfloat16, k, 520)
    a[3, 5], a[300, 0], b[7, 9], b[k - 1, 300] = math.inf, math.nan, -math.inf, math.nan
    a[600, 8], b[8, 515] = math.inf, 0.0  # inf * 0
    a[650, 1], b[1, 400] = 3e38, 3e38  # overflows
    a, b = lay(a, b, layout)
    got, want = half_gemm.matmul(a, b), a @ b
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf() * got.sign().nan_to_num(), want.isinf() * want.sign().nan_to_num())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_around_the_result_is_left_alone(layout, monkeypatch):
    m, n, k, edge = 1000, 264, 200, 4096
    a, b = lay(random(torch.bfloat16, m, k), random(torch.bfloat16, k, n), layout)
    want = half_gemm.matmul(a, b)
    memory = torch.full((edge + m * n + edge,), 7.0, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(gemm, "allocate", lambda *_: memory[edge:-edge].view(m, n))
    assert torch.equal(half_gemm.matmul(a, b), want)
    assert bool((memory[:edge] == 7).all()) and bool((memory[-edge:] == 7).all())


@pytest.mark.captures
def test_on_another_stream_and_in_a_graph():
    a, b = random(torch.bfloat16, 512, 1024), random(torch.bfloat16, 1024, 512)
    want, side = half_gemm.matmul(a, b), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = half_gemm.matmul(a, b)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(there, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = half_gemm.matmul(a, b)
    for _ in range(3):
        a.normal_()
        graph.replay()
        assert torch.equal(captured, half_gemm.matmul(a, b))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device_than_the_current_one():
    a, b = random(torch.bfloat16, 512, 1024), random(torch.bfloat16, 1024, 512)
    want, x, weight = half_gemm.matmul(a, b), a.to("cuda:1"), b.to("cuda:1").t().contiguous()
    got = half_gemm.matmul(x, weight.t())
    one = torch.eye(512, dtype=a.dtype, device=x.device)
    dx, dw = half_gemm.Gradients(x, weight)(one, x, weight, True, True)
    assert got.device == dx.device == dw.device == x.device and torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), want.cpu()) and torch.equal(dx, weight) and torch.equal(dw, x)


def test_what_does_not_fit_stays_with_the_library(monkeypatch):
    a, b = random(torch.bfloat16, 512, 512), random(torch.bfloat16, 512, 512)
    assert half_gemm.why_not(a, b) is None
    assert "16-byte" in str(half_gemm.why_not(a[:, 1:], b[1:]))
    assert "16-byte" in str(half_gemm.why_not(a.t(), b.t()))  # no kernel for these two together
    assert "multiple" in str(half_gemm.why_not(a, b[:, :510]))
    assert "float16" in str(half_gemm.why_not(a.float(), b.float()))
    assert "float16" in str(half_gemm.why_not(a, b.half()))
    monkeypatch.setenv("FXFUSE_PORTABLE", "1")
    assert "Hopper" in str(half_gemm.why_not(a, b))
    monkeypatch.delenv("FXFUSE_PORTABLE")
    monkeypatch.undo()
    assert "faster in the library" in str(half_gemm.why_not(a, b))


class Block(nn.Module):
    def __init__(self, k: int, n: int, norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)
        self.scale = nn.Parameter(torch.rand(n) + 0.5)
        self.norm = nn.BatchNorm1d(n) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        return torch.relu(z) / 2 if self.norm is None else self.norm(z * self.scale)


def fails(*_: object) -> Tensor:
    raise AssertionError("the library was asked")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
def test_a_step_s_gradients_come_of_it(norm, dtype, monkeypatch):
    m, n, k = 1032, 4096, 2048
    model = Block(k, n, norm).cuda().to(dtype)
    fused = fxfuse.optimize(model)
    x, dy = random(dtype, m, k).requires_grad_(), random(dtype, m, n)
    exact = Block(k, n, norm).cuda().double()
    exact.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    steps = []
    with monkeypatch.context() as patched:
        for _ in range(3):  # the ordinary way, then kept steps
            out = fused(x)
            patched.setattr(torch, "mm", fails)
            steps.append(torch.autograd.grad(out, [x, model.linear.weight], dy))
            patched.undo()
    eager = torch.autograd.grad(model(x), [x, model.linear.weight], dy)
    x64 = x.detach().double().requires_grad_()
    want = torch.autograd.grad(exact(x64), [x64, exact.linear.weight], dy.double())
    for got in steps:
        for mine, eagers, best in zip(got, eager, want, strict=True):
            assert error(mine, best) <= 1.25 * error(eagers, best)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_of_one_kind(wanted, dtype, monkeypatch):
    m, n, k = 520, 264, 136
    dz, (x, right) = random(dtype, m, n), lay(random(dtype, m, k), random(dtype, k, n), "forward")
    weight = right.t()
    gradients = half_gemm.Gradients(x, weight)
    assert gradients.taken and x.stride(0) > k and weight.stride(0) > k
    monkeypatch.setattr(torch, "mm", fails)
    for _ in range(2):
        dx, dw = gradients(dz, x, weight, *wanted)
        assert (dx is not None, dw is not None) == wanted
        assert dx is None or torch.equal(dx, half_gemm.matmul(dz, weight))
        assert dw is None or torch.equal(dw, half_gemm.matmul(dz.t(), x))
        x.normal_(), dz.normal_()
    monkeypatch.undo()
    fill_with_nan(monkeypatch)
    monkeypatch.setenv("FXFUSE_PORTABLE", "1")  # from now on the library's
    dx, dw = gradients(dz, x, weight, *wanted)
    assert (dx is not None, dw is not None) == wanted
    assert dx is None or error(dx, dz.double() @ weight.double()) < 1e-2
    assert dw is None or error(dw, dz.double().t() @ x.double()) < 1e-2


def test_only_one_of_the_gradients_pays(monkeypatch):
    monkeypatch.undo()
    fill_with_nan(monkeypatch)
    x, weight = random(torch.bfloat16, 512, 4096), random(torch.bfloat16, 4096, 4096)
    dz = random(torch.bfloat16, 512, 4096)
    gradients, asked, mm = half_gemm.Gradients(x, weight), [], torch.mm
    assert gradients.taken
    monkeypatch.setattr(torch, "mm", lambda a, b: asked.append(a.shape) or mm(a, b))
    dx, dw = gradients(dz, x, weight, True, True)
    assert asked == [(512, 4096)]
    assert error(dx, dz.double() @ weight.double()) < 1e-2 and error(dw, dz.double().t() @ x.double()) < 1e-2
    assert not half_gemm.Gradients(x.float(), weight.float()).taken
    assert not half_gemm.Gradients(x[:, :100], weight[:, :100]).taken
