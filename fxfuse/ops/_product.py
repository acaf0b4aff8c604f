"""The product in front of an op, for any rank of weight, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fxfuse.kernels import float32_gemm, half_gemm
from fxfuse.kernels import matmul_div_sum_scale as collapse

from ._road import wide


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weight.T + bias. For a weight of more than two dimensions `.T` turns all of them around, as it does in eager
    (deprecated there): a pattern that met `w.T` before the rank of w was known relies on it."""
    if weight.dim() <= 2:
        return F.linear(x, weight, bias)
    out = x @ weight.permute(*reversed(range(weight.dim())))
    return out if bias is None else out + bias


def linear_backward(
    dz: Tensor,
    factor: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Sequence[bool],
    db: Tensor | None = None,
) -> Sequence[Tensor | None]:
    """factor · the gradients of linear(x, weight, bias) for an upstream gradient `dz`; `db` if it is there already."""
    matrices = dz.dim() == 2  # the rule; views that change nothing take their time, too
    flat = dz if matrices else dz.reshape(-1, weight.size(0))
    dx = dw = None
    if wanted[0]:
        dx = _of_matrices(flat, weight, factor)
        dx = dx if matrices else dx.view(x.shape)
    if wanted[1]:
        dw = _of_matrices(flat.t(), x if matrices else x.reshape(-1, x.size(-1)), factor)
    if db is None and bias is not None and wanted[2]:
        db = _column_sums(flat, factor)
    return dx, dw, db


class LinearBackward:
    """`linear_backward` for steps of one kind (see _kinds.py), whose kernel is found once: matrices x and weight of the
    shapes, strides, dtypes and alignment of those given here, dz contiguous and on 16 bytes."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self._kernel = half_gemm.Gradients(x, weight)

    def __call__(
        self,
        dz: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Sequence[bool],
        db: Tensor | None = None,
    ) -> Sequence[Tensor | None]:
        if not self._kernel.taken:
            return linear_backward(dz, 1.0, x, weight, bias, wanted, db)
        if db is None and bias is not None and wanted[2]:
            db = _column_sums(dz, 1.0)
        return *self._kernel(dz, x, weight, wanted[0], wanted[1]), db


def _column_sums(dz: Tensor, factor: float) -> Tensor:
    """factor · the sums of dz's columns, in its dtype: by our kernel, for ATen's takes scratch of several times dz."""
    if dz.is_cuda and dz.numel() and collapse.why_not(dz, dz) is None:
        sums = collapse.column_sums(dz, None)[: dz.size(1)]
        return (sums if factor == 1 else sums.mul_(factor)).to(dz.dtype)
    return dz.sum(0) if factor == 1 else dz.sum(0, dtype=wide(dz.dtype)).mul_(factor).to(dz.dtype)


def _of_matrices(a: Tensor, b: Tensor, factor: float) -> Tensor:
    if factor != 1:
        return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=factor)
    kernel = float32_gemm if a.dtype is torch.float32 else half_gemm
    return kernel.matmul(a, b) if kernel.why_not(a, b) is None else torch.mm(a, b)
