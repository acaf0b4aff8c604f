"""A captured forward as straight-line calls: eager's own operations, without the Python that leads to them.

What goes by eager's own operations (`aside.py`) is small, and much of its time on the host is nn.Module's: finding a
layer, asking for its hooks, reading its tensors. A graph rests on all of that being as it was captured, and that is
checked before a call (`assume.py`), so the layers of its matches need not be called: each becomes the operation that
its forward comes to, in the same order and with the same arguments. Bit for bit eager's result and gradients.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxfuse.aside import checked
from fxfuse.assume import Source
from fxfuse.codegen import compile_graph

__all__ = ["Straight", "batch_norm", "open_layers"]

_has_torch_function = torch._C._has_torch_function


class Straight:
    """The forward of a graph that is about to be rewritten; a copy of it is kept, and nothing of a module.

    graph: as it was captured. call: the ``function`` of one tensor behind its check (`aside.checked`).
    """

    call: Callable[..., Any] | None = None

    def __init__(self, graph: fx.Graph) -> None:
        self._graph: fx.Graph | None = copy.deepcopy(graph)
        for node in self._graph.nodes:
            node.meta = {}
        self._layers: frozenset[str] = frozenset()
        self._source: Source = ([], {})
        self._function: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def may_open(self, layers: Iterable[str], source: Source) -> None:
        """layers: paths of those of torch's whose type, settings and lack of hooks `source` checks."""
        self._layers, self._source = frozenset(layers), source

    def function(self, owner: nn.Module) -> Callable[..., Any] | None:
        """``forward(self, *inputs)``, made once. owner: a module for which the graph holds. None where no layer can be
        opened, so that the forward as it was written is as short."""
        with self._lock:  # replicas of a module run side by side, and share this
            graph, self._graph = self._graph, None
            if graph is not None and open_layers(graph, owner, self._layers):
                self._function = compile_graph(graph, owner)
                if sum(node.op == "placeholder" for node in graph.nodes) == 1:
                    self.call = checked(self._function, self._source)
            return self._function


def open_layers(graph: fx.Graph, root: nn.Module, layers: Container[str]) -> int:
    """Write the calls of `layers` that are known here as operations, in place; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_module" or node.target not in layers or len(node.args) != 1 or node.kwargs:
            continue
        path = str(node.target)
        layer = root.get_submodule(path)
        lower = _LAYERS.get(type(layer))
        if lower is not None:
            with graph.inserting_before(node):
                new = lower(graph, path, layer, node.args[0])
            new.meta = node.meta
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            count += 1
    return count


def _linear(graph: fx.Graph, path: str, layer: nn.Module, x: Any) -> fx.Node:
    weight, bias = (graph.create_node("get_attr", f"{path}.{name}") for name in ("weight", "bias"))
    return graph.call_function(F.linear, (x, weight, bias))


def _relu(graph: fx.Graph, path: str, layer: nn.ReLU, x: Any) -> fx.Node:
    return graph.call_function(F.relu, (x,), {"inplace": layer.inplace})


def _batch_norm(graph: fx.Graph, path: str, layer: nn.Module, x: Any) -> fx.Node:
    return graph.call_function(batch_norm, (graph.create_node("get_attr", path), x))


_LAYERS: dict[type, Callable[[fx.Graph, str, Any, Any], fx.Node]] = {
    nn.Linear: _linear, nn.ReLU: _relu, nn.BatchNorm1d: _batch_norm,
}  # fmt: skip


def batch_norm(bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """What ``bn.forward(x)`` comes to. Whatever is not the usual case is left to it."""
    settings, parameters, buffers = bn.__dict__, bn._parameters, bn._buffers
    training, momentum = settings["training"], settings["momentum"]
    if (training is not True and training is not False) or momentum is None or not settings["track_running_stats"]:
        return bn.forward(x)
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # kept in another way
        return bn.forward(x)
    if mean is None or var is None or _has_torch_function((x, weight, bias, mean, var)):
        return bn.forward(x)
    if x.dim() != 2 or x.size(0) < 2 or "_check_input_dim" in settings:
        return bn.forward(x)
    if training and batches is not None:
        batches.add_(1)
    enabled = torch._C._get_cudnn_enabled()
    return torch.batch_norm(x, weight, bias, mean, var, training, momentum, settings["eps"], enabled)
