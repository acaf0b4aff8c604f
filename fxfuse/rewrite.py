"""From matches to a new graph: order, overlap, aliasing and mutation, replacement, fuel.

``find`` reads, ``replace`` writes. Outermost matches win over inner ones, larger over smaller; what a match covers
belongs to it alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxfuse.emit import Emit
from fxfuse.match import Match, Miss, Step, matcher
from fxfuse.pattern import Pattern
from fxfuse.view import Attr, View

__all__ = ["Found", "Fuel", "find", "replace"]


@dataclass
class Found:
    """What reading one graph gave: matches in graph order, and each pattern's attempts that got furthest so far."""

    matches: list[Match] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


class Fuel:
    """Optimisation fuel: ``FXFUSE_LIMIT=N`` lets the process make N replacements, so that bisection finds a bad one."""

    used = 0

    @classmethod
    def take(cls) -> str | None:
        """Spend one replacement; a reason when there is none left.

        Raises:
            ValueError: when the variable is no whole number.
        """
        limit = os.environ.get("FXFUSE_LIMIT")
        if not limit:
            return None
        if not limit.isdigit():
            raise ValueError(f"FXFUSE_LIMIT must be a whole number, not {limit!r}")
        if cls.used >= int(limit):
            return f"FXFUSE_LIMIT={limit} replacements are used up"
        cls.used += 1
        return None


def disabled() -> frozenset[str]:
    """Patterns that ``FXFUSE_DISABLE=name,name`` turns off."""
    return frozenset(filter(None, (n.strip() for n in os.environ.get("FXFUSE_DISABLE", "").split(","))))


def find(view: View, patterns: Sequence[Pattern], allow: Callable[[Match, Pattern], str | None] | None = None) -> Found:
    """Every place in the graph a pattern holds.

    Args:
        view: the reading of the graph.
        patterns: what to look for.
        allow: a last word on each match: None, or the reason not to replace it.
    """
    off = disabled()
    by_head: dict[str, list[tuple[Pattern, matcher]]] = {}
    for pattern in patterns:
        if pattern.name not in off:
            attempt = matcher(pattern.name, pattern.expression, view)
            for head in pattern.heads:
                by_head.setdefault(head, []).append((pattern, attempt))
    found, claimed = Found(), set[fx.Node]()
    deepest: dict[str, int] = {}  # of a pattern's misses; those that got less far are not kept
    for node in reversed(list(view.operations)):
        tries = by_head.get(view.operations[node], ())
        if not tries or node in claimed:
            continue
        best: Match | None = None
        for pattern, attempt in tries:
            result = _consider(attempt(node, deepest.get(pattern.name, 0)), pattern, view, allow)
            if isinstance(result, Miss):
                if result.depth >= deepest.get(pattern.name, 0):
                    deepest[pattern.name] = result.depth
                    found.misses.append(result)
                continue
            free = not claimed.intersection(n for n in result.nodes if n not in result.shared)
            if free and (best is None or len(result.nodes) > len(best.nodes)):
                best = result
        if best is not None:
            found.matches.append(best)
            claimed.update(n for n in best.nodes if n not in best.shared)
    found.matches.reverse()
    return found


def _consider(result: Match | Miss, pattern: Pattern, view: View, allow: Any) -> Match | Miss:
    if isinstance(result, Miss):
        return result
    for guard in pattern.guards:
        reason = guard(result)
        if reason is not None:
            return Miss(pattern.name, result.root, reason, len(result.nodes) + 1)
    reason = _unsafe(result, view) or (allow(result, pattern) if allow is not None else None)
    if reason is not None:
        return Miss(pattern.name, result.root, reason, len(result.nodes) + 2)
    return result


def _unsafe(match: Match, view: View) -> str | None:
    """Why reading the match's inputs at its root, and not where they were read, could change a result."""
    inside = set(match.nodes)
    first = min(view.order[n] for n in inside)
    last = view.order[match.root]
    for node in view.mode_changes:
        if first < view.order[node] < last:
            return f"{node.name} changes the grad or autocast mode inside the match"
    changes = [(n, base) for n, base in view.mutations_between(first, last) if n not in inside]
    if not changes:
        return None
    read: set[Any] = set()
    for value in _inputs(match):
        read |= view.storage(value)
    for node, base in changes:
        if read & view.storage(base):
            return f"{node.name} changes {view.describe(base)} in place inside the match"
    return None


def _inputs(match: Match) -> Iterable[Any]:
    for value in match.bindings.values():
        for item in value if isinstance(value, list) else (value,):
            item = item.factor if isinstance(item, Step) else item
            if isinstance(item, (fx.Node, Attr)):
                yield item


def replace(graph: fx.Graph, match: Match, pattern: Pattern) -> fx.Node:
    """Put the pattern's op in the place of a match; returns the node that now holds the value.

    Nodes the match covers are erased unless something else reads them; nothing else is touched.
    """
    view = match.view
    before = match.root.prev
    with graph.inserting_before(match.root):
        emit = Emit(graph, view.replaced)
        if pattern.lower is not None:
            new = pattern.lower(match, emit)
        else:
            new = emit.call(pattern.op, **{name: match.get(name) for name in sorted(pattern.variables)})
    for key in ("example_value", "val", "tensor_meta", "nn_module_stack", "stack_trace"):
        if key in match.root.meta:
            new.meta.setdefault(key, match.root.meta[key])
    new.meta["fxfuse"] = pattern.name
    written = before.next
    while written is not match.root:  # later matches ask where these stand
        view.order[written] = view.order[match.root]
        written = written.next
    for user, name in view.later_users(match.root):
        user.replace_input_with(name, new)
    view.renamed(match.root, new)
    for node in sorted(set(match.nodes), key=lambda n: view.order[n], reverse=True):
        if not node.users:
            graph.erase_node(node)
    return new
