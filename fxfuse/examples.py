"""Example inputs: which arguments are tensors, and the shapes behind every node of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxfuse.capture import TENSOR, Captured, Signature, Untraceable, kind_of

__all__ = ["normalize", "kinds_of", "annotate"]

Example = tuple[tuple[Any, ...], dict[str, Any]]


def normalize(example_inputs: Any) -> Example | None:
    """``example_inputs`` as (args, kwargs): a tensor, a tuple or list of arguments, or a dict of keywords.

    Raises:
        TypeError: for anything else.
    """
    if example_inputs is None:
        return None
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
    for name, kind, value in zip(signature.names, kinds, values):
        if kind is None:
            raise Untraceable(f"its argument '{name}' is a {type(value).__name__}")
    return kinds


def annotate(captured: Captured, signature: Signature, example: Example) -> None:
    """Put a fake tensor (shape, dtype, device) into ``meta['val']`` of every node, without computing anything.

    Raises:
        ValueError: when the inputs do not run through the graph, with the first reason.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    values = signature.bind(*example) or []
    given = [v for v in values if kind_of(v) is TENSOR or type(v) is float]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for v in given]

    class _Meta(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op != "output":
                n.meta["val"] = result
            return result

    try:
        with mode, torch.no_grad():
            _Meta(captured.root, graph=captured.graph).run(*fakes)
    except Exception as error:  # whatever the user's model raises for these shapes
        text = str(error).strip().splitlines()
        raise ValueError(f"example_inputs do not run through the model: {text[0] if text else error!r}") from error
