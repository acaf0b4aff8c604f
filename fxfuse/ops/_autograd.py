"""Gradients of an op: the raw backward, and the reference differentiated when a graph of the gradient is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._autocast import autocast_off

if TYPE_CHECKING:
    from ._op import Op
    from ._road import Road

_any_autocast = torch._C._is_any_autocast_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_jit_trace = torch._C._get_tracing_state


def transformed() -> bool:
    """A functorch transform, forward-mode AD or a jit trace is at work: they understand the reference alone."""
    return _transforms() is not None or forward_ad._current_level >= 0 or _jit_trace() is not None


class Differentiable(torch.autograd.Function):
    """`Differentiable.call(op, road, *args)`: the op with its own backward.

    With a road the raw Python forward and backward are called; with None the dispatcher's `<name>_forward` and
    `<name>_backward`, so that a tracer sees them. Every Tensor argument but buffers is saved beside what forward saves:
    second derivatives differentiate the reference at those arguments.
    """

    @classmethod
    def call(cls, op: Op, road: Road | None, *args: Any) -> Any:
        """`apply` without its care for functorch's transforms: the caller has seen that none is at work."""
        return super(torch.autograd.Function, cls).apply(op, road, *args)  # type: ignore[misc]

    @staticmethod
    def forward(ctx: Any, op: Op, road: Road | None, *args: Any) -> Any:
        needs = ctx.needs_input_grad
        wanted = tuple([needs[i + 2] for i in op.tensors])
        if road is None:
            out, saved = op.registered.forward_traced(args, wanted)
        else:
            out, saved = op.forward(road, *args, wanted=wanted, **op.update)
        ctx.op, ctx.road, ctx.wanted = op, road, wanted
        others = list(args)
        for i in op.tensors:
            others[i] = None
        ctx.others = others
        ctx.save_for_backward(*[args[i] for i in op.kept], *saved)
        ctx.set_materialize_grads(False)
        if isinstance(out, tuple):
            ctx.mark_non_differentiable(*[t for t in out[1:] if t is not None])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> Any:
        op: Op = ctx.op
        result: list[Tensor | None] = [None] * (len(ctx.others) + 2)
        if grad is None:
            return tuple(result)
        kept = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # not where the graph is retained
        args = ctx.others.copy()
        for i, position in enumerate(op.kept):
            args[position] = kept[i]
        saved = kept[len(op.kept) :]
        del kept  # the only references that are left are saved's: a backward may let go of what it has used
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            grads = vjp(lambda *a: op.again(saved, *a), op.tensors, args, grad, ctx.wanted, create_graph=True)
        elif ctx.road is None:
            grads = op.registered.backward_traced(grad, saved, args, ctx.wanted)
        elif _any_autocast():
            with autocast_off():
                grads = op.backward(ctx.road, grad, saved, *args, wanted=ctx.wanted)
        else:
            grads = op.backward(ctx.road, grad, saved, *args, wanted=ctx.wanted)
        for position, value in zip(op.tensors, grads, strict=True):
            result[position + 2] = value
        return tuple(result)


def vjp(
    function: Callable[..., Any],
    tensors: Sequence[int],
    args: Sequence[Any],
    grad: Tensor,
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """The gradients of `function(*args)`'s first output for the wanted Tensor arguments (None for the others)."""
    inputs = list(args)
    chosen = [position for position, want in zip(tensors, wanted, strict=True) if want]
    with _autograd_on(), autocast_off(), torch.enable_grad():
        for position in chosen:
            # A fresh alias cuts the path through another argument's history, should one be computed from the other.
            tensor = args[position]
            inputs[position] = tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_()
        out = function(*inputs)
        out = out[0] if isinstance(out, (tuple, list)) else out
        found = torch.autograd.grad(
            out, [inputs[p] for p in chosen], grad, create_graph=create_graph, allow_unused=True
        )
    by_position = dict(zip(chosen, found, strict=True))
    return [by_position.get(position) for position in tensors]


_AUTOGRAD_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)


def _autograd_on() -> Any:
    """Autograd works inside this scope even when it is entered from below autograd in the dispatcher."""
    excluded = torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD_KEYS
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
