"""Calls into ``linear_scale_batchnorm1d.cu``: product, scale and BatchNorm in few passes, forward and backward."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse.kernels import gemm
from fxfuse.kernels.abi import DTYPE_CODE, FLOAT, I64, INT, NOT_SUPPORTED, PTR, allocate, pointer, stream
from fxfuse.kernels.counters import counters_of
from fxfuse.kernels.loader import KernelError, library

__all__ = [
    "NO_ROOM", "PRODUCT_ROWS", "SMALL_ELEMENTS", "SMALL_ROWS", "Columns", "Gradients", "backward", "backward_scratch",
    "behind", "counters_for", "eval_apply", "eval_product", "functions", "in_one", "train", "train_apply",
    "train_product", "vector",
]  # fmt: skip

_NAME = "fxfuse_linear_scale_batchnorm1d_"
_ONE_FOR_ALL = 8  # kOneForAll in column_vector.cuh
SMALL_ROWS = 1024  # kSmallRows: up to here statistics and normalisation can be one launch
SMALL_ELEMENTS = 1 << 20  # ... and up to here that is the quicker way
NO_ROOM = (720, NOT_SUPPORTED)  # cudaErrorCooperativeLaunchTooLarge, and no Hopper: what a launch in one kernel says
PRODUCT_ROWS = 64  # rows of a partial that the Hopper GEMM writes

#: How a batch's statistics reached ``train_apply``: (partials [blocks, N, 2], rows of a block); None: not computed yet.
Partials = tuple[Tensor, int] | None


class Columns(NamedTuple):
    """Everything the op says about each column: vectors [N], single numbers, or None; alpha multiplies the scale."""

    bias: Tensor | None
    scale: Tensor | None
    divisor: Tensor | None
    alpha: float
    weight: Tensor | None
    shift: Tensor | None
    eps: float

    def arguments(self) -> tuple[Any, ...]:
        bias, scale, divisor, alpha, weight, shift, eps = self
        return (
            *vector(bias), *vector(scale), *vector(divisor), alpha, *vector(weight), *vector(shift), eps
        )  # fmt: skip


class Gradients(NamedTuple):
    """What ``backward`` gives: by acc, by the columns' vectors (None where not wanted), and by the whole factor s."""

    acc: Tensor
    weight: Tensor | None
    shift: Tensor | None
    bias: Tensor | None
    s: Tensor | None
    scale: Tensor | None


def vector(t: Tensor | None) -> tuple[int, int]:
    """Pointer and code of a contiguous vector or single number; the caller keeps the tensor alive."""
    if t is None:
        return 0, 0
    return t.data_ptr(), DTYPE_CODE[t.dtype] + (_ONE_FOR_ALL if t.numel() == 1 else 0)


class _Functions(NamedTuple):
    eval: Callable[..., None]
    product: Callable[..., None]
    train: Callable[..., None]
    eval_apply: Callable[..., None]
    block_rows: Callable[..., None]
    statistics: Callable[..., None]
    train_apply: Callable[..., None]
    backward: Callable[..., None]
    backward_scratch: Callable[..., None]
    step_forward: Callable[..., None]
    step_backward: Callable[..., None]


@functools.lru_cache(maxsize=1)
def functions() -> _Functions:
    found = library()
    assert found is not None, "asked for before the kernels were there"
    one = [PTR, INT]
    columns = [*one, *one, *one, FLOAT, *one, *one, FLOAT]
    end = [INT, PTR]
    return _Functions(
        found.function(_NAME + "eval", [PTR] * 3 + [I64] * 5 + columns + one * 2 + [INT] * 3 + end),
        found.function(_NAME + "product", [PTR] * 4 + [I64] * 5 + [INT] * 2 + end),
        found.function(_NAME + "train", [PTR] * 9 + [I64] * 5 + columns + one * 2 + [FLOAT, INT, INT] + end),
        found.function(_NAME + "eval_apply", [PTR] * 2 + [I64] * 2 + columns + one * 2 + [INT, INT] + end),
        found.function(_NAME + "block_rows", [I64, PTR]),
        found.function(_NAME + "statistics", [PTR] * 2 + [I64] * 2 + [INT] + end),
        found.function(
            _NAME + "train_apply",
            [PTR] * 3 + [I64] + [PTR] * 2 + [I64] * 2 + columns + one * 2 + [FLOAT] + [INT, INT] + end,
        ),
        found.function(_NAME + "backward", [PTR] * 10 + [I64] * 2 + columns + [INT, INT] + end),
        found.function(_NAME + "backward_scratch", [I64, I64, INT, INT, INT, INT, PTR]),
        found.function(_NAME + "step_forward", [PTR, PTR]),
        found.function(_NAME + "step_backward", [PTR, PTR]),
    )


@functools.lru_cache(maxsize=4096)
def block_rows(rows: int) -> int:
    """Rows of a partial of the reducing passes (reduction_rows in the source)."""
    found = I64()
    functions().block_rows(rows, ctypes.addressof(found))
    return found.value


@functools.lru_cache(maxsize=4096)
def backward_scratch(
    rows: int, columns: int, aligned: bool, dtype: torch.dtype, grad_dtype: torch.dtype, device: int
) -> int:
    """Float pairs of scratch for ``backward``; 0 where all of it is one launch."""
    found = I64()
    functions().backward_scratch(
        rows, columns, aligned, DTYPE_CODE[dtype], DTYPE_CODE[grad_dtype], device, ctypes.addressof(found)
    )
    return found.value


def eval_product(x: Tensor, weight: Tensor, c: Columns, mean: Tensor, var: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The op in evaluation in one kernel: out [M, N], where ``gemm.why_not_product`` is None."""
    a, b = gemm.rows(x), gemm.rows(weight)
    assert a is not None and b is not None
    m, n, device = x.size(0), weight.size(0), x.get_device()
    out = allocate((m, n), (n, 1), out_dtype, device)
    functions().eval(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), m, n, weight.size(1), a[1], b[1], *c.arguments(),
        *vector(mean), *vector(var), gemm.ieee(x), DTYPE_CODE[x.dtype], DTYPE_CODE[out_dtype], device, stream(device),
    )  # fmt: skip
    return out


def eval_apply(acc: Tensor, c: Columns, mean: Tensor, var: Tensor, out: Tensor) -> Tensor:
    """The same on a finished product acc [M, N] without bias; out may be acc."""
    device = acc.device.index
    functions().eval_apply(
        acc.data_ptr(), out.data_ptr(), *acc.shape, *c.arguments(), *vector(mean), *vector(var),
        DTYPE_CODE[acc.dtype], DTYPE_CODE[out.dtype], device, stream(device),
    )  # fmt: skip
    return out


def train_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Partials]:
    """acc = x weight^T and its columns' statistics in one kernel, where ``gemm.why_not_product`` is None."""
    a, b = gemm.rows(x), gemm.rows(weight)
    assert a is not None and b is not None
    m, n, device = x.size(0), weight.size(0), x.get_device()
    acc = allocate((m, n), (n, 1), x.dtype, device)
    partials = allocate((-(-m // PRODUCT_ROWS), n, 2), (2 * n, 2, 1), torch.float32, device)
    functions().product(
        x.data_ptr(), weight.data_ptr(), acc.data_ptr(), partials.data_ptr(), m, n, weight.size(1), a[1], b[1],
        gemm.ieee(x), DTYPE_CODE[x.dtype], device, stream(device),
    )  # fmt: skip
    return acc, (partials, PRODUCT_ROWS)


def behind(x: Tensor, out_dtype: torch.dtype) -> str:
    """What stands behind a training batch's product in one kernel, as ``gemm.why_not_product`` names it: "training"
    where ``train`` takes the batch, else its "statistics" alone."""
    one = x.dtype == out_dtype and (x.size(0) <= SMALL_ROWS or not gemm.ieee(x))
    return "training" if one else "statistics"


def train(
    x: Tensor,
    weight: Tensor,
    c: Columns,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """A training step in one kernel: (out [M, N], acc or None, saved [3, N]), where ``gemm.why_not_product`` is None
    and ``behind`` says "training". ``keep``: whether the bare product acc is wanted for the backward pass.

    None, and nothing done, where the device has no room for all of its blocks at once (part of it is set aside).
    """
    a, b = gemm.rows(x), gemm.rows(weight)
    assert a is not None and b is not None
    m, n, device = x.size(0), weight.size(0), x.get_device()
    out = allocate((m, n), (n, 1), x.dtype, device)
    acc = allocate((m, n), (n, 1), x.dtype, device) if keep else None
    blocks = -(-m // PRODUCT_ROWS)
    pairs = (blocks + 1) * n  # partials, and the columns' maps
    scratch = allocate((2 * pairs,), (1,), torch.float32, device)
    saved = allocate((3, n), (n, 1), torch.float32, device)
    partials, queue = scratch.data_ptr(), stream(device)
    counters = counters_of(x.device, queue, counters_for(n))
    done = in_one(
        functions().train, x.data_ptr(), weight.data_ptr(), out.data_ptr(), pointer(acc), partials,
        partials + 8 * blocks * n, counters.data_ptr(), saved.data_ptr(), 0, m, n, weight.size(1), a[1], b[1],
        *c.arguments(), *vector(running_mean), *vector(running_var), momentum, gemm.ieee(x), DTYPE_CODE[x.dtype],
        device, queue,
    )  # fmt: skip
    return (out, acc, saved) if done else None


def in_one(call: Callable[..., None], *args: Any) -> bool:
    """The one kernel, by either function that launches it; False, and nothing done, where not all of its blocks have
    room at once, or on no Hopper."""
    try:
        call(*args)
    except KernelError as error:
        if error.code not in NO_ROOM:
            raise
        return False
    return True


def counters_for(columns: int) -> int:
    """How many counters ``train`` is given."""
    return 1 + 2 * -(-columns // 64)


def train_apply(
    acc: Tensor,
    partials: Partials,
    c: Columns,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    out: Tensor,
) -> Tensor:
    """Normalises acc [M, N] (without bias) into out, which may be acc; updates the running statistics in place.

    Without partials the statistics are computed here. Returns saved [3, N] float32: mean of acc, rstd of s times it,
    and what rounding left out of the mean.
    """
    rows, columns = acc.shape
    device, dtype = acc.get_device(), DTYPE_CODE[acc.dtype]
    saved = allocate((3, columns), (columns, 1), torch.float32, device)
    if partials is None and (rows > SMALL_ROWS or acc.numel() > SMALL_ELEMENTS):
        step = block_rows(rows)
        scratch = allocate((-(-rows // step), columns, 2), (2 * columns, 2, 1), torch.float32, device)
        functions().statistics(acc.data_ptr(), scratch.data_ptr(), rows, columns, dtype, device, stream(device))
        partials = scratch, step
    maps = None if partials is None else allocate((3, columns), (columns, 1), torch.float32, device)
    found, block = partials or (None, 0)
    functions().train_apply(
        acc.data_ptr(), out.data_ptr(), pointer(found), block, pointer(maps), saved.data_ptr(), rows, columns,
        *c.arguments(), *vector(running_mean), *vector(running_var), momentum, dtype, DTYPE_CODE[out.dtype], device,
        stream(device),
    )  # fmt: skip
    return saved


def backward(
    grad: Tensor, acc: Tensor, saved: Tensor, c: Columns, *,
    weight: bool = False, shift: bool = False, bias: bool = False, s: bool = False, scale: bool = False,
) -> Gradients:  # fmt: skip
    """The gradients of a training step by acc and by what else is asked for; acc and saved as the forward left them.

    grad: [M, N] in out's dtype. ``scale`` may be asked for where the scale has one number a column.
    """
    rows, columns = acc.shape
    grad = grad.contiguous()
    device = acc.get_device()
    aligned = grad.data_ptr() % 16 == 0 and acc.data_ptr() % 16 == 0
    pairs = backward_scratch(rows, columns, aligned, acc.dtype, grad.dtype, device)
    scratch = allocate((2 * pairs,), (1,), torch.float32, device) if pairs else None
    found = Gradients(
        torch.empty_like(acc),
        torch.empty_like(c.weight) if weight and c.weight is not None else None,
        torch.empty_like(c.shift) if shift and c.shift is not None else None,
        torch.empty_like(c.bias) if bias and c.bias is not None else None,
        allocate((columns,), (1,), torch.float32, device) if s else None,
        torch.empty_like(c.scale) if scale and c.scale is not None else None,
    )
    functions().backward(
        grad.data_ptr(), acc.data_ptr(), saved.data_ptr(), found.acc.data_ptr(), pointer(scratch),
        pointer(found.weight), pointer(found.shift), pointer(found.bias), pointer(found.s), pointer(found.scale),
        rows, columns, *c.arguments(), DTYPE_CODE[acc.dtype], DTYPE_CODE[grad.dtype], device, stream(device),
    )  # fmt: skip
    return found
