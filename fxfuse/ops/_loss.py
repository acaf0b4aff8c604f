"""Scalar losses whose kernels write the gradients in the pass that computes the loss.

An eager call that wants gradients gets them with the loss, for an incoming gradient of 1; backward multiplies them by
the one that came, which the device skips where it is 1. They are handed out once: a second backward over a retained
graph computes them anew from the arguments, and second derivatives differentiate the reference, as for every op.

Traced calls keep loss and gradient apart: what a dispatcher op saves may not be handed out again, and a copy costs as
much as computing the gradient does.

A call on a GPU that is like one made before takes a short road: what that came to is kept as a function of the two
tensors, and Dynamo's guards say in one question whether these two are of the same kind (type, dtype, device, shape,
strides, gradient, and the dispatch keys by which autocast, functorch, inference and dispatch modes act). Unlike what
_short.py keeps, such a function rests on no address, and there are some with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxfuse.kernels.scale_unless_one import scale_unless_one

from ._autograd import Differentiable
from ._op import Direct, Op
from ._road import Road
from ._short import Guards

#: (*args, wanted) -> the loss and its gradients, or None where this call has no such pass
WithGradients = Callable[..., "tuple[Tensor, list[Tensor | None]] | None"]


class Short:
    """What a call comes to, as a function of its two tensors; `direct` where that is ATen's own operations."""

    __slots__ = ("direct", "grad_mode", "run", "same")

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], *, direct: bool = False) -> None:
        self.run = run
        self.direct = direct

    def rests_on(self, one: Tensor, two: Tensor) -> None:
        self.same = Guards(one, two, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.grad_mode = _grad_enabled() if one.requires_grad or two.requires_grad else None


class LossOp(Op):
    """An `Op` of two tensors and numbers, with two more ways.

    with_gradients(*args, wanted)     loss and gradients in one pass; taken by eager calls on the road `kernel`
    short(*args) -> Short | None      what an ordinary call on a GPU with these arguments comes to, where less will do
                                      than the ways of an `Op`
    """

    def __init__(
        self,
        *args: Any,
        kernel: Road,
        with_gradients: WithGradients,
        short: Callable[..., Short | None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.kernel = kernel
        self.with_gradients = with_gradients
        self.short = short
        self._kept: dict[tuple[Any, ...], list[Short]] = {}  # by the numbers, the last to come first

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        one, two, numbers = args[0], args[1], args[2:]
        for kept in self._kept.get(numbers, ()):
            if (
                kept.same(one, two)
                and (kept.grad_mode is None or kept.grad_mode is _grad_enabled())
                and not _has_torch_function(one)  # a mode: the type is known
                and forward_ad._current_level < 0
            ):
                if not kept.direct:
                    return kept.run(one, two)
                if not _capturing():  # replayed without the host, whose time is what counts
                    Direct.calls += 1
                    return kept.run(one, two)
        out = super().__call__(*args)
        if Guards is not None and isinstance(one, Tensor) and one.is_cuda and self.ordinary(args) and not _capturing():
            short = self._short(one, two, numbers)
            short.rests_on(one, two)
            self._kept[numbers] = [short, *self._kept.get(numbers, ())][:MOST_KEPT]
        return out

    def _short(self, one: Tensor, two: Tensor, numbers: tuple[Any, ...]) -> Short:
        args = one, two, *numbers
        if self.short is not None and (short := self.short(*args)) is not None:
            return short
        if self.direct is not None and self.direct(*args):
            return Short(lambda one, two: self.brief(one, two, *numbers), direct=True)
        road = self._road(*args)
        if road is not self.kernel:
            return Short(lambda one, two: self.reference(one, two, *numbers))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(one, two):
            return Short(lambda one, two: GradientsInForward.call(self, road, one, two, *numbers))
        return Short(lambda one, two: self.forward(road, one, two, *numbers)[0])

    def forget(self) -> None:
        """Forget what is kept of earlier calls."""
        self._kept.clear()

    def _eager(self, args: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args) and self._road(*args) is self.kernel:
            return GradientsInForward.call(self, self.kernel, *args)
        return super()._eager(args)


MOST_KEPT = 4  # for the same numbers; a check that fails costs 0.1 us
_grad_enabled = torch.is_grad_enabled
_has_torch_function = torch._C._has_torch_function_unary
_capturing = torch.cuda.is_current_stream_capturing


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
