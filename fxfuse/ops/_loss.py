"""Scalar losses whose kernels write the gradients in the pass that computes the loss.

An eager call that wants gradients gets them with the loss, for an incoming gradient of 1; backward multiplies them by
the one that came, which the device skips where it is 1. They are handed out once: a second backward over a retained
graph computes them anew from the arguments, and second derivatives differentiate the reference, as for every op.

Traced calls keep loss and gradient apart: what a dispatcher op saves may not be handed out again, and a copy costs as
much as computing the gradient does.

A call on a GPU that is like one made before takes a short road (_kinds.py), with gradients and without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels.scale_unless_one import scale_unless_one

from ._autograd import Differentiable
from ._kinds import Kind, Kinds
from ._op import Op
from ._road import Road

#: (*args, wanted) -> the loss and its gradients, or None where this call has no such pass
WithGradients = Callable[..., "tuple[Tensor, list[Tensor | None]] | None"]


class LossOp(Op):
    """An `Op` of two tensors and numbers, with two more ways.

    with_gradients(*args, wanted)     loss and gradients in one pass; taken by eager calls on the road `kernel`
    short(*args) -> Kind | None       what an ordinary call on a GPU with these arguments comes to, where less will do
                                      than the ways of an `Op`
    """

    def __init__(
        self,
        *args: Any,
        kernel: Road,
        with_gradients: WithGradients,
        short: Callable[..., Kind | None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.kernel = kernel
        self.with_gradients = with_gradients
        self.short = short
        self.kinds = Kinds()

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        one, two, numbers = args[0], args[1], args[2:]
        run = self.kinds.find(numbers, one, two)
        if run is not None:
            return run(one, two)
        out = super().__call__(*args)
        self.kinds.keep(self, args, numbers, one, two, make=lambda: self._short(one, two, numbers))
        return out

    def _short(self, one: Tensor, two: Tensor, numbers: tuple[Any, ...]) -> Kind:
        args = one, two, *numbers
        if self.short is not None and (short := self.short(*args)) is not None:
            return short
        if self.direct is not None and self.direct(*args):
            return Kind(lambda one, two: self.brief(one, two, *numbers), direct=True)
        road = self._road(*args)
        if road is not self.kernel:
            return Kind(lambda one, two: self.reference(one, two, *numbers))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(one, two):
            return Kind(lambda one, two: GradientsInForward.call(self, road, one, two, *numbers))
        return Kind(lambda one, two: self.forward(road, one, two, *numbers)[0])

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
