"""Pieces of `linear_scale_batchnorm1d`: one number a column, the calls into its kernels, and the last step of its
gradients. The algebra is told in the op's own file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxfuse.kernels import gemm, small_gemm
from fxfuse.kernels import linear_scale_batchnorm1d as kernels

from ._product import linear_backward

Buffers = tuple[Tensor | None, Tensor | None]

FEW_ROWS = 4  # up to here the library's product with its bias is another, better kernel than the one without


def mode(training: bool) -> str:
    """As the kernels' rules name it."""
    return "training" if training else "evaluation"


def behind(x: Tensor, training: bool, out_dtype: torch.dtype) -> str:
    """What stands behind the product in one kernel, as ``gemm.why_not_product`` names it."""
    return kernels.behind(x, out_dtype) if training else "evaluation"


def one_launch(x: Tensor, weight: Tensor, *others: Any) -> bool:
    """Whether a call of the op without a gradient is a single launch that its sizes make worth while."""
    training = others[8]
    return small_gemm.one_launch(x, weight, mode(training), behind(x, training, scaled_dtype(x, *others[1:3])))


def product_has_bias(x: Tensor, training: bool) -> bool:
    """Whether a library's product takes the bias along, rather than the pass behind it. In training it cancels."""
    return not training and x.size(0) <= FEW_ROWS


def one_pass(rows: int, columns: int) -> bool:
    """Whether a training step's statistics and normalisation are one launch behind the product."""
    return rows <= kernels.SMALL_ROWS and rows * columns <= kernels.SMALL_ELEMENTS


def buffer(new: Tensor | None, like: Tensor, training: bool) -> Tensor:
    """The dispatcher's results are tensors: an empty one says that there is nothing to update."""
    return new if training and new is not None else like.new_empty(0)


def per_column(factor: Tensor | None, columns: int) -> bool:
    """[N], [1, N], or a single number of rank at most two."""
    if factor is None or factor.dim() == 0:
        return True
    return factor.dim() <= 2 and factor.size(-1) in (1, columns) and (factor.dim() == 1 or factor.size(0) == 1)


def scaled_dtype(x: Tensor, scale: Tensor | None, divisor: Tensor | None) -> torch.dtype:
    """The dtype of what BatchNorm is given, by type promotion."""
    dtype = x.dtype
    for factor in (scale, divisor):
        if factor is not None and factor.dim() > 0:
            dtype = torch.promote_types(dtype, factor.dtype)
    return dtype


def factors(
    x: Tensor, weight: Tensor, scale: Tensor | None, divisor: Tensor | None, alpha: float, dtype: torch.dtype
) -> Tensor | float:
    """s = alpha·scale/divisor: [N] or a single element in `dtype`; the number alpha when both are None."""
    s: Tensor | float = alpha
    if scale is not None:
        s = scale.to(dtype).reshape(-1) * alpha
    if divisor is not None:
        s = s / divisor.to(dtype).reshape(-1)
    return s


def columns(
    bias: Tensor | None,
    scale: Tensor | None,
    divisor: Tensor | None,
    alpha: float,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> kernels.Columns:
    """The vectors as the kernels take them: contiguous [N], or a single number."""

    def vector(t: Tensor | None) -> Tensor | None:
        if t is None or (t.dim() == 1 and t.is_contiguous()):
            return t
        return t.reshape(-1).contiguous()

    return kernels.Columns(vector(bias), vector(scale), vector(divisor), alpha, vector(bn_weight), vector(bn_bias), eps)


def kernel_evaluation(
    x: Tensor, weight: Tensor, c: kernels.Columns, mean: Tensor | None, var: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    assert mean is not None and var is not None
    mean, var = mean.contiguous(), var.contiguous()
    if small_gemm.why_not(x, weight, "evaluation") is None:
        return small_gemm.batchnorm(x, weight, c, mean, var, out_dtype, training=False)(x)
    if gemm.why_not_product(x, weight, "evaluation") is None:
        return kernels.eval_product(x, weight, c, mean, var, out_dtype)
    if product_has_bias(x, training=False):
        acc, c = F.linear(x, weight, c.bias), c._replace(bias=None)
    else:
        acc = F.linear(x, weight)
    return kernels.eval_apply(
        acc, c, mean, var, acc if acc.dtype == out_dtype else torch.empty_like(acc, dtype=out_dtype)
    )


def kernel_training(
    x: Tensor,
    weight: Tensor,
    c: kernels.Columns,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    out_dtype: torch.dtype,
    keep: bool,
    update: bool,
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Sequence[Tensor]]:
    """Saves the bare product (no bias: it cancels) and its columns' statistics."""
    mean, var = running_mean, running_var
    if mean is not None and var is not None and not (update and mean.is_contiguous() and var.is_contiguous()):
        mean, var = mean.clone(memory_format=torch.contiguous_format), var.clone(memory_format=torch.contiguous_format)
    small = not keep and small_gemm.why_not(x, weight, "training") is None
    how = behind(x, True, out_dtype)
    product = not small and gemm.why_not_product(x, weight, how) is None
    done: tuple[Tensor, Tensor | None, Tensor] | None = None
    if small:
        out = small_gemm.batchnorm(x, weight, c, mean, var, out_dtype, training=True, momentum=momentum)(x)
        done = out, None, out
    elif product and how == "training":
        done = kernels.train(x, weight, c, mean, var, momentum, keep)
    if done is not None:
        out, acc, saved = done
    else:
        acc, partials = kernels.train_product(x, weight) if product else (F.linear(x, weight), None)
        out = acc if acc.dtype == out_dtype and not keep else torch.empty_like(acc, dtype=out_dtype)
        saved = kernels.train_apply(acc, partials, c, mean, var, momentum, out)
    buffers: Buffers = (None, None)
    if not update:
        buffers = buffer(mean, x, True), buffer(var, x, True)
    elif mean is not running_mean and running_mean is not None and running_var is not None:
        running_mean.copy_(mean)  # type: ignore[arg-type]
        running_var.copy_(var)  # type: ignore[arg-type]
    if not keep:
        return (out, *buffers), ()
    assert acc is not None
    return (out, *buffers), (acc, saved)


def kernel_gradients(
    grad: Tensor,
    saved: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    divisor: Tensor | None,
    alpha: float,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Every argument's gradient of a training step, from one call into the kernels and the product's own two.

    ``saved`` is emptied: the product acc is not needed beside its gradient and those that come of it.
    """
    c = columns(bias, scale, divisor, alpha, bn_weight, bn_bias, eps)
    statistics, acc = saved.pop(), saved.pop()
    per_column = scale is not None and scale.numel() == weight.size(0)
    found = kernels.backward(
        grad, acc, statistics, c, weight=wanted[5], shift=wanted[6], bias=wanted[2], scale=wanted[3] and per_column,
        s=wanted[4] or (wanted[3] and not per_column),
    )  # fmt: skip
    del acc
    dx, dw, _ = linear_backward(found.acc, 1.0, x, weight, None, wanted)
    d_scale = d_divisor = None
    if scale is not None and wanted[3]:
        d_scale = _by_scale(found.s, scale, divisor, alpha) if found.scale is None else found.scale.view(scale.shape)
    if divisor is not None and wanted[4]:
        s = factors(x, weight, scale, divisor, alpha, torch.float32)
        d_divisor = _by_divisor(found.s, s, divisor)
    return dx, dw, found.bias, d_scale, d_divisor, found.weight, found.shift, None, None


def _by_scale(d_s: Tensor | None, scale: Tensor, divisor: Tensor | None, alpha: float) -> Tensor:
    assert d_s is not None
    return shaped(d_s * alpha if divisor is None else d_s * alpha / divisor.to(d_s.dtype).reshape(-1), scale)


def _by_divisor(d_s: Tensor | None, s: Tensor | float, divisor: Tensor) -> Tensor:
    assert d_s is not None
    return shaped(d_s * s / divisor.to(d_s.dtype).reshape(-1) * -1, divisor)


def gradients(
    dy: Tensor,
    d_gamma: Tensor | None,
    total: Tensor | None,
    d_s: Tensor | None,
    s: Tensor | float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    divisor: Tensor | None,
    alpha: float,
    training: bool,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Every argument's gradient from that of the product, of gamma, of beta and of the whole factor s."""
    dx, dw, db = linear_backward(dy, 1.0, x, weight, bias, (*wanted[:2], wanted[2] and not training))
    if wanted[2] and training:
        db = torch.zeros_like(bias)  # type: ignore[arg-type]
    return (
        dx,
        dw,
        db,
        _by_scale(d_s, scale, divisor, alpha) if scale is not None and wanted[3] else None,
        _by_divisor(d_s, s, divisor) if divisor is not None and wanted[4] else None,
        d_gamma if wanted[5] else None,
        total if wanted[6] else None,
        None,
        None,
    )


def shaped(columns: Tensor, factor: Tensor) -> Tensor:
    """A gradient of one number a column, as the factor that was broadcast over the columns has it."""
    value = columns.sum() if factor.numel() == 1 else columns
    return value.reshape(factor.shape).to(factor.dtype)
