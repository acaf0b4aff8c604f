"""A pattern: what is recognised, when, and the op it becomes. Patterns are discovered, there is no list of them.

Where they come from, in this order: the files of ``fxfuse/patterns/``, the entry point group ``fxfuse.patterns`` of
installed packages, and :func:`register`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from torch import fx

from fxfuse import expression as _expression
from fxfuse import match as _match
from fxfuse.guards import Guard

if TYPE_CHECKING:
    from fxfuse.cost import Cost
    from fxfuse.emit import Emit
    from fxfuse.report import Replacement

__all__ = ["Pattern", "Words", "available", "register", "select", "unregister"]

ENTRY_POINTS = "fxfuse.patterns"


@dataclass(frozen=True)
class Words:
    """What :func:`fxfuse.explain` says of a pattern, in sentences for a person.

    Attributes:
        why: why the replacement pays.
        fuses: what is computed in one place, and what is not written to memory any more.
        algebra: the identity used, exact in real arithmetic.
        left: what stays as it was, and where rounding or special values differ.
    """

    why: str = ""
    fuses: str = ""
    algebra: str = ""
    left: str = ""


@dataclass(frozen=True)
class Pattern:
    """A computation to find and the op that replaces it.

    Args:
        name: the name reports and switches use.
        expression: the computation, over named variables (see :mod:`fxfuse.match`).
        op: a callable that takes the expression's variables by keyword. It must mean the same as the expression for
            every input that passes the guards, and trace (a function of torch operations, or a ``torch.library`` op).
        guards: conditions, each returning None or the reason to refuse.
        lower: how a match becomes nodes; by default one call of ``op`` with the bound variables.
        pays_always: the op does less work whoever compiles it (an algebraic gain); other ops replace nothing where an
            inner compiler would have fused the same and no kernel runs.
        words: sentences for :func:`fxfuse.explain`.
        cost: what one call of ``op`` costs, where it is not its inputs read once, its result written once and the
            matrix products as before (see :mod:`fxfuse.cost`).

    Raises:
        TypeError, ValueError: at once, for an expression that cannot be matched or an op that is not callable.
    """

    name: str
    expression: Any
    op: Callable[..., Any]
    guards: tuple[Guard, ...] = ()
    lower: Callable[[_match.Match, Emit], fx.Node] | None = None
    pays_always: bool = False
    words: Words = field(default_factory=Words)
    cost: Callable[[Replacement], Cost] | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a pattern's name must be an identifier, not {self.name!r}")
        if not callable(self.op):
            raise TypeError(f"pattern '{self.name}': op must be callable, not {type(self.op).__name__}")
        try:
            _expression.heads(self.expression)
        except ValueError as error:
            raise ValueError(f"pattern '{self.name}': {error}") from None
        for guard in self.guards:
            if not callable(guard):
                raise TypeError(f"pattern '{self.name}': a guard must be callable, not {guard!r}")

    @property
    def heads(self) -> frozenset[str]:
        """Operations a node must have to be tried as this pattern's outermost one."""
        return _expression.heads(self.expression)

    @property
    def variables(self) -> frozenset[str]:
        """The names the expression binds."""
        return _expression.names(self.expression)


_registered: dict[str, Pattern] = {}


def register(pattern: Pattern) -> Pattern:
    """Make a pattern of one's own take part from now on; returns it. The name must be free.

    Raises:
        TypeError: for anything but a :class:`Pattern`.
        ValueError: when a pattern of that name exists.
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"register takes a fxfuse.Pattern, not {type(pattern).__name__}")
    if pattern.name in available():
        raise ValueError(f"a pattern named '{pattern.name}' exists already; unregister it first or take another name")
    _registered[pattern.name] = pattern
    return pattern


def unregister(name: str) -> None:
    """Undo :func:`register`; a KeyError says what is registered."""
    if name not in _registered:
        raise KeyError(f"'{name}' was not registered; registered: {', '.join(_registered) or 'none'}")
    del _registered[name]


@lru_cache(maxsize=1)
def _discovered() -> dict[str, Pattern]:
    found: dict[str, Pattern] = {}
    package = importlib.import_module("fxfuse.patterns")
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        if not info.name.startswith("_"):
            found[info.name] = importlib.import_module(f"fxfuse.patterns.{info.name}").pattern
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        loaded = entry.load()
        if not isinstance(loaded, Pattern):
            raise TypeError(f"the entry point '{entry.name}' of group {ENTRY_POINTS} is a {type(loaded).__name__}, "
                            "not a fxfuse.Pattern")  # fmt: skip
        found[loaded.name] = loaded
    return found


def available() -> dict[str, Pattern]:
    """Every pattern by name: shipped, from entry points, registered."""
    return {**_discovered(), **_registered}


def select(chosen: Iterable[str | Pattern] | str | Pattern | None) -> tuple[Pattern, ...]:
    """The patterns a caller asked for: all when None, else names or :class:`Pattern` objects, in one order always.

    Raises:
        ValueError: for a name that does not exist, naming those that do.
        TypeError: for anything that is neither a name nor a pattern.
    """
    everything = available()
    if chosen is None:
        return tuple(everything[name] for name in sorted(everything))
    picked: dict[str, Pattern] = {}
    for item in (chosen,) if isinstance(chosen, (str, Pattern)) else chosen:
        if isinstance(item, Pattern):
            picked[item.name] = item
        elif isinstance(item, str):
            if item not in everything:
                raise ValueError(f"no pattern is named '{item}'; there are: {', '.join(sorted(everything))}")
            picked[item] = everything[item]
        else:
            raise TypeError(f"patterns are names or fxfuse.Pattern objects, not {type(item).__name__}")
    return tuple(picked[name] for name in sorted(picked))
