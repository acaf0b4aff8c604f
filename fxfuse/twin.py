"""A twin of a module tree: new module objects, the same tensors.

Parameters and buffers are the very same objects, so an optimizer built for the original trains the twin. Everything
that refers to a module of the tree (lists, dicts, bound methods, hooks, closures of one level) refers to its twin.
Lists, dicts and sets are copied, so what a forward writes into them stays with the twin; all else is shared.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["twin"]

_PLAIN = frozenset({bool, int, float, str, type(None)})
#: the tables nn.Module itself keeps, each module its own
_TABLES = frozenset(key for key, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


def twin(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The twins of a tree's modules, ``list(root.modules())``, in that order: the root's comes first.

    ``torch.compile(m)`` is made anew around the twin of ``m``. A module compiled in place (``m.compile()``) is not
    compiled any more. What is inside TorchScript cannot be rebuilt and is shared, its train or eval mode, too.
    """
    made: dict[int, Any] = {}
    for m in modules:
        made[id(m)] = _empty(m)
    for m in modules:
        if not isinstance(m, torch.jit.ScriptModule):
            _fill(m, made[id(m)], made)
    kinds = (fx.GraphModule, *_compiled_kind())
    for m in reversed([m for m in modules if isinstance(m, kinds)]):  # children first
        if isinstance(m, fx.GraphModule):
            made[id(m)].graph = _copy_of(m.graph)
        else:
            _compile_again(m, made)
    return [made[id(m)] for m in modules]


def _empty(module: nn.Module) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return copy.copy(module)
    if isinstance(module, fx.GraphModule):  # every one has a class of its own
        return module.__class__.__new__(module.__class__)
    return object.__new__(type(module))


def _fill(original: nn.Module, copied: nn.Module, made: dict[int, Any]) -> None:
    state = copied.__dict__
    state.update(original.__dict__)
    for key, value in original.__dict__.items():
        if key in _TABLES:
            if not value:  # mostly no hooks
                state[key] = type(value)()
            elif key == "_modules":
                state[key] = {name: made.get(id(item), item) for name, item in value.items()}
            elif key == "_parameters" or key == "_buffers":
                state[key] = value.copy()
            else:
                state[key] = _remap(value, made)
        elif type(value) not in _PLAIN:
            state[key] = _remap(value, made)
    state.pop("_compiled_call_impl", None)


def _compiled_kind() -> tuple[type, ...]:
    """What torch.compile returns for a module; nothing where Dynamo was never loaded."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return (dynamo.OptimizedModule,) if dynamo is not None else ()


def _compile_again(original: Any, made: dict[int, Any]) -> None:
    copied = made[id(original)]
    state = dict(copied.__dict__)
    copied.__dict__.clear()
    type(original).__init__(copied, made[id(original._orig_mod)], original.dynamo_ctx)
    copied.__dict__.update({key: value for key, value in state.items() if "_hooks" in key or key == "training"})


def _copy_of(graph: fx.Graph) -> fx.Graph:
    """A graph of its own; node metadata (shapes) is shared, deepcopy would copy it."""
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    copied._codegen = graph._codegen
    renamed: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        renamed[node] = copied.node_copy(node, renamed.__getitem__)
    return copied


# --- attributes that may refer to modules ----------------------------------------------------------------------------


def _remap(value: Any, made: dict[int, Any]) -> Any:
    """``value`` with every module of the tree replaced by its twin."""
    if isinstance(value, nn.Module):
        return made.get(id(value), value)
    remap = _REMAP.get(type(value))
    return value if remap is None else remap(value, made)


def _sequence(value: Any, made: dict[int, Any]) -> Any:
    if id(value) not in made:
        copied: Any = deque(maxlen=value.maxlen) if isinstance(value, deque) else type(value)()
        made[id(value)] = copied
        add = copied.add if isinstance(value, set) else copied.append
        for item in value:
            add(_remap(item, made))
    return made[id(value)]


def _mapping(value: Any, made: dict[int, Any]) -> Any:
    if id(value) not in made:
        made[id(value)] = copied = type(value)()
        for key, item in value.items():
            copied[key] = _remap(item, made)
    return made[id(value)]


def _tuple(value: Any, made: dict[int, Any]) -> Any:
    if _PLAIN.issuperset(map(type, value)):
        return value
    items = tuple(_remap(item, made) for item in value)
    return items if any(a is not b for a, b in zip(items, value, strict=False)) else value


def _method(value: types.MethodType, made: dict[int, Any]) -> types.MethodType:
    owner = _remap(value.__self__, made)
    function = _remap(value.__func__, made)
    same = owner is value.__self__ and function is value.__func__
    return value if same else types.MethodType(function, owner)


def _partial(value: Any, made: dict[int, Any]) -> Any:
    args = _tuple(value.args, made)
    keywords = {key: _remap(item, made) for key, item in value.keywords.items()}
    function = _remap(value.func, made)
    copied = functools.partial(function, *args, **keywords)
    copied.__dict__.update({key: _remap(item, made) for key, item in value.__dict__.items()})
    return copied


def _function(value: types.FunctionType, made: dict[int, Any]) -> types.FunctionType:
    """A closure over a module of the tree, as ``self.act = lambda x: self.fc(x)`` makes one."""
    cells = value.__closure__ or ()
    if not any(_contents(cell) is not None and id(_contents(cell)) in made for cell in cells):
        return value
    closure = tuple(types.CellType(made[id(_contents(c))]) if id(_contents(c)) in made else c for c in cells)
    copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
    copied.__kwdefaults__ = value.__kwdefaults__
    copied.__dict__.update(value.__dict__)
    return copied


def _contents(cell: Any) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:
        return None
    return value if isinstance(value, nn.Module) else None


def _weak(value: Any, made: dict[int, Any]) -> Any:
    target = value()
    return weakref.ref(made[id(target)]) if isinstance(target, nn.Module) and id(target) in made else value


def _handle(value: RemovableHandle, made: dict[int, Any]) -> RemovableHandle:
    """A hook's handle removes the twin's hook."""
    table = value.hooks_dict_ref()
    if table is None:
        return value
    copied = RemovableHandle.__new__(RemovableHandle)
    copied.id = value.id
    copied.hooks_dict_ref = weakref.ref(_mapping(table, made))
    tables = [ref() for ref in value.extra_dict_ref]
    copied.extra_dict_ref = tuple(weakref.ref(_mapping(t, made)) for t in tables if t is not None)
    return copied


_REMAP: dict[type, Callable[[Any, dict[int, Any]], Any]] = {
    list: _sequence,
    set: _sequence,
    deque: _sequence,
    dict: _mapping,
    OrderedDict: _mapping,
    tuple: _tuple,
    types.MethodType: _method,
    types.FunctionType: _function,
    functools.partial: _partial,
    weakref.ref: _weak,
    RemovableHandle: _handle,
}
