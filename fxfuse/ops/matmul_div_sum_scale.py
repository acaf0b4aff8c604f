"""Matmul, then a sum over the output features: collapsed to one matrix-vector product.

Meaning: scale · linear(x, weight, bias).sum(dim, keepdim, dtype), or the mean. When `dim` is the last one the sum and
the product change places:

    Σⱼ (x·Wᵀ + b)ᵢⱼ = xᵢ·v + Σⱼ bⱼ,        v = Σⱼ Wⱼ        (weight is [N, K], v is [K])

M·N·K multiply-adds become N·K + M·K. This is an algebraic rewrite: the rounding differs (it is smaller as a rule), and
so does the point of overflow. v is formed from the live weight in every call.

Gradients, with g the upstream gradient times scale (divided by N for the mean), one number for each row of x:

    dx = g ⊗ v                  rank one, written once
    dW = 1 ⊗ (gᵀ·x)             one row, repeated: returned as an expanded row, never written out here
    db = 1 ⊗ Σ g

v is saved when dx is wanted. Sums over half-precision data are accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxfuse.freeze import Kept
from fxfuse.kernels import matmul_div_sum_scale as kernel

from ._autocast import cast
from ._blocks import block_rows, blocks
from ._kinds import Kinds
from ._op import Op
from ._product import product
from ._road import HALF, Road, floating, together, wide
from ._short import Calls


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    dim: int,
    keepdim: bool,
    mean: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    y = product(x, weight, bias)
    reduced = y.mean(dim, keepdim, dtype=dtype) if mean else y.sum(dim, keepdim, dtype=dtype)
    return reduced if scale == 1 else reduced * scale


def road(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    dim: int,
    keepdim: bool,
    mean: bool,
    dtype: torch.dtype | None,
) -> Road:
    if x.is_cuda and kernel.why_not(x, weight, bias) is None and _kernel_fits(x, weight, bias, dim, dtype):
        return KERNEL
    if not floating(x, weight, bias) or not together(x, weight, bias):
        return Road("composed", "not floating-point tensors of one device")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        return Road("composed", "x, weight and bias differ in dtype")
    if dtype is not None and not dtype.is_floating_point:
        return Road("composed", f"summed as {dtype}")
    if weight.dim() != 2 or x.dim() < 1 or dim not in (-1, x.dim() - 1):
        return Road("composed", "the sum is not over the product's last dimension")
    if x.size(-1) != weight.size(1) or (bias is not None and bias.shape != weight.shape[:1]):
        return Road("composed", "the shapes do not fit")
    if weight.size(0) == 0 or weight.size(1) == 0:
        return Road("composed", "an empty weight")
    return COLLAPSED


def _kernel_fits(x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, dtype: torch.dtype | None) -> bool:
    """The short way through the questions of `road`, for dtypes, ranks and devices that the kernels take."""
    (n, k), shape = weight.shape, x.shape
    return (
        shape[-1] == k
        and n > 0
        and k > 0
        and (dim == -1 or dim == len(shape) - 1)
        and (dtype is None or dtype is x.dtype or dtype is torch.float32)
        and (bias is None or bias.size(0) == n)
    )


COLLAPSED = Road("closed", "collapsed to x·ΣW")
KERNEL = Road("kernel", "collapsed to x·ΣW: x and W read once, each gradient written once")


def forward(
    road: Road,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    dim: int,
    keepdim: bool,
    mean: bool,
    dtype: torch.dtype | None,
    *,
    wanted: Sequence[bool] = (),
) -> tuple[Tensor, Sequence[Tensor]]:
    factor = scale / weight.size(0) if mean else scale
    if road is KERNEL:
        out, v = kernel.forward(x, weight, bias, factor, dtype)
    else:
        v = column_sums(weight)
        out = _from_sums(x, v, None if bias is None else bias.sum(dtype=v.dtype), factor, dtype)
    return (out.unsqueeze(-1) if keepdim else out), ((v,) if any(wanted[:1]) else ())


def _from_sums(x: Tensor, v: Tensor, beta: Tensor | None, factor: float, dtype: torch.dtype | None) -> Tensor:
    """factor · (x·v + beta) in `dtype`, or in that of x."""
    out = _dot(x, v)
    if beta is not None:
        out += beta
    if factor != 1:
        out *= factor
    return out.to(dtype or x.dtype)


def saves(x: Tensor, weight: Tensor, *others: Any, wanted: Sequence[bool]) -> Sequence[Tensor]:
    k = weight.size(1)
    size = kernel.sums_size(k) if road(x, weight, *others) is KERNEL else k
    return (weight.new_empty(size, dtype=wide(weight.dtype)),) if any(wanted[:1]) else ()


def backward(
    road: Road,
    grad: Tensor,
    saved: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    dim: int,
    keepdim: bool,
    mean: bool,
    dtype: torch.dtype | None,
    *,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    g = grad.squeeze(-1) if keepdim else grad
    factor = scale / weight.size(0) if mean else scale
    if road is KERNEL:
        (sums,) = saved or (None,)
        return kernel.backward(g, x, sums, weight.size(0), factor, wanted)
    g = g.to(wide(x.dtype))
    if factor != 1:
        g = g * factor
    dx = dw = db = None
    if wanted[0]:
        (v,) = saved
        dx = _outer(g, v, x)
    if wanted[1]:
        dw = _weighted_rows(g, x).to(weight.dtype).expand(weight.shape)
    if bias is not None and wanted[2]:
        db = g.sum().to(bias.dtype).expand(bias.shape)
    return dx, dw, db


def column_sums(weight: Tensor) -> Tensor:
    """Σⱼ Wⱼ of a [N, K] weight, in float32 or wider."""
    dtype = wide(weight.dtype)
    if weight.dtype == dtype or weight.device.type != "cpu":
        return weight.sum(0, dtype=dtype)
    total = torch.zeros(weight.size(1), dtype=dtype)
    for block in blocks(weight.size(0), block_rows(weight.size(0), 2 * weight.size(1) * dtype.itemsize)):
        total += weight[block].to(dtype).sum(0)
    return total


#: terms of one partial dot product, and how many there are at most: short sums in float32 err less than one long one,
#: and each costs a call
_SPAN, _SPANS = 256, 16


def _dot(x: Tensor, v: Tensor) -> Tensor:
    """x·v over the last dimension, in v's dtype: partial sums over spans of it, added up."""
    rows = x.reshape(-1, x.size(-1))
    if x.dtype != v.dtype:
        step = block_rows(rows.size(0), 2 * rows.size(1) * v.itemsize)
        parts = [torch.mv(rows[block].to(v.dtype), v) for block in blocks(rows.size(0), step)]
        out = torch.cat(parts) if parts else rows.new_zeros(0, dtype=v.dtype)
    elif v.dtype == torch.float64 or v.numel() <= _SPAN:
        out = torch.mv(rows, v)
    else:
        span = max(_SPAN, -(-v.numel() // _SPANS))
        spans = zip(rows.split(span, 1), v.split(span), strict=True)
        out = torch.stack([torch.mv(a, b) for a, b in spans]).sum(0, dtype=torch.float64).to(v.dtype)
    return out.view(x.shape[:-1])


def _outer(g: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """g ⊗ v in the dtype and shape of `like`, without a wider tensor of that size."""
    if v.dtype == like.dtype:
        return g.unsqueeze(-1) * v
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    torch.mul(g.unsqueeze(-1), v, out=out)
    return out


def _weighted_rows(g: Tensor, x: Tensor) -> Tensor:
    """Σᵢ gᵢ·xᵢ in g's dtype."""
    g, rows = g.reshape(-1), x.reshape(-1, x.size(-1))
    if x.dtype == g.dtype:
        return torch.mv(rows.t(), g)
    total = g.new_zeros(rows.size(1))
    for block in blocks(rows.size(0), block_rows(rows.size(0), 2 * rows.size(1) * g.itemsize)):
        total += torch.mv(rows[block].to(g.dtype).t(), g[block])
    return total


def autocast(
    device: str,
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    dim: int,
    keepdim: bool,
    mean: bool,
    out: torch.dtype | None,
) -> tuple[object, ...]:
    x, weight, bias = (cast(dtype, t) for t in (x, weight, bias))  # type: ignore[assignment]
    if device == "cuda" and not mean and out is None and x.dtype != torch.float64:
        out = torch.float32  # sum is a float32 op there; mean is not
    return x, weight, bias, scale, dim, keepdim, mean, out


def direct(x: Tensor, weight: Tensor, *others: object) -> str:
    if x.is_cuda:
        return ""
    columns = weight.size(0) if weight.dim() == 2 else 0
    if x.numel() * columns < 1 << 19 or (columns < 48 and x.dtype in HALF):
        return "the product itself is small"
    if x.numel() <= 2 * x.size(-1):
        return "a product of one or two rows reads the weight once, too"
    return ""


OP = Op(
    "matmul_div_sum_scale",
    "(Tensor x, Tensor weight, Tensor? bias=None, float scale=1., int dim=-1, bool keepdim=False, bool mean=False,"
    " ScalarType? dtype=None) -> Tensor",
    reference,
    road=road,
    forward=forward,
    backward=backward,
    saves=saves,
    autocast=autocast,
    direct=direct,
)


@OP.public
def matmul_div_sum_scale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dim: int = -1,
    keepdim: bool = False,
    mean: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """scale · linear(x, weight, bias).sum(dim, keepdim), collapsed when `dim` is the last dimension.

    Args:
        x: [..., K].
        weight: [N, K], as nn.Linear has it.
        bias: [N] or None.
        scale: a number times the result; every scalar factor and divisor around the sum, multiplied out.
        dim, keepdim: of the sum.
        mean: the mean over `dim` in the sum's place.
        dtype: of the sum and the result, as in torch.sum.

    Returns [...] (or [..., 1] with keepdim) in the dtype of x. Under CUDA autocast the sum is float32.
    Raises what torch.nn.functional.linear raises for shapes and dtypes that do not fit.
    """
    if type(x) is not Tensor or not x.is_cuda or torch.compiler.is_compiling():
        out: Tensor = OP(x, weight, bias, scale, dim, keepdim, mean, dtype)
        return out
    if _wants_gradient(x, weight, bias):
        return _step(x, weight, bias, (scale, dim, keepdim, mean, dtype))
    key, tensors, numbers = (id(weight), x.shape), (x, weight, bias), (scale, dim, keepdim, mean, dtype)
    launch = CALLS.find(key, tensors, numbers)
    if launch is not None and (kept := launch(x)) is not None:
        return kept
    args = (x, weight, bias, *numbers)
    out = OP(*args)
    if OP.inference(args) and road(*args) is KERNEL:
        factor = scale / weight.size(0) if mean else scale
        CALLS.keep(key, tensors, numbers, lambda: kernel.launch(x, weight, bias, factor, dtype, keepdim))
    return out


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: tuple[Any, ...]) -> Tensor:
    """A call whose gradient is wanted, by what a call like it came to."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    key = len(tensors), *numbers
    args = (x, weight, bias, *numbers)
    out: Tensor = STEPS.call(OP, args, key, *tensors, ordinary=lambda: OP(*args))
    return out


_kept = Kept()
CALLS, FROZEN, STEPS = Calls(), Calls(), Kinds()


def frozen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dim: int = -1,
    keepdim: bool = False,
    mean: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The same, with the weight's and the bias' sums kept until one of them changes: y costs one read of x.

    Only calls without a gradient use what is kept; all others are ordinary calls.
    """
    args = (x, weight, bias, scale, dim, keepdim, mean, dtype)
    short = (
        type(x) is Tensor
        and x.is_cuda
        and not torch.compiler.is_compiling()
        and not _wants_gradient(x, weight, bias)
        and not any(t is not None and t.is_inference() for t in (weight, bias))
    )
    if short:
        # What is kept is of these very versions of the weights.
        versions = weight._version, None if bias is None else bias._version
        key, tensors, numbers = (id(weight), x.shape), (x, weight, bias), (scale, dim, keepdim, mean, dtype, *versions)
        launch = FROZEN.find(key, tensors, numbers)
        if launch is not None and (kept := launch(x)) is not None:
            return kept
    if has_torch_function(args):
        out: Tensor = handle_torch_function(frozen, args, *args)
        return out
    way = road(*args) if OP.inference(args) else None
    if way is None or way.composed:
        return matmul_div_sum_scale(*args)
    factor = scale / weight.size(0) if mean else scale
    if way is KERNEL:
        sums = _kept.get((weight, bias), way.name, lambda: kernel.column_sums(weight, bias))
        out = kernel.frozen(x, sums, bias is not None, factor, dtype)
        if short:
            FROZEN.keep(key, tensors, numbers, lambda: kernel.launch(x, weight, bias, factor, dtype, keepdim, sums))
    else:
        v, beta = _kept.get((weight, bias), way.name, lambda: _both_sums(weight, bias))
        out = _from_sums(x, v, beta, factor, dtype)
    return out.unsqueeze(-1) if keepdim else out


def _both_sums(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    v = column_sums(weight)
    return v, None if bias is None else bias.sum(dtype=v.dtype)


matmul_div_sum_scale.frozen = frozen  # where freeze=True looks for it
