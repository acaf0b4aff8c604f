"""Distillation loss: scale · KL(student / Ts against teacher / Tt), softmaxes included.

Meaning, with l = log_softmax(student / Ts, dim) and

    log_target=False    p = softmax(teacher / Tt, dim)          kl = p·log p − p·l
    log_target=True     q = log_softmax(teacher / Tt, dim)      kl = exp(q)·(q − l)

the result is scale · reduce(kl), the reductions as in kl_div.

Gradients, from those of kl_div (dl, and dp or dq) through the softmaxes, a row at a time:

    d student = (dl − softmax·Σ dl) / Ts          (softmax = exp(l))
    d teacher = p·(dp − Σ dp·p) / Tt        or        (dq − exp(q)·Σ dq) / Tt

For the reductions, with one g for every element, that is

    d student = g·(softmax(student / Ts) − p) / Ts
    d teacher = g·p·(a − Σ a·p) / Tt        with a = log p − l (q − l)

Nothing is saved but the two arguments: backward forms the rows' softmaxes again. On the CPU both passes run in blocks
of rows that stay in cache; no tensor of the input's size is made but the gradients (and the result of "none"). On CUDA
a kernel reads the logits once for a reduced loss, and an eager call writes the gradients in that pass (see _loss.py);
the elements of "none", and their gradients, take two reads, the second from cache as far as that holds a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxfuse.kernels import distillation_elements as elements
from fxfuse.kernels import distillation_kl as kernel
from fxfuse.kernels.scale_unless_one import why_not

from . import kl_div as kl
from ._autocast import cast
from ._autograd import vjp
from ._blocks import Workspace, block_rows, blocks, widened
from ._loss import LossOp
from ._road import Road, floating, together, wide


def reference(
    student: Tensor,
    teacher: Tensor,
    dim: int,
    student_temperature: float,
    teacher_temperature: float,
    scale: float,
    reduction: str,
    log_target: bool,
) -> Tensor:
    student = _divided(student, student_temperature).log_softmax(dim)
    teacher = _divided(teacher, teacher_temperature)
    teacher = teacher.log_softmax(dim) if log_target else teacher.softmax(dim)
    loss = kl.reference(student, teacher, reduction, log_target, False)
    return loss if scale == 1 else loss * scale


def _divided(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def road(
    student: Tensor,
    teacher: Tensor,
    dim: int,
    student_temperature: float,
    teacher_temperature: float,
    scale: float,
    reduction: str,
    log_target: bool,
) -> Road:
    if reduction not in ("none", "sum", "mean", "batchmean"):
        return Road("composed", f"unknown reduction {reduction!r}")
    if not floating(student, teacher) or not together(student, teacher):
        return Road("composed", "not two floating-point tensors of one device")
    if student.shape != teacher.shape:
        return Road("composed", "student and teacher broadcast")
    if student.dim() == 0 or dim not in (-1, student.dim() - 1):
        return Road("composed", "the softmax is not over the last dimension")
    if not (student.is_contiguous() and teacher.is_contiguous()):
        return Road("composed", "not contiguous")
    if student.numel() == 0:
        return Road("composed", "empty")
    if student.device.type == "cpu":
        return BLOCKS
    missing = why_not(student, teacher)
    return KERNEL if missing is None else Road("composed", missing)


KERNEL = Road("kernel", "both softmaxes and the loss in one pass; an eager call writes its gradients in it, too")
BLOCKS = Road("closed", "one pass in blocks of rows that stay in cache")


def forward(
    road: Road,
    student: Tensor,
    teacher: Tensor,
    dim: int,
    student_temperature: float,
    teacher_temperature: float,
    scale: float,
    reduction: str,
    log_target: bool,
    *,
    wanted: Sequence[bool] = (),
) -> tuple[Tensor, Sequence[Tensor]]:
    if road is KERNEL:
        temperatures = student_temperature, teacher_temperature
        if min(temperatures) <= 0:
            return reference(student, teacher, dim, *temperatures, scale, reduction, log_target), ()
        if reduction == "none":
            return elements.forward(student, teacher, temperatures, scale, log_target), ()
        factor = 1 / kl.count(student, reduction)
        loss = kernel.distillation_kl(student, teacher, temperatures, factor, scale, log_target)[0]
        assert loss is not None
        return loss, ()
    dtype = wide(student.dtype, teacher.dtype)
    s, t = _rows(student), _rows(teacher)
    out_dtype = torch.promote_types(student.dtype, teacher.dtype)
    out = torch.empty(s.shape, dtype=out_dtype) if reduction == "none" else None
    step = block_rows(s.size(0), kl.BUFFERS * s.size(1) * dtype.itemsize)
    space = Workspace(3, step, s.size(1), dtype=dtype)
    softmax = torch.log_softmax if log_target else torch.softmax
    partials = []
    for block in blocks(s.size(0), step):
        one, two, loss = space(block.stop - block.start)
        log_student = torch.log_softmax(_scaled(s[block], student_temperature, one), -1, out=one)
        target = softmax(_scaled(t[block], teacher_temperature, two), -1, out=two)
        kl.pointwise(log_student, target, log_target, False, one, loss)
        if out is not None:
            out[block] = loss.mul_(scale)
        else:
            partials.append(loss.sum())
    if out is not None:
        return out.view(student.shape), ()
    return kl.reduced(partials, kl.count(student, reduction), scale, out_dtype), ()


def backward(
    road: Road,
    grad: Tensor,
    saved: Sequence[Tensor],
    student: Tensor,
    teacher: Tensor,
    dim: int,
    student_temperature: float,
    teacher_temperature: float,
    scale: float,
    reduction: str,
    log_target: bool,
    *,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    if road is KERNEL:
        temperatures = student_temperature, teacher_temperature
        if min(temperatures) <= 0:  # as in forward: the meaning itself, which knows any temperature
            args = (student, teacher, dim, *temperatures, scale, reduction, log_target)
            return vjp(reference, OP.tensors, args, grad, wanted, create_graph=False)
        if reduction == "none":
            return elements.backward(grad, student, teacher, temperatures, scale, log_target, wanted)
        factor = 1 / kl.count(student, reduction)
        return kernel.distillation_kl(
            student, teacher, temperatures, factor, scale, log_target, wanted, grad, loss=False
        )[1]
    dtype = wide(student.dtype, teacher.dtype)
    s, t = _rows(student), _rows(teacher)
    ds = torch.empty_like(s) if wanted[0] else None
    dt = torch.empty_like(t) if wanted[1] else None
    step = block_rows(s.size(0), kl.BUFFERS * s.size(1) * dtype.itemsize)
    space = Workspace(3, step, s.size(1), dtype=dtype)
    if reduction == "none":
        each = grad.contiguous().view(s.shape)
    else:
        whole = grad.to(torch.float64).mul(scale).div_(kl.count(student, reduction))
    for block in blocks(s.size(0), step):
        one, two, three = space(block.stop - block.start)
        z_student = _scaled(s[block], student_temperature, one)
        z_teacher = _scaled(t[block], teacher_temperature, two)
        if reduction == "none":
            g = each[block].to(dtype) * scale
            log_student = torch.log_softmax(z_student, -1, out=one)
            softmax = torch.log_softmax if log_target else torch.softmax
            target = softmax(z_teacher, -1, out=two)
            if ds is not None:
                dl = (target.exp() if log_target else target) * -g
                dz = torch._log_softmax_backward_data(dl, log_student, -1, dtype)
                ds[block] = dz.div_(student_temperature)
            if dt is not None and log_target:
                dq = torch.sub(target, log_student).add_(1).mul_(target.exp()).mul_(g)
                dt[block] = torch._log_softmax_backward_data(dq, target, -1, dtype).div_(teacher_temperature)
            elif dt is not None:
                dp = torch.log(target).add_(target / target).sub_(log_student).mul_(g)
                dt[block] = torch._softmax_backward_data(dp, target, -1, dtype).div_(teacher_temperature)
            continue
        # One g for all elements: d student = g·(softmax − p), as Σ p = 1; and constants fall out of d teacher.
        if dt is not None:
            log_student = torch.log_softmax(z_student, -1, out=three)
            ratio = torch.log_softmax(z_teacher, -1) if log_target else torch.softmax(z_teacher, -1).log_()
            ratio.sub_(log_student)
            p = torch.softmax(z_teacher, -1, out=two)
            dz = torch._softmax_backward_data(ratio, p, -1, dtype)
            dt[block] = dz.mul_((whole / teacher_temperature).to(dtype))
            own = torch.exp(log_student, out=three)
        else:
            p = torch.softmax(z_teacher, -1, out=two)
            own = torch.softmax(z_student, -1, out=one) if ds is not None else one
        if ds is not None:
            ds[block] = own.sub_(p).mul_((whole / student_temperature).to(dtype))
    return (
        None if ds is None else ds.view(student.shape),
        None if dt is None else dt.view(teacher.shape),
    )


def with_gradients(
    student: Tensor,
    teacher: Tensor,
    dim: int,
    student_temperature: float,
    teacher_temperature: float,
    scale: float,
    reduction: str,
    log_target: bool,
    *,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]] | None:
    temperatures = student_temperature, teacher_temperature
    if min(temperatures) <= 0 or reduction == "none":
        return None
    factor = 1 / kl.count(student, reduction)
    loss, grads = kernel.distillation_kl(student, teacher, temperatures, factor, scale, log_target, wanted)
    assert loss is not None
    return loss, grads


def _rows(logits: Tensor) -> Tensor:
    return logits.view(-1, logits.size(-1))


def _scaled(logits: Tensor, temperature: float, buffer: Tensor) -> Tensor:
    """logits / temperature in the buffer's dtype: the logits themselves, or written into the buffer."""
    wider = widened(logits, buffer)
    return wider if temperature == 1 else torch.div(wider, temperature, out=buffer)


def autocast(device: str, dtype: torch.dtype, student: Tensor, teacher: Tensor, *others: object) -> tuple[object, ...]:
    # CUDA: the softmaxes run in float32. CPU: they keep the dtype, and kl_div casts to float32 behind them.
    return cast(torch.float32, student), cast(torch.float32, teacher), *others


def direct(student: Tensor, *others: object) -> str:
    return "" if student.is_cuda or student.numel() > 1 << 21 else "small: all of it stays in cache anyway"


OP = LossOp(
    "distillation_kl",
    "(Tensor student, Tensor teacher, int dim=-1, float student_temperature=1., float teacher_temperature=1.,"
    " float scale=1., str reduction='mean', bool log_target=False) -> Tensor",
    reference,
    road=road,
    forward=forward,
    backward=backward,
    kernel=KERNEL,
    with_gradients=with_gradients,
    autocast=autocast,
    direct=direct,
)


@OP.public
def distillation_kl(
    student: Tensor,
    teacher: Tensor,
    dim: int = -1,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    scale: float = 1.0,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """scale · kl_div(log_softmax(student / Ts, dim), softmax(teacher / Tt, dim), reduction), in one pass.

    Args:
        student, teacher: logits of any shape and floating dtype.
        dim: the classes' dimension; the last one takes the fast road.
        student_temperature, teacher_temperature: Ts and Tt.
        scale: a number times the result, Ts·Tt as a rule.
        reduction: "none", "sum", "mean" or "batchmean".
        log_target: the target is log_softmax(teacher / Tt), as kl_div(log_target=True) takes it. Same value,
            and finite gradients for the teacher where its probabilities underflow.

    Returns the loss in the promoted dtype: 0-d, or of the logits' shape for "none". float32 under autocast.
    Raises ValueError for another reduction, and what ATen raises for a bad dim or shapes that do not broadcast.
    """
    loss: Tensor = OP(student, teacher, dim, student_temperature, teacher_temperature, scale, reduction, log_target)
    return loss
