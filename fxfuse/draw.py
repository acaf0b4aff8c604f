"""Pictures of graphs before and after: SVG without any other program, or DOT for graphviz.

What a pattern replaced has the pattern's colour on both sides. Weights are written into the node that reads them, and
runs of nodes far from any replacement become one "… 12 nodes …". The background is opaque: it reads on any page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from fxfuse.drawing import Drawing
from fxfuse.layout import Layout, arrange

__all__ = ["draw"]

#: fills that dark text reads on, apart from each other for most eyes; the border is a darker shade of each
_COLOURS = (
    ("#9ecae9", "#2c6ea3"), ("#ffbf79", "#b8690f"), ("#98d594", "#33803a"), ("#e3a8cf", "#a0457f"),
    ("#f2d267", "#94750a"), ("#b9b0e0", "#5f4fa8"), ("#8fd3cf", "#1f7f7a"), ("#f4a6a0", "#b0413a"),
)  # fmt: skip
_PLAIN, _INPUT = ("#ffffff", "#8a8f98"), ("#eef0f3", "#8a8f98")
_PAPER, _INK, _SOFT = "#fafafa", "#1c1f24", "#5b616b"
_NEAR = 2  # nodes this close to a replacement are always drawn
_SHORTEST_RUN = 4  # shorter runs of other nodes are drawn, too
_LETTER, _SMALL, _LINE = 7.3, 6.1, 15.0  # widths of a letter at 12 and 10 px, height of a line
_MARGIN, _BETWEEN = 24.0, 56.0
_FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class _Node:
    """A node as it is drawn: a title, small lines below, the pattern it belongs to."""

    name: str
    title: str
    small: tuple[str, ...]
    mark: str
    kind: str
    reads: tuple[str, ...]

    @property
    def size(self) -> tuple[float, float]:
        width = max([len(self.title) * _LETTER, *(len(line) * _SMALL for line in self.small)])
        return width + 22.0, 12.0 + _LINE + 13.0 * len(self.small)


def draw(heading: str, drawings: Sequence[Drawing], path: str) -> str:
    """Write every graph, before and after, to ``path`` under a heading; ``.svg`` or ``.dot`` by its ending.

    Returns the path. Raises ValueError for another ending and OSError where the file cannot be written.
    """
    ending = Path(path).suffix.lower()
    if ending not in (".svg", ".dot"):
        raise ValueError(f"a drawing is written as .svg or .dot, not as {ending or 'a file without an ending'!r}")
    marks = sorted({mark for d in drawings for *_, mark in (*d.before, *d.after) if mark})
    colours = {mark: _COLOURS[i % len(_COLOURS)] for i, mark in enumerate(marks)}
    text = (_svg if ending == ".svg" else _dot)(heading, drawings, colours)
    Path(path).write_text(text, encoding="utf-8")
    return path


# --- what is drawn ---------------------------------------------------------------------------------------------------


def _nodes(rows: Iterable[tuple[str, str, tuple[str, ...], str]], layers: Mapping[str, str]) -> list[_Node]:
    """The rows of a drawing: layers by class and path, weights folded into their readers, far runs collapsed."""
    rows = list(rows)
    weights = {name: label.partition("\n")[2] for name, label, reads, mark in rows
               if label.startswith("get_attr\n") and not mark}  # fmt: skip
    nodes = []
    for name, label, reads, mark in rows:
        if name in weights:
            continue
        kind, _, target = label.partition("\n")
        own = [weights[r] for r in reads if r in weights]
        small = [own[i] + (f", {own[i + 1]}" if i + 1 < len(own) else "") for i in range(0, len(own), 2)]
        if kind == "call_module":
            title, small = layers.get(target) or "module", [target, *small]
        elif kind in ("placeholder", "output"):
            title = name if kind == "placeholder" else "output"
        else:
            title = target.removesuffix("_module") if mark else target or kind
        nodes.append(_Node(name, title, tuple(small[:4]), mark, kind, tuple(r for r in reads if r not in weights)))
    return _collapsed(nodes)


def _alike(drawings: Iterable[Drawing]) -> list[tuple[Drawing, list[str]]]:
    """Each different drawing once, with the places it is of: a stack of equal layers is drawn as one of them."""
    places: list[tuple[Drawing, list[str]]] = []
    for drawing in drawings:
        for seen, where in places:
            if (seen.before, seen.after, seen.layers) == (drawing.before, drawing.after, drawing.layers):
                where.append(drawing.where)
                break
        else:
            places.append((drawing, [drawing.where]))
    return places


def _listed(places: list[str]) -> str:
    named = [place or "the model" for place in places]
    return "in " + ", ".join(named[:3]) + (f" and {len(named) - 3} more alike" if len(named) > 3 else "")


def _collapsed(nodes: list[_Node]) -> list[_Node]:
    """Runs of nodes that are far from every replacement, as one node each.

    A run is consecutive in the graph's order, so that nothing outside it lies between its parts and no cycle arises.
    """
    near = _near(nodes)
    result: list[_Node] = []
    stands_for: dict[str, str] = {}
    run: list[_Node] = []

    def close() -> None:
        if len(run) >= _SHORTEST_RUN:
            inside = {n.name for n in run}
            reads = tuple(dict.fromkeys(r for n in run for r in n.reads if r not in inside))
            result.append(_Node(run[0].name, f"… {len(run)} nodes …", (), "", "run", reads))
            stands_for.update({n.name: run[0].name for n in run})
        else:
            result.extend(run)
        run.clear()

    for node in nodes:
        if node.name in near or node.kind in ("placeholder", "output"):
            close()
            result.append(node)
        else:
            run.append(node)
    close()
    return [
        _Node(n.name, n.title, n.small, n.mark, n.kind,
              tuple(dict.fromkeys(stands_for.get(r, r) for r in n.reads if stands_for.get(r, r) != n.name)))
        for n in result
    ]  # fmt: skip


def _near(nodes: list[_Node]) -> set[str]:
    beside: dict[str, set[str]] = {n.name: set(n.reads) for n in nodes}
    for node in nodes:
        for read in node.reads:
            beside[read].add(node.name)
    near = {n.name for n in nodes if n.mark}
    for _ in range(_NEAR):
        near |= {other for name in near for other in beside[name]}
    return near


# --- SVG -------------------------------------------------------------------------------------------------------------


def _svg(title: str, drawings: Sequence[Drawing], colours: dict[str, tuple[str, str]]) -> str:
    body: list[str] = []
    width, y = 360.0, _MARGIN + 18
    body.append(_text(_MARGIN, y, title, 15, _INK, "start", bold=True))
    y, width = _legend(body, colours, y + 14, width)
    for drawing, places in _alike(drawings):
        y, right = _pair(body, drawing, colours, y, "" if places == [""] else _listed(places))
        width = max(width, right)
    if not drawings:
        y += 30
        body.append(_text(_MARGIN, y, "No node was replaced: the graph is as it was.", 12, _SOFT, "start"))
    width, height = max(width, len(title) * 9.2) + _MARGIN, y + _MARGIN
    frame = f'width="{width - 1:.0f}" height="{height - 1:.0f}" rx="10" fill="{_PAPER}" stroke="#d0d4da"'
    w, h, xmlns = f"{width:.0f}", f"{height:.0f}", "http://www.w3.org/2000/svg"
    head = [
        f'<svg xmlns="{xmlns}" viewBox="0 0 {w} {h}" width="{w}" height="{h}" font-family="{_FONT}">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        f'<path d="M0,0.8 L7.4,4 L0,7.2 z" fill="{_SOFT}"/></marker></defs>',
        f'<rect x="0.5" y="0.5" {frame}/>',
    ]
    return "\n".join([*head, *body, "</svg>", ""])


def _legend(body: list[str], colours: dict[str, tuple[str, str]], y: float, width: float) -> tuple[float, float]:
    x = _MARGIN
    for mark, (fill, line) in colours.items():
        body.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="14" height="14" rx="3" fill="{fill}" stroke="{line}"/>')
        body.append(_text(x + 20, y + 11, mark, 12, _INK, "start"))
        x += 20 + len(mark) * _LETTER + 24
    return (y + 14 if colours else y), max(width, x)


def _pair(
    body: list[str], drawing: Drawing, colours: dict[str, tuple[str, str]], y: float, place: str
) -> tuple[float, float]:
    """One graph before (left) and after (right); returns the lower edge and the right edge."""
    y += 34
    if place:
        body.append(_text(_MARGIN, y, place, 13, _INK, "start", bold=True))
        y += 26
    left, bottom = _MARGIN, y
    for heading, rows in (("before", drawing.before), ("after", drawing.after)):
        nodes = _nodes(rows, drawing.layers)
        page = arrange({n.name: n.size for n in nodes}, [(r, n.name) for n in nodes for r in n.reads])
        width = max(page.width, 80.0)
        body.append(_text(left + width / 2, y, heading, 12, _SOFT, "middle"))
        _graph(body, nodes, page, colours, left + (width - page.width) / 2, y + 14)
        bottom = max(bottom, y + 14 + page.height)
        left += width + _BETWEEN
    right = left - _BETWEEN
    return bottom, right


def _graph(
    body: list[str], nodes: list[_Node], page: Layout, colours: dict[str, tuple[str, str]], left: float, top: float
) -> None:
    for _, _, points in page.edges:
        body.append(f'<path d="{_curve(points, left, top)}" fill="none" stroke="{_SOFT}" stroke-width="1.2" '
                    'marker-end="url(#arrow)"/>')  # fmt: skip
    for node in nodes:
        box = page.boxes[node.name]
        x, y = left + box.x, top + box.y
        fill, line = colours.get(node.mark, _INPUT if node.kind in ("placeholder", "output") else _PLAIN)
        body.append(f"<g><title>{escape(node.name)}</title>")
        if node.kind != "run":
            radius = box.height / 2 if node.kind in ("placeholder", "output") else 5
            place = f'x="{x - box.width / 2:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
            style = f'rx="{radius:.1f}" fill="{fill}" stroke="{line}" stroke-width="{1.8 if node.mark else 1.1}"'
            body.append(f"<rect {place} {style}/>")
        body.append(_text(x, y + 18, node.title, 12, _SOFT if node.kind == "run" else _INK, "middle", bool(node.mark)))
        for i, line_text in enumerate(node.small):
            body.append(_text(x, y + 32 + 13 * i, line_text, 10, "#3d434c" if node.mark else _SOFT, "middle"))
        body.append("</g>")


def _curve(points: list[tuple[float, float]], left: float, top: float) -> str:
    """Straight down through a layer, an S from one layer to the next."""
    x, y = left + points[0][0], top + points[0][1]
    parts = [f"M{x:.1f},{y:.1f}"]
    for point_x, point_y in points[1:]:
        to_x, to_y = left + point_x, top + point_y
        middle = (y + to_y) / 2
        bent = f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f}"
        parts.append(bent if abs(to_x - x) >= 0.5 else f"L{to_x:.1f},{to_y:.1f}")
        x, y = to_x, to_y
    return " ".join(parts)


def _text(x: float, y: float, text: str, size: int, colour: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>")  # fmt: skip


# --- DOT -------------------------------------------------------------------------------------------------------------


def _dot(title: str, drawings: Sequence[Drawing], colours: dict[str, tuple[str, str]]) -> str:
    lines = [
        "digraph fxfuse {",
        f'  bgcolor="{_PAPER}"; label={_quoted(title)}; labelloc=t; fontname="monospace";',
        '  node [shape=box, style="rounded,filled", fontname="monospace", fontsize=11];',
        f'  node [fillcolor="{_PLAIN[0]}", color="{_PLAIN[1]}", fontcolor="{_INK}"];',
        f'  edge [color="{_SOFT}"];',
    ]
    for number, (drawing, places) in enumerate(_alike(drawings)):
        for heading, rows in (("before", drawing.before), ("after", drawing.after)):
            prefix = f"{heading}{number}_"
            lines.append(f"  subgraph cluster_{heading}{number} {{")
            place = heading if places == [""] else f"{_listed(places)}, {heading}"
            lines.append(f'    label={_quoted(place)}; color="{_PLAIN[1]}"; fontcolor="{_SOFT}";')
            nodes = _nodes(rows, drawing.layers)
            for node in nodes:
                label = "\n".join((node.title, *node.small))
                colour = colours.get(node.mark)
                fill = f', fillcolor="{colour[0]}", color="{colour[1]}"' if colour else ""
                lines.append(f"    {_quoted(prefix + node.name)} [label={_quoted(label)}{fill}];")
            lines += [f"    {_quoted(prefix + r)} -> {_quoted(prefix + n.name)};" for n in nodes for r in n.reads]
            lines.append("  }")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
