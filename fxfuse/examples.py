"""Example inputs: which arguments are tensors, and the shapes behind every node of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from fxfuse.capture import Captured
from fxfuse.signature import NUMBER, TENSOR, Signature, Untraceable, kind_of
from fxfuse.view import why_called_only

__all__ = ["annotate", "kinds_of", "normalize"]

Example = tuple[tuple[Any, ...], dict[str, Any]]


def normalize(example_inputs: Any) -> Example:
    """``example_inputs`` as (args, kwargs): a tensor, a tuple or list of arguments, or a dict of keywords.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    raise TypeError(
        "example_inputs is a tensor, a tuple of positional arguments or a dict of keyword arguments, "
        f"not {type(example_inputs).__name__}"
    )


def kinds_of(signature: Signature, example: Example) -> tuple[Any, ...]:
    """The kinds of a call with these inputs.

    Raises:
        TypeError: when they do not fit the signature.
        Untraceable: when one is neither a tensor nor a plain value.
    """
    values = signature.bind(*example)
    if values is None:
        raise TypeError(
            f"example_inputs do not fit forward({', '.join(signature.names)}): "
            f"{len(example[0])} positional arguments and the keywords {sorted(example[1])} were given"
        )
    kinds = tuple(kind_of(v) for v in values)
    for name, kind, value in zip(signature.names, kinds, values, strict=False):
        if kind is None:
            raise Untraceable(f"its argument '{name}' is a {type(value).__name__}")
    return kinds


def annotate(captured: Captured, signature: Signature, example: Example) -> None:
    """Put a fake tensor (shape, dtype, device) into ``meta['val']`` of every node, without computing anything.

    Raises:
        ValueError: when the inputs do not run through the graph, with the first reason.
    """
    values = signature.bind(*example) or []
    given = [v for v in values if kind_of(v) in (TENSOR, NUMBER)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for v in given]
    caches = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)  # it would keep fake casts of the real weights
        with mode, torch.no_grad():
            _Shapes(captured, mode).run(*fakes)
    except Exception as error:  # whatever the user's model raises for these shapes
        text = str(error).strip().splitlines()
        raise ValueError(f"example_inputs do not run through the model: {text[0] if text else error!r}") from error
    finally:
        torch.set_autocast_cache_enabled(caches)


_UNKNOWN = object()
_DEPENDS_ON_VALUES = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException, NotImplementedError,
)  # fmt: skip


class _Shapes(fx.Interpreter):
    """Runs a graph on fake tensors. What depends on values, or on Python that is not torch's own, stays unknown."""

    def __init__(self, captured: Captured, mode: FakeTensorMode) -> None:
        super().__init__(captured.root, graph=captured.graph)
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output" or any(self.env.get(a) is _UNKNOWN for a in n.all_input_nodes):
            return _UNKNOWN
        try:
            result = super().run_node(n)
        except _DEPENDS_ON_VALUES:
            return _UNKNOWN
        if result is not _UNKNOWN:
            n.meta["val"] = result
        return result

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if not type(module).__module__.startswith("torch.nn.modules.") or why_called_only(module) is not None:
            return _UNKNOWN
        fakes: dict[str, torch.Tensor] = {}  # stand-ins, so that running statistics stay as they are
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            fakes[name] = self.mode.from_tensor(value, static_shapes=True)
        return torch.func.functional_call(module, fakes, args, kwargs)
