"""What was replaced, what came nearest, what could not be traced: plain data that pickles, printed as tables."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fxfuse.drawing import Drawing

if TYPE_CHECKING:
    from fxfuse.match import Miss

__all__ = ["NearMiss", "Replacement", "Report", "Step", "Tensor", "Undone", "Untraced"]

WAY_IN = 'torch.compile(model, backend="fxfuse")'


@dataclass(frozen=True)
class Tensor:
    """What is known of a tensor: its sizes, its dtype ("float32") and its device ("cuda")."""

    shape: tuple[int, ...]
    dtype: str
    device: str


@dataclass(frozen=True)
class Step:
    """One operation that was replaced: canonical arguments as :class:`Tensor`, plain value, or "?" where not known."""

    operation: str
    arguments: dict[str, Any]
    result: Tensor | None


@dataclass(frozen=True)
class Replacement:
    """One replacement that was made.

    Attributes:
        pattern: the pattern's name.
        op: the op that stands there now.
        nodes: names of the graph nodes it took the place of, in graph order.
        where: the module whose forward holds it, by path ('' is the model itself).
        operations: what those nodes computed, in canonical words.
        drawing: index of the graph it was made in, in :attr:`Report.drawings`.
        steps: the operations with what is known of their tensors, for the cost model.
        call: what the op is called with: argument -> :class:`Tensor`, plain value, or "?" where not known.
        result: of the replacement, where known.
    """

    pattern: str
    op: str
    nodes: tuple[str, ...]
    where: str
    operations: tuple[str, ...] = ()
    drawing: int = 0
    steps: tuple[Step, ...] = field(default=(), repr=False)
    call: dict[str, Any] = field(default_factory=dict, repr=False)
    result: Tensor | None = None


@dataclass(frozen=True)
class NearMiss:
    """The deepest attempt of a pattern that failed: at which node, and why."""

    pattern: str
    node: str
    reason: str
    depth: int = 0
    where: str = ""


@dataclass(frozen=True)
class Untraced:
    """A module whose forward could not be read as one graph; it keeps its own Python and its children were tried."""

    where: str
    reason: str


@dataclass(frozen=True)
class Undone:
    """A replacement that ``verify=True`` found out of bounds and took back.

    Attributes:
        pattern, where, operations, nodes: as in :class:`Replacement`.
        what: the tensor that was worst, as in "gradient of fc.bias (train)".
        error: its norm-wise error against float64; ``bound`` is what was allowed.
    """

    pattern: str
    where: str
    operations: tuple[str, ...]
    nodes: tuple[str, ...]
    what: str
    error: float
    bound: float


@dataclass
class Report:
    """What a run of the compiler did to one model or graph. ``print()`` it, or read its fields.

    Attributes:
        title: what was optimized.
        replacements: every :class:`Replacement`, in graph order.
        near_misses: per pattern the deepest :class:`NearMiss`, deepest first.
        untraceable: every :class:`Untraced` module.
        notes: sentences that fit nowhere else (what a torch.compile backend left to the inner compiler, say).
        drawings: the graphs before and after, for :meth:`draw`.
        undone: every replacement that verification took back, as :class:`Undone`.
        verified: what verification compared and found, in a sentence; "" where it was not asked for.
    """

    title: str = ""
    replacements: list[Replacement] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    untraceable: list[Untraced] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    undone: list[Undone] = field(default_factory=list)
    verified: str = ""

    def add_misses(self, misses: list[Miss], where: str) -> None:
        """Keep the deepest attempt of each pattern, several where they went equally deep for different reasons."""
        deepest = {near.pattern: near.depth for near in self.near_misses}
        for miss in misses:
            if miss.depth < deepest.get(miss.pattern, -1):
                continue
            deepest[miss.pattern] = miss.depth
            node = miss.node.name if miss.node is not None else ""
            near = NearMiss(miss.pattern, node, miss.reason, miss.depth, where)
            held = [n for n in self.near_misses if n.pattern == near.pattern]
            if not held or near.depth > held[0].depth:
                self.near_misses = [n for n in self.near_misses if n.pattern != near.pattern]
                self.near_misses.append(near)
            elif len(held) < 3 and all(n.reason != near.reason for n in held):
                self.near_misses.append(near)
        self.near_misses.sort(key=lambda n: (-n.depth, n.pattern))

    def settle(self) -> Report:
        """Forget attempts that never matched anything, unless there is nothing else to say; returns the report."""
        if self.replacements or any(n.depth for n in self.near_misses):
            self.near_misses = [n for n in self.near_misses if n.depth]
        return self

    def draw(self, path: str) -> str:
        """Write the graphs before and after, replaced nodes coloured; ``.svg`` or ``.dot`` by the path's ending.

        Returns the path. Raises ValueError for another ending.
        """
        from fxfuse.draw import draw

        return draw(self.heading(), self.drawings, path)

    def __str__(self) -> str:
        parts = [self.heading()]
        if self.replacements:
            rows = [(r.pattern, _where(r), _wrap(" → ".join(r.operations), 34)) for r in self.replacements]
            parts.append("Replaced\n" + _table(rows, ("pattern", "in", "what was there")))
        if self.undone:
            undone = [(u.pattern, _where(u), _wrap(f"{u.what}: {_error(u)}", 34)) for u in self.undone]
            parts.append("Undone by verification\n" + _table(undone, ("pattern", "in", "because")))
        if self.near_misses:
            near = [(n.pattern, _wrap(_at(n), 18), _wrap(n.reason, 34)) for n in self.near_misses]
            parts.append("Came nearest without matching\n" + _table(near, ("pattern", "at", "because")))
        if self.untraceable:
            kept = [(_wrap(u.where or "(the model)", 26), _wrap(u.reason, 46)) for u in self.untraceable]
            parts.append(
                "Could not be traced: these keep their own Python, their children were tried\n"
                + _table(kept, ("module", "because"))
                + "\n"
                + textwrap.fill(f"The way into these is {WAY_IN}, which reads what Python really does.", 80)
            )
        parts += [textwrap.fill(note, 80) for note in (*self.notes, self.verified) if note]
        return "\n\n".join(parts)

    def heading(self) -> str:
        """Its first line: what was optimized and how often something was replaced."""
        count = len(self.replacements)
        what = "nothing replaced" if count == 0 else "1 replacement" if count == 1 else f"{count} replacements"
        return f"fxfuse · {self.title} · {what}"

    __repr__ = __str__


def _at(miss: NearMiss) -> str:
    return ": ".join(filter(None, (miss.where, miss.node)))


def _where(made: Replacement | Undone) -> str:
    return _wrap(made.where or "(the model)", 16)


def _error(undone: Undone) -> str:
    if undone.bound != undone.bound:  # NaN: nothing was measured
        return "not what the original gives"
    return f"error {undone.error:.3g}, allowed {undone.bound:.3g}"


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) if text else ""


def _table(rows: list[tuple[Any, ...]], headers: tuple[str, ...]) -> str:
    from tabulate import tabulate  # only a report that is printed needs it: importing fxfuse stays cheap

    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
