"""Pictures: what stands in them, that nothing overlaps, and that they can be read on any page."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse import draw as drawing
from fxfuse.drawing import Drawing
from fxfuse.layout import arrange
from fxfuse.report import Report

torch.set_num_threads(1)
SVG = "{http://www.w3.org/2000/svg}"


class Net(nn.Module):
    """A long untouched way, a residual, two replacements of different patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.out = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        far = torch.sin(x)
        for _ in range(9):
            far = torch.cos(far)
        y = self.bn(self.fc(far) * self.scale) + far
        return F.gelu(self.out(torch.exp(y))) / 2


def picture(model, tmp_path, name="graph.svg") -> str:
    report = fxfuse.report(fxfuse.optimize(model))
    path = str(tmp_path / name)
    assert report.draw(path) == path
    return (tmp_path / name).read_text(encoding="utf-8")


def texts(svg: str) -> list[str]:
    return [t.text or "" for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_before_and_after_with_both_patterns(tmp_path):
    seen = texts(picture(Net(), tmp_path))
    assert seen[0] == "fxfuse · Net · 2 replacements" and {"before", "after"} <= set(seen)
    # a legend entry and one node after; layers by class and path before
    assert seen.count("linear_scale_batchnorm1d") == 2 and seen.count("linear_activation_scale") == 2
    assert seen.count("Linear") == 2 and seen.count("BatchNorm1d") == 1 and {"fc", "bn", "out"} <= set(seen)
    assert any("fc.weight" in t for t in seen) and "get_attr" not in seen  # weights stand in the node that reads them
    assert seen.count("exp") == 2  # what was left alone stands on both sides


def test_replaced_nodes_have_their_patterns_colour_on_both_sides(tmp_path):
    root = ElementTree.fromstring(picture(Net(), tmp_path))
    fills = {}
    for group in root.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        if rect is not None:
            fills.setdefault(group.find(f"{SVG}text").text, []).append(rect.get("fill"))
    (blue,) = set(fills["linear_activation_scale"])
    (orange,) = set(fills["linear_scale_batchnorm1d"])
    assert blue != orange and set(fills["BatchNorm1d"]) == {orange} and set(fills["Linear"]) == {orange, blue}
    assert set(fills["gelu"]) == {blue} and set(fills["exp"]) == {"#ffffff"}


def test_far_runs_are_collapsed(tmp_path):
    seen = texts(picture(Net(), tmp_path))
    assert [t for t in seen if "nodes" in t] == ["… 8 nodes …"] * 2  # sin and ten cosines, less the two nearest
    assert seen.count("cos") == 4 and "sin" not in seen


def test_equal_layers_are_drawn_once(tmp_path):
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Softmax(-1)) for _ in range(5)))
    seen = texts(picture(blocks, tmp_path))
    assert "in 0, 1, 2 and 2 more alike" in seen and seen.count("before") == 1
    blocks[3].add_module("3", nn.Tanh())
    seen = texts(picture(blocks, tmp_path))
    assert seen.count("before") == 2 and "in 3" in seen


def test_nothing_replaced_is_said(tmp_path):
    assert any("No node was replaced" in t for t in texts(picture(nn.Linear(3, 3), tmp_path)))


def test_the_same_picture_every_time(tmp_path):
    assert picture(Net(), tmp_path, "a.svg") == picture(Net(), tmp_path, "b.svg")


def test_names_are_escaped(tmp_path):
    odd = Drawing("", (("a", 'call_function\n<lambda> & "x"', (), "p"),), (("a", "call_function\nb", (), "p"),))
    report = Report("<Model>", drawings=[odd])
    assert '<lambda> & "x"' in texts((tmp_path / report.draw(str(tmp_path / "a.svg"))).read_text())
    assert '\\"x\\"' in (tmp_path / report.draw(str(tmp_path / "a.dot"))).read_text()


@pytest.mark.parametrize("name", ["graph.png", "graph", "graph.svg.txt"])
def test_another_ending_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"a drawing is written as \.svg or \.dot"):
        Report().draw(str(tmp_path / name))


def test_dot(tmp_path):
    dot = picture(Net(), tmp_path, "graph.dot")
    declared = set(re.findall(r'^    ("[^"]+") \[', dot, re.M))
    edges = re.findall(r'^    ("[^"]+") -> ("[^"]+");', dot, re.M)
    assert edges and all(a in declared and b in declared for a, b in edges)
    assert dot.count("{") == dot.count("}") and dot.count("subgraph cluster_") == 2
    assert dot.count('fillcolor="#9ecae9"') == 4  # three nodes of one pattern before, one after
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg", str(tmp_path / "graph.dot")], check=True, capture_output=True)


# --- readable on any page --------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_on_an_opaque_page(tmp_path):
    root = ElementTree.fromstring(picture(Net(), tmp_path))
    paper = root.find(f"{SVG}rect")
    assert paper.get("fill") == drawing._PAPER and "opacity" not in ElementTree.tostring(root, encoding="unicode")
    width, height = (float(root.get(side)) for side in ("width", "height"))
    assert float(paper.get("width")) >= width - 2 and float(paper.get("height")) >= height - 2
    for fill, line in (*drawing._COLOURS, drawing._PLAIN, drawing._INPUT):
        assert contrast(fill, drawing._INK) >= 7 and contrast(fill, "#3d434c") >= 4.5
        assert contrast(line, drawing._PAPER) >= 3
    assert contrast(drawing._PAPER, drawing._SOFT) >= 4.5


def test_nothing_reaches_over_the_edge(tmp_path):
    root = ElementTree.fromstring(picture(Net(), tmp_path))
    width, height = float(root.get("width")), float(root.get("height"))
    for rect in list(root.iter(f"{SVG}rect"))[1:]:
        x, y, w, h = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height


# --- the layout ------------------------------------------------------------------------------------------------------


def random_graph(seed: int, count: int = 40):
    generator = torch.Generator().manual_seed(seed)
    sizes, edges = {}, []
    for i in range(count):
        sizes[f"n{i}"] = (float(torch.randint(30, 200, (), generator=generator)), 30.0)
        for _ in range(int(torch.randint(1, 4, (), generator=generator)) if i else 0):
            edges.append((f"n{int(torch.randint(max(0, i - 9), i, (), generator=generator))}", f"n{i}"))
    return sizes, edges


@pytest.mark.parametrize("seed", range(8))
def test_boxes_do_not_overlap_and_edges_go_down(seed):
    sizes, edges = random_graph(seed)
    page = arrange(sizes, edges)
    boxes = list(page.boxes.values())
    for i, a in enumerate(boxes):
        assert a.x - a.width / 2 >= -0.01 and a.x + a.width / 2 <= page.width + 0.01
        for b in boxes[i + 1 :]:
            apart_x = abs(a.x - b.x) >= (a.width + b.width) / 2
            apart_y = a.y + a.height <= b.y or b.y + b.height <= a.y
            assert apart_x or apart_y
    assert {(a, b) for a, b, _ in page.edges} == set(edges)
    for _, _, points in page.edges:
        assert all(y2 >= y1 for (_, y1), (_, y2) in pairwise(points))


@pytest.mark.parametrize("seed", range(8))
def test_long_edges_go_around_the_boxes(seed):
    sizes, edges = random_graph(seed)
    page = arrange(sizes, edges)
    for source, target, points in page.edges:
        for (x, y1), (x2, y2) in zip(points[1:-1:2], points[2:-1:2], strict=True):
            assert x == x2  # straight through a layer
            for name, box in page.boxes.items():
                if name not in (source, target) and y1 <= box.y and box.y + box.height <= y2:
                    assert abs(box.x - x) >= box.width / 2


def test_a_chain_is_straight_and_an_empty_graph_is_nothing():
    page = arrange({n: (w, 20.0) for n, w in (("a", 20.0), ("b", 90.0), ("c", 50.0))}, [("a", "b"), ("b", "c")])
    assert len({box.x for box in page.boxes.values()}) == 1
    empty = arrange({}, [])
    assert (empty.width, empty.height, empty.edges) == (0.0, 0.0, [])
