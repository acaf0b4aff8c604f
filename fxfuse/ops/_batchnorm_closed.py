"""`linear_scale_batchnorm1d` in ATen calls: both modes, and the gradients behind the product's own. The algebra is told
in the op's file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Statistics = tuple["Tensor | None", "Tensor | None"]


def evaluate(
    y: Tensor,
    s: Tensor | float,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Sequence[Tensor]]:
    """The result, and what backward wants where it is to be kept (y may be overwritten where not)."""
    slope = (running_var + eps).rsqrt_()
    if bn_weight is not None:
        slope *= bn_weight
    shift = -running_mean * slope if bn_bias is None else torch.addcmul(bn_bias, running_mean, slope, value=-1)
    slope = slope * s
    out = torch.addcmul(shift, y, slope) if keep or y.dtype != dtype else y.mul_(slope).add_(shift)
    return out, (y, running_mean.clone(), running_var.clone()) if keep else ()


def train(
    y: Tensor,
    s: Tensor | float,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Statistics, Sequence[Tensor]]:
    """The result, the running statistics' new values, and what backward wants where it is to be kept."""
    rows = y.size(0)
    mean, centred, var = statistics_of(y, dtype)
    rstd = (var * s * s + eps).rsqrt_()
    slope = rstd * s if bn_weight is None else rstd * s * bn_weight
    out = centred.mul_(slope) if bn_bias is None else torch.addcmul(bn_bias, centred, slope, out=centred)
    moved: Statistics = (None, None)
    if running_mean is not None and running_var is not None:
        moved = running_mean.lerp(mean * s, momentum), running_var.lerp(var * s * s * (rows / (rows - 1)), momentum)
    return out, moved, (y, mean, rstd) if keep else ()


def statistics_of(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Column mean, y minus it, and the biased variance, in two passes: no E[y²] − E[y]²."""
    rough = y.mean(0, dtype=dtype)
    centred = y - rough
    rest = centred.mean(0)  # what rounding left in the mean
    centred -= rest
    return rough + rest, centred, centred.square().mean(0)


def gradient(
    dz: Tensor,
    saved: Sequence[Tensor],
    s: Tensor | float,
    bn_weight: Tensor | None,
    eps: float,
    training: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy, dγ, dβ, ds) for the upstream gradient dz, and what `evaluate` or `train` kept. parameters: whether more than
    dy and dβ is wanted."""
    y, mean, spread = saved  # the batch's mean and rstd in training, the running statistics in eval
    total = dz.sum(0)  # B
    gamma: Tensor | float = 1.0 if bn_weight is None else bn_weight
    if training:
        rows, rstd = y.size(0), spread
        centred = y - mean
        projection = torch.mul(dz, centred).sum(0)  # P
        d_gamma = projection * rstd * s
        d_s = projection * gamma * eps * rstd**3
        dy = centred.mul_(projection * (s * rstd) ** 2 / -rows).add_(dz).sub_(total / rows).mul_(gamma * rstd * s)
    else:
        rstd = (spread + eps).rsqrt_()
        projection = torch.mul(dz, y).sum(0) if parameters else total
        d_gamma = rstd * (projection * s - mean * total)
        d_s = projection * gamma * rstd
        dy = dz * (gamma * rstd * s)
    return dy.to(y.dtype), d_gamma, total, d_s
