"""The two products of a backward pass: which kernel takes them, and how their operands lie."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse.kernels import float32_gemm, gemm, half_gemm, narrow_rule, small_gemm
from fxfuse.ops import _product

M, N, K = 24, 16, 40


def test_sides_say_how_operands_lie():
    a, b = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(K, N, dtype=torch.bfloat16)
    for left, right, across in (
        (a, b, (False, True)),
        (a, b.t().contiguous().t(), (False, False)),
        (a.t().contiguous().t(), b, (True, True)),
    ):
        found = gemm.sides(left, right)
        assert found is not None and found[2:] == across
        for matrix, whole in ((found[0], left), (found[1], right)):
            assert matrix.stride(1) == 1 and gemm.pitch(matrix) == matrix.stride(0)
            assert matrix.data_ptr() == whole.data_ptr()
        assert found[0].shape == ((K, M) if across[0] else (M, K))
        assert found[1].shape == ((K, N) if across[1] else (N, K))


def test_sides_are_none_where_the_copy_engine_cannot_read():
    a, b = torch.randn(M, K, dtype=torch.bfloat16), torch.randn(K, N, dtype=torch.bfloat16)
    assert gemm.sides(a.t().contiguous().t(), b.t().contiguous().t()) is None  # only a's rows lie across
    assert gemm.sides(a[:, 1:], b[1:]) is None  # not on 16 bytes
    assert gemm.sides(torch.randn(M, K + 3, dtype=torch.bfloat16)[:, :K], b) is None  # nor are its rows
    assert gemm.sides(a[:, ::2], b[::2]) is None


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(torch.bfloat16, half_gemm), (torch.float16, half_gemm), (torch.float32, float32_gemm)]
)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_of_a_product_go_by_the_kernel_that_takes_them(dtype, kernel, wanted, monkeypatch):
    asked = []

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        asked.append((a, b))
        return a @ b

    monkeypatch.setattr(kernel, "why_not", lambda a, b: None)
    monkeypatch.setattr(kernel, "matmul", matmul)
    dz, x, weight = (torch.randn(s).to(dtype) for s in ((M, N), (M, K), (N, K)))
    dx, dw, db = _product.linear_backward(dz, 1.0, x, weight, None, (*wanted, False))
    assert db is None and (dx is None, dw is None) == (not wanted[0], not wanted[1])
    expected = [pair for pair, want in zip([(dz, weight), (dz.t(), x)], wanted, strict=True) if want]
    for operands, pair in zip(asked, expected, strict=True):
        for got, want in zip(operands, pair, strict=True):
            assert got.data_ptr() == want.data_ptr() and got.stride() == want.stride() and got.shape == want.shape
    for got, (a, b) in zip([t for t in (dx, dw) if t is not None], expected, strict=True):
        assert torch.equal(got, a @ b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_on_the_cpu_stay_with_the_library(dtype, monkeypatch):
    for kernel in (half_gemm, float32_gemm):
        monkeypatch.setattr(kernel, "matmul", lambda a, b: pytest.fail("there is no kernel for the CPU"))
    dz, x, weight = (torch.randn(s).to(dtype) for s in ((512, 4096), (512, 512), (4096, 512)))
    dx, dw, _ = _product.linear_backward(dz, 1.0, x, weight, None, (True, True, False))
    assert torch.equal(dx, dz @ weight) and torch.equal(dw, dz.t() @ x)


def test_steps_of_one_kind_go_by_the_kernel_they_were_made_for(monkeypatch):
    """A stand-in for the C function: which addresses and sizes it is given, for which gradients."""
    told = []
    monkeypatch.setattr(gemm, "is_hopper", lambda device: True)
    monkeypatch.setattr(gemm, "pays", lambda m, n, k, device: k == N)  # by the input alone
    monkeypatch.setattr(half_gemm, "stream", lambda device: 0)
    monkeypatch.setattr(half_gemm, "allocate", lambda shape, strides, dtype, device: torch.zeros(shape, dtype=dtype))
    functions = half_gemm._Functions(None, lambda *args: told.append([getattr(a, "value", a) for a in args]))
    monkeypatch.setattr(half_gemm, "_functions", lambda: functions)
    x, weight, dz = (torch.randn(s).bfloat16() for s in ((M, K), (N, K), (M, N)))
    products = _product.LinearBackward(x, weight)
    dx, dw, db = products(dz, x, weight, weight[:, 0], (True, True, True))
    assert told == [
        [dz.data_ptr(), x.data_ptr(), weight.data_ptr(), dx.data_ptr(), 0, M, N, K, K, K, 2, x.get_device(), 0]
    ]
    assert torch.equal(dw, dz.t() @ x) and torch.equal(db, dz.sum(0))
    dx, dw, db = products(dz, x, weight, None, (False, True, False))
    assert dx is None and torch.equal(dw, dz.t() @ x) and db is None
    assert products(dz, x, weight, None, (False, False, False)) == (None, None, None) and len(told) == 1


def test_steps_of_one_kind_without_a_kernel(monkeypatch):
    x, weight, dz = (torch.randn(s).bfloat16() for s in ((M, K), (N, K), (M, N)))
    monkeypatch.setattr(gemm, "is_hopper", lambda device: False)
    dx, dw, db = _product.LinearBackward(x, weight)(dz, x, weight, None, (True, True, False))
    assert torch.equal(dx, dz @ weight) and torch.equal(dw, dz.t() @ x) and db is None


@pytest.mark.parametrize(
    ("m", "n", "k", "spared", "whole_columns", "taken"),
    [
        (1024, 8192, 8192, 0, False, True), (1024, 8192, 8192, 1, True, True), (16384, 4096, 4096, 0, False, True),
        (2048, 2304, 2048, 0, False, False), (2048, 2304, 2048, 1, False, False),  # a round and a bit
        (3072, 3072, 2048, 0, False, False), (3072, 3072, 512, 1, False, True),  # where passes outweigh it
        (320, 32768, 512, 0, False, False), (640, 32768, 8192, 1, False, False),  # tiles over the edge
        (1024, 8448, 2048, 1, False, True), (1024, 8448, 2048, 1, True, False),  # 64 clusters of 66
        (255, 32768, 8192, 1, False, False), (8192, 8192, 511, 1, False, False), (1024, 2048, 8192, 1, False, False),
    ],
)  # fmt: skip
def test_which_products_pay_on_132_multiprocessors(m, n, k, spared, whole_columns, taken, monkeypatch):
    """As measured on an H200: see docs/kernels-gemm.md."""
    monkeypatch.setattr(gemm, "processors", lambda device: 132)
    assert gemm.pays(m, n, k, 0, spared, whole_columns) is taken


@pytest.mark.parametrize(
    ("m", "n", "k", "size", "op", "taken"),
    [
        (256, 2048, 2048, 2, "activation", True), (256, 64, 2048, 2, "evaluation", True),
        (2, 4096, 128, 2, "training", True), (1024, 1024, 1024, 2, "activation", True),
        (1024, 2048, 1024, 2, "training", True), (1024, 1024, 512, 4, "training", True),
        (1024, 1088, 64, 2, "activation", True), (1024, 4096, 64, 2, "activation", False),  # 128 x 128, and too many
        (100, 320, 8192, 2, "activation", False), (640, 1024, 8192, 4, "evaluation", False),  # K is long
        (100, 64, 8256, 2, "evaluation", False), (64, 64, 4096, 2, "activation", False),
        (200, 3072, 3000, 2, "activation", False), (200, 3072, 1024, 2, "activation", True),  # rows amid a line
        (1025, 64, 64, 2, "training", False), (1025, 64, 64, 2, "activation", True),
        (0, 64, 64, 2, "activation", False), (64, 0, 64, 2, "activation", False), (64, 64, 0, 2, "activation", False),
    ],
)  # fmt: skip
def test_which_products_narrow_tiles_take_on_132_multiprocessors(m, n, k, size, op, taken):
    """As measured on an H200: see docs/kernels-gemm.md."""
    assert narrow_rule.pays(m, n, k, size, False, op, 132) is taken


@pytest.mark.parametrize(
    ("m", "n", "k", "op", "taken"),
    [
        (768, 768, 512, "activation", True), (512, 1024, 2048, "training", True), (768, 1536, 128, "evaluation", True),
        (256, 2048, 2048, "evaluation", True), (384, 1024, 3000, "activation", True), (1024, 768, 64, "training", True),
        (384, 1024, 3000, "evaluation", False), (320, 768, 3000, "training", False),  # shared out by the library
        (32, 768, 3000, "activation", False), (100, 128, 3000, "evaluation", False), (1025, 64, 64, "training", False),
        (768, 512, 8192, "evaluation", False), (64, 64, 0, "activation", False), (4096, 4096, 64, "activation", False),
    ],
)  # fmt: skip
def test_which_products_in_ieee_float32_narrow_tiles_take(m, n, k, op, taken):
    assert narrow_rule.pays(m, n, k, 4, True, op, 132) is taken


def test_which_products_alone_in_ieee_float32_narrow_tiles_take():
    for m, n, k in ((1024, 1024, 1024), (1024, 1024, 4096), (512, 1024, 1024)):
        assert narrow_rule.product_pays(m, n, k, 132)
    large, by_less_than_an_eighth = (4096, 4096, 512), (512, 1024, 2048)
    for m, n, k in ((128, 1024, 1024), (512, 512, 512), (32, 2048, 2048), (256, 64, 2048), (64, 64, 64), large,
                    by_less_than_an_eighth):  # fmt: skip
        assert not narrow_rule.product_pays(m, n, k, 132)


OPS = ["activation", "evaluation", "training"]
KINDS = [(2, False), (4, False), (4, True)]  # bytes of an element, IEEE


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("size", "exact"), KINDS)
def test_what_narrow_tiles_take_grows_with_the_product(op, size, exact):
    def us(m, n, k, processors=132):
        return narrow_rule.us(m, n, k, size, exact, op, processors)

    for m, n in ((64, 512), (256, 2048), (1000, 1024)):
        times = [us(m, n, k) for k in (64, 256, 1024, 2048)]
        assert times == sorted(times) and len(set(times)) == 4
    assert us(256, 2048, 512, processors=20) == math.inf  # on a device with room for fewer
    assert us(1000, 1024, 64) < us(1000, 2048, 64) < us(1000, 2056, 64) == math.inf  # 128 x 128, and too many


@pytest.mark.parametrize("op", OPS)
def test_what_narrow_tiles_take_where_rows_start_amid_a_cache_line(op):
    """As many stages, each of them longer; not in IEEE float32, where another step is the slowest."""
    more = []
    for m, n in ((64, 512), (256, 3072), (1000, 1600)):  # 128 x 64, more than 64 of those, 128 x 128
        whole, half, amid = (narrow_rule.us(m, n, k, 2, False, op, 132) for k in (1024, 1008, 1000))
        assert whole < half < amid
        more.append(amid - whole)
        assert narrow_rule.us(m, n, 1000, 4, True, op, 132) == narrow_rule.us(m, n, 1024, 4, True, op, 132)
    assert more[1] > more[0]


@pytest.mark.parametrize("op", OPS)
def test_long_products_are_not_for_narrow_tiles(op):
    for size, k in ((2, 4096), (4, 2048)):
        assert narrow_rule.us(64, 64, k, size, False, op, 132) < math.inf
        assert narrow_rule.us(64, 64, k + 1, size, False, op, 132) == math.inf


@pytest.fixture
def warnings_every_time():
    """torch's own, of which it else gives one a process."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.parametrize("op", OPS)
def test_a_fake_tensor_is_asked_for_no_address(op, monkeypatch, warnings_every_time, recwarn):
    """As while a graph is traced, on a Hopper GPU."""
    monkeypatch.setattr(gemm, "is_hopper", lambda device: True)
    monkeypatch.setattr(gemm, "processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        x, weight, large = (torch.empty(rows, 1024, device="cuda", dtype=torch.bfloat16) for rows in (256, 1024, 16384))
        assert small_gemm.why_not(x, weight, op) is not None and gemm.narrow_us(x, weight, op) < 10
        assert small_gemm.one_launch(x, weight, op) and not small_gemm.one_launch(x, large, op)
    assert not recwarn.list
