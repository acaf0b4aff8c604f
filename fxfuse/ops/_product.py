"""The product in front of an op, for any rank of weight."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weight.T + bias. For a weight of more than two dimensions `.T` turns all of them around, as it does in eager
    (deprecated there): a pattern that met `w.T` before the rank of w was known relies on it."""
    if weight.dim() <= 2:
        return F.linear(x, weight, bias)
    out = x @ weight.permute(*reversed(range(weight.dim())))
    return out if bias is None else out + bias
