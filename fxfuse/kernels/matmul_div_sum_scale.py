"""Calls into ``matmul_div_sum_scale.cu``: y = scale * (x . v + beta), v = column sums of the weight, and its backward.

Sums of the weight live in one float32 tensor of ``sums_size(K)`` elements: v [K], and beta (float64, two elements,
8-byte aligned) at its end. They are all that the backward needs of the weight, and all that is kept of a frozen one.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse.kernels.abi import DOUBLE, DTYPE_CODE, I64, INT, PTR, allocate, any_other_layout, pointer, stream
from fxfuse.kernels.loader import library

__all__ = ["available", "backward", "column_sums", "forward", "frozen", "launch", "sums_size", "why_not"]

_NAME = "fxfuse_matmul_div_sum_scale_"


class _Functions(NamedTuple):
    scratch: Callable[..., None]
    forward: Callable[..., None]
    backward: Callable[..., None]


@functools.lru_cache(maxsize=1)
def _functions() -> _Functions:
    found = library()
    assert found is not None, "asked for before available()"
    return _Functions(
        found.function(_NAME + "scratch", [I64, I64, I64, INT, INT, PTR, INT, INT]),
        found.function(
            _NAME + "forward",
            [PTR, I64, I64, PTR, I64, I64, I64, PTR, PTR, PTR, PTR, DOUBLE, PTR, INT, INT, INT, PTR],
        ),
        found.function(
            _NAME + "backward", [PTR, I64, PTR, I64, I64, I64, I64, PTR, DOUBLE, PTR, PTR, PTR, PTR, INT, INT, PTR]
        ),
    )


def available() -> bool:
    """Whether the kernels are there; the first call may build them."""
    return library() is not None


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """The reason these tensors have no kernel, None when they have. Asks dtypes, devices, ranks and layouts alone."""
    index = x.get_device()
    if not x.is_cuda or weight.get_device() != index or (bias is not None and bias.get_device() != index):
        return "not all on one CUDA device"
    if x.dtype not in DTYPE_CODE or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "no kernel for these dtypes"
    if x.dim() < 1 or weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        return "no kernel for these ranks"
    if any_other_layout(x, weight, bias):
        return "a layout that is not strided, or a pending negation"
    if not _capable(index):
        return "a GPU of compute capability below 8.0"
    return None if available() else "the CUDA kernels are not there"


@functools.lru_cache
def _capable(index: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(index) >= (8, 0)


def sums_size(k: int) -> int:
    """float32 elements that hold v [k] and beta."""
    return k + k % 2 + 2


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """y and the sums, for x [..., K], weight [N, K] and bias [N] of one dtype and device.

    y has x.shape[:-1], in x's dtype or float32 (``dtype``).
    """
    address, weights = x.data_ptr(), weight.data_ptr()
    key = (x.shape, x.stride(), weight.shape, weight.stride(), x.dtype, x.get_device(), address % 16, weights % 16)
    layout = _layouts.get(key) or _layout(key, x, weight)
    if layout is None or (bias is not None and bias.stride(0) != 1):
        if weight.stride(1) != 1 and not weight.is_contiguous():  # a transposed weight: ATen sums along its rows
            sums = _sums_of_transposed(weight, bias)
            return frozen(x, sums, bias is not None, scale, dtype), sums
        return _forward(x, weight, bias, None, scale, dtype)
    outer, m, ldx, n, ldw, k, size, scratch_size, code, index = layout
    y = allocate(outer, _strides(outer), dtype or x.dtype, index)
    sums = allocate((size,), _DENSE, torch.float32, index)
    scratch = allocate((scratch_size,), _DENSE, torch.float64, index) if scratch_size else None
    v = sums.data_ptr()
    _functions().forward(
        address, ldx, m, weights, ldw, n, k, pointer(bias),
        v, 0 if bias is None else v + 4 * (size - 2), pointer(scratch), scale,
        y.data_ptr(), dtype is torch.float32, code, index, stream(index),
    )  # fmt: skip
    return y, sums


class _Layout(NamedTuple):
    """What the kernels are told of an x and a weight that they read as they lie."""

    outer: tuple[int, ...]
    m: int
    ldx: int
    n: int
    ldw: int
    k: int
    sums: int
    scratch: int
    dtype: int
    device: int


_layouts: dict[tuple[Any, ...], _Layout] = {}
_DENSE = (1,)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return _DENSE if len(shape) == 1 else tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _layout(key: tuple[Any, ...], x: Tensor, weight: Tensor) -> _Layout | None:
    """The layout of an x and a weight, kept by what it depends on; None where one has to be copied."""
    n, k = weight.shape
    rows, weight_rows = _rows(x, k), _rows(weight, k)
    if rows[0].data_ptr() != x.data_ptr() or weight_rows[0].data_ptr() != weight.data_ptr():
        return None
    if len(_layouts) > 4096:
        _layouts.clear()
    ldx, ldw, outer = rows[1], weight_rows[1], tuple(x.shape[:-1])
    scratch = _scratch_size(n, k, ldw, weight, False)
    found = _Layout(outer, math.prod(outer), ldx, n, ldw, k, sums_size(k), scratch, DTYPE_CODE[x.dtype], x.get_device())
    _layouts[key] = found
    return found


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    dtype: torch.dtype | None,
    keepdim: bool,
    sums: Tensor | None = None,
) -> Callable[..., Tensor | None] | None:
    """``forward``, or with ``sums`` ``frozen``, as ``launch(x, weight, bias)`` -> y [...] or [..., 1] with ``keepdim``.

    Everything is as it was when this was made but for x's address; the weight's memory and the bias' stay alive. None
    where something would have to be copied. ``sums`` are not kept alive: the launch gives None once they are gone.
    """
    address, weights = x.data_ptr(), weight.data_ptr()
    key = (x.shape, x.stride(), weight.shape, weight.stride(), x.dtype, x.get_device(), address % 16, weights % 16)
    layout = _layouts.get(key) or _layout(key, x, weight)
    if layout is None or (bias is not None and bias.stride(0) != 1):
        return None
    outer, m, ldx, n, ldw, k, size, scratch_size, code, index = layout
    shape = (*outer, 1) if keepdim else outer
    strides = _strides(shape)
    room = -(-size // 64) * 64  # what follows the sums is aligned as an allocation is
    y_dtype, wide, biases = dtype or x.dtype, dtype is torch.float32, pointer(bias)
    run = _functions().forward

    if sums is not None:
        kept, v = weakref.ref(sums), sums.data_ptr()
        beta = 0 if bias is None else v + 4 * (size - 2)

        def read(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor | None:
            if kept() is None:
                return None
            y = allocate(shape, strides, y_dtype, index)
            run(x.data_ptr(), ldx, m, 0, 0, 0, k, 0, v, beta, 0, scale, y.data_ptr(), wide, code, index,
                stream(index))  # fmt: skip
            return y

        return read

    def whole(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        y = allocate(shape, strides, y_dtype, index)
        memory = allocate((room + 2 * scratch_size,), _DENSE, torch.float32, index)  # the sums, then scratch of float64
        v = memory.data_ptr()
        run(x.data_ptr(), ldx, m, weights, ldw, n, k, biases, v, v + 4 * (size - 2) if biases else 0,
            v + 4 * room if scratch_size else 0, scale, y.data_ptr(), wide, code, index, stream(index))  # fmt: skip
        return y

    return whole


def frozen(x: Tensor, sums: Tensor, bias: bool, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """y from sums computed before by ``forward`` or ``column_sums``; ``bias``: whether they hold a beta."""
    return _forward(x, None, sums if bias else None, sums, scale, dtype)[0]


def _sums_of_transposed(weight: Tensor, bias: Tensor | None) -> Tensor:
    k = weight.shape[1]
    sums = torch.empty(sums_size(k), dtype=torch.float32, device=weight.device)
    torch.sum(weight, 0, dtype=torch.float32, out=sums[:k])
    if bias is not None:
        torch.sum(bias, 0, dtype=torch.float64, out=sums[k + k % 2 :].view(torch.float64)[0])
    return sums


def column_sums(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sums of weight [N, K] and bias [N] alone."""
    if weight.stride(1) != 1 and not weight.is_contiguous():
        return _sums_of_transposed(weight, bias)
    return _forward(None, weight, bias, None, 1.0, None)[1]


def _forward(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    scale: float,
    y_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    some = weight if x is None else x
    assert some is not None
    dtype, device, k = some.dtype, some.device, some.shape[-1]
    y, m, ldx, n, ldw, scratch = None, 0, 0, 0, 0, None
    if x is not None:
        y = x.new_empty(x.shape[0] if x.dim() == 2 else x.shape[:-1], dtype=y_dtype)
        m = y.numel()
        x, ldx = _rows(x, k)
    if weight is not None:
        weight, ldw = _rows(weight, k)
        n = weight.shape[0]
        sums = torch.empty(sums_size(k), dtype=torch.float32, device=device)
        scratch = _scratch(n, k, ldw, weight, False)
        bias = None if bias is None else bias.contiguous()
    assert sums is not None
    v = sums.data_ptr()
    _functions().forward(
        pointer(x), ldx, m, pointer(weight), ldw, n, k, 0 if weight is None else pointer(bias),
        v, 0 if bias is None else v + 4 * (k + k % 2), pointer(scratch), scale, pointer(y),
        y_dtype is torch.float32, DTYPE_CODE[dtype], device.index, stream(device.index),
    )  # fmt: skip
    return y if y is not None else sums, sums


def backward(
    grad: Tensor, x: Tensor, sums: Tensor | None, n: int, scale: float, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight [n, K], dbias [n]), None where not wanted, for grad of x.shape[:-1] (any strides).

    sums are read only for dx. A gradient of another dtype than x's is scaled first and then rounded to it.
    """
    dtype, index, k = x.dtype, x.get_device(), x.shape[-1]
    need_x, need_w, need_b = (*wanted, False)[:3]
    dx = allocate(tuple(x.shape), _strides(x.shape), dtype, index) if need_x else None
    dw = allocate((n, k), (k, 1), dtype, index) if need_w else None
    db = allocate((n,), _DENSE, dtype, index) if need_b else None
    m = grad.numel()
    if grad.dtype != dtype:
        grad, scale = (grad * scale).to(dtype), 1.0
    grad = grad if grad.dim() == 1 else grad.reshape(-1)  # an expanded gradient stays a view of stride 0
    x, ldx = _rows(x, k) if need_w else (x, k)
    scratch = _scratch(m, k, ldx, x, True) if need_w or need_b else None
    _functions().backward(
        grad.data_ptr(), grad.stride(0), x.data_ptr(), ldx, m, n, k, pointer(sums), scale,
        pointer(dx), pointer(dw), pointer(db), pointer(scratch), DTYPE_CODE[dtype], index, stream(index),
    )  # fmt: skip
    return dx, dw, db


def _rows(t: Tensor, k: int) -> tuple[Tensor, int]:
    """t [..., k] as rows of consecutive elements at one stride: itself where it is, a copy where it is not."""
    if t.is_contiguous():
        return t, k
    if t.dim() == 2 and t.stride(1) == 1:
        return t, t.stride(0)
    flat = t.reshape(-1, k)
    return (flat, flat.stride(0)) if flat.stride(1) == 1 else (flat.contiguous(), k)


_scratch_sizes: dict[tuple[int, int, int, bool, bool, torch.dtype, int], int] = {}


def _scratch(rows: int, cols: int, ld: int, t: Tensor, weighted: bool) -> Tensor | None:
    """Scratch for the column sums of t, None where none is needed."""
    size = _scratch_size(rows, cols, ld, t, weighted)
    return allocate((size,), _DENSE, torch.float64, t.get_device()) if size else None


def _scratch_size(rows: int, cols: int, ld: int, t: Tensor, weighted: bool) -> int:
    """Its float64 elements, asked once per size and layout."""
    key = (rows, cols, ld, t.data_ptr() % 16 == 0, weighted, t.dtype, t.device.index)
    size = _scratch_sizes.get(key)
    if size is None:
        if len(_scratch_sizes) > 4096:
            _scratch_sizes.clear()
        found = I64()
        _functions().scratch(rows, cols, ld, key[3], weighted, ctypes.addressof(found), DTYPE_CODE[t.dtype], key[6])
        size = _scratch_sizes[key] = found.value
    return size
