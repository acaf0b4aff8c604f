"""Pattern expressions: a computation as data, operations of the vocabulary over named variables::

    x, weight, bias = variables("x weight bias")
    op.relu(op.linear(x, weight, bias))

A parameter an expression leaves out must have its default in the graph, so nothing a call says is ever dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxfuse import vocabulary

__all__ = ["Chain", "Either", "Op", "Var", "heads", "names", "number", "op", "variables"]


@dataclass(frozen=True, slots=True)
class Var:
    """Binds any value to a name; the same name twice must be the same value. ``kind`` narrows it to 'number'."""

    name: str
    kind: str = "any"


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of the vocabulary over sub-expressions, by canonical parameter name.

    ``shared`` lets the node have readers outside the match (a transposed view of a weight): it is then left in place.
    """

    op: str
    args: tuple[tuple[str, Any], ...]
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Either:
    """The first alternative that matches."""

    alternatives: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """Any number of scalings (mul, div, neg) on top of ``base``; bound under ``name`` as a list of :class:`Step`.

    ``factors`` says what a factor may be: a 'number' (of Python, or symbolic), a 'scalar' (also a tensor known to have
    no dimensions) or 'any'.
    """

    name: str
    base: Any
    factors: str = "any"


class _Operations:
    """``op.linear(x, weight, bias)`` builds an expression; names and parameters are checked when it is written."""

    def __getattr__(self, name: str) -> Callable[..., Op]:
        if name.startswith("_"):
            raise AttributeError(name)

        def build(*args: Any, shared: bool = False, **kwargs: Any) -> Op:
            try:
                operation = vocabulary.operation(name)
            except KeyError as error:
                raise ValueError(str(error.args[0])) from None
            if len(args) > len(operation.params):
                raise ValueError(f"op.{name} takes {operation.params}, given {len(args)} values")
            given = dict(zip(operation.params, args, strict=False))  # those not given by position may follow by name
            for key, value in kwargs.items():
                if key not in operation.params or key in given:
                    raise ValueError(f"op.{name} has no free parameter '{key}'; it takes {operation.params}")
                given[key] = value
            for param in operation.params:
                if param not in given and param not in operation.defaults:
                    raise ValueError(f"op.{name} needs '{param}'")
            return Op(name, tuple(given.items()), shared)

        return build


op = _Operations()


def variables(names: str) -> tuple[Var, ...]:
    """Variables by name: ``x, weight = variables("x weight")``."""
    return tuple(Var(name) for name in names.split())


def number(name: str) -> Var:
    """A variable that only a number binds (a Python number or a symbolic one)."""
    return Var(name, "number")


def heads(expression: Any) -> frozenset[str]:
    """The operations a node must have to be worth trying as the expression's root."""
    if isinstance(expression, Op):
        return frozenset({expression.op})
    if isinstance(expression, Either):
        return frozenset().union(*(heads(e) for e in expression.alternatives))
    if isinstance(expression, Chain):
        return heads(expression.base) | frozenset(vocabulary.SCALINGS)
    raise ValueError(f"a pattern's expression starts with an operation, not {expression!r}")


def names(expression: Any) -> frozenset[str]:
    """Every variable an expression may bind."""
    if isinstance(expression, Var):
        return frozenset({expression.name})
    if isinstance(expression, Op):
        return frozenset().union(*(names(e) for _, e in expression.args)) if expression.args else frozenset()
    if isinstance(expression, Either):
        return frozenset().union(*(names(e) for e in expression.alternatives))
    if isinstance(expression, Chain):
        return names(expression.base) | {expression.name}
    return frozenset()
