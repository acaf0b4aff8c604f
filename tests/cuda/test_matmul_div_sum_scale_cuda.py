"""The kernels of matmul_div_sum_scale on a GPU: numbers against float64 and eager, layouts, streams, graphs, memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from uninitialised import fill_with_nan

from fxfuse.kernels import matmul_div_sum_scale as kernel
from fxfuse.ops.matmul_div_sum_scale import OP, STEPS, matmul_div_sum_scale, reference

module = sys.modules[OP.call.__module__]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # m, n, k
    (1, 17, 17), (3, 1, 5), (129, 511, 130), (64, 1000, 1000), (33, 4099, 17), (257, 64, 8192), (5, 3, 12289),
    (2000, 30, 24), (2, 9000, 3), (7, 130, 40000), (300, 513, 4097),
]  # fmt: skip


@pytest.fixture(params=("hopper", "portable"), autouse=True)
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test on the device's own road and on that of compute capability 8.0, with poisoned outputs."""
    monkeypatch.setenv("FXFUSE_PORTABLE", str(int(request.param == "portable")))
    fill_with_nan(monkeypatch)
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "whole") -> Tensor:
    """Standard normal; "offset": one element off 16-byte alignment, "sliced": rows of a wider tensor, "transposed"."""
    if layout == "offset":
        return torch.randn(shape[0] * shape[1] + 1, device="cuda").to(dtype)[1:].view(shape)
    if layout == "sliced":
        return torch.randn(shape[0], shape[1] + 24, device="cuda").to(dtype)[:, 8:-16]
    if layout == "transposed":
        return torch.randn(shape[::-1], device="cuda").to(dtype).t()
    return torch.randn(shape, device="cuda").to(dtype)


def run(x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, scale: float = 0.37) -> list[Tensor]:
    """Output and gradients of the op through autograd."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    assert OP.road(*leaves[:2], leaves[2] if b is not None else None).name == "kernel"
    y = matmul_div_sum_scale(leaves[0], leaves[1], leaves[2] if b is not None else None, scale)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def exact(x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, scale: float = 0.37) -> list[tuple[Tensor, Tensor]]:
    """The same in float64, each with the size of the terms that are summed: what rounding may be a part of."""
    x, w, g = x.double(), w.double(), g.double() * scale
    v, size = w.sum(0), w.abs().sum(0)
    beta = b.double().sum() if b is not None else 0.0
    out = [
        (scale * (x @ v + beta), scale * (x.abs() @ v.abs() + abs(beta))),
        (g[:, None] * v, g.abs()[:, None] * size),
        ((g @ x).expand(w.shape), (g.abs() @ x.abs()).expand(w.shape)),
    ]
    return [*out, (g.sum().expand(w.shape[:1]), g.abs().sum().expand(w.shape[:1]))] if b is not None else out


@pytest.mark.parametrize("layout", ["whole", "offset", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_float64(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    m, n, k = shape
    x, w = random(m, k, dtype=dtype, layout=layout), random(n, k, dtype=dtype, layout=layout)
    b = random(n, dtype=dtype) if n % 2 else None
    g = random(2 * m, dtype=dtype)[::2]
    unit = torch.finfo(dtype).eps
    for name, out, (want, size) in zip(("y", "dx", "dw", "db"), run(x, w, b, g), exact(x, w, b, g), strict=False):
        assert out.shape == want.shape and out.dtype == dtype
        # Half a unit of the result, a few of float32's in the sums, and the smallest float16.
        allowed = 0.51 * unit * want.abs() + 5e-7 * size + torch.finfo(dtype).smallest_normal * unit
        assert bool(((out.double() - want).abs() <= allowed).all()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("pitch", [0, 1, 6])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1031, 9, 4099), (4099, 5, 1027), (259, 7, 20483), (2057, 3, 2048), (7, 5, 400001)]
)
def test_rows_off_sixteen_bytes_among_nan(m: int, n: int, k: int, pitch: int, ahead: int, dtype: torch.dtype) -> None:
    """Rows that begin anywhere, large enough to be read in pieces: NaN between them does not count."""
    held = torch.full((ahead + (m - 1) * (k + pitch) + k,), float("nan"), device="cuda", dtype=dtype)
    x = held.as_strided((m, k), (k + pitch, 1), ahead)
    x.copy_(torch.randn(m, k, device="cuda"))
    w, g = random(n, k, dtype=dtype), random(m, dtype=dtype)
    y = kernel.forward(x, w, None, 0.37)[0]
    dw = kernel.backward(g, x, None, n, 0.37, (False, True, False))[1]
    assert dw is not None
    (want, size), _, (want_w, size_w) = exact(x, w, None, g)
    unit = torch.finfo(dtype).eps
    for out, best, terms in ((y, want, size), (dw, want_w, size_w)):
        assert bool(((out.double() - best).abs() <= 0.51 * unit * best.abs() + 5e-7 * terms).all())
    again = kernel.forward(x, w, None, 0.37)[0], kernel.backward(g, x, None, n, 0.37, (False, True, False))[1]
    assert torch.equal(y, again[0]) and torch.equal(dw, again[1])  # type: ignore[arg-type]
    sliced = kernel.column_sums(x, None)[:k].double()  # x as a weight, whose columns are summed without one
    assert bool(((sliced - x.double().sum(0)).abs() <= 5e-7 * x.double().abs().sum(0)).all())


@pytest.mark.parametrize("kind", ["random", "positive", "cancelling columns", "mirrored rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager(dtype: torch.dtype, kind: str) -> None:
    m, n, k = 256, 2048, 2048
    draw = torch.rand if kind == "positive" else torch.randn
    x, w = (draw(s, device="cuda") / 8 for s in ((m, k), (n, k)))
    if kind == "cancelling columns":
        w -= w.mean(0)
    if kind == "mirrored rows":
        w[n // 2 :] = -w[: n // 2].flip(0) + 1e-3 * torch.randn(n // 2, k, device="cuda")
        w = w[torch.randperm(n, device="cuda")]
    x, w, g = x.to(dtype), w.to(dtype), random(m, dtype=dtype)
    xe, we = x.clone().requires_grad_(), w.clone().requires_grad_()
    ye = (torch.matmul(xe, we.T) / 2).sum(1) * 1.5
    theirs = [ye.detach(), *torch.autograd.grad(ye, (xe, we), g)]
    for a, b, (want, _) in zip(run(x, w, None, g, 0.75), theirs, exact(x, w, None, g, 0.75), strict=True):
        assert (a.double() - want).norm() <= 1.25 * (b.double() - want).norm()


def test_same_bits_and_only_what_is_wanted() -> None:
    x, w, b, g = random(300, 1000), random(777, 1000), random(777), random(300)
    y, sums = kernel.forward(x, w, b, 0.5)
    again = kernel.forward(x, w, b, 0.5)
    assert torch.equal(y, again[0]) and torch.equal(sums[:1000], again[1][:1000])
    assert torch.equal(kernel.frozen(x, sums, True, 0.5), y)
    assert torch.equal(kernel.column_sums(w, b)[:1000], sums[:1000])
    every = kernel.backward(g, x, sums, 777, 0.5, (True, True, True))
    for i in range(3):
        only = kernel.backward(g, x, sums if i == 0 else None, 777, 0.5, tuple(i == j for j in range(3)))
        assert [t is not None for t in only] == [i == j for j in range(3)]
        assert torch.equal(only[i], every[i])  # type: ignore[arg-type]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_leading_dimensions_and_expanded_gradient(keepdim: bool, mean: bool) -> None:
    x, w = random(6, 40).view(2, 3, 40).requires_grad_(), random(50, 40).requires_grad_()
    y = matmul_div_sum_scale(x, w, None, 3.0, -1, keepdim, mean)
    want = reference(x.double(), w.double(), None, 3.0, -1, keepdim, mean, None)
    assert y.shape == want.shape
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(y.sum(), (x, w))  # the gradient arrives as one number, expanded
    for a, b in zip(ours, torch.autograd.grad(want.sum(), (x, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_expanded_operands_and_empty_batch() -> None:
    row, w = random(1, 64), random(1, 64).expand(33, 64)
    x = row.expand(9, 64)
    torch.testing.assert_close(matmul_div_sum_scale(x, w), (x @ w.t()).sum(1), rtol=1e-4, atol=1e-4)
    empty = torch.empty(0, 64, device="cuda", requires_grad=True)
    weight = random(33, 64).requires_grad_()
    y = matmul_div_sum_scale(empty, weight)
    dx, dw = torch.autograd.grad(y, (empty, weight), torch.empty(0, device="cuda"))
    assert y.shape == (0,) and dx.shape == (0, 64) and not dw.any()


def test_second_derivative() -> None:
    x, w = random(5, 12).requires_grad_(), random(7, 12).requires_grad_()
    found = []
    for f in (matmul_div_sum_scale, lambda x, w: reference(x, w, None, 1.0, -1, False, False, None)):
        first = torch.autograd.grad(f(x, w).square().sum(), (x, w), create_graph=True)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in first), (x, w)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_autocast_sums_in_float32() -> None:
    x, w = random(64, 256).requires_grad_(), random(512, 256).requires_grad_()
    results = []
    for f in (matmul_div_sum_scale, lambda x, w: torch.nn.functional.linear(x, w).sum(-1)):
        with torch.autocast("cuda", torch.bfloat16):
            y = f(x, w)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), (x, w))))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 1e-2


@pytest.mark.captures
def test_graph_side_stream_and_compile() -> None:
    x, w, g = random(64, 512), random(300, 512), random(64)
    want = run(x, w, None, g)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = run(x, w, None, g)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, want, beside))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, w, None, g)
    for t in captured:
        t.fill_(float("nan"))
    graph.replay()
    assert all(map(torch.equal, want, captured))
    compiled = torch.compile(lambda x, w: matmul_div_sum_scale(x, w, None, 0.37), backend="aot_eager")
    xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = compiled(xs, ws)
    assert all(map(torch.equal, want, [y.detach(), *torch.autograd.grad(y, (xs, ws), g)]))


def test_reads_what_was_just_written() -> None:
    """The kernels start early beside each other, never beside the caller's own work on their inputs."""
    w, x = random(512, 4096), random(2048, 4096)
    sums = kernel.column_sums(w, None)
    for step in range(20):
        x.fill_(step)
        frozen = kernel.frozen(x, sums, False, 1.0)
        x.fill_(-1)
        w.fill_(step)
        full = kernel.forward(x, w, None, 1.0)[0]
        g = torch.full((2048,), float(step), device="cuda")
        dx = kernel.backward(g, x, sums, 512, 1.0, (True, False, False))[0]
        assert torch.allclose(frozen, step * sums[:4096].double().sum().float(), rtol=1e-3, atol=1e-3)
        assert bool((full == -4096.0 * 512 * step).all())
        assert torch.equal(dx, (step * sums[:4096]).expand(2048, 4096))  # type: ignore[arg-type]


@pytest.mark.memory
def test_memory_is_of_features_and_rows() -> None:
    x, w, g = random(4096, 4096), random(4096, 4096), random(4096)
    run(x, w, None, g)
    gc.collect()  # what other tests left is not to be freed meanwhile
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(x, w, None, g)
    results = sum(t.numel() * t.element_size() for t in out)
    assert torch.cuda.max_memory_allocated() - before - results < 4 << 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [16400, 2056])  # stripes of 16 lanes and of 32
def test_matrices_that_pairs_of_blocks_read(dtype: torch.dtype, cols: int) -> None:
    """Over 512 MiB, rows that fill neither the ranges nor the stripes."""
    rows = (600 << 20) // (cols * dtype.itemsize) + 5
    big, small, g = random(rows, cols, dtype=dtype), random(3, cols, dtype=dtype), random(rows, dtype=dtype)
    sums = kernel.column_sums(big, None)[:cols]
    dw = kernel.backward(g, big, None, 3, 0.37, (False, True, False))[1]
    y = kernel.forward(small, big, None, 0.37)[0]
    assert dw is not None
    wide = big.double()
    want, terms = wide.sum(0), wide.abs().sum(0)
    want_w, terms_w = 0.37 * (g.double() @ wide), 0.37 * (g.double().abs() @ wide.abs_())
    assert bool(((sums.double() - want).abs() <= 5e-7 * terms).all())
    unit = torch.finfo(dtype).eps
    assert bool(((dw[2].double() - want_w).abs() <= 0.51 * unit * want_w.abs() + 5e-7 * terms_w).all())
    best, size = 0.37 * small.double() @ want, 0.37 * small.double().abs() @ terms
    assert bool(((y.double() - best).abs() <= 0.51 * unit * best.abs() + 5e-7 * size).all())
    assert torch.equal(sums, kernel.column_sums(big, None)[:cols])


@pytest.mark.large
def test_more_than_2_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    m, k = (1 << 31) // 4096 + 3, 4096
    long, short = torch.ones(m, k, device="cuda", dtype=torch.bfloat16), random(3, k, dtype=torch.bfloat16)
    long[-1] = 2
    y = matmul_div_sum_scale(long, short)
    want = short.double().sum()
    torch.testing.assert_close(y[-1].double(), 2 * want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y[0].double(), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(kernel.column_sums(long, None)[:k], torch.full((k,), m + 1.0, device="cuda"))
    sums = kernel.column_sums(short, None)
    dx, dw, _ = kernel.backward(y.new_ones(m), long, sums, 3, 1.0, (True, True, False))
    assert torch.equal(dx[-1].float(), sums[:k].bfloat16().float())  # type: ignore[index]
    assert float(dw.float().mean()) == pytest.approx(m + 1, rel=1e-2)  # type: ignore[union-attr]


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, w = random(16, 64), random(32, 64)
    there = matmul_div_sum_scale(x.to("cuda:1"), w.to("cuda:1"))
    assert there.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(there.cpu(), matmul_div_sum_scale(x, w).cpu())


# --- the short road -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_kept_steps_give_the_same_bits(dtype: torch.dtype, bias: bool) -> None:
    STEPS.forget()
    x, w, g = random(9, 40, dtype=dtype), random(30, 40, dtype=dtype), random(9, dtype=dtype)
    b = random(30, dtype=dtype) if bias else None
    key = 2 + bias, 0.37, -1, False, False, None

    def step(*wanted: bool) -> list[Tensor]:
        leaves = [t.detach().requires_grad_(w) for t, w in zip((x, w, b), wanted, strict=True) if t is not None]
        found.append(STEPS.find(key, *leaves) is not None)
        y = matmul_div_sum_scale(leaves[0], leaves[1], leaves[2] if bias else None, 0.37)
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], g.to(y.dtype))]

    found: list[bool] = []
    first, again = step(True, True, bias), step(True, True, bias)
    assert found == [False, True]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    alone, again = step(False, True, False), step(False, True, False)  # other gradients are another kind
    assert found == [False, True, False, True]
    assert torch.equal(alone[1], first[2]) and torch.equal(again[1], first[2])
    with torch.autocast("cuda", torch.bfloat16):
        y = step(True, True, bias)[0]
    assert not found[-1] and y.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    x = random(5, 9, 40, dtype=dtype)[2]
    assert torch.equal(step(True, True, bias)[2], matmul_steps(x, w, b, g)[2]) and found[-1]  # at another address
    x = random(40, 9, dtype=dtype).t()
    step(True, True, bias)
    assert not found[-1]
    with torch.no_grad():
        matmul_div_sum_scale(x.requires_grad_(), w, b, 0.37)
        assert STEPS.find(key, *[t for t in (x, w, b) if t is not None]) is None


def matmul_steps(x: Tensor, w: Tensor, b: Tensor | None, g: Tensor) -> list[Tensor]:
    """What `run` gives, on a road that is not kept."""
    STEPS.forget()
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    y = matmul_div_sum_scale(leaves[0], leaves[1], leaves[2] if b is not None else None, 0.37)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@pytest.fixture(params=["whole", "frozen"])
def call(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = matmul_div_sum_scale if request.param == "whole" else matmul_div_sum_scale.frozen
    return op


def ordinary(call: Callable[..., Tensor], *args: Any) -> Tensor:
    """The same call as if it were the first."""
    module.CALLS.forget()
    module.FROZEN.forget()
    out = call(*args)
    module.CALLS.forget()
    module.FROZEN.forget()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("layout", ["whole", "offset", "sliced", "transposed"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 17, 17), (129, 511, 130), (1, 1, 1), (2000, 30, 24)])
def test_kept_calls_give_the_same_bits(
    call: Callable[..., Tensor], m: int, n: int, k: int, layout: str, keepdim: bool, dtype: torch.dtype
) -> None:
    w, b = random(n, k, dtype=dtype, layout=layout), random(n, dtype=dtype)
    for bias in (None, b):
        for step in range(3):
            x = random(m, k, dtype=dtype)
            args = (x, w, bias, 0.37, -1, keepdim, False, torch.float32 if step == 2 else None)
            got = call(*args)
            want = ordinary(call, *args)
            assert got.shape == want.shape and got.stride() == want.stride() and got.dtype == want.dtype
            for _ in range(2):  # kept by the first
                got = call(*args)
            assert torch.equal(got, want)
            assert got.shape == want.shape and got.stride() == want.stride() and got.dtype == want.dtype


def test_a_kept_call_sees_what_changed(call: Callable[..., Tensor]) -> None:
    w, b = random(300, 200), random(300)
    x = random(50, 200)
    for _ in range(3):
        call(x, w, b)
    w.add_(1)
    torch.testing.assert_close(call(x, w, b), reference(x, w, b, 1.0, -1, False, False, None), rtol=1e-4, atol=1e-2)
    b.zero_()
    torch.testing.assert_close(call(x, w, b), reference(x, w, b, 1.0, -1, False, False, None), rtol=1e-4, atol=1e-2)
    other = random(70, 200)
    torch.testing.assert_close(
        call(other, w, b), reference(other, w, b, 1.0, -1, False, False, None), rtol=1e-4, atol=1e-2
    )
    with torch.autocast("cuda", torch.bfloat16):
        assert call(x, w, b).dtype == torch.float32
    w.requires_grad_()
    assert call(x, w, b).requires_grad
    with torch.no_grad():
        assert not call(x, w, b).requires_grad


@pytest.mark.captures
def test_kept_calls_on_a_side_stream_and_in_a_graph(call: Callable[..., Tensor]) -> None:
    w, b, x = random(513, 260), random(513), random(64, 260)
    want = call(x, w, b).clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = call(x, w, b)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(x, w, b)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(on_side, want) and torch.equal(captured, want)
