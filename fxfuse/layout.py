"""Where the nodes of a graph go on a page: layers from top to bottom, few crossings, long edges around the nodes.

The layered method in its plain form: the longest path gives the layer, dummy points carry edges that span several
layers, barycentres order each layer, and a few sweeps pull nodes over their neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

__all__ = ["Box", "Layout", "arrange"]

_GAP_X, _GAP_Y, _DUMMY = 26.0, 28.0, 8.0
_SWEEPS = 8
_STIFF = 20.0  # how much more a long edge's points weigh than a box


@dataclass
class Box:
    """A node's place: centre ``x``, top ``y``, and its size."""

    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    layer: int = 0


@dataclass
class Layout:
    """A finished page: boxes by name, edges as points from the end of one box to the top of another."""

    boxes: dict[str, Box]
    edges: list[tuple[str, str, list[tuple[float, float]]]] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0


def arrange(sizes: Mapping[str, tuple[float, float]], edges: Sequence[tuple[str, str]]) -> Layout:
    """Lay out an acyclic graph.

    Args:
        sizes: node -> (width, height), in topological order.
        edges: (from, to), both in ``sizes``.
    """
    boxes = {name: Box(width, height) for name, (width, height) in sizes.items()}
    inputs: dict[str, list[str]] = {name: [] for name in sizes}
    for source, target in edges:
        inputs[target].append(source)
    _layer(boxes, inputs)
    chains = _split_long_edges(boxes, edges)
    above: dict[str, list[str]] = {name: [] for name in boxes}
    below: dict[str, list[str]] = {name: [] for name in boxes}
    for chain in chains:
        for a, b in pairwise(chain):
            above[b].append(a)
            below[a].append(b)
    layers: list[list[str]] = [[] for _ in range(max((b.layer for b in boxes.values()), default=-1) + 1)]
    for name, box in boxes.items():
        layers[box.layer].append(name)
    _order(layers, above, below)
    _place(layers, boxes, above, below)
    return _finish(boxes, layers, chains, sizes)


def _layer(boxes: dict[str, Box], inputs: dict[str, list[str]]) -> None:
    for name, sources in inputs.items():
        boxes[name].layer = max((boxes[s].layer + 1 for s in sources), default=0)
    readers: dict[str, list[str]] = {name: [] for name in boxes}
    for name, sources in inputs.items():
        for source in sources:
            readers[source].append(name)
    for name in reversed(list(inputs)):  # what nothing computes stands right above what reads it
        if not inputs[name] and readers[name]:
            boxes[name].layer = min(boxes[r].layer for r in readers[name]) - 1


def _split_long_edges(boxes: dict[str, Box], edges: Sequence[tuple[str, str]]) -> list[list[str]]:
    chains = []
    for number, (source, target) in enumerate(dict.fromkeys(edges)):
        chain = [source]
        for layer in range(boxes[source].layer + 1, boxes[target].layer):
            name = f"\0{number}.{layer}"
            boxes[name] = Box(_DUMMY, 0.0, layer=layer)
            chain.append(name)
        chains.append([*chain, target])
    return chains


def _order(layers: list[list[str]], above: dict[str, list[str]], below: dict[str, list[str]]) -> None:
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        near = above if down else below
        at = {name: i for layer in layers for i, name in enumerate(layer)}
        for layer in layers if down else reversed(layers):
            weight = {n: _mean([at[m] for m in near[n]], at[n]) for n in layer}
            layer.sort(key=weight.__getitem__)
            at.update({name: i for i, name in enumerate(layer)})


def _place(
    layers: list[list[str]], boxes: dict[str, Box], above: dict[str, list[str]], below: dict[str, list[str]]
) -> None:
    for layer in layers:
        x = 0.0
        for name in layer:
            boxes[name].x = x + boxes[name].width / 2
            x += boxes[name].width + _GAP_X
    for sweep in range(2 * _SWEEPS):
        near = above if sweep % 2 == 0 else below
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = {n: _mean([boxes[m].x for m in near[n]], boxes[n].x) for n in layer}
            # a line that only passes through is to be straight; boxes give way to it
            _pull(layer, boxes, wanted, {n: _STIFF if _passes(n, near) else 1.0 for n in layer})
    y = 0.0
    for layer in layers:
        height = max(boxes[name].height for name in layer)
        for name in layer:
            boxes[name].y = y + (height - boxes[name].height) / 2
        y += height + _GAP_Y


def _passes(name: str, near: dict[str, list[str]]) -> bool:
    """Whether this is a point of a long edge, next to another one."""
    return name[0] == "\0" and all(other[0] == "\0" for other in near[name])


def _pull(layer: list[str], boxes: dict[str, Box], wanted: dict[str, float], weight: dict[str, float]) -> None:
    """Put nodes where they want to be, in their order and without overlap: groups that touch share the mean."""
    groups: list[tuple[list[str], float]] = []  # (names, where the first one's centre is)
    for name in layer:
        names, start = [name], wanted[name]
        while groups:
            before, first = groups[-1]
            shift = sum(_step(boxes, a, b) for a, b in zip(before, [*before[1:], name], strict=True))
            if first + shift <= start:
                break
            groups.pop()
            names = before + names
            offsets = [0.0]
            for a, b in pairwise(names):
                offsets.append(offsets[-1] + _step(boxes, a, b))
            pull = sum(weight[n] * (wanted[n] - o) for n, o in zip(names, offsets, strict=True))
            start = pull / sum(weight[n] for n in names)
            name = names[0]
        groups.append((names, start))
    for names, start in groups:
        x = start
        for i, name in enumerate(names):
            x += _step(boxes, names[i - 1], name) if i else 0.0
            boxes[name].x = x


def _step(boxes: dict[str, Box], a: str, b: str) -> float:
    return (boxes[a].width + boxes[b].width) / 2 + _GAP_X


def _finish(
    boxes: dict[str, Box], layers: list[list[str]], chains: list[list[str]], sizes: Mapping[str, tuple[float, float]]
) -> Layout:
    left = min((b.x - b.width / 2 for b in boxes.values()), default=0.0)
    for box in boxes.values():
        box.x -= left
    tops = [min(boxes[n].y for n in layer) for layer in layers]
    ends = [max(boxes[n].y + boxes[n].height for n in layer) for layer in layers]
    page = Layout({name: boxes[name] for name in sizes})
    for chain in chains:
        first, last = boxes[chain[0]], boxes[chain[-1]]
        points = [(first.x, first.y + first.height)]
        for name in chain[1:-1]:
            box = boxes[name]
            points += [(box.x, tops[box.layer]), (box.x, ends[box.layer])]
        page.edges.append((chain[0], chain[-1], [*points, (last.x, last.y)]))
    page.width = max((b.x + b.width / 2 for b in boxes.values()), default=0.0)
    page.height = max(ends, default=0.0)
    return page


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else float(otherwise)
