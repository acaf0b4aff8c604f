"""What a graph takes for granted, and the check of it that runs before every fused call.

A symbolic trace freezes whatever Python decided while it ran. Everything it decided by is written down here:
attributes, the children of containers, types of modules whose call is replaced by their contents, global and
closed-over values. Where one of them has changed since, the graph does not hold and the module's own Python runs.
"""

from __future__ import annotations

import enum
import itertools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from fxfuse.watch import type_of

__all__ = ["CALLS", "Assumptions", "Source", "compile_check", "first_tensor", "outside_values", "picture"]

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_MOST_ITEMS = 256

#: lines of a check, and what they name
Source: TypeAlias = tuple[list[str], dict[str, Any]]


class _Same:
    """Equal to itself: an object that is compared by identity."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def picture(value: Any, depth: int = 3) -> Any:
    """A value as something that compares equal as long as a trace would have read the same from it.

    Plain values, lists, dicts and the attributes of plain objects (a config) are compared by content; modules by type;
    tensors, functions and everything else by identity.
    """
    kind = type(value)
    if kind in _SIMPLE:
        return (kind, value) if value == value else kind  # NaN is not equal to itself
    if isinstance(value, nn.Module):
        return type_of(value)
    if depth and kind in (list, tuple, set, frozenset, deque, torch.Size) and len(value) <= _MOST_ITEMS:
        return (kind, [picture(item, depth - 1) for item in value])
    if depth and isinstance(value, dict) and len(value) <= _MOST_ITEMS:
        return (kind, [(key, picture(item, depth - 1)) for key, item in value.items()])
    if depth and not isinstance(value, (type, enum.Enum, torch.Tensor, types.ModuleType)) and not callable(value):
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            return (kind, _Same(value), picture(attributes, depth - 1))
    return _Same(value)


#: names by which an instance is called in another way than its class says
CALLS = frozenset(("forward", "_call_impl", "_compiled_call_impl"))
_LISTS_OF_TENSORS = frozenset(("named_parameters", "named_buffers"))  # parameters() and buffers() ask these


def first_tensor(module: nn.Module) -> tuple[torch.dtype, torch.device] | None:
    """Dtype and device of a module's first parameter, or buffer, as those who ask for its own take them."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return None if first is None else (first.dtype, first.device)


@dataclass
class Assumptions:
    """What one graph rests on; paths are from the module that owns it, '' being that module.

    Attributes:
        values: (path, attribute) -> :func:`picture` of what was read.
        own: those of them that lie in the module's ``__dict__``, where they are read in a third of the time: a class
            with ``__getattr__`` asks for everything twice.
        methods: path -> names found on the class, which an instance attribute of the name would hide.
        tensors: path -> :func:`first_tensor` of a module whose tensors were listed (``next(self.parameters()).dtype``).
        absent: (path, attribute) that was asked for and is not there.
        present: (path, attribute) of tensors that stand in the graph, and so are not None -> the table that has them.
        aliases: (path, source of a module behind it) -> the path by which the graph knows that module.
        children: path -> the (name, type) of every child of a module whose children were listed.
        bypassed: path -> type of a module whose call stands in the graph by its contents: hooks would not run.
        settings: (function of torch, arguments) -> what it said (whether gradients are on).
        outside: (holder, key, value) of globals and closure cells a traced function reads.
    """

    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    own: set[tuple[str, str]] = field(default_factory=set)
    methods: dict[str, set[str]] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    absent: set[tuple[str, str]] = field(default_factory=set)
    present: dict[tuple[str, str], str] = field(default_factory=dict)
    aliases: dict[tuple[str, str], str] = field(default_factory=dict)
    children: dict[str, list[tuple[str, type]]] = field(default_factory=dict)
    bypassed: dict[str, type] = field(default_factory=dict)
    settings: dict[tuple[Callable[..., Any], tuple[Any, ...]], Any] = field(default_factory=dict)
    outside: list[tuple[Any, str, Any]] = field(default_factory=list)

    def forget_reads(self) -> None:
        """Rest on nothing that was read from modules so far."""
        tables = self.values, self.methods, self.present, self.aliases, self.children, self.settings
        for table in (*tables, self.own, self.absent):
            table.clear()

    def reach(self, graph: fx.Graph, root: nn.Module) -> None:
        """Rest on the modules by whose paths the graph finds its calls and tensors: the forward may have come to them
        in another way (a list, a second name). And on what listed tensors are."""
        for path, names in self.methods.items():
            if not names.isdisjoint(_LISTS_OF_TENSORS):
                self.tensors[path] = first_tensor(root.get_submodule(path))
        for node in graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            *steps, last = str(node.target).split(".")
            owner: Any = root
            for depth, step in enumerate([*steps, last] if node.op == "call_module" else steps):
                path, owner = ".".join(steps[:depth]), owner._modules.get(step)
                if owner is None:
                    break
                if path not in self.children and f"{path}.{step}".lstrip(".") not in self.bypassed:
                    self.values.setdefault((path, step), type_of(owner))
            if node.op == "get_attr" and owner is not None:
                self.present[".".join(steps), last] = "_parameters" if last in owner._parameters else "_buffers"

    def bypass(self, path: str, module: nn.Module) -> None:
        """Take for granted that the module at ``path`` stays of its type and without hooks."""
        self.bypassed[path] = type(module)
        owner, _, name = path.rpartition(".")
        self.values.pop((owner, name), None)  # the same, and less

    def read_settings(self, path: str, module: nn.Module) -> None:
        """Take for granted the plain attributes (``negative_slope``) of a layer whose call was read."""
        for name, value in module.__dict__.items():
            if type(value) in _SIMPLE and not name.startswith("_") and name not in ("training", "call_super_init"):
                self.values[(path, name)] = picture(value)
                self.own.add((path, name))
        for name, parameter in module._parameters.items():
            if parameter is None:
                self.values[(path, name)] = picture(None)

    def check(self) -> Callable[[Any], bool]:
        """``holds(module)``: whether all of it is still so."""
        lines, names = self.source()
        return compile_check("self", lines, ["return True"], names, otherwise=False) if lines else _always

    def source(self) -> Source:
        """Lines about ``self`` that ``return OTHERWISE`` or raise where anything has changed, and what they name."""
        names: dict[str, Any] = {"picture": picture, "first_tensor": first_tensor}
        lines: list[str] = []

        def constant(value: Any) -> str:
            name = f"k{len(names)}"
            names[name] = value
            return name

        for holder, key, value in self.outside:
            here = constant(holder) + (f".get({key!r})" if isinstance(holder, dict) else ".cell_contents")
            lines.append(_unless(_differs(here, value, constant)))
        for (question, args), answer in self.settings.items():
            lines.append(_unless(f"{constant(question)}(*{constant(args)}) != {constant(answer)}"))
        pairs = (*self.values, *self.absent, *self.present, *self.aliases)
        with_own = {*self.methods, *self.bypassed, *(path for path, _ in self.own)}
        for path in sorted({path for path, _ in pairs} | {*self.methods, *self.children, *self.bypassed}):
            lines.append(f"m = self{_steps(path)}")
            if path in with_own:
                lines.append("own = m.__dict__")
            tests = list(self._tests(path, constant))
            if tests:
                lines.append(_unless(" or ".join(tests)))
        return lines, names

    def _tests(self, path: str, constant: Callable[[Any], str]) -> Iterator[str]:
        hiding = set(self.methods.get(path, ()))
        if path in self.bypassed and path:
            yield f"type(m) is not {constant(self.bypassed[path])}"
            hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            yield " or ".join(f"own[{name!r}]" for name in hooks)
            hiding |= CALLS
        for name in sorted(hiding):
            yield f"{name!r} in own"
        if path in self.tensors:
            yield f"first_tensor(m) != {constant(self.tensors[path])}"
        yield from (f"hasattr(m, {name!r})" for owner, name in sorted(self.absent) if owner == path)
        for (owner, name), table in self.present.items():
            if owner == path:  # replicas of DataParallel hold their tensors as plain attributes
                yield f"m.{table}.get({name!r}) is None and getattr(m, {name!r}, None) is None"
        for (owner, source), known in self.aliases.items():
            if owner == path:
                yield f"m.{source} is not self{_steps(known)}"
        if path in self.children:
            yield f"[(n, type(c)) for n, c in m._modules.items()] != {constant(self.children[path])}"
        for (owner, attribute), value in self.values.items():
            if owner == path:
                child = isinstance(value, type) and issubclass(value, nn.Module)
                here = f"own[{attribute!r}]" if (owner, attribute) in self.own else f"m.{attribute}"
                yield _differs(f"m._modules[{attribute!r}]" if child else here, value, constant)


def compile_check(
    arguments: str,
    lines: Iterable[str],
    then: Iterable[str],
    names: dict[str, Any],
    *,
    otherwise: Any,
    first: Iterable[str] = (),
) -> Callable[..., Any]:
    """A function of the lines `first`, a source's and `then`. Straight-line code, since it runs at every call."""
    source = [f"def check({arguments}):", *(f"    {line}" for line in first)]
    source += ["    try:", "        pass", *(f"        {line}" for line in lines)]
    source += ["    except (LookupError, AttributeError, TypeError, ValueError):", "        return OTHERWISE"]
    source += [f"    {line}" for line in then]
    names = {**names, "OTHERWISE": otherwise}
    exec(compile("\n".join(source), "<fxfuse condition>", "exec"), names)
    check: Callable[..., Any] = names["check"]
    return check


def _unless(test: str) -> str:
    return f"if {test}: return OTHERWISE"


def _differs(here: str, value: Any, constant: Callable[[Any], str]) -> str:
    """Source of the test whether ``here`` is not what its picture shows; plain values without drawing a new one."""
    if isinstance(value, type):
        return f"type({here}) is not {constant(value)}"
    kind, content = value if isinstance(value, tuple) and len(value) == 2 else (None, None)
    if kind is bool or kind is type(None):
        return f"{here} is not {content}"
    if kind in _SIMPLE:  # nearly always the very object
        return f"{here} is not {constant(content)} and picture({here}) != {constant(value)}"
    return f"picture({here}) != {constant(value)}"


def _steps(path: str) -> str:
    """Source that follows a path from a module."""
    return "".join(f"._modules[{name!r}]" for name in path.split(".") if name)


def _always(owner: Any) -> bool:
    return True


def outside_values(function: Any, tensors: bool = False) -> Iterator[tuple[Any, str, Any]]:
    """(holder, key, picture) of the plain values a function reads from its globals and its closure.

    ``tensors`` takes in tensors, too: they are compared by identity.
    """
    wanted = (*_SIMPLE, list, tuple, dict, set)

    def taken(value: Any) -> bool:
        return type(value) in wanted or (tensors and isinstance(value, torch.Tensor))

    for name in sorted(_names_in(function.__code__)):
        if name in function.__globals__ and taken(function.__globals__[name]):
            yield function.__globals__, name, picture(function.__globals__[name])
    for cell in function.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if taken(value):
            yield cell, "", picture(value)


def _names_in(code: types.CodeType) -> set[str]:
    inner = [_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inner)
