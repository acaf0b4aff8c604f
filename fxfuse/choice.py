"""Which matches may be replaced: how verification tries some without others, and takes one back for good.

A match is known by its place and by the tensors it reads, not by node names: one computation is named differently in a
trace of the whole model and in one of the module that holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from fxfuse.view import Attr, ModuleRef

if TYPE_CHECKING:
    from fxfuse.match import Match
    from fxfuse.pattern import Pattern

__all__ = ["UNDONE", "Choice", "Key", "Place", "owner_of"]

UNDONE = "verification found it out of bounds"
#: (module path, pattern, paths of the tensors and modules it reads, which one of several like it)
Key = tuple[str, str, tuple[str, ...], int]
Allow = Callable[["Match", "Pattern"], "str | None"]


@dataclass(frozen=True)
class Place:
    """Where a match was found, as the report names it."""

    pattern: str
    where: str
    operations: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass
class Choice:
    """A last word on every match of a model, by key.

    Attributes:
        refused: these stay as they are.
        only: if given, nothing else is replaced.
        places: every match that was allowed, in the order they were met; not part of a pickle.
    """

    refused: frozenset[Key] = frozenset()
    only: frozenset[Key] | None = None
    places: dict[Key, Place] = field(default_factory=dict)

    def at(self, where: str) -> Allow:
        """The last word on the matches in one reading of the graph of the module at ``where``."""
        met: Counter[Key] = Counter()
        closed: set[tuple[str, fx.Node]] = set()  # a part of what was refused is refused, too

        def allow(match: Match, pattern: Pattern) -> str | None:
            if any((pattern.name, node) in closed for node in match.nodes):
                return UNDONE
            path, reads = _join(where, owner_of(match)), _reads(where, match)
            like = (path, pattern.name, reads, 0)
            key = (path, pattern.name, reads, met[like])
            met[like] += 1
            if key in self.refused or (self.only is not None and key not in self.only):
                closed.update((pattern.name, node) for node in match.nodes)
                return UNDONE
            if key not in self.places:
                self.places[key] = _place(path, match)
            return None

        return allow

    def __getstate__(self) -> dict[str, Any]:
        return {"refused": self.refused, "only": self.only, "places": {}}


def _reads(where: str, match: Match) -> tuple[str, ...]:
    found: set[str] = set()
    for value in [*match.bindings.values(), *(a for n in match.nodes for a in n.all_input_nodes)]:
        if isinstance(value, (Attr, ModuleRef)):
            found.add(_join(where, value.path))
        elif isinstance(value, fx.Node) and value.op == "get_attr":
            found.add(_join(where, str(value.target)))
    return tuple(sorted(found))


def _place(path: str, match: Match) -> Place:
    nodes = sorted(set(match.nodes), key=lambda n: match.view.order[n])
    operations = tuple(match.view.operations[n].removesuffix("_module") for n in nodes)
    return Place(match.pattern, path, operations, tuple(n.name for n in nodes))


def _join(where: str, path: str) -> str:
    return ".".join(filter(None, (where, path)))


def owner_of(match: Match) -> str:
    """The path of the smallest module whose forward computes all of a match ('' is the root)."""
    paths = [stack_path(node) for node in match.nodes]
    common = paths[0]
    for path in paths[1:]:
        common = tuple(a for a, b in zip(common, path, strict=False) if a == b)[: _shared_length(common, path)]
    return common[-1] if common else ""


def _shared_length(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def stack_path(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules whose forwards are running at a node, outermost first; a called leaf does not count."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ()
    paths = [str(entry[0]) for entry in stack.values()]
    if node.op == "call_module" and paths and paths[-1] == node.target:
        paths.pop()
    return tuple(p for p in paths if p)
