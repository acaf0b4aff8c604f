"""Traced values: proxies that refuse every question whose answer a trace would freeze."""

from __future__ import annotations

import dis
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Attribute

__all__ = ["Value"]


class Value(fx.Proxy):
    """A traced value. It is a tensor to ``isinstance`` where that is certain, and refuses to say where it is not."""

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if self.tracer.is_tensor(self.node):
            return torch.Tensor
        if self.node.op == "placeholder":
            return float
        raise self.tracer.refuse(f"it asks for the type of {self.node.name}, which is known only when it runs")

    def __getattr__(self, name: str) -> Any:
        if not hasattr(torch.Tensor, name):
            if self.tracer.is_tensor(self.node):
                raise AttributeError(f"'Tensor' object has no attribute {name!r}")
            raise self.tracer.refuse(f"it reads .{name} of {self.node.name}, whose type is known only when it runs")
        return ValueAttribute(self, name)

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        # fx looks for its tracer with isinstance(argument, cls): asked of Proxy, that needs nobody's __class__
        return fx.Proxy.__torch_function__.__func__(fx.Proxy, orig_method, types, args, kwargs)  # type: ignore[attr-defined]

    def __iter__(self) -> Any:
        count = _unpacked_into(sys._getframe(1))
        return iter([operator.getitem(self, i) for i in range(count)]) if count is not None else self.tracer.iter(self)

    def __len__(self) -> int:
        raise self.tracer.refuse(f"it takes len() of {self.node.name}")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self.tracer.refuse(f"it assigns to a part of {self.node.name}")

    def __contains__(self, item: Any) -> bool:
        raise self.tracer.refuse(f"it looks for a value in {self.node.name}")

    def __int__(self) -> int:
        raise self.tracer.refuse(f"it makes a Python number of {self.node.name}")

    __float__ = __complex__ = __int__


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    # fx.Proxy has no in-place operators, so Python would quietly take `x *= 2` for `x = x * 2`
    function = getattr(operator, name)

    def apply(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(Value, f"__{_name}__", _in_place(_name))


class ValueAttribute(Attribute):
    """An attribute of a traced value (``x.shape``), which becomes a node when it is used."""

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        raise self.tracer.refuse(f"it asks for the type of .{self.attr}, which is known only when it runs")

    __torch_function__ = Value.__torch_function__
    __iter__ = Value.__iter__
    __len__ = Value.__len__
    __setitem__ = Value.__setitem__
    __contains__ = Value.__contains__


def _unpacked_into(frame: types.FrameType) -> int | None:
    """How many names a frame is just unpacking a value into, as ``b, n, c = x.shape`` does; None where it is not.

    fx does the same, by way of a reference cycle that keeps the values alive.
    """
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            return instruction.argval if instruction.opname == "UNPACK_SEQUENCE" else None
    return None
