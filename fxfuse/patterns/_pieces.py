"""Expressions and lowerings that several patterns share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxfuse.emit import Emit
from fxfuse.match import Either, Match, op, variables

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


def call_on_product(match: Match, emit: Emit, function: Callable[..., Any], **arguments: Any) -> fx.Node:
    """A call of an op of this package on the product that was found."""
    if any(match.view.operations[node] == "add" for node in match.nodes):
        return emit.call(with_added_bias, name=function.__name__, **arguments)
    return emit.call(function, **arguments)


def with_added_bias(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **others: Any
) -> torch.Tensor:
    """The op ``name`` where the bias was added by a node of its own: autocast lowers the product there, not the sum."""
    function = getattr(importlib.import_module(f"fxfuse.ops.{name.removesuffix('_module')}"), name)
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (x.dtype, weight.dtype):
        return function(x=x, weight=weight, bias=bias, **others)
    lower = torch.get_autocast_dtype(device)
    wide = torch.promote_types(lower, bias.dtype)
    with torch.autocast(device, enabled=False):
        return function(x=x.to(lower).to(wide), weight=weight.to(lower).to(wide), bias=bias.to(wide), **others)


def as_the_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``out`` in the dtype of x · weightᵀ, which a product that is scaled in place by a wider tensor keeps."""
    device = x.device.type
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return out.to(dtype)
