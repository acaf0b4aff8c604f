"""A read-only reading of an fx graph: node -> Call(operation, canonical arguments). The graph is not touched.

Module parameters appear as :class:`Attr` and become ``get_attr`` nodes only inside a replacement. In-place calls are
read as their out-of-place meaning: what is read after ``y.mul_(s)`` under the name ``y`` is the result of the ``mul_``.
"""

from __future__ import annotations

import bisect
import functools
import inspect
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxfuse import vocabulary
from fxfuse.vocabulary import Unreadable

__all__ = ["Attr", "Call", "ModuleRef", "View"]

_IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
} | {operator.setitem}
#: results of these share memory with their first argument even though the vocabulary has no operation for them
_ALIASING_METHODS = frozenset(
    "view view_as reshape reshape_as expand expand_as squeeze unsqueeze narrow select chunk split unbind permute "
    "transpose t flatten unflatten swapaxes swapdims movedim diagonal as_strided detach contiguous to type_as float "
    "double half bfloat16 requires_grad_ __getitem__ real imag unfold alias view_as_real view_as_complex "
    "int long bool cpu cuda adjoint broadcast_to conj resolve_conj resolve_neg dsplit hsplit vsplit tensor_split "
    "split_with_sizes unsafe_chunk unsafe_split moveaxis positive ravel as_subclass".split()
)
#: calls that turn gradients or autocast on or off from here on
_MODE_CHANGES = frozenset(
    "_set_grad_enabled set_grad_enabled _enter_autocast _exit_autocast "
    "_enter_inference_mode _exit_inference_mode".split()
)
#: in-place calls on one value that are followed as versions of it; more than these are rare, and would cost time
_MOST_VERSIONS = 32


@dataclass(frozen=True, slots=True)
class Attr:
    """A parameter, buffer or plain tensor of the module, by its path from the graph's root: ``Attr("fc.weight")``."""

    path: str


@dataclass(frozen=True, slots=True)
class ModuleRef:
    """A submodule, by its path from the graph's root."""

    path: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a node computes, in canonical words."""

    op: str
    args: dict[str, Any]
    node: fx.Node
    inplace: bool = False


class View:
    """The reading of one graph.

    Args:
        graph: the fx graph; never changed by the view.
        root: the module whose attributes the graph names (None for a graph without module attributes).
        leave_alone: module paths that must stay calls, with the reason (hooks, parametrizations).
    """

    def __init__(self, graph: fx.Graph, root: nn.Module | None) -> None:
        self.graph = graph
        self.root = root
        self.order: dict[fx.Node, int] = {}
        self.operations: dict[fx.Node, str] = {}
        self._calls: dict[fx.Node, Call | str] = {}
        self._versions: dict[fx.Node, list[fx.Node]] = {}  # a value changed in place -> its names, in order
        self.mutations: list[tuple[fx.Node, fx.Node]] = []  # (mutating node, mutated node as the graph names it)
        self._mutating: set[fx.Node] = set()
        self.mode_changes: list[fx.Node] = []
        self.replaced: dict[fx.Node, fx.Node] = {}  # what holds an erased node's value
        self._modules: dict[str, nn.Module | None] = {}
        self._kin: dict[type, tuple[vocabulary.Operation, str] | None] = {}
        for position, node in enumerate(graph.nodes):
            self.order[node] = position
            self._first_look(node)

    # --- reading --------------------------------------------------------------------------------------------------

    def call(self, value: Any) -> Call | None:
        """The canonical call behind a value, or None (a placeholder, a constant, an operation without a word)."""
        found = self._calls.get(value) if isinstance(value, fx.Node) else None
        if found is None and isinstance(value, fx.Node) and value in self.operations:
            found = self._calls[value] = self._read(value)
        return found if isinstance(found, Call) else None

    def describe(self, value: Any) -> str:
        """A value in a few words, for reasons and reports."""
        if isinstance(value, Attr):
            return value.path
        if not isinstance(value, fx.Node):
            return repr(value)
        self.call(value)
        reason = self._calls.get(value)
        if isinstance(reason, str):
            return f"{value.name} ({reason})"
        if value in self.operations:
            return self.operations[value]
        if value.op == "call_module":
            module = self.module(str(value.target))
            return f"{type(module).__name__} '{value.target}'"
        if value.op == "placeholder":
            return f"the input '{value.name}'"
        if value.op == "get_attr":
            return f"the attribute '{value.target}'"
        target = value.target if isinstance(value.target, str) else getattr(value.target, "__name__", str(value.target))
        return str(target)

    def module(self, path: str) -> nn.Module | None:
        """The submodule at a path, or None."""
        if path not in self._modules:
            here: Any = self.root
            for name in path.split(".") if path else ():
                children: dict[str, Any] = getattr(here, "__dict__", {}).get("_modules", {})
                here = children[name] if name in children else getattr(here, name, None)
            self._modules[path] = here if isinstance(here, nn.Module) else None
        return self._modules[path]

    def tensor(self, value: Any) -> torch.Tensor | None:
        """The tensor (real or fake) known to stand behind a value when the graph is read, or None."""
        path = value.path if isinstance(value, Attr) else None
        if isinstance(value, fx.Node):
            for key in ("example_value", "val"):
                known = value.meta.get(key)
                if isinstance(known, torch.Tensor):
                    return known
            if value.op == "get_attr":
                path = str(value.target)
        if path is None:
            return None
        owner, _, name = path.rpartition(".")
        module = self.module(owner)
        found = getattr(module, name, None) if module is not None else None
        return found if isinstance(found, torch.Tensor) else None

    def rank(self, value: Any) -> int | None:
        """The number of dimensions of a value, where it is known."""
        known = self.tensor(value)
        if known is not None:
            return known.dim()
        call = self.call(value)
        if call is not None and call.op in ("linear", "relu", "gelu", "silu", "sigmoid", "tanh", "neg", "log"):
            return self.rank(call.args["x"])
        return None

    def is_number(self, value: Any) -> bool | None:
        """Whether a value is a Python number (True), a tensor or something else (False), or not known (None)."""
        if isinstance(value, bool):
            return False
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            return True
        if not isinstance(value, fx.Node):
            return False
        for key in ("example_value", "val"):
            if key in value.meta:
                return isinstance(value.meta[key], (int, float, torch.SymInt, torch.SymFloat))
        if value.op == "call_method" and value.target == "item":
            return True
        if value.op == "get_attr" or value in self.operations:
            return False
        return None

    # --- users under the names the graph means ----------------------------------------------------------------------

    def now(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """Which node holds the value ``reader`` gets when it reads ``node``: the last in-place call before it."""
        here = self.order[reader]
        for version in reversed(self._versions.get(node, ())):
            if self.order[version] < here:
                return version
        return node

    def readers(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Every (reader, name it reads) that gets this node's value; in-place calls answer to several names."""
        names = self._versions.get(node, (node,))
        return [(u, name) for name in names for u in name.users if u is not node and self.now(name, u) is node]

    def later_users(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Every (user, name it uses) behind this node that gets its memory, changed in place since or not."""
        names = self._versions.get(node, [node])
        here = self.order[node]
        upto = names[: names.index(node) + 1]
        return [(user, name) for name in upto for user in name.users if self.order[user] > here]

    def renamed(self, node: fx.Node, new: fx.Node) -> None:
        """``new`` stands in the place of ``node`` from now on."""
        self.replaced[node] = new
        names = self._versions.get(node)
        if names is not None:
            names[names.index(node)] = new
            self._versions[new] = names

    def first_readers(self, node: fx.Node, count: int) -> list[fx.Node]:
        """Up to ``count`` of the nodes that read this node's value: what asks does not pay for thousands of them."""
        if node not in self._versions:
            return list(itertools.islice(node.users, count))
        return [user for user, _ in self.readers(node)[:count]]

    def mutations_between(self, first: int, last: int) -> list[tuple[fx.Node, fx.Node]]:
        """The in-place changes after position ``first`` of the graph and up to ``last``."""
        start = bisect.bisect_right(self.mutations, first, key=lambda change: self.order[change[0]])
        changes = itertools.islice(self.mutations, start, None)
        return list(itertools.takewhile(lambda change: self.order[change[0]] <= last, changes))

    # --- building -------------------------------------------------------------------------------------------------

    def _first_look(self, node: fx.Node) -> None:
        """What can be told without binding arguments: the operation's name, in-place calls, changes of mode."""
        kind = node.op
        if kind == "call_function" or kind == "call_method":
            target = node.target
            if "out" in node.kwargs:
                out = node.kwargs["out"]
                for written in out if isinstance(out, (tuple, list)) else (out,):
                    self._note_mutation(node, written)
            spelling = vocabulary.spelling_of(target, kind)
            if spelling is not None:
                self.operations[node] = spelling.operation.name
                if spelling.inplace or node.kwargs.get("inplace") or spelling.adapt is vocabulary._inplace_flag:
                    self._note_in_place(node, spelling.inplace)
                return
            if target in vocabulary.ATTRIBUTE_READS:
                known = vocabulary.attribute_spelling(str(node.args[1])) if len(node.args) == 2 else None
                if known is not None:
                    self.operations[node] = known.operation.name
                return
            name = target if isinstance(target, str) else getattr(target, "__name__", "")
            in_place = target in _IN_PLACE_OPERATORS or (name.split(".")[0].endswith("_") and not name.startswith("_"))
            if in_place or _asked_in_place(node):
                self._note_mutation(node, _first_argument(node))
            if name in _MODE_CHANGES:
                self.mode_changes.append(node)
        elif kind == "call_module":
            module = self.module(str(node.target))
            if module is None:
                return
            layer = type(module)
            if layer not in self._kin:
                self._kin[layer] = vocabulary.module_kin(layer)
            reader, kin = vocabulary.module_reader(layer), self._kin[layer]
            if reader is not None:
                self.operations[node] = reader[0].name
            elif kin is not None:
                self.operations[node] = kin[0].name
                self._calls[node] = f"'{node.target}' {why_called_only(module) or kin[1]}"
            # nn.Module takes its time to say that it has no such attribute
            has_flag = "inplace" in module.__dict__ or hasattr(layer, "inplace")
            if has_flag and getattr(module, "inplace", False) is True:
                self._note_in_place(node, reader is not None)

    def _note_in_place(self, node: fx.Node, certain: bool) -> None:
        if not certain and node.op != "call_module":
            call = self.call(node)
            if call is not None and call.args.get("inplace") is False:
                return
            if call is not None and not call.inplace:
                return
        base = _first_argument(node)
        self._note_mutation(node, base)
        if base is None or node not in self.operations:
            return
        # in-place on a value somebody already looked at through another name is not a chain of values any more
        names = self._versions.get(base, [base])
        here = self.order[node]
        seen = (u for name in names for u in name.users if u is not node and self.order.get(u, here) < here)
        fresh = base.op.startswith("call") and not self._aliases_input(base)
        if not fresh or any(u not in names for u in seen):
            self._calls[node] = "works in place on a value that is also read elsewhere"
        elif len(names) > _MOST_VERSIONS:
            self._calls[node] = f"is more than the {_MOST_VERSIONS}th in-place call on one value"
        else:
            names.append(node)
            self._versions[base] = self._versions[node] = names

    def _note_mutation(self, node: fx.Node, changed: Any) -> None:
        if isinstance(changed, fx.Node):
            self.mutations.append((node, changed))
            self._mutating.add(node)

    def _aliases_input(self, node: fx.Node) -> bool:
        """Whether the node's result may be memory that existed before the node ran."""
        name = self.operations.get(node)
        if name is not None:
            return vocabulary.OPERATIONS[name].aliases
        return True

    def storage(self, value: Any) -> set[Any]:
        """Names (nodes, attribute paths) whose memory the value may share."""
        seen: set[Any] = set()
        todo = [value]
        while todo:
            item = todo.pop()
            if isinstance(item, Attr):
                seen.add(item.path)
                continue
            if not isinstance(item, fx.Node) or item in seen:
                continue
            seen.add(item)
            if item.op == "get_attr":
                seen.add(str(item.target))
            elif item.op.startswith("call"):
                name = self.operations.get(item)
                in_place = item in self._mutating
                fresh = name is not None and not vocabulary.OPERATIONS[name].aliases and not in_place
                if name is None and item.op == "call_method" and item.target not in _ALIASING_METHODS:
                    fresh = not in_place
                if not fresh:
                    todo += item.all_input_nodes
        return seen

    def _read(self, node: fx.Node) -> Call | str:
        try:
            return self._bind(node)
        except Unreadable as reason:
            return str(reason)

    def _bind(self, node: fx.Node) -> Call:
        resolve = {a: self.now(a, node) for a in node.all_input_nodes} if self._versions else {}

        def settle(value: Any) -> Any:
            return resolve.get(value, value) if isinstance(value, fx.Node) else value

        if node.op == "call_module":
            return self._bind_module(node, settle)
        spelling = vocabulary.spelling_of(node.target, node.op)
        if spelling is None:
            spelling = vocabulary.attribute_spelling(str(node.args[1]))
            assert spelling is not None
            return Call(spelling.operation.name, {"x": settle(node.args[0])}, node)
        bound = {key: settle(value) for key, value in spelling.bind(node.args, node.kwargs).items()}
        inplace = spelling.inplace or bound.pop("inplace", False)
        return Call(spelling.operation.name, bound, node, inplace)

    def _bind_module(self, node: fx.Node, settle: Any) -> Call:
        path = str(node.target)
        module = self.module(path)
        assert module is not None
        refusal = why_called_only(module)
        if refusal is not None:
            raise Unreadable(f"'{path}' {refusal}")
        reader = vocabulary.module_reader(type(module))
        assert reader is not None
        op, values = reader
        args = dict(values(module))
        names = ("input", "target") if op.name == "kl_div" else ("input",)  # as torch's own layers call them
        unknown = [key for key in node.kwargs if key not in names[len(node.args) :]]
        if len(node.args) > len(names) or unknown:
            given = len(node.args) + len(node.kwargs)
            raise Unreadable(f"'{path}' is called with {given} arguments, not with {' and '.join(names)} alone")
        for position, value in enumerate(node.args):
            args[op.params[position]] = settle(value)
        for key, value in node.kwargs.items():
            args[op.params[names.index(key)]] = settle(value)
        if op.name == "linear":
            args["weight"] = Attr(f"{path}.weight")
            args["bias"] = Attr(f"{path}.bias") if module.bias is not None else None
        elif "module" in op.params:
            args["module"] = ModuleRef(path)
        elif op.name == "kl_div":
            args = vocabulary._reduction(args)
        inplace = args.pop("inplace", False)
        return Call(op.name, args, node, inplace)


def _first_argument(node: fx.Node) -> Any:
    """What an in-place call changes: its first argument, which torch names input or self."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _asked_in_place(node: fx.Node) -> bool:
    """Whether a call of torch.nn.functional is asked to work in place, as F.dropout and F.elu may be."""
    if node.op != "call_function" or getattr(node.target, "__module__", None) != F.__name__:
        return False
    position = _inplace_position(node.target)
    if position is None:
        return False
    given = node.args[position] if len(node.args) > position else node.kwargs.get("inplace", False)
    return given is not False


@functools.cache
def _inplace_position(function: Any) -> int | None:
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


def why_called_only(module: nn.Module) -> str | None:
    """Why a module must be called as it is (hooks, parametrizations), or None where its call may be read."""
    if module._forward_hooks or module._forward_pre_hooks:
        names = sorted({getattr(h, "__name__", type(h).__name__) for h in _hooks(module)})
        return f"has forward hooks ({', '.join(names)}), which a fusion would not run"
    if module._backward_hooks or getattr(module, "_backward_pre_hooks", None):
        return "has backward hooks, which a fusion would not run"
    parametrized: Any = getattr(module, "parametrizations", None)
    if parametrized is not None:
        return f"has parametrizations on {', '.join(parametrized)}"
    if isinstance(module, nn.Linear) and not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "computes its weight anew at every call"
    return None


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()
