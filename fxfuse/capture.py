"""nn.Module or function -> fx graph, with everything the graph rests on.

A symbolic trace is only as good as what it took for granted. Beside the graph, :class:`Captured` holds the Python attributes
the forward read while it was traced (``self.training``, ``self.alpha``) and the modules whose call was replaced by their
contents; :mod:`fxfuse.plan` checks both at run time and uses the module's own Python where they have changed.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx, nn

from fxfuse.view import why_called_only

__all__ = ["Captured", "Untraceable", "Signature", "capture", "TENSOR", "NUMBER", "CONSTANTS"]

TENSOR, NUMBER = "<tensor>", "<number>"
#: values a graph may be specialised on
CONSTANTS = (bool, int, str, type(None), torch.dtype, torch.device, torch.memory_format, enum.Enum)
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_SIMPLE = (bool, int, float, str, type(None))


class Untraceable(Exception):
    """Why a forward cannot be read as one graph."""


@dataclass
class Captured:
    """A traced forward.

    Attributes:
        graph: the fx graph; its placeholders are the arguments that are tensors or floats, in order.
        root: the module the graph's attributes belong to.
        reads: (module path, attribute) -> value seen while tracing.
        inlined: paths of modules whose contents stand in the graph in place of a call.
    """

    graph: fx.Graph
    root: nn.Module
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    inlined: set[str] = field(default_factory=set)


class Signature:
    """The parameters of a forward and how a call binds to them, without the cost of ``inspect`` at every call."""

    def __init__(self, function: Callable[..., Any], skip_first: bool) -> None:
        parameters = list(inspect.signature(function).parameters.values())[1 if skip_first else 0 :]
        self.variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        self.names = tuple(p.name for p in parameters)
        self.keyword_only = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        self.positional = len(self.names) - len(self.keyword_only)
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.annotations = {p.name: p.annotation for p in parameters}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """Values in the order of the names, or None where the call does not fit."""
        if len(args) > self.positional:
            return None
        values, used = list(args), 0
        for name in self.names[len(args) :]:
            if name in kwargs:
                values.append(kwargs[name])
                used += 1
            elif name in self.defaults:
                values.append(self.defaults[name])
            else:
                return None
        return values if used == len(kwargs) else None

    def expected(self) -> tuple[Any, ...] | None:
        """The kinds of an ordinary call: required arguments are tensors (or floats, by annotation), the rest absent."""
        kinds: list[Any] = []
        for name in self.names:
            if name in self.defaults:
                kind = kind_of(self.defaults[name])
            else:
                annotation = self.annotations[name]
                kind = NUMBER if annotation in (float, "float") else TENSOR
                if annotation in (bool, int, str, "bool", "int", "str"):
                    return None
            if kind is None:
                return None
            kinds.append(kind)
        return tuple(kinds)


def kind_of(value: Any) -> Any:
    """What a graph needs to know of an argument: TENSOR, NUMBER, a constant (in a 1-tuple), or None (cannot be traced)."""
    if isinstance(value, torch.Tensor) or issubclass(type(value), fx.Proxy):
        return TENSOR
    if type(value) is float:
        return NUMBER
    if isinstance(value, CONSTANTS):
        return (value,)
    return None


class _TensorProxy(fx.Proxy):
    """An argument that is a tensor and says so: ``isinstance(x, Tensor)`` is true, as it will be when the graph runs."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return torch.Tensor


class _Tracer(fx.Tracer):
    """fx.Tracer that refuses what it would freeze silently, and writes down what it reads."""

    proxy_buffer_attributes = True

    def __init__(
        self, captured: Captured, closure: frozenset[int], signature: Signature, kinds: tuple[Any, ...]
    ) -> None:
        super().__init__()
        self.captured = captured
        self.closure = closure
        self.signature = signature
        self.kinds = kinds
        self.attribute_names: dict[int, str] = {}
        self.paths: dict[int, str] = {}

    def prepare(self, root: nn.Module) -> None:
        """Index the tensors and modules of the tree by identity."""
        for path, module in root.named_modules():
            self.paths[id(module)] = path
            prefix = path + "." if path else ""
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        self.attribute_names.setdefault(id(tensor), prefix + name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders for tensors and floats; constants go in as they are."""
        positional: list[Any] = [self.root] if is_module else []
        keywords: dict[str, Any] = {}
        for name, kind in zip(self.signature.names, self.kinds):
            value = kind[0] if isinstance(kind, tuple) else self._placeholder(name, kind)
            if name in self.signature.keyword_only:
                keywords[name] = value
            else:
                positional.append(value)
        return functools.partial(root_fn, **keywords) if keywords else root_fn, positional

    def _placeholder(self, name: str, kind: Any) -> fx.Proxy:
        proxy = self.create_proxy("placeholder", name, (), {})
        if kind == NUMBER:
            proxy.node.meta["val"] = 1.0
            return proxy
        return _TensorProxy(proxy.node, self)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return self.paths[id(mod)]
        except KeyError:
            raise Untraceable(f"it calls a {type(mod).__name__} that is not registered as a submodule") from None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if called_only(m):
            return True
        self.captured.inlined.add(module_qualified_name)
        return False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, torch.Tensor):
            name = self.attribute_names.get(id(attr_val))
            if name is not None:
                if name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                return parameter_proxy_cache[name]
        return attr_val

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if type(a) in (int, float, str, bool, type(None)):
            return a
        if isinstance(a, torch.Tensor):
            name = self.attribute_names.get(id(a))
            if name is not None:
                return self.create_node("get_attr", name, (), {})
            if id(a) not in self.closure:
                raise Untraceable("it makes a tensor that does not depend on its inputs; a trace would freeze it")
        elif isinstance(a, (dict, list, tuple)) and type(a) not in (dict, list, tuple) and not hasattr(a, "_fields"):
            if not isinstance(a, torch.Size) and not type(a).__module__.startswith("torch.fx"):
                raise Untraceable(f"it passes or returns a {type(a).__name__}, which a trace would not rebuild")
        return super().create_arg(a)

    def seen(self, module: nn.Module, name: str, value: Any) -> Any:
        """Called for every attribute the traced Python reads from a module of the tree."""
        if name in _MODULE_INTERNALS or name.startswith("__"):
            return value
        state = object.__getattribute__(module, "__dict__")
        if name in state:
            path = self.paths.get(id(module))
            if path is not None and isinstance(value, _SIMPLE):
                self.captured.reads[(path, name)] = value
            elif path is not None and isinstance(value, torch.Tensor) and not isinstance(value, fx.Proxy):
                return self.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})
        return value


def called_only(module: nn.Module) -> bool:
    """Whether a module is called and never looked into: torch's own layers, hooks, scripted or compiled modules."""
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)) or module._compiled_call_impl is not None:
        return True
    name = type(module).__module__
    if name.startswith(("torch.nn", "torch.ao.nn", "torch._dynamo")) and not isinstance(module, nn.Sequential):
        return True
    return why_called_only(module) is not None


_active: list[_Tracer] = []


@lru_cache(maxsize=None)
def _watched(kind: type) -> type:
    """A subclass of a module type that tells the active tracer what its forward reads and refuses writes."""

    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        return _active[-1].seen(self, name, value) if _active else value

    def write(self: Any, name: str, value: Any) -> None:
        if _active:
            raise Untraceable(f"its forward writes self.{name}")
        kind.__setattr__(self, name, value)

    body = {"__getattribute__": read, "__setattr__": write, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), body)


def capture(target: nn.Module | types.FunctionType, kinds: tuple[Any, ...], signature: Signature) -> Captured:
    """Trace a module's forward, or a function, for arguments of the given kinds.

    Args:
        target: the module (its hooks stay outside the graph) or plain Python function.
        kinds: one per parameter, as :func:`kind_of` gives them.
        signature: of the forward, without ``self``.

    Raises:
        Untraceable: with the reason, whatever went wrong.
    """
    if signature.variadic:
        raise Untraceable("it takes *args or **kwargs")
    is_module = isinstance(target, nn.Module)
    root = target if isinstance(target, nn.Module) else nn.Module()
    captured = Captured(fx.Graph(), root)
    closure = frozenset() if isinstance(target, nn.Module) else _closure_tensors(target)
    tracer = _Tracer(captured, closure, signature, kinds)
    watched: list[tuple[nn.Module, type]] = []
    try:
        if is_module:
            tracer.prepare(root)
            for module in root.modules():
                if module is root or not called_only(module):
                    watched.append((module, type(module)))
                    object.__setattr__(module, "__class__", _watched(type(module)))
        _active.append(tracer)
        try:
            captured.graph = tracer.trace(target)
        finally:
            _active.pop()
    except Untraceable:
        raise
    except Exception as error:  # tracing runs the user's Python with proxies: anything can come out of it
        raise Untraceable(_first_line(error)) from error
    finally:
        for module, kind in watched:
            object.__setattr__(module, "__class__", kind)
    if not is_module:
        captured.root = tracer.root
    return captured


def _closure_tensors(function: types.FunctionType) -> frozenset[int]:
    """Tensors a function may refer to without making them: its closure, defaults and globals."""
    values = [c.cell_contents for c in function.__closure__ or () if _filled(c)]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values += [function.__globals__.get(name) for name in function.__code__.co_names]
    return frozenset(id(v) for v in values if isinstance(v, torch.Tensor))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents
    except ValueError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
