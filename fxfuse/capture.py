"""nn.Module or function -> fx graph, with everything the graph rests on.

A symbolic trace is only as good as what it took for granted. Beside the graph, :class:`Captured` holds all of that
(:mod:`fxfuse.assume`); :mod:`fxfuse.plan` checks it at run time and uses the module's own Python where it has changed.
What a trace could not repeat at all (:mod:`fxfuse.watch`) makes the forward untraceable.
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxfuse import vocabulary
from fxfuse.assume import Assumptions, outside_values, picture
from fxfuse.signature import NUMBER, Signature, Untraceable
from fxfuse.values import Value
from fxfuse.view import why_called_only
from fxfuse.watch import Watcher, is_plain_method, kept_elsewhere, tracing, type_of

__all__ = ["Captured", "called_only", "capture"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
#: torch's layers whose call gives one tensor, beside those the vocabulary reads
_GIVES_TENSOR = (
    "linear", "conv", "batchnorm", "instancenorm", "normalization", "dropout", "padding", "sparse", "flatten",
)  # fmt: skip


@dataclass
class Captured:
    """A traced forward.

    Attributes:
        graph: the fx graph; its placeholders are the arguments that are tensors or floats, in order.
        root: the module the graph's attributes belong to.
        assumed: what the graph rests on.
        inlined: paths of modules whose contents stand in the graph in place of a call.
        is_function: a plain function was traced; the root holds the tensors it closes over.
    """

    graph: fx.Graph
    root: nn.Module
    assumed: Assumptions = field(default_factory=Assumptions)
    inlined: set[str] = field(default_factory=set)
    is_function: bool = False

    @property
    def reads_mode(self) -> bool:
        """Whether the forward looked at ``training``."""
        return any(attribute == "training" for _, attribute in self.assumed.values)


class _Tracer(fx.Tracer, Watcher):
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
        self.thread = threading.get_ident()
        self.attribute_names: dict[int, str] = {}
        self.paths: dict[int, str] = {}
        self.values: list[weakref.ref[fx.Proxy]] = []
        self.containers: dict[int, tuple[Any, Any]] = {}
        #: in place of fx's own cache, which a reference cycle of fx keeps alive
        self.parameters: dict[str, fx.Proxy] = {}

    def prepare(self, root: nn.Module) -> None:
        """Index the tensors and modules of the tree by identity."""
        for path, module in root.named_modules():
            self.paths[id(module)] = path
            prefix = path + "." if path else ""
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        self.attribute_names.setdefault(id(tensor), prefix + name)

    # --- values -----------------------------------------------------------------------------------------------------

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = Value(node, self)
        self.values.append(weakref.ref(made))
        return made

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node's value is certainly a tensor."""
        if node.op == "placeholder":
            return "val" not in node.meta
        if node.op == "get_attr":
            return True
        if node.op != "call_module":
            return vocabulary.spelling_of(node.target, node.op) is not None
        module = self.root.get_submodule(str(node.target))
        place = type(module).__module__
        known = place.startswith("torch.nn.modules.") and place.rpartition(".")[2] in _GIVES_TENSOR
        return known or vocabulary.module_reader(type(module)) is not None

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.refuse(f"it branches on the value of {obj.node.name}")

    def iter(self, obj: fx.Proxy) -> Any:
        raise self.refuse(f"it iterates over {obj.node.name}")

    def keys(self, obj: fx.Proxy) -> Any:
        raise self.refuse(f"it unpacks the keys of {obj.node.name}")

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders for tensors and floats; constants go in as they are. The last that fx asks for before the
        forward runs: what was read until here, fx has read, and the graph does not rest on it."""
        self.captured.assumed.forget_reads()
        positional: list[Any] = [self.root] if is_module else []
        keywords: dict[str, Any] = {}
        for name, kind in zip(self.signature.names, self.kinds, strict=False):
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
                raise self.refuse("it uses a tensor that is neither its own nor made of its inputs")
        elif isinstance(a, (dict, list, tuple)) and not _rebuilt(a):
            raise self.refuse(f"it passes or returns a {type(a).__name__}, which a trace would not rebuild")
        return super().create_arg(a)

    # --- modules ----------------------------------------------------------------------------------------------------

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return self.paths[id(mod)]
        except KeyError:
            raise self.refuse(f"it calls a {type(mod).__name__} that is not registered as a submodule") from None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if called_only(m):
            return True
        self.captured.inlined.add(module_qualified_name)
        return False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:  # fx has patched nn.Module for the threads of others, too
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, torch.Tensor) and threading.get_ident() == self.thread:
            name = self.attribute_names.get(id(attr_val))
            if name is not None:
                if name not in self.parameters:
                    self.parameters[name] = self.create_proxy("get_attr", name, (), {})
                return self.parameters[name]
        return attr_val

    def mind(self, container: Any) -> None:
        """Remember what a list, dict or set holds, to put it back should the traced Python change it."""
        if isinstance(container, (list, dict, set, deque)) and id(container) not in self.containers:
            self.containers[id(container)] = (container, container.copy())

    def put_back(self) -> bool:
        """Undo changes of the containers; whether there were any."""
        changed = False
        for container, before in self.containers.values():
            pairs = zip(_items(container), _items(before), strict=False)
            if len(container) != len(before) or any(a is not b for a, b in pairs):
                changed = True
                container.clear()
                container.update(before) if isinstance(container, (dict, set)) else container.extend(before)
        return changed

    def absent(self, module: nn.Module, name: str) -> None:
        """Write down an attribute that the traced Python asks for in vain."""
        path = self.paths.get(id(module))
        if path is not None and not name.startswith("__") and name != "parametrizations":  # torch's own question
            self.captured.assumed.absent.add((path, name))

    def asked(self, question: Callable[..., Any], args: tuple[Any, ...], answer: Any) -> None:
        """Write down what torch said when the traced Python asked it."""
        self.captured.assumed.settings[question, args] = answer

    def seen(self, module: nn.Module, name: str, value: Any) -> Any:
        """Write down an attribute the traced Python reads from a module of the tree."""
        if name.startswith("__"):
            return value
        path = self.paths.get(id(module))
        if path is None or issubclass(type(value), fx.Proxy):
            return value
        assumed = self.captured.assumed
        if name == "_modules":
            assumed.children[path] = [(key, child and type_of(child)) for key, child in value.items()]
            return value
        if isinstance(value, torch.Tensor):
            return self.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})
        known = self.paths.get(id(value)) if name in object.__getattribute__(module, "_modules") else None
        if known is not None and known != f"{path}.{name}".lstrip("."):
            assumed.aliases[(path, f"_modules[{name!r}]")] = known
        for i, item in enumerate(value) if type(value) in (list, tuple) else ():
            if isinstance(item, nn.Module) and id(item) in self.paths:
                assumed.aliases[(path, f"{name}[{i}]")] = self.paths[id(item)]
        self.mind(value)
        if is_plain_method(value) and name not in object.__getattribute__(module, "__dict__"):
            assumed.methods.setdefault(path, set()).add(name)
        elif (path, name) not in assumed.values:
            assumed.values[(path, name)] = picture(value)
        return value


def _rebuilt(value: Any) -> bool:
    """Whether fx makes a container of the same type again."""
    kind = type(value)
    return kind in (dict, list, tuple, torch.Size) or hasattr(kind, "_fields") or kind.__module__.startswith("torch.fx")


def _items(container: Any) -> Iterable[Any]:
    return (part for item in container.items() for part in item) if isinstance(container, dict) else container


def called_only(module: nn.Module) -> bool:
    """Whether a module is called and never looked into: torch's own layers, hooks, scripted or compiled modules."""
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)) or module._compiled_call_impl is not None:
        return True
    name = type(module).__module__
    if name.startswith(("torch.nn", "torch.ao.nn", "torch._dynamo")) and not isinstance(module, nn.Sequential):
        return True
    return why_called_only(module) is not None


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
    module = target if isinstance(target, nn.Module) else None
    captured = Captured(fx.Graph(), module if module is not None else nn.Module())
    closure = frozenset() if isinstance(target, nn.Module) else _closure_tensors(target)
    tracer = _Tracer(captured, closure, signature, kinds)
    watched = []
    if module is not None:
        tracer.prepare(module)
        watched = [m for m in module.modules() if m is module or isinstance(m, _CONTAINERS) or not called_only(m)]
    functions = {type(m).forward for m in watched} if module is not None else {target}
    read_outside = {f: list(outside_values(f, tensors=module is None)) for f in functions if hasattr(f, "__code__")}
    for holder, key, _ in (read for reads in read_outside.values() for read in reads):
        tracer.mind(holder[key] if isinstance(holder, dict) else holder.cell_contents)
    try:
        with tracing(tracer, watched):
            captured.graph = tracer.trace(target)
    except Exception as error:  # tracing runs the user's Python with proxies: anything can come out of it
        raise tracer.refused or Untraceable(_first_line(error)) from error
    finally:
        changed = tracer.put_back()
    if tracer.refused is not None:  # raised, and caught by the traced Python
        raise tracer.refused
    tracer.parameters.clear()
    if changed or kept_elsewhere(tracer.values):
        raise Untraceable("it keeps a value outside its results, which a trace would not repeat")
    captured.root, captured.is_function = tracer.root, module is None
    for path in captured.inlined:
        captured.assumed.bypass(path, captured.root.get_submodule(path))
    if module is not None:
        captured.assumed.reach(captured.graph, module)
    used = {type(captured.root.get_submodule(p)).forward for p in {"", *captured.inlined}} if module else functions
    captured.assumed.outside = [read for f in used for read in read_outside.get(f, ())]
    return captured


def _closure_tensors(function: types.FunctionType) -> frozenset[int]:
    """Tensors a function may refer to without making them: its closure, defaults and globals."""
    values = [c.cell_contents for c in function.__closure__ or () if _filled(c)]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values += [function.__globals__.get(name) for name in function.__code__.co_names]
    return frozenset(id(v) for v in values if isinstance(v, torch.Tensor))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
