"""How a call binds to a forward, and what a graph needs to know of each argument."""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["CONSTANTS", "NUMBER", "TENSOR", "Signature", "Untraceable", "forward_signature", "kind_of"]

TENSOR, NUMBER = "<tensor>", "<number>"
#: values a graph may be specialised on
CONSTANTS = (bool, int, str, type(None), torch.dtype, torch.device, torch.memory_format, enum.Enum)


class Untraceable(Exception):
    """Why a forward cannot be read as one graph."""


class Signature:
    """The parameters of a forward and how a call binds to them, without the cost of ``inspect`` at every call.

    Raises:
        Untraceable: for a callable whose parameters Python does not know.
    """

    def __init__(self, function: Callable[..., Any], skip_first: bool) -> None:
        try:
            parameters = list(inspect.signature(function).parameters.values())[1 if skip_first else 0 :]
        except (TypeError, ValueError) as error:
            raise Untraceable(f"its parameters cannot be read: {error}") from None
        self.variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        self.names = tuple(p.name for p in parameters)
        self.keyword_only = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        self.positional = len(self.names) - len(self.keyword_only)
        #: how many arguments a call gives that needs no binding; -1 where there is no such call
        self.arity = -1 if self.keyword_only else len(self.names)
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.annotations = {p.name: p.annotation for p in parameters}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """Values in the order of the names, or None where the call does not fit."""
        if len(args) > self.positional:
            return None
        values, used = list(args), 0
        for name in self.names[len(args) :]:
            if name in kwargs:
                values.append(kwargs[name])
                used += 1
            elif name in self.defaults:
                values.append(self.defaults[name])
            else:
                return None
        return values if used == len(kwargs) else None

    def expected(self) -> tuple[Any, ...] | None:
        """The kinds of an ordinary call: required arguments are tensors (or floats, by annotation), the rest absent."""
        kinds: list[Any] = []
        for name in self.names:
            if name in self.defaults:
                kind = kind_of(self.defaults[name])
            else:
                annotation = self.annotations[name]
                kind = NUMBER if annotation in (float, "float") else TENSOR
                if annotation in (bool, int, str, "bool", "int", "str"):
                    return None
            if kind is None:
                return None
            kinds.append(kind)
        return tuple(kinds)


def forward_signature(kind: type) -> Signature:
    """The signature of a module type's forward, without ``self``.

    Raises:
        Untraceable: when its forward is no ordinary method.
    """
    forward = inspect.getattr_static(kind, "forward")
    if not isinstance(forward, types.FunctionType):
        raise Untraceable(f"its forward is a {type(forward).__name__}, not a plain method")
    return Signature(forward, skip_first=True)


def kind_of(value: Any) -> Any:
    """What a graph needs to know of an argument: TENSOR, NUMBER, a constant as (value, type), or None (not traceable).

    The type keeps ``True`` and ``1`` apart, which are equal as keys.
    """
    if isinstance(value, torch.Tensor) or issubclass(type(value), fx.Proxy):
        return TENSOR
    if type(value) is float:
        return NUMBER
    if isinstance(value, CONSTANTS):
        return (value, type(value))
    return None
