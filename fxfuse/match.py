"""Matching: a pattern's expression held against the nodes of a view.

A failed attempt is a :class:`Miss` with the reason and how deep it got; the deepest one of a pattern is what a report
shows. What expressions are made of (:mod:`fxfuse.expression`) can be imported from here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxfuse import vocabulary
from fxfuse.expression import Chain, Either, Op, Var, number, op, variables
from fxfuse.view import Attr, Call, ModuleRef, View

__all__ = ["Chain", "Either", "Match", "Miss", "Op", "Step", "Var", "matcher", "number", "op", "variables"]


# --- results -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Match:
    """A place where a pattern's expression holds.

    Attributes:
        pattern: the pattern's name.
        root: the node whose value the expression describes.
        bindings: variable -> fx node, :class:`Attr`, :class:`ModuleRef` or constant; absent when not reached.
        nodes: every node the expression covers, root first.
        view: the reading the match was found in.
    """

    pattern: str
    root: fx.Node
    bindings: dict[str, Any]
    nodes: list[fx.Node]
    view: View
    shared: frozenset[fx.Node] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value bound to a name, or the default."""
        return self.bindings.get(name, default)


@dataclass(slots=True)
class Miss:
    """Why a pattern did not match at a node, and how many operations had matched by then."""

    pattern: str
    node: fx.Node | None
    reason: str
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One link of a chain: the operation, its other operand, and the node."""

    op: str
    factor: Any
    node: fx.Node


# --- matching ------------------------------------------------------------------------------------------------------

#: longer runs of scalings are left alone: nobody writes them, and following them costs a call of Python's stack each
_LONGEST_CHAIN = 32


@dataclass(slots=True)
class _Attempt:
    view: View
    root: fx.Node
    bindings: dict[str, Any] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)
    shared: set[fx.Node] = field(default_factory=set)

    def mark(self) -> tuple[dict[str, Any], int]:
        return dict(self.bindings), len(self.nodes)

    @property
    def depth(self) -> int:
        """How many operations have matched; scalings do not count, nearly every graph has some."""
        return sum(self.view.operations[node] not in vocabulary.SCALINGS for node in self.nodes)

    def back(self, mark: tuple[dict[str, Any], int]) -> None:
        self.bindings, length = dict(mark[0]), mark[1]
        del self.nodes[length:]


@dataclass(slots=True)
class _Failure:
    """Why an attempt ended. Most are never read, so the words are put together when they are asked for."""

    reason: str  # with a {} for each of `seen`
    node: fx.Node | None
    depth: int
    seen: tuple[Any, ...] = ()  # values of the graph, described; texts and expressions, as _Shown

    def text(self, view: View) -> str:
        return self.reason.format(*[str(v.it) if type(v) is _Shown else view.describe(v) for v in self.seen])


@dataclass(frozen=True, slots=True)
class _Shown:
    it: Any


class matcher:
    """Matches one expression against the nodes of one view. Failures of chains are remembered, so a long run of
    scalings is walked once and not once from every link."""

    def __init__(self, pattern: str, expression: Any, view: View) -> None:
        self.pattern = pattern
        self.expression = expression
        self.view = view
        self._dead: dict[tuple[int, fx.Node], _Failure] = {}
        self._runs: dict[fx.Node, int] = {}

    def __call__(self, root: fx.Node, least: int = 0) -> Match | Miss:
        """Try the expression with ``root`` outermost. A miss that got less deep than ``least`` comes without words."""
        attempt = _Attempt(self.view, root)
        if self.view.call(root) is None:  # a kin of what the pattern wants, or a call with an unknown word
            return Miss(self.pattern, root, self.view.describe(root), 1)
        failure = self._match(self.expression, root, attempt)
        if failure is not None:
            reason = failure.text(self.view) if failure.depth >= least else ""
            return Miss(self.pattern, failure.node or root, reason, failure.depth)
        return Match(self.pattern, root, attempt.bindings, attempt.nodes, self.view, frozenset(attempt.shared))

    def _match(self, expression: Any, value: Any, attempt: _Attempt) -> _Failure | None:
        if isinstance(expression, Var):
            return self._variable(expression, value, attempt)
        if isinstance(expression, Op):
            return self._operation(expression, value, attempt)
        if isinstance(expression, Either):
            return self._either(expression, value, attempt)
        if isinstance(expression, Chain):
            return self._chain(expression, value, attempt)
        if isinstance(expression, tuple) and isinstance(value, (tuple, list)) and tuple(value) == expression:
            return None
        if type(value) is type(expression) and value == expression:
            return None
        return _Failure("expected {}, found {}", None, attempt.depth, (_Shown(repr(expression)), value))

    def _variable(self, var: Var, value: Any, attempt: _Attempt) -> _Failure | None:
        if var.kind == "number" and not self.view.is_number(value):
            return _Failure(f"'{var.name}' must be a number, found {{}}", None, attempt.depth, (value,))
        if var.name in attempt.bindings and not _same(attempt.bindings[var.name], value):
            seen = (attempt.bindings[var.name], value)
            return _Failure(f"'{var.name}' is {{}} and also {{}}", None, attempt.depth, seen)
        attempt.bindings[var.name] = value
        return None

    def _enter(self, value: Any, wanted: str, attempt: _Attempt) -> _Failure | Any:
        call = self.view.call(value)
        if call is None:
            node = value if isinstance(value, fx.Node) else None
            return _Failure(f"expected {wanted}, found {{}}", node, attempt.depth, (value,))
        return call

    def _private(self, node: fx.Node, attempt: _Attempt) -> _Failure | None:
        """An inner node's value must have no reader outside the match: it will not exist any more."""
        if node is attempt.root:
            return None
        readers = self.view.first_readers(node, len(attempt.nodes) + 3)
        others = [r.name for r in readers if r not in attempt.nodes]
        if others:
            return _Failure(f"the value of {node.name} is also read by {', '.join(others[:3])}", node, attempt.depth)
        for reader in readers:
            if _times_read(node, reader) > 1:
                return _Failure(f"{reader.name} reads the value of {node.name} twice", node, attempt.depth)
        return None

    def _operation(self, expression: Op, value: Any, attempt: _Attempt) -> _Failure | None:
        call = self._enter(value, expression.op, attempt)
        if isinstance(call, _Failure):
            return call
        if call.op != expression.op:
            return _Failure(f"expected {expression.op}, found {{}}", call.node, attempt.depth, (value,))
        if not expression.shared:
            failure = self._private(call.node, attempt)
            if failure is not None:
                failure.depth += 1  # it is the operation that was wanted
                return failure
        operation = vocabulary.OPERATIONS[call.op]
        given = dict(expression.args)
        for param in operation.params:
            if param in given or param not in call.args or param == "inplace":
                continue
            default = operation.defaults.get(param)
            if not _same(call.args[param], default):
                return _Failure(f"{call.op} has {param}={{}}", call.node, attempt.depth + 1, (call.args[param],))
        mark = attempt.mark()
        self._cover(call.node, attempt, expression.shared)
        failure = self._arguments(given, call.args, call, attempt)
        if failure is not None and operation.commutes:
            attempt.back(mark)
            self._cover(call.node, attempt, expression.shared)
            first, second = operation.params[:2]
            swapped = {**call.args, first: call.args[second], second: call.args[first]}
            other = self._arguments(given, swapped, call, attempt)
            failure = None if other is None else max(failure, other, key=lambda f: f.depth)
        return failure

    def _cover(self, node: fx.Node, attempt: _Attempt, shared: bool) -> None:
        attempt.nodes.append(node)
        if shared:
            attempt.shared.add(node)

    def _arguments(self, given: dict[str, Any], args: dict[str, Any], call: Call, attempt: _Attempt) -> _Failure | None:
        for param, expression in given.items():
            failure = self._match(expression, args.get(param), attempt)
            if failure is not None:
                if not isinstance(expression, (Var, Op, Either, Chain)):
                    failure.reason = f"{call.op} has {param}={{}}, not {{}}"
                    failure.seen = (args.get(param), _Shown(repr(expression)))
                return failure
        return None

    def _either(self, expression: Either, value: Any, attempt: _Attempt) -> _Failure | None:
        deepest: _Failure | None = None
        mark = attempt.mark()
        for alternative in expression.alternatives:
            failure = self._match(alternative, value, attempt)
            if failure is None:
                return None
            if deepest is None or failure.depth > deepest.depth:
                deepest = failure
            attempt.back(mark)
        return deepest

    def _run(self, node: fx.Node) -> int:
        """How many scalings hang together under a node, itself included."""
        todo = [node]
        while todo:
            call = self.view.call(todo[-1])
            assert call is not None
            below = [a for a, _ in _sides(call) if isinstance(a, fx.Node) and a in self.view.operations]
            below = [a for a in below if self.view.operations[a] in vocabulary.SCALINGS and self.view.call(a)]
            unknown = [a for a in below if a not in self._runs]
            if unknown:
                todo += unknown
            else:
                self._runs[todo.pop()] = 1 + max((self._runs[a] for a in below), default=0)
        return self._runs[node]

    def _chain(self, chain: Chain, value: Any, attempt: _Attempt, length: int = 0) -> _Failure | None:
        # an inner value may fail for its other readers, which do not matter where it is the root
        dead = self._dead.get((id(chain), value)) if isinstance(value, fx.Node) and value is not attempt.root else None
        if dead is not None:
            return dead
        mark = attempt.mark()
        deepest: _Failure | None = None
        call = self.view.call(value)
        if call is not None and call.op in vocabulary.SCALINGS:
            if length == 0 and self._run(call.node) > _LONGEST_CHAIN:
                return _Failure(f"more than {_LONGEST_CHAIN} scalings in a row", call.node, attempt.depth)
            deepest = self._private(call.node, attempt)
            for inner, factor in _sides(call) if deepest is None else ():
                attempt.back(mark)
                attempt.nodes.append(call.node)
                failure = self._bad_factor(chain, factor, call, attempt)
                if failure is None:
                    failure = self._chain(chain, inner, attempt, length + 1)
                if failure is None:
                    attempt.bindings[chain.name] = [*attempt.bindings[chain.name], Step(call.op, factor, call.node)]
                    return None
                if deepest is None or failure.depth > deepest.depth:
                    deepest = failure
            attempt.back(mark)
        failure = self._match(chain.base, value, attempt)
        if failure is None:
            attempt.bindings.setdefault(chain.name, [])
            return None
        if deepest is None or failure.depth > deepest.depth:
            deepest = failure
        if isinstance(value, fx.Node):
            self._dead[(id(chain), value)] = deepest
        return deepest

    def _bad_factor(self, chain: Chain, factor: Any, call: Any, attempt: _Attempt) -> _Failure | None:
        """Why a link's other operand may not be a factor of this chain."""
        if chain.factors == "any" or factor is None:
            return None
        number = self.view.is_number(factor)
        if number:
            if call.op == "div" and not isinstance(factor, fx.Node) and factor == 0:
                return _Failure("division by the number 0", call.node, attempt.depth)
            return None
        known = self.view.tensor(factor)
        if chain.factors == "scalar" and known is not None and known.dim() == 0:
            return None
        what = f"{call.op} by {{}}, which is not "
        what += "known to be a number before it runs" if number is None and known is None else f"a {chain.factors}"
        return _Failure(what, call.node, attempt.depth, (factor,))


def _sides(call: Any) -> Sequence[tuple[Any, Any]]:
    """(what is scaled, by what) for a link of a chain."""
    if call.op == "neg":
        return ((call.args["x"], None),)
    a, b = call.args["a"], call.args["b"]
    if call.op == "mul":
        return ((a, b), (b, a))
    return ((a, b),)


def _times_read(node: fx.Node, reader: fx.Node) -> int:
    """How many arguments of ``reader`` are ``node``."""
    if len(reader.all_input_nodes) == len(reader.args) + len(reader.kwargs):
        return 1  # all arguments are nodes, and all differ
    count = 0

    def visit(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.map_arg((reader.args, reader.kwargs), visit)
    return count


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (fx.Node, Attr, ModuleRef)) or isinstance(b, (fx.Node, Attr, ModuleRef)):
        return a is b or (type(a) is type(b) and not isinstance(a, fx.Node) and a == b)
    comparable = type(a) is type(b) or (isinstance(a, (int, float)) and isinstance(b, (int, float)))
    return comparable and bool(a == b)
