"""Kullback-Leibler divergence, one pass forward and one backward.

Meaning, elementwise, with x the log-probabilities (`input`, or log(`input`) with `log_input`) and t the `target`:

    log_target=False    t·log t − t·x      (0·log 0 = 0)
    log_target=True     exp(t)·(t − x)

then "none", "sum", "mean" (over all elements) or "batchmean" (the sum over the first dimension's size).

Gradients for an upstream gradient g, elementwise:

    log_target=False    dx = −g·t            dt = g·(log t + t/t − x)      (t/t makes t = 0 NaN, as it is for ATen)
    log_target=True     dx = −g·exp(t)       dt = g·exp(t)·(t − x + 1)
    log_input           dp = dx / p

Nothing is saved but the two arguments. On the CPU both passes run in blocks that stay in cache; on CUDA a kernel reads
each argument once, and an eager call for a scalar loss writes the gradients in that same pass (see _loss.py).
Source: torch.nn.functional.kl_div, ATen/native/Loss.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import _reduction

from fxfuse.kernels import kl_div as kernel
from fxfuse.kernels.scale_unless_one import why_not

from ._autocast import cast
from ._blocks import Workspace, block_rows, blocks, widened
from ._kinds import Kind
from ._loss import LossOp
from ._road import Road, floating, together, wide


def reference(input: Tensor, target: Tensor, reduction: str, log_target: bool, log_input: bool) -> Tensor:
    if log_input:
        input = input.log()
    code = _reduction.get_enum("sum" if reduction == "batchmean" else reduction)
    loss = torch.kl_div(input, target, code, log_target=log_target)
    if reduction == "batchmean" and input.dim() != 0:
        loss = loss / input.size(0)
    return loss


def brief(input: Tensor, target: Tensor, reduction: str, log_target: bool, log_input: bool) -> Tensor:
    """The reference; elementwise on a GPU in a launch and a node of autograd less, inf and NaN where they were."""
    if reduction == "none" and input.is_cuda and not torch.is_autocast_enabled("cuda"):
        return aten_elements(input, target, log_target, log_input)(input, target)
    return reference(input, target, reduction, log_target, log_input)


def aten_elements(input: Tensor, target: Tensor, log_target: bool, log_input: bool) -> Callable[..., Tensor]:
    """reduction="none" of two tensors like these, by ATen."""
    if (
        log_target or not target.is_cuda or input.shape != target.shape
        or input.dtype != target.dtype or input.dtype not in ROUNDED_ONCE
    ):  # fmt: skip
        if log_input:
            return lambda p, t: torch.kl_div(p.log(), t, 0, log_target=log_target)
        return lambda x, t: torch.kl_div(x, t, 0, log_target=log_target)
    if log_input:
        return lambda p, t: torch.addcmul(torch.xlogy(t, t), t, p.log(), value=-1)
    return lambda x, t: torch.addcmul(torch.xlogy(t, t), t, x, value=-1)


#: dtypes whose products may stay in float32 until they are subtracted; float16's overflow before that in eager
ROUNDED_ONCE = (torch.float32, torch.bfloat16)


def road(input: Tensor, target: Tensor, reduction: str, log_target: bool, log_input: bool) -> Road:
    if reduction not in REDUCTIONS:
        return Road("composed", f"unknown reduction {reduction!r}")
    if not floating(input, target) or not together(input, target):
        return Road("composed", "not two floating-point tensors of one device")
    if input.shape != target.shape:
        return Road("composed", "input and target broadcast")
    if not (input.is_contiguous() and target.is_contiguous()):
        return Road("composed", "not contiguous")
    if input.device.type == "cpu":
        return BLOCKS
    missing = why_not(input, target)
    return KERNEL if missing is None else Road("composed", missing)


REDUCTIONS = ("none", "sum", "mean", "batchmean")
KERNEL = Road("kernel", "each argument read once; an eager scalar loss writes its gradients in the same pass")
BLOCKS = Road("closed", "one pass in blocks that stay in cache")


def forward(
    road: Road,
    input: Tensor,
    target: Tensor,
    reduction: str,
    log_target: bool,
    log_input: bool,
    *,
    wanted: Sequence[bool] = (),
) -> tuple[Tensor, Sequence[Tensor]]:
    if road is KERNEL:
        if input.numel() == 0:
            return reference(input, target, reduction, log_target, log_input), ()
        factor = 1 / count(input, reduction)
        return kernel.forward(input, target, reduction != "none", factor, log_target, log_input)[0], ()
    dtype = wide(input.dtype, target.dtype)
    x, t = input.view(-1), target.view(-1)
    out_dtype = torch.promote_types(input.dtype, target.dtype)
    out = torch.empty_like(input, dtype=out_dtype).view(-1) if reduction == "none" else None
    step = block_rows(x.numel(), BUFFERS * dtype.itemsize)
    space = Workspace(3, step, dtype=dtype)
    partials = []
    for block in blocks(x.numel(), step):
        one, two, loss = space(block.stop - block.start)
        pointwise(widened(x[block], one), widened(t[block], two), log_target, log_input, one, loss)
        if out is not None:
            out[block] = loss
        else:
            partials.append(loss.sum())
    if out is not None:
        return out.view(input.shape), ()
    return reduced(partials, count(input, reduction), 1.0, out_dtype), ()


def backward(
    road: Road,
    grad: Tensor,
    saved: Sequence[Tensor],
    input: Tensor,
    target: Tensor,
    reduction: str,
    log_target: bool,
    log_input: bool,
    *,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    if road is KERNEL and input.numel():
        return kernel.backward(grad, input, target, 1 / count(input, reduction), log_target, log_input, wanted)
    dtype = wide(input.dtype, target.dtype)
    x, t = input.view(-1), target.view(-1)
    if reduction == "none":
        each = grad.contiguous().view(-1)
    else:
        whole = grad.to(torch.float64).div(count(input, reduction)).to(dtype)
    dx = torch.empty_like(x) if wanted[0] else None
    dt = torch.empty_like(t) if wanted[1] else None
    if dx is not None and dt is None and reduction != "none" and dx.dtype == t.dtype and not (log_target or log_input):
        return torch.mul(t, -whole.to(t.dtype), out=dx).view(input.shape), None  # one pass as it is
    step = block_rows(x.numel(), BUFFERS * dtype.itemsize)
    space = Workspace(4, step, dtype=dtype)
    for block in blocks(x.numel(), step):
        one, two, weight, value = space(block.stop - block.start)
        x_block, t_block = widened(x[block], one), widened(t[block], two)
        g = each[block].to(dtype) if reduction == "none" else whole
        if dx is not None and dt is None and dx.dtype == dtype:
            weight = dx[block]
        w = torch.exp(t_block, out=weight) if log_target else t_block
        if dx is not None:
            target_of = dx[block] if dx.dtype == dtype else value
            torch.mul(w, -g, out=target_of)
            if log_input:
                target_of.div_(x_block)
            if target_of is value:
                dx[block] = value
        if dt is not None:
            if log_input:
                x_block = torch.log(x_block, out=one)
            if log_target:
                torch.sub(t_block, x_block, out=value).add_(1).mul_(w).mul_(g)
            else:
                torch.div(t_block, t_block, out=value).sub_(x_block)
                value.add_(torch.log(t_block, out=weight)).mul_(g)
            dt[block] = value
    return (
        None if dx is None else dx.view(input.shape),
        None if dt is None else dt.view(input.shape),
    )


HOST_BOUND = 1 << 25  # bytes of a tensor: up to here ATen's operations on an H200 take no longer than their launches
BUFFERS = 5  # what a block touches for each element: two arguments, two or three scratch tensors or results


def pointwise(x: Tensor, t: Tensor, log_target: bool, log_input: bool, spare: Tensor, out: Tensor) -> Tensor:
    """The loss of a block, written into `out`; `spare` may be overwritten."""
    if log_input:
        x = torch.log(x, out=spare)
    if log_target:
        torch.sub(t, x, out=out)
        return out.mul_(torch.exp(t, out=spare))
    if t.numel() and t.amin() > 0:  # no zero, and no NaN: t·log t is what it says, and quicker than xlogy
        torch.log(t, out=out).mul_(t)
    else:
        torch.xlogy(t, t, out=out)
    return out.addcmul_(t, x, value=-1)


def with_gradients(
    input: Tensor, target: Tensor, reduction: str, log_target: bool, log_input: bool, *, wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]] | None:
    if reduction == "none" or input.numel() == 0:
        return None
    return kernel.forward(input, target, True, 1 / count(input, reduction), log_target, log_input, wanted)


def count(input: Tensor, reduction: str) -> int:
    """What the sum is divided by."""
    if reduction == "mean":
        return input.numel()
    return input.size(0) if reduction == "batchmean" and input.dim() else 1


def reduced(partials: list[Tensor], divisor: int, scale: float, dtype: torch.dtype) -> Tensor:
    """The blocks' sums, added in float64 and rounded once."""
    total = torch.stack(partials).sum(dtype=torch.float64) if partials else torch.zeros((), dtype=torch.float64)
    return total.mul_(scale).div_(divisor).to(dtype)


def autocast(
    device: str, dtype: torch.dtype, input: Tensor, target: Tensor, reduction: str, log_target: bool, log_input: bool
) -> tuple[object, ...]:
    return cast(torch.float32, input), cast(torch.float32, target), reduction, log_target, log_input


def direct(input: Tensor, target: Tensor, reduction: str, log_target: bool, *others: object) -> str:
    if input.is_cuda:
        if reduction != "none" or input.nbytes > HOST_BOUND or not torch.is_grad_enabled():
            return ""
        if not torch._C._any_requires_grad(input, target) or torch.cuda.is_current_stream_capturing():
            return ""
        return "small, with gradients of every element: the host is the limit, and ATen's operations ask less of it"
    # Up to here eager's temporaries stay in the last-level cache; where it has few or keeps exp(t), a little longer.
    enough = 1 << (23 if log_target or reduction == "none" else 21)
    return "" if input.numel() >= enough else "small: all of it stays in cache anyway"


def short(input: Tensor, target: Tensor, reduction: str, log_target: bool, log_input: bool) -> Kind | None:
    if direct(input, target, reduction, log_target):
        return Kind(aten_elements(input, target, log_target, log_input), direct=True)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, target):
        return None
    if input.numel() == 0 or road(input, target, reduction, log_target, log_input) is not KERNEL:
        return None
    factor = 1 / count(input, reduction)
    return Kind(kernel.kept_forward(input, reduction != "none", factor, log_target, log_input))


OP = LossOp(
    "kl_div",
    "(Tensor input, Tensor target, str reduction='mean', bool log_target=False, bool log_input=False) -> Tensor",
    reference,
    road=road,
    forward=forward,
    backward=backward,
    kernel=KERNEL,
    with_gradients=with_gradients,
    autocast=autocast,
    direct=direct,
    brief=brief,
    short=short,
)


@OP.public
def kl_div(
    input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False, log_input: bool = False
) -> Tensor:
    """`torch.nn.functional.kl_div`, in one pass.

    Args:
        input: log-probabilities of any shape; probabilities with `log_input`.
        target: probabilities, or log-probabilities with `log_target`; broadcasts against `input`.
        reduction: "none", "sum", "mean" or "batchmean".

    Returns the loss in the promoted dtype: 0-d, or of the broadcast shape for "none". float32 under autocast.
    Raises ValueError for another reduction, and what ATen raises for shapes that do not broadcast.
    """
    loss: Tensor = OP(input, target, reduction, log_target, log_input)
    return loss
