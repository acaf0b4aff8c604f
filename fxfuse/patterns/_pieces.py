"""Expressions and lowerings that several patterns share."""

from __future__ import annotations

from typing import Any

import torch

from fxfuse.match import Either, op, variables

x, weight, bias = variables("x weight bias")


def _transposed(value: Any) -> Either:
    """Every way to write the transpose of a matrix; the view itself may have other readers and then stays."""
    swaps = ((0, 1), (1, 0), (-1, -2), (-2, -1))
    return Either((
        op.t(value, shared=True),
        op.mT(value, shared=True),
        *(op.transpose(value, a, b, shared=True) for a, b in swaps),
        op.permute(value, (1, 0), shared=True),
    ))  # fmt: skip


#: x · weightᵀ + bias in every spelling
product = Either((
    op.linear(x, weight, bias),
    op.addmm(bias, x, _transposed(weight)),
    op.add(op.matmul(x, _transposed(weight)), bias),
    op.matmul(x, _transposed(weight)),
))  # fmt: skip


def restore_leading(out: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``out`` [prod(leading), C] with the leading dimensions of ``like`` [*leading, K] again: [*leading, C]."""
    return out.reshape(*like.shape[:-1], out.shape[-1])
