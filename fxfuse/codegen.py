"""An fx graph as a Python function that reads its tensors from a module."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable
from typing import Any

from torch import fx, nn

__all__ = ["compile_graph"]


def compile_graph(graph: fx.Graph, root: nn.Module) -> Callable[..., Any]:
    """The graph as a Python function ``forward(self, *inputs)``; its source is kept for tracebacks."""
    for node in graph.nodes:
        if node.name in _TAKEN or node.target in _TAKEN:
            node._rename(f"{node.name}_value")
            if node.op == "placeholder":
                node.target = node.name
        if node.op == "call_module" and any(map(keyword.iskeyword, str(node.target).split("."))):
            with graph.inserting_before(node):
                module = graph.create_node("get_attr", str(node.target))
            node.op, node.target, node.args = "call_method", "__call__", (module, *node.args)
    code = graph.python_code("self", verbose=False)
    namespace = dict(code.globals)
    source = code.src
    for path in {str(node.target) for node in graph.nodes if node.op == "get_attr"}:
        source = re.sub(rf"= self\.{re.escape(path)}(?![\w.\[(])", f"= {_reach(path, root)}", source)
    exec(compile(source, "<fxfuse forward>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    function.__fxfuse_source__ = source  # type: ignore[attr-defined]
    return function


#: What the source itself says: torch's functions go by their full names.
_TAKEN = frozenset(("self", "torch", "_m"))


def _reach(path: str, root: nn.Module) -> str:
    """Source of an attribute by its path from ``self``: where it lies in a table of nn.Module, out of that, for its own
    way takes several times as long."""
    *owners, name = path.split(".")
    here, owner = "self", root
    for step in owners:
        if step not in owner._modules:
            return f"self.{path}"
        here, owner = f"{here}._modules[{step!r}]", owner._modules[step]  # type: ignore[assignment]
    elsewhere = f"getattr(_m, {name!r})" if keyword.iskeyword(name) else f"_m.{name}"
    for table in ("_parameters", "_buffers", "_modules"):
        if name in getattr(owner, table):  # replicas of DataParallel hold their tensors as plain attributes
            return f"_m.{table}[{name!r}] if {name!r} in (_m := {here}).{table} else {elsewhere}"
    return f"self.{path}"
