"""An fx graph as a Python function that reads its tensors from a module."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import fx, nn

__all__ = ["compile_graph"]


def compile_graph(graph: fx.Graph, root: nn.Module) -> Callable[..., Any]:
    """The graph as a Python function ``forward(self, *inputs)``; its source is kept for tracebacks."""
    code = graph.python_code("self", verbose=False)
    namespace = dict(code.globals)
    source = code.src
    for path in {str(node.target) for node in graph.nodes if node.op == "get_attr"}:
        source = re.sub(rf"= self\.{re.escape(path)}(?![\w.\[(])", f"= {_reach(path, root)}", source)
    exec(compile(source, "<fxfuse forward>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    function.__fxfuse_source__ = source  # type: ignore[attr-defined]
    return function


def _reach(path: str, root: nn.Module) -> str:
    """Source of an attribute by its path from ``self``: where it lies in a table of nn.Module, out of that, for its own
    way takes several times as long."""
    *owners, name = path.split(".")
    here, owner = "self", root
    for step in owners:
        if step not in owner._modules:
            return f"self.{path}"
        here, owner = f"{here}._modules[{step!r}]", owner._modules[step]  # type: ignore[assignment]
    for table in ("_parameters", "_buffers", "_modules"):
        if name in getattr(owner, table):  # replicas of DataParallel hold their tensors as plain attributes
            return f"_m.{table}[{name!r}] if {name!r} in (_m := {here}).{table} else _m.{name}"
    return f"self.{path}"
