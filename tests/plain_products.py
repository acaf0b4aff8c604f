"""cuBLAS's products of matrices on a GPU without its Hopper kernels, beside which racecheck does not survive (see
sanitize.py): by way of float64, and those of float32 that must not be TF32 as a batch of one."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fxfuse.kernels import gemm


def _wide(t: Tensor) -> Tensor:
    if t.dtype is torch.float32:
        if not gemm.tf32_allowed():
            return t
        finite = t.isfinite()  # 10 bits of fraction, rounded to nearest
        t = torch.where(finite, ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32), t)
    return t.double()


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(_wide(a)[None], _wide(b)[None])[0]


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b).to(a.dtype)


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = _product(a, b) * alpha
    return (out if beta == 0 else out + beta * c.to(out.dtype)).to(a.dtype)


def _mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(_mm(a, b))


def _addmm_out(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
    return out.copy_(_addmm(c, a, b, beta=beta, alpha=alpha))


def in_force(key: str = "CUDA") -> torch.library.Library:
    """Replaces the products of a dispatch key, as long as the library that is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there were others
        for name, function in (("mm", _mm), ("addmm", _addmm), ("mm.out", _mm_out), ("addmm.out", _addmm_out)):
            library.impl(name, function, key)
    return library
