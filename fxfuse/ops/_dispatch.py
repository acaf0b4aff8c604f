"""An op in PyTorch's dispatcher: what torch.compile, torch.export and make_fx see.

Three operators a name: `<name>` (the public one), `<name>_forward` (returns what backward wants, too) and
`<name>_backward`. The keys of `<name>`: Autocast casts, Autograd splits into the other two when a gradient is wanted
(or gives way to the reference where that is the road: a compiler may then fuse its parts), the rest computes.
Outputs are fresh tensors in the strides the fake implementations promise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._autocast import autocast_off, device_and_dtype
from ._autograd import Differentiable, transformed

if TYPE_CHECKING:
    from ._op import Op

_LIBRARIES: dict[str, torch.library.Library] = {}


def _library(namespace: str) -> torch.library.Library:
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    return _LIBRARIES[namespace]


class Registered:
    """The operators of one op, and calls to them that hide how lists stand in for optional tensors."""

    def __init__(self, owner: Op) -> None:
        self.owner = owner
        parsed = torch._C.parse_schema(f"{owner.namespace}::{owner.name}{owner.schema}")
        self.arguments = parsed.arguments
        self.outputs = len(parsed.returns)
        self.tensors = tuple(i for i, a in enumerate(parsed.arguments) if str(a.type) in ("Tensor", "Optional[Tensor]"))
        inner = re.sub(r"=(\[[^\]]*\]|[^,]*)", "", owner.schema[1 : owner.schema.rindex("->")].strip()[:-1])
        comma = ", " if inner else ""
        library = _library(owner.namespace)
        tags = (torch.Tag.pt2_compliant_tag,)
        library.define(owner.name + owner.schema, tags=tags)
        library.define(f"{owner.name}_forward({inner}{comma}bool[] wanted) -> Tensor[]", tags=tags)
        library.define(
            f"{owner.name}_backward(Tensor grad, Tensor[] saved, {inner}{comma}bool[] wanted) -> Tensor[]", tags=tags
        )
        operators = getattr(torch.ops, owner.namespace)
        self.op = getattr(operators, owner.name).default
        self.op_forward = getattr(operators, f"{owner.name}_forward").default
        self.op_backward = getattr(operators, f"{owner.name}_backward").default

        library.impl(owner.name, self.compute, "CompositeExplicitAutograd")
        library.impl(owner.name, self.autograd, "Autograd", with_keyset=True)
        library.impl(owner.name, self.reference, "FuncTorchBatched")
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(owner.name, self.autocast, key)
        library.impl(f"{owner.name}_forward", self.compute_forward, "CompositeExplicitAutograd")
        library.impl(f"{owner.name}_backward", self.compute_backward, "CompositeExplicitAutograd")
        for suffix, fake in (("", self.fake), ("_forward", self.fake_forward), ("_backward", self.fake_backward)):
            torch.library.register_fake(f"{owner.namespace}::{owner.name}{suffix}", fake, lib=library)

    def complete(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> tuple[Any, ...]:
        """All arguments in order, with keywords placed and defaults filled in. TypeError when they do not fit."""
        full = list(args)
        if len(full) > len(self.arguments):
            raise TypeError(f"{self.owner.name}() takes {len(self.arguments)} arguments but {len(full)} were given")
        rest = dict(kwargs or {})
        for argument in self.arguments[len(full) :]:
            if argument.name in rest:
                full.append(rest.pop(argument.name))
            elif argument.has_default_value():
                full.append(argument.default_value)
            else:
                raise TypeError(f"{self.owner.name}() missing argument {argument.name!r}")
        if rest:
            raise TypeError(f"{self.owner.name}() got an unexpected or repeated argument {next(iter(rest))!r}")
        return tuple(full)

    # <name>. The dispatcher drops trailing arguments that equal their defaults: each kernel completes them.

    def reference(self, *args: Any) -> Any:
        return self.owner.reference(*self.complete(args))

    fake = reference

    def compute(self, *args: Any) -> Any:
        full = self.complete(args)
        with autocast_off():
            road = self.owner._road(*full)
            if road.composed:
                return self.owner.reference(*full)
            return self.owner.forward(road, *full)[0]

    def autocast(self, *args: Any) -> Any:
        full = self.complete(args)
        device, dtype = device_and_dtype(full)
        if dtype is not None:
            if self.owner.autocast is None:
                return self.owner.reference(*full)
            full = self.owner.autocast(device, dtype, *full)
        with autocast_off():
            return self.op(*full)

    def autograd(self, keyset: Any, *args: Any) -> Any:
        full = self.complete(args)
        if transformed() or self.owner._road(*full).composed:
            return self.owner.reference(*full)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*full):
            return Differentiable.apply(self.owner, None, *full)
        return self.op.redispatch(keyset & torch._C._after_autograd_keyset, *full)

    # <name>_forward: the outputs, then what is saved, in one list.

    def forward_traced(self, args: Sequence[Any], wanted: Sequence[bool]) -> tuple[Any, Sequence[Tensor]]:
        results = self.op_forward(*args, list(wanted))
        out = results[0] if self.outputs == 1 else tuple(results[: self.outputs])
        return out, results[self.outputs :]

    def compute_forward(self, *args: Any) -> list[Tensor]:
        *full, wanted = args
        with autocast_off():
            out, saved = self.owner.forward(self.owner._road(*full), *full, wanted=tuple(wanted))
        return [*(out if isinstance(out, tuple) else (out,)), *saved]

    def fake_forward(self, *args: Any) -> list[Tensor]:
        *full, wanted = args
        out = self.owner.reference(*full)
        saved = self.owner.saves(*full, wanted=tuple(wanted)) if self.owner.saves else ()
        return [*(out if isinstance(out, tuple) else (out,)), *saved]

    # <name>_backward: the wanted gradients only, each in the strides of `torch.empty_like(argument)`.

    def backward_traced(
        self, grad: Tensor, saved: Sequence[Tensor], args: Sequence[Any], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        found = iter(self.op_backward(grad, list(saved), *args, list(wanted)))
        return [next(found) if want else None for want in wanted]

    def compute_backward(self, grad: Tensor, saved: list[Tensor], *args: Any) -> list[Tensor]:
        *full, wanted = args
        with autocast_off():
            grads = self.owner.backward(self.owner._road(*full), grad, saved, *full, wanted=tuple(wanted))
        pairs = zip(grads, (full[i] for i in self.tensors), wanted, strict=True)
        return [_settled(g, argument) for g, argument, want in pairs if want]

    def fake_backward(self, grad: Tensor, saved: list[Tensor], *args: Any) -> list[Tensor]:
        *full, wanted = args
        return [torch.empty_like(full[i]) for i, want in zip(self.tensors, wanted, strict=True) if want]


def _settled(grad: Tensor | None, argument: Tensor) -> Tensor:
    """`grad` in the strides and dtype the fake backward promises (an expanded row is written out here)."""
    if grad is None:
        return torch.zeros_like(argument)
    promised = torch.empty_like(argument, device="meta")
    if grad.stride() == promised.stride() and grad.dtype == promised.dtype:
        return grad
    return torch.empty_like(argument).copy_(grad)


def register(owner: Op) -> Registered:
    """Register `owner` with the dispatcher."""
    return Registered(owner)
