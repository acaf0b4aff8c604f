"""Scalar losses whose kernels write the gradients in the pass that computes the loss.

An eager call that wants gradients gets them with the loss, for an incoming gradient of 1; backward multiplies them by
the one that came, which the device skips where it is 1. They are handed out once: a second backward over a retained
graph computes them anew from the arguments, and second derivatives differentiate the reference, as for every op.

Traced calls keep loss and gradient apart: what a dispatcher op saves may not be handed out again, and a copy costs as
much as computing the gradient does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels.scale_unless_one import scale_unless_one

from ._autograd import Differentiable
from ._op import Op
from ._road import Road

#: (*args, wanted) -> the loss and its gradients, or None where this call has no such pass
WithGradients = Callable[..., "tuple[Tensor, list[Tensor | None]] | None"]


class LossOp(Op):
    """An `Op` with one more way: `with_gradients(*args, wanted)`, taken by eager calls on the road `kernel`."""

    def __init__(self, *args: Any, kernel: Road, with_gradients: WithGradients, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel = kernel
        self.with_gradients = with_gradients

    def _eager(self, args: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args) and self._road(*args) is self.kernel:
            return GradientsInForward.call(self, self.kernel, *args)
        return super()._eager(args)


class GradientsInForward(Differentiable):
    """`Differentiable` that may hold the gradients already when backward is called."""

    @staticmethod
    def forward(ctx: Any, op: LossOp, road: Road, *args: Any) -> Any:  # type: ignore[override]
        needs = ctx.needs_input_grad
        wanted = tuple([needs[i + 2] for i in op.tensors])
        found = op.with_gradients(*args, wanted=wanted)
        if found is None:
            ctx.held = None
            return Differentiable.forward(ctx, op, road, *args)
        loss, ctx.held = found
        ctx.op, ctx.road, ctx.wanted = op, road, wanted
        ctx.others = [None if i in op.tensors else arg for i, arg in enumerate(args)]
        ctx.save_for_backward(*[args[i] for i in op.kept])
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> Any:
        if grad is None or ctx.held is None or torch.is_grad_enabled():
            return Differentiable.backward(ctx, grad, *unused)
        held: Sequence[Tensor | None] = ctx.held
        ctx.held = None
        some = next(t for t in held if t is not None)
        scale_unless_one(grad.to(some.dtype).resolve_neg(), held)
        result: list[Tensor | None] = [None] * (len(ctx.others) + 2)
        for position, value in zip(ctx.op.tensors, held, strict=True):
            result[position + 2] = value
        return tuple(result)
