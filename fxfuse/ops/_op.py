"""What an op is, and the short road an eager call takes.

An op is its *meaning* (`reference`: composed ATen calls, differentiable any number of times, good for any device,
dtype, layout and rank) and, when it has them, faster ways to the same numbers:

    OP = Op("axpy", "(Tensor x, Tensor y, float a=1.0) -> Tensor", reference=lambda x, y, a: a * x + y)
    axpy = OP.call                                # differentiable, traceable, fit for torch.compile

Everything else is optional:

    road(*args) -> Road               which way this call goes; "composed" is the reference itself
    forward(road, *args, wanted=())   -> (out, saved): out as the reference gives it, and the tensors backward wants
    backward(road, grad, saved, *args, wanted=())   -> one gradient (or None) for each Tensor argument, in order;
                                      what it drops from the list `saved` is freed, unless the graph is retained
    saves(*args, wanted=())           -> empty tensors shaped as `saved`; needed when forward saves any
    again(saved, *args)               -> the reference with its graph, for second derivatives (default: reference)
    autocast(device_type, dtype, *args) -> args cast as autocast casts them inside the unfused code
    buffers                           Tensor arguments the unfused code updates in place, by name (see below)
    direct(*args) -> str              why an eager call on the CPU or a GPU goes straight to the reference; "" when it
                                      does not. Asked first and often: it looks at a size or two, nothing more
    brief(*args)                      what a direct call runs: the reference, or the same in less of the host's time
    told(road, *args) -> Road         the road in words that fit these very sizes, for a person who asks

`args` are always all arguments of the schema, in order; `wanted` has one bool for each Tensor argument, empty when no
gradient is wanted. A call with several outputs is differentiable in the first; the others are new values of buffers.

An op with `buffers` is functional for the dispatcher: it returns their new values, and the public callable copies them
back. Its reference and forward take one more keyword, `update`: when True (eager calls) they may update the buffers
themselves and return None for the new values. Buffers are not kept for backward: forward saves what it needs of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from . import _dispatch
from ._autocast import autocast_off, device_and_dtype
from ._autograd import Differentiable, transformed, vjp
from ._road import Road

_has_torch_function = torch._C._has_torch_function
_any_requires_grad = torch._C._any_requires_grad
_dispatch_modes = torch._C._len_torch_dispatch_stack
_any_autocast = torch._C._is_any_autocast_enabled

# Types an eager call may hold and still take the short road. Anything else (fake and functional tensors, symbolic
# numbers, subclasses) is for the dispatcher.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None), bool, int, float, str, torch.dtype})


class Direct:
    """Counts the direct calls, for those who want to know whether all of theirs were."""

    calls = 0


class Op:
    """One fused op, registered with the dispatcher as `torch.ops.<namespace>.<name>`.

    name:    the op's name, "namespace::name" for another namespace than fxfuse.
    schema:  its arguments and results, in the dispatcher's language.
    call:    the public callable; `public` sets one with a signature and docstring of its own.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Any],
        *,
        road: Callable[..., Road] | None = None,
        forward: Callable[..., tuple[Any, Sequence[Tensor]]] | None = None,
        backward: Callable[..., Sequence[Tensor | None]] | None = None,
        saves: Callable[..., Sequence[Tensor]] | None = None,
        again: Callable[..., Any] | None = None,
        autocast: Callable[..., tuple[Any, ...]] | None = None,
        buffers: Sequence[str] = (),
        direct: Callable[..., str] | None = None,
        brief: Callable[..., Any] | None = None,
        told: Callable[..., Road] | None = None,
    ) -> None:
        self.namespace, _, self.name = name.rpartition("::")
        self.namespace = self.namespace or "fxfuse"
        self.schema = schema
        self.reference = reference
        self.forward = forward or self._reference_forward
        self.backward = backward or self._reference_backward
        self.saves = saves
        self.again = again or (lambda saved, *args: reference(*args))
        self.autocast = autocast
        self.direct = direct
        self.brief = brief or reference
        self.told = told
        self.update: dict[str, Any] = {"update": True} if buffers else {}
        self._road = road or functools.partial(_only_road, Road("closed", "its own forward") if forward else _MEANING)
        self.registered = _dispatch.register(self)
        self.overload = self.registered.op
        self.tensors = self.registered.tensors
        self.kept = tuple(i for i in self.tensors if self.registered.arguments[i].name not in buffers)
        self.call: Callable[..., Any] = self._default_call()

    def public(self, function: Callable[..., Any]) -> Any:
        """Decorator: makes `function` the public callable, the one that traced graphs name."""
        self.call = function
        return function

    def road(self, *args: Any, **kwargs: Any) -> Road:
        """The road these arguments take in an eager call on this machine, and why."""
        args = self.registered.complete(args, kwargs)
        if self.direct is not None and (args[0].is_cpu or args[0].is_cuda) and (why := self.direct(*args)):
            return Road("composed", why)
        road = self._road(*args)
        return road if self.told is None else self.told(road, *args)

    def __call__(self, *args: Any) -> Any:
        """The op on all its arguments, in order."""
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if _has_torch_function(args):  # fx proxies, subclasses, torch function modes
            return handle_torch_function(self.call, args, *args)
        return self.plain(args)

    def plain(self, args: tuple[Any, ...]) -> Any:
        """The op on arguments without a torch function of their own."""
        if _dispatch_modes():  # make_fx, fake tensors
            return self.overload(*args)
        direct, first = self.direct, args[0]
        if direct is not None and (first.is_cuda or first.is_cpu) and direct(*args):
            Direct.calls += 1
            return self.brief(*args, **self.update)  # right under autocast and transforms, too
        if not _PLAIN.issuperset(map(type, args)):  # subclasses, symbolic numbers
            return self.overload(*args)
        if transformed():
            return self.reference(*args)
        if _any_autocast():
            return self._under_autocast(args)
        return self._eager(args)

    def ordinary(self, args: tuple[Any, ...]) -> bool:
        """Whether this call is one of plain tensors, without a trace, a transform or autocast around it."""
        return not (
            torch.compiler.is_compiling()
            or _dispatch_modes()
            or not _PLAIN.issuperset(map(type, args))
            or transformed()
            or _any_autocast()
        )

    def inference(self, args: tuple[Any, ...]) -> bool:
        """Whether this call is an ordinary one without a gradient."""
        return self.ordinary(args) and not (torch.is_grad_enabled() and _any_requires_grad(*args))

    def _eager(self, args: tuple[Any, ...]) -> Any:
        road = self._road(*args)
        if road.name == "composed":
            return self.reference(*args, **self.update)
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return Differentiable.call(self, road, *args)
        return self.forward(road, *args, **self.update)[0]

    def _under_autocast(self, args: tuple[Any, ...]) -> Any:
        device, dtype = device_and_dtype(args)
        if dtype is None:
            return self._eager(args)
        if self.autocast is None:
            return self.reference(*args)
        cast = self.autocast(device, dtype, *args)
        with autocast_off():
            return self._eager(cast)

    def _reference_forward(self, road: Road, *args: Any, wanted: Sequence[bool] = ()) -> tuple[Any, Sequence[Tensor]]:
        return self.reference(*args), ()

    def _reference_backward(
        self, road: Road, grad: Tensor, saved: Sequence[Tensor], *args: Any, wanted: Sequence[bool] = ()
    ) -> Sequence[Tensor | None]:
        return vjp(lambda *a: self.again(saved, *a), self.tensors, args, grad, wanted, create_graph=False)

    def _default_call(self) -> Callable[..., Any]:
        """A callable that takes keywords and defaults as the schema has them. It is looked up by name in a graph."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self(*self.registered.complete(args, kwargs))

        call.__name__ = call.__qualname__ = self.name
        call.__module__ = self.reference.__module__
        call.__doc__ = self.reference.__doc__
        return call

    def __repr__(self) -> str:
        return f"<Op {self.namespace}::{self.name}{self.schema}>"


_MEANING = Road("composed", "this op is its reference")


def _only_road(road: Road, *args: Any) -> Road:
    return road
