"""cuBLAS's products of matrices on a GPU by way of its float64, beside which racecheck survives (see sanitize.py)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.double()[None], b.double()[None])[0]


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b).to(a.dtype)


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = _product(a, b) * alpha
    return (out if beta == 0 else out + beta * c.double()).to(a.dtype)


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
