"""Calls into ``linear_activation_scale.cu``: scale * act(pre_scale * (x W^T + b)) and its elementwise passes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxfuse.kernels import gemm
from fxfuse.kernels.abi import DTYPE_CODE, FLOAT, I64, INT, PTR, allocate, pointer, stream
from fxfuse.kernels.counters import counters_of
from fxfuse.kernels.loader import library

__all__ = ["ACTIVATION_CODE", "Act", "apply", "backward", "backward_scratch", "forward", "from_output", "functions"]

_NAME = "fxfuse_linear_activation_scale_"

#: Name -> code of ``enum Activation`` in ``activation.cuh``.
ACTIVATION_CODE = {
    name: code
    for code, name in enumerate(
        ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "leaky_relu", "hardtanh", "clamp")
    )
}


class Act(NamedTuple):
    """An activation with its numbers and the factors before and behind it."""

    activation: str
    alpha: float
    beta: float
    pre_scale: float
    scale: float

    def arguments(self) -> tuple[int, float, float, float, float]:
        return ACTIVATION_CODE[self.activation], self.alpha, self.beta, self.pre_scale, self.scale


class _Functions(NamedTuple):
    forward: Callable[..., None]
    apply: Callable[..., None]
    backward: Callable[..., None]
    backward_scratch: Callable[..., None]


@functools.lru_cache(maxsize=1)
def functions() -> _Functions:
    found = library()
    assert found is not None, "asked for before the kernels were there"
    act = [INT, FLOAT, FLOAT, FLOAT, FLOAT]
    end = [INT, INT, PTR]
    return _Functions(
        found.function(_NAME + "forward", [PTR, PTR, PTR, PTR, I64, I64, I64, I64, I64, *act, INT, *end]),
        found.function(_NAME + "apply", [PTR, PTR, I64, *act, *end]),
        found.function(_NAME + "backward", [PTR] * 6 + [I64, I64, INT, *act, *end]),
        found.function(_NAME + "backward_scratch", [I64, I64, INT, INT, PTR, PTR]),
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: Act) -> Tensor:
    """The op in one kernel: out [..., N] for x [..., K], weight [N, K], bias [N]; asks ``gemm.why_not_product``
    to be None."""
    a, b = gemm.rows(x), gemm.rows(weight)
    assert a is not None and b is not None
    device, n = x.get_device(), weight.size(0)
    if x.dim() == 2:
        out = allocate((x.size(0), n), (n, 1), x.dtype, device)
    else:
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    functions().forward(
        x.data_ptr(), weight.data_ptr(), pointer(bias), out.data_ptr(), a[0].size(0), n, weight.size(1), a[1], b[1],
        *act.arguments(), gemm.ieee(x), DTYPE_CODE[x.dtype], device, stream(device),
    )  # fmt: skip
    return out


def apply(z: Tensor, act: Act, out: Tensor) -> Tensor:
    """out = scale * act(pre_scale * z), elementwise; contiguous, 16-byte aligned, of one dtype. out may be z."""
    device = z.device.index
    functions().apply(
        z.data_ptr(), out.data_ptr(), z.numel(), *act.arguments(), DTYPE_CODE[z.dtype], device, stream(device)
    )
    return out


def from_output(act: Act) -> bool:
    """Whether the derivative can be had from the op's output, so that z need not be kept. Not where the factor behind
    the activation could push outputs out of a 16-bit type's range."""
    if not 1e-3 <= abs(act.scale) <= 1e3:
        return False
    return act.activation in ("relu", "sigmoid", "tanh") or (act.activation == "leaky_relu" and act.alpha >= 0)


@functools.lru_cache(maxsize=4096)
def backward_scratch(rows: int, columns: int, dtype: torch.dtype, device: int) -> tuple[int, int]:
    """Floats of scratch and counters for the column sums of ``backward``."""
    floats, counters = ctypes.c_int64(), ctypes.c_int64()
    functions().backward_scratch(
        rows, columns, DTYPE_CODE[dtype], device, ctypes.addressof(floats), ctypes.addressof(counters)
    )
    return floats.value, counters.value


def backward(
    grad: Tensor, saved: Tensor, act: Act, output: bool, column_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """d z (contiguous) for the gradient of out; ``saved`` is z, or with ``output`` out itself. One dtype and shape.

    With ``column_sums`` the sums of d z over all but the last dimension come from the same pass, in its dtype; None
    where rows are no multiple of 16 bytes, and where they are not asked for.
    """
    grad = grad.contiguous()
    if grad.data_ptr() % 16:
        grad = grad.clone()
    device, columns, dtype = grad.get_device(), grad.size(-1), grad.dtype
    dz = allocate(tuple(grad.shape), grad.stride(), dtype, device)
    rows, queue = grad.numel() // max(columns, 1), stream(device)
    db = scratch = counters = None
    if column_sums and rows and columns and columns * grad.element_size() % 16 == 0:
        db = allocate((columns,), (1,), dtype, device)
        floats, ints = backward_scratch(rows, columns, dtype, device)
        if floats:
            scratch = allocate((floats,), (1,), torch.float32, device)
            counters = counters_of(grad.device, queue, ints)
    functions().backward(
        pointer(grad), pointer(saved), pointer(dz), pointer(db), pointer(scratch), pointer(counters), rows, columns,
        int(output), *act.arguments(), DTYPE_CODE[dtype], device, queue,
    )  # fmt: skip
    return dz, db
