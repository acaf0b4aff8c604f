"""Calls into ``float32_gemm.cu``: products of float32 matrices that lie either way round, as exact as float32."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fxfuse.kernels import gemm, narrow_rule
from fxfuse.kernels.abi import I64, INT, PTR
from fxfuse.kernels.loader import library

__all__ = ["matmul", "why_not"]


@functools.lru_cache(maxsize=1)
def _function() -> Callable[..., None]:
    found = library()
    assert found is not None, "asked for before the kernels were there"
    return found.function("fxfuse_float32_gemm", [PTR] * 3 + [I64] * 5 + [INT] * 3 + [PTR])


def why_not(a: Tensor, b: Tensor) -> str | None:
    """The reason why ``matmul`` does not take a [M, K] and b [K, N]; None when it does."""
    if not a.is_cuda or a.dtype is not torch.float32 or b.dtype is not torch.float32 or a.device != b.device:
        return "not float32 on one CUDA device"
    if not gemm.ieee(a):
        return "TF32 is allowed"
    if not gemm.is_hopper(a.device):
        return "not a Hopper GPU"
    size = a.size(0), b.size(1), a.size(1)
    if not (gemm.float32_pays(*size) or narrow_rule.product_pays(*size, gemm.processors(a.get_device()))):
        return "a product this small is faster in the library"
    if gemm.float32_off():
        return "FXFUSE_FLOAT32=library leaves IEEE float32 products to the library"
    if b.size(1) % 4 or max(*a.shape, *b.shape) >= 2**31:
        return "N is no multiple of 16 bytes, or a size is 2^31 or more"
    if gemm.sides(a, b) is None:
        return "an operand's rows are not contiguous and 16-byte aligned"
    return None if library() is not None else "the CUDA kernels are not there"


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], contiguous, where ``why_not`` is None."""
    return gemm.matmul(_function(), a, b)
