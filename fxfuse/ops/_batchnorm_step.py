"""A training step of `linear_scale_batchnorm1d` like one before: what the ordinary way would find out again is kept.

The ordinary way (`_batchnorm.kernel_training` and `kernel_gradients`) asks of each call which kernels take it and
describes every vector anew. For a kept kind (see _kinds.py) shapes, strides and dtypes are known to be the same, so
that a step is a few allocations, its kernels and the two products of the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxfuse.kernels import gemm
from fxfuse.kernels import linear_scale_batchnorm1d as kernels
from fxfuse.kernels.abi import allocate
from fxfuse.kernels.batchnorm_step import TrainingStep, Vectors

from ._batchnorm import scaled_dtype
from ._kinds import Kind, whole
from ._op import Differentiable, Op
from ._product import LinearBackward


class Step:
    """The op for steps like this one, as `Differentiable` takes an op; its last argument is num_batches_tracked, which
    counts one more. x and weight are on 16 bytes if those given here are. What does not fit all the same (a gradient's
    strides, a device that has no room) goes the ordinary way.
    """

    def __init__(self, op: Op, args: tuple[Any, ...]) -> None:
        x, weight, bias, scale, _, _, gamma, beta, mean, var, *_ = args
        self.op = op
        self.tensors, self.kept, self.update = op.tensors, op.kept, op.update
        out_dtype = scaled_dtype(x, scale, None)
        self.products = LinearBackward(x, weight)
        self.calls = TrainingStep(x, weight, Vectors(bias, scale, gamma, beta, mean, var), out_dtype)

    def forward(
        self, road: Any, *args: Any, wanted: Sequence[bool], update: bool
    ) -> tuple[tuple[Tensor, None, None], Sequence[Tensor]]:
        x, weight, bias, scale, _, alpha, gamma, beta, mean, var, _, momentum, eps, batches = args
        calls = self.calls
        if calls.one_kernel:
            vectors = Vectors(bias, scale, gamma, beta, mean, var)
            done = calls.train(x, weight, vectors, alpha, eps, momentum, batches)
            if done is not None:
                return (done[0], None, None), done[1:]
        if batches is not None:
            batches.add_(1)
        if calls.one_kernel or (calls.product and not gemm.is_hopper(x.device)):
            ordinary: Any = self.op.forward
            return ordinary(road, *args[:-1], wanted=wanted, update=update)
        c = kernels.Columns(bias, scale, None, alpha, gamma, beta, eps)
        acc, partials = kernels.train_product(x, weight) if calls.product else (F.linear(x, weight), None)
        out = allocate(calls.shape, calls.strides, calls.out_dtype, calls.device)
        saved = kernels.train_apply(acc, partials, c, mean, var, momentum, out)
        return (out, None, None), (acc, saved)

    def backward(
        self, road: Any, grad: Tensor, saved: list[Tensor], *args: Any, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        if grad.data_ptr() % 16 or not grad.is_contiguous():
            return self.op.backward(road, grad, saved, *args[:-1], wanted=wanted)
        x, weight, bias, scale, _, alpha, gamma, beta, _, _, _, _, eps, _ = args
        statistics, acc = saved.pop(), saved.pop()
        vectors = Vectors(bias, scale, gamma, beta, None, None)
        asked = wanted[2], wanted[3], wanted[5], wanted[6]
        d_acc, (d_bias, d_scale, d_gamma, d_beta) = self.calls.backward(
            grad, acc, statistics, vectors, alpha, eps, asked
        )
        del acc  # not needed beside its gradient and those that come of it
        dx, dw = self.products(d_acc, x, weight, None, wanted)[:2]
        return dx, dw, d_bias, d_scale, None, d_gamma, d_beta, None, None

    def again(self, saved: Sequence[Tensor], *args: Any) -> Any:
        return self.op.again(saved, *args[:-1])


def kind(op: Op, args: tuple[Any, ...], batches: Tensor | None) -> Kind:
    """What steps like this one come to, as a function of args and batches: a `Step` where that is all the kernels need
    to be told, else the whole call."""
    ordinary = whole(op, args)
    if not ordinary.direct and _plain(args, batches) and (road := op._road(*args)).name == "kernel":
        step = Step(op, args)
        return Kind(lambda *args: Differentiable.call(step, road, *args))  # type: ignore[arg-type]

    def counted(*args: Any) -> Any:
        if args[-1] is not None:
            args[-1].add_(1)
        return ordinary.run(*args[:-1])

    return Kind(counted, direct=ordinary.direct)


def _plain(args: tuple[Any, ...], batches: Tensor | None) -> bool:
    """Training, every vector a contiguous [N], no divisor, and a counter that a kernel can count in."""
    x, weight, bias, scale, divisor, _, gamma, beta, mean, var, training, *_ = args
    features = weight.shape[:1]
    return (
        training
        and divisor is None
        and all(
            t is None or (t.shape == features and t.is_contiguous()) for t in (bias, scale, gamma, beta, mean, var)
        )
        and (batches is None or (batches.dtype is torch.int64 and batches.get_device() == x.get_device()))
    )
