"""The short road by kind: what a call on a GPU came to, kept as a function of its tensors for others like them.

Dynamo's guards say in one question whether tensors are of the kept kind: type, dtype, device, shape, strides, gradient,
and the dispatch keys by which autocast, functorch and inference mode act. Unlike the launches of _short.py,
such a function rests on no address, and may have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._autograd import Differentiable
from ._op import Direct, Op
from ._short import Guards

MOST = 4  # kinds kept for the same numbers; a check that fails costs 0.1 us
MOST_NUMBERS = 1024  # past that all are forgotten, and kept anew: a temperature may be another one in every step
Run = Callable[..., Any]

_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_torch_function = torch._C._has_torch_function_unary
_capturing = torch.cuda.is_current_stream_capturing


class Kind:
    """A kind of call, and what it comes to as a function of its tensors; `direct` where that is ATen's operations."""

    __slots__ = ("direct", "grad_mode", "run", "same")

    def __init__(self, run: Run, *, direct: bool = False) -> None:
        self.run = run
        self.direct = direct

    def rests_on(self, tensors: tuple[Tensor, ...]) -> None:
        self.same: Callable[..., bool] = Guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.grad_mode = _grad_enabled() if any(t.requires_grad for t in tensors) else None


def whole(op: Op, args: tuple[Any, ...]) -> Kind:
    """What an ordinary call of `op` comes to, by its own ways, as a function of all of its arguments."""
    update = op.update
    if op.direct is not None and op.direct(*args):
        return Kind(lambda *args: op.brief(*args, **update), direct=True)
    road = op._road(*args)
    if road.composed:
        return Kind(lambda *args: op.reference(*args, **update))
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return Kind(lambda *args: Differentiable.call(op, road, *args))
    return Kind(lambda *args: op.forward(road, *args, **update)[0])


class Kinds:
    """What is kept for one op."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, list[Kind]] = {}  # by the numbers; the last to come is asked first

    def find(self, numbers: Hashable, *tensors: Tensor) -> Run | None:
        """What a call like this one came to; None where there was none, or anything that it rests on is another."""
        for kind in self._kinds.get(numbers, ()):
            if (
                kind.same(*tensors)
                and (kind.grad_mode is None or kind.grad_mode is _grad_enabled())
                and not _dispatch_modes()  # the guards miss that of fake tensors
                and not _has_torch_function(tensors[0])  # a mode: the type is known
                and forward_ad._current_level < 0
            ):
                if not kind.direct:
                    return kind.run
                if not _capturing():  # a graph is replayed without the host, whose time is what counts for these
                    Direct.calls += 1
                    return kind.run
        return None

    def keep(
        self, op: Op, args: tuple[Any, ...], numbers: Hashable, *tensors: Tensor, make: Callable[[], Kind]
    ) -> None:
        """Keep `make()` for calls like this one of `op`, if it is an ordinary one on a GPU."""
        first = tensors[0]
        if Guards is None or not isinstance(first, Tensor) or not first.is_cuda:
            return
        if op.ordinary(args) and not _capturing():
            kind = make()
            kind.rests_on(tensors)
            if len(self._kinds) >= MOST_NUMBERS and numbers not in self._kinds:
                self.forget()
            self._kinds[numbers] = [kind, *self._kinds.get(numbers, ())][:MOST]

    def call(
        self,
        op: Op,
        args: tuple[Any, ...],
        numbers: Hashable,
        *tensors: Tensor,
        ordinary: Callable[[], Any],
        make: Callable[[], Kind] | None = None,
    ) -> Any:
        """`op` by what a call like this one came to, as a function of `args`; else `ordinary()`, for which `make()` is
        kept, or the `whole` call."""
        run = self.find(numbers, *tensors)
        if run is not None:
            return run(*args)
        out = ordinary()
        self.keep(op, args, numbers, *tensors, make=make or (lambda: whole(op, args)))
        return out

    def forget(self) -> None:
        """Forget all that is kept."""
        self._kinds.clear()
