"""What a pattern's ``lower`` writes with: nodes of a replacement, in a graph that is being rewritten."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfuse.match import Step
from fxfuse.view import Attr, ModuleRef

__all__ = ["Emit"]


class Emit:
    """Writes the nodes of one replacement in front of the match's root."""

    def __init__(self, graph: fx.Graph, replaced: Mapping[fx.Node, fx.Node]) -> None:
        self.graph = graph
        self._replaced = replaced

    def value(self, value: Any) -> Any:
        """A bound value as an fx argument; attributes and modules become ``get_attr`` nodes, and a value that an
        earlier replacement computes is read from there."""
        if isinstance(value, (Attr, ModuleRef)):
            return self.graph.create_node("get_attr", value.path)
        return self._replaced.get(value, value) if isinstance(value, fx.Node) else value

    def call(self, function: Callable[..., Any], **arguments: Any) -> fx.Node:
        """A call of ``function`` with bound values by keyword."""
        return self.graph.call_function(function, (), {key: self.value(v) for key, v in arguments.items()})

    def method(self, name: str, *arguments: Any) -> fx.Node:
        """A method call on a value."""
        return self.graph.call_method(name, tuple(self.value(a) for a in arguments))

    def number(self, steps: Sequence[Step], inverse: bool = False) -> Any:
        """The product of a chain's numbers (its reciprocal with ``inverse``); symbolic ones become arithmetic nodes."""
        total, symbols = 1.0, []
        for step in steps:
            if step.op == "neg":
                total = -total
            elif isinstance(step.factor, (int, float)):
                divides = (step.op == "div") != inverse
                total = total / step.factor if divides else total * step.factor
            else:
                symbols.append(step)
        result: Any = total
        for step in symbols:
            function = operator.truediv if (step.op == "div") != inverse else operator.mul
            result = self.graph.call_function(function, (result, self.value(step.factor)))
        return result

    def product(self, factors: Sequence[Any]) -> Any:
        """The product of tensors, or None of none."""
        result: Any = None
        for factor in factors:
            value = self.value(factor)
            result = value if result is None else self.graph.call_function(torch.mul, (result, value))
        return result

    def apply(self, steps: Sequence[Step], value: fx.Node) -> fx.Node:
        """The steps of a chain, one node each, on top of ``value``."""
        for step in steps:
            function = torch.div if step.op == "div" else torch.mul
            value = self.graph.call_function(function, (value, self.value(step.factor)))
        return value
