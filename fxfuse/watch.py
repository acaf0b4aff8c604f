"""Python seen at work while a forward is traced: what it reads from modules, and what a trace would lose.

Everything here is in force for one thread and for the time of one trace. What a graph could not repeat makes the trace
end with :class:`Untraceable`: attributes written, values kept elsewhere, numbers drawn, modes changed, a backward of
one's own.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.signature import Untraceable

__all__ = ["Watcher", "derived", "is_plain_method", "kept_elsewhere", "tracing", "type_of"]

#: one trace at a time: torch.fx patches nn.Module for the whole process while it runs
TRACING = threading.RLock()
_local = threading.local()
_MARK = "_fxfuse_watches"
#: what nn.Module itself reads at every call
_INTERNALS = {*nn.Module().__dict__, "__dict__", "__class__", "forward", "_call_impl"} - {"training", "_modules"}


#: questions to torch that a forward may branch on
_SETTINGS = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype",
             "get_default_dtype")  # fmt: skip


class Watcher:
    """Who is told; the tracer is one."""

    refused: Untraceable | None = None

    def refuse(self, reason: str) -> Untraceable:
        """The exception to raise. It is kept, since the traced Python may catch what passes through it."""
        self.refused = self.refused or Untraceable(reason)
        return self.refused

    def seen(self, module: nn.Module, name: str, value: Any) -> Any:
        """An attribute was read; returns what the reader gets."""
        raise NotImplementedError

    def absent(self, module: nn.Module, name: str) -> None:
        """An attribute was asked for that is not there."""
        raise NotImplementedError

    def asked(self, question: Callable[..., Any], args: tuple[Any, ...], answer: Any) -> None:
        """One of torch's settings was asked for."""
        raise NotImplementedError


def watcher() -> Watcher | None:
    """Who watches this thread, if anybody."""
    return getattr(_local, "watcher", None)


def derived(kind: type, body: dict[str, Any]) -> type:
    """A subclass of a module type under the same name.

    ``__init_subclass__`` and a metaclass's ``__new__`` do not run: they may refuse, or put the class in a registry.
    """
    made = type.__new__(type(kind), kind.__name__, (nn.Module,), {
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, **body,
    })  # fmt: skip
    if kind is not nn.Module:
        made.__bases__ = (kind,)
    return made


@cache
def _watched(kind: Any) -> type:
    """A subclass of a module type that tells the watcher what its forward reads, and refuses writes."""

    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if name in _INTERNALS:
            return value
        now = watcher()
        return value if now is None else now.seen(self, name, value)

    def missing(self: Any, name: str) -> Any:
        now = watcher()
        try:
            value = kind.__getattr__(self, name)
        except AttributeError:
            if now is not None:
                now.absent(self, name)
            raise
        return value if now is None else now.seen(self, name, value)

    def write(self: Any, name: str, value: Any) -> None:
        now = watcher()
        if now is not None:
            raise now.refuse(f"its forward writes self.{name}")
        kind.__setattr__(self, name, value)

    def delete(self: Any, name: str) -> None:
        now = watcher()
        if now is not None:
            raise now.refuse(f"its forward deletes self.{name}")
        kind.__delattr__(self, name)

    return derived(kind, {
        "__getattribute__": read, "__getattr__": missing, "__setattr__": write, "__delattr__": delete, _MARK: kind,
    })  # fmt: skip


def type_of(module: nn.Module) -> type:
    """A module's type, watched or not."""
    kind = type(module)
    return kind.__dict__.get(_MARK, kind)


@contextlib.contextmanager
def tracing(who: Watcher, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Watch these modules, and this thread, for the time of one trace."""
    with TRACING, contextlib.ExitStack() as stack:
        _local.watcher, before = who, watcher()
        stack.callback(setattr, _local, "watcher", before)
        for module in modules:
            kind: Any = type(module)
            object.__setattr__(module, "__class__", _watched(kind))
            stack.callback(object.__setattr__, module, "__class__", kind)
        _patch(stack)
        drawn = _random_states()
        with _NoConcreteTensors(who):
            yield
        if _restore(drawn):
            raise who.refuse("it draws random numbers in Python, which a trace would draw once and for all")


class _NoConcreteTensors(TorchDispatchMode):
    """Refuses computing on real tensors: the result, or a decision made on it, would be frozen."""

    def __init__(self, who: Watcher) -> None:
        super().__init__()
        self.who = who

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise self.who.refuse(f"it computes {func} without its inputs; a trace would freeze the result")


def _random_states() -> tuple[Any, Any]:
    """State of Python's random generator, and of NumPy's where NumPy is loaded."""
    numpy = sys.modules.get("numpy.random")
    return random.getstate(), numpy.get_state() if numpy is not None else None


def _restore(before: tuple[Any, Any]) -> bool:
    """Set the generators back; whether one had been used."""
    now = _random_states()
    used = now[0] != before[0]
    if used:
        random.setstate(before[0])
    if before[1] is not None and (now[1][2:] != before[1][2:] or not (now[1][1] == before[1][1]).all()):
        sys.modules["numpy.random"].set_state(before[1])
        used = True
    return used


# --- what a trace would lose -------------------------------------------------------------------------------------


def _patch(stack: contextlib.ExitStack) -> None:
    """Make the constructs below refuse in the tracing thread, for the time of the trace."""
    for owner, name, what in (
        (torch.no_grad, "__enter__", "switches gradients off"),
        (torch.enable_grad, "__enter__", "switches gradients on"),
        (torch.set_grad_enabled, "__init__", "switches gradients on or off"),
        (torch.inference_mode, "__enter__", "enters inference mode"),
        (torch.autocast, "__enter__", "enters an autocast region"),
        (torch.autograd.graph.saved_tensors_hooks, "__enter__", "changes how tensors are saved (a checkpoint?)"),
    ):
        _replace(stack, owner, name, _refusing(getattr(owner, name), f"it {what}, which a trace does not keep"))
    for name in _SETTINGS:
        _replace(stack, torch, name, _telling(getattr(torch, name)))
    original = torch.autograd.Function.__dict__["apply"].__func__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        now = watcher()
        if now is not None:
            raise now.refuse(f"it calls the autograd.Function {cls.__name__}, whose backward a trace would lose")
        return original(cls, *args, **kwargs)

    _replace(stack, torch.autograd.Function, "apply", classmethod(apply))


def _refusing(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = watcher()
        if now is not None:
            raise now.refuse(reason)
        return original(self, *args, **kwargs)

    return call


def _telling(question: Callable[..., Any]) -> Callable[..., Any]:
    def ask(*args: Any) -> Any:
        answer, now = question(*args), watcher()
        if now is not None:
            now.asked(question, args, answer)
        return answer

    return ask


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    inherited = name not in owner.__dict__
    before = None if inherited else owner.__dict__[name]
    setattr(owner, name, value)
    stack.callback(delattr, owner, name) if inherited else stack.callback(setattr, owner, name, before)


def kept_elsewhere(values: list[weakref.ref[fx.Proxy]]) -> bool:
    """Whether a traced value outlives its trace: the forward has put it in a list, a dict or another object."""
    if all(ref() is None for ref in values):
        return False
    gc.collect()  # a reference cycle of the forward's own is no harm
    return any(ref() is not None for ref in values)


def is_plain_method(value: Any) -> bool:
    """Whether an attribute read from a module is code of its class."""
    return isinstance(value, (types.MethodType, types.FunctionType))
