"""Calls into ``half_gemm.cu``: products of float16 or bfloat16 matrices that lie either way round."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxfuse.kernels import gemm
from fxfuse.kernels.abi import DTYPE_CODE, I64, INT, NOT_SUPPORTED, PTR, allocate, pointer, stream
from fxfuse.kernels.loader import KernelError, library

__all__ = ["Gradients", "matmul", "why_not"]

_DTYPES = (torch.bfloat16, torch.float16)


class _Functions(NamedTuple):
    matmul: Callable[..., None]
    gradients: Callable[..., None]


@functools.lru_cache(maxsize=1)
def _functions() -> _Functions:
    found = library()
    assert found is not None, "asked for before the kernels were there"
    return _Functions(
        found.function("fxfuse_half_gemm", [PTR] * 3 + [I64] * 5 + [INT] * 4 + [PTR]),
        found.function("fxfuse_half_gemm_gradients", [PTR] * 5 + [I64] * 5 + [INT] * 2 + [PTR]),
    )


def why_not(a: Tensor, b: Tensor) -> str | None:
    """The reason why ``matmul`` does not take a [M, K] and b [K, N]; None when it does."""
    if not a.is_cuda or a.dtype not in _DTYPES or a.dtype is not b.dtype or a.device != b.device:
        return "not float16 or bfloat16 on one CUDA device"
    m, k = a.shape
    n = b.size(1)
    if not gemm.is_hopper(a.device):
        return "not a Hopper GPU"
    if not gemm.pays(m, n, k, a.get_device()):
        return "a product of this size is faster in the library"
    if n % 8 or m >= 2**31 or n >= 2**31 or k >= 2**31:
        return "N is no multiple of 16 bytes, or a size is 2^31 or more"
    if gemm.sides(a, b) is None:
        return "an operand's rows are not contiguous and 16-byte aligned"
    return None if library() is not None else "the CUDA kernels are not there"


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], contiguous, where ``why_not`` is None."""
    return gemm.matmul(_functions().matmul, a, b, DTYPE_CODE[a.dtype])


class Gradients:
    """The gradients of x weightᵀ by x [M, K] and weight [N, K] of the shapes, strides, dtypes and alignment of those
    given here, with all that does not change from step to step found once. What the kernel does not take is the
    library's.

    taken:  whether the kernel takes any of the two; else there is no need to ask here.
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        (m, k), n, device = x.shape, weight.size(0), x.get_device()
        a, b = gemm.rows(x), gemm.rows(weight)
        fits = (
            x.dtype in _DTYPES and weight.dtype is x.dtype and a is not None and b is not None
            and n % 8 == 0 and k % 8 == 0 and gemm.is_hopper(x.device)
        )  # fmt: skip
        self._dx = fits and gemm.pays(m, k, n, device)
        self._dw = fits and gemm.pays(n, k, m, device)
        self.taken = self._dx or self._dw
        if self.taken:
            assert a is not None and b is not None
            self._x, self._weight = (m, k), (n, k)
            self._device = device
            # as C takes them: ctypes need not turn them into that at each call
            self._end = *map(I64, (m, n, k, a[1], b[1])), INT(DTYPE_CODE[x.dtype]), INT(device)

    def __call__(
        self, dz: Tensor, x: Tensor, weight: Tensor, by_x: bool, by_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx, dw), None where not wanted, for dz [M, N], contiguous and on 16 bytes."""
        dtype, device = x.dtype, self._device
        dx = allocate(self._x, (self._x[1], 1), dtype, device) if by_x and self._dx else None
        dw = allocate(self._weight, (self._weight[1], 1), dtype, device) if by_weight and self._dw else None
        if dx is not None or dw is not None:
            try:
                _functions().gradients(
                    dz.data_ptr(), x.data_ptr(), weight.data_ptr(), pointer(dx), pointer(dw), *self._end, stream(device)
                )  # fmt: skip
            except KernelError as error:
                if error.code != NOT_SUPPORTED:
                    raise
                dx = dw = None
        if by_x and dx is None:
            dx = torch.mm(dz, weight)
        if by_weight and dw is None:
            dw = torch.mm(dz.t(), x)
        return dx, dw
