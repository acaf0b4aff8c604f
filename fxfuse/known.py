"""What is known of the tensors around a replacement when a graph is read, as plain data for the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxfuse.match import Match
from fxfuse.report import Step, Tensor
from fxfuse.view import Attr, ModuleRef, View

__all__ = ["UNKNOWN", "call_of", "steps_of"]

UNKNOWN = "?"
_PLAIN = (bool, int, float, str, type(None))


def steps_of(match: Match) -> tuple[Step, ...]:
    """The operations of a match in graph order; asked before they are replaced."""
    steps = []
    for node in sorted(set(match.nodes), key=lambda n: match.view.order[n]):
        call = match.view.call(node)
        given: dict[str, Any] = {}
        for name, value in call.args.items() if call is not None else ():
            given.update(_described(name, value, match.view))
        result = match.view.tensor(node)
        steps.append(Step(match.view.operations[node], given, _tensor(result)))
    return tuple(steps)


def call_of(new: fx.Node, op: str, view: View) -> dict[str, Any]:
    """The arguments of the op among the nodes a replacement wrote, ``new`` being the last of them."""
    node: fx.Node | None = new
    while node is not None and not _name(node).startswith(op):
        node = next((n for n in node.all_input_nodes if n.op.startswith("call")), None)
    if node is None:
        return {}
    given: dict[str, Any] = {}
    for name, value in node.kwargs.items():
        given.update(_described(name, value, view))
    return given


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _described(name: str, value: Any, view: View) -> dict[str, Any]:
    """One argument, or a module's tensors and settings as ``name.weight``, ``name.training``."""
    path = value.path if isinstance(value, ModuleRef) else None
    if isinstance(value, fx.Node) and value.op == "get_attr":
        path = str(value.target)
    module = view.module(path) if path is not None else None
    if module is not None:
        return {f"{name}.{key}": v for key, v in _settings(module).items()}
    if isinstance(value, (fx.Node, Attr)):
        return {name: _described_tensor(_known(value, view)) or UNKNOWN}
    if isinstance(value, (tuple, list)) and all(isinstance(v, _PLAIN) for v in value):
        return {name: tuple(value)}
    return {name: value if type(value) in _PLAIN else UNKNOWN}


def _settings(module: nn.Module) -> dict[str, Any]:
    tensors: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
    plain = {k: v for k, v in module.__dict__.items() if type(v) in _PLAIN and not k.startswith("_")}
    return {**{k: _tensor(v) for k, v in tensors.items()}, **plain}


def _known(value: Any, view: View) -> tuple[torch.Tensor, torch.device] | None:
    """The tensor behind a value and its device; what a replacement computes of known ones (a product of factors) is
    computed on the meta device."""
    found = view.tensor(value)
    if found is not None:
        return found, found.device
    if not isinstance(value, fx.Node) or value.op not in ("call_function", "call_method"):
        return None
    read = {n: _known(n, view) for n in value.all_input_nodes}
    empty: dict[fx.Node, torch.Tensor] = {}
    device = None
    for node, known in read.items():
        if known is None:
            return None
        tensor, device = known
        empty[node] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if device is None:
        return None
    args, kwargs = fx.map_arg((value.args, value.kwargs), empty.__getitem__)
    function = getattr(args[0], value.target) if isinstance(value.target, str) else value.target
    try:
        result = function(*(args[1:] if isinstance(value.target, str) else args), **kwargs)
    except Exception:  # a user's op need not take meta tensors
        return None
    return (result, device) if isinstance(result, torch.Tensor) else None


def _described_tensor(known: tuple[torch.Tensor, torch.device] | None) -> Tensor | None:
    if known is None:
        return None
    sizes = [size for size in map(_size, known[0].shape) if size is not None]
    if len(sizes) != known[0].dim():
        return None
    return Tensor(tuple(sizes), str(known[0].dtype).removeprefix("torch."), known[1].type)


def _tensor(tensor: torch.Tensor | None) -> Tensor | None:
    return None if tensor is None else _described_tensor((tensor, tensor.device))


def _size(size: Any) -> int | None:
    """A size as a number; a symbolic one as Dynamo saw it first, without guarding on it."""
    if isinstance(size, int):
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return hint if isinstance(hint, int) else None
