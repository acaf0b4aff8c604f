"""Bar charts of bench results: how much faster than eager each rival is, case by case.

The background is opaque and the colours dark enough for print, so a plot reads the same on a light and a dark page.
Each PNG carries a digest of the results it was drawn from.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from fxfuse.bench.cases import format_shape
from fxfuse.bench.workloads import WORKLOADS

Document = dict[str, Any]
DIGEST_KEY = "fxfuse-results"
# Okabe and Ito's palette: told apart with any colour vision; eager grey, fxfuse the strongest.
COLOURS = {
    "eager": "#999999",
    "compile": "#56B4E9",
    "max-autotune": "#0072B2",
    "liger": "#E69F00",
    "fxfuse": "#D55E00",
    "fxfuse-compile": "#CC79A7",
}
PAPER, INK, GRID = "#ffffff", "#1f2328", "#d0d7de"


def digest(document: Document) -> str:
    """A digest of what is drawn."""
    return hashlib.sha256(json.dumps(document["results"], sort_keys=True).encode()).hexdigest()[:32]


def draw(document: Document, path: Path) -> None:
    """Write the chart of `document` to `path` (PNG). ImportError, saying what to install, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'fxfuse[bench]'") from error

    rows = [row for row in document["results"] if row["status"] == "ok" and row.get("ratio")]
    precisions = list(dict.fromkeys(row["precision"] for row in rows)) or ["none"]
    cases = list(dict.fromkeys((row["workload"], tuple(row["shape"]), row["mode"]) for row in rows))
    names = [name for name in COLOURS if any(row["rival"] == name for row in rows)]
    values = {(row["workload"], tuple(row["shape"]), row["mode"], row["precision"], row["rival"]): row for row in rows}

    height = 1.5 + max(1, len(cases)) * (0.16 * max(2, len(names)) + 0.22)
    figure = Figure(figsize=(2.6 + max(5.0, 3.2 * len(precisions)), height), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    thickness = 0.8 / max(1, len(names))
    for axis, precision in zip(axes, precisions, strict=True):
        reached = [1.0]
        for number, name in enumerate(names):
            for place, case in enumerate(cases):
                row = values.get((*case, precision, name))
                if row is None:
                    continue
                y = place - 0.4 + (number + 0.5) * thickness
                # Bars leave from 1×, eager's own time: right is faster, left is slower, also on a logarithmic scale.
                axis.barh(y, row["ratio"] - 1, thickness * 0.92, left=1, color=COLOURS[name], label=name, zorder=2)
                words = f" {'eager ' if name == 'eager' else ''}{row['median_ms']:.3g} ms"
                axis.text(max(row["ratio"], 1), y, words, va="center", fontsize=7, color=INK, zorder=4,
                          bbox={"facecolor": PAPER, "alpha": 0.75, "edgecolor": "none", "pad": 0.4})  # fmt: skip
                reached.append(row["ratio"])
        for place, case in enumerate(cases):
            row = values.get((*case, precision, "eager"))
            if row and row.get("limit_ms"):
                best = row["median_ms"] / row["limit_ms"]
                axis.vlines(best, place - 0.42, place + 0.42, color=INK, linewidth=1.4, linestyle="--", zorder=3)
                reached.append(best)
        _dress(axis, precision, min(reached), max(reached))
    axes[0].set_yticks(range(len(cases)), [_label(*case) for case in cases], fontsize=8, color=INK)
    axes[0].set_ylim(len(cases) - 0.4, -0.6)
    _legend(figure, names)
    made, versions = document["machine"], document["versions"]
    where = made.get("gpu") or f"{made['cpu']}, {made['torch_threads']} threads"
    figure.suptitle(f"Times faster than PyTorch eager (1×, right is better) · {where}, torch {versions['torch']}",
                    fontsize=10, color=INK)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=144, facecolor=PAPER, metadata={DIGEST_KEY: digest(document)})


def _dress(axis: Any, precision: str, least: float, most: float) -> None:
    """Scale and rule one panel; logarithmic, so that twice as fast and half as fast are equally far from 1×."""
    axis.set_facecolor(PAPER)
    axis.set_title(precision, fontsize=9, color=INK)
    axis.set_xscale("log")
    axis.set_xlim(least / 1.3, most * max(2.0, (most / least) ** 0.4))
    fine = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    marks = [t for t in fine if least / 1.3 <= t <= most * 1.3]
    if len(marks) > 6:
        marks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if marks[0] <= t <= marks[-1]]
    axis.set_xticks(marks, [f"{t:g}×" for t in marks])
    axis.minorticks_off()
    axis.axvline(1, color=INK, linewidth=0.8, zorder=3)
    axis.grid(axis="x", color=GRID, linewidth=0.6, zorder=0)
    axis.tick_params(colors=INK, labelsize=8, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _legend(figure: Any, names: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=COLOURS[name], label=name) for name in names if name != "eager"]
    handles.append(Line2D([], [], color=INK, linewidth=1.4, label="limit of the device", linestyle="--"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False,
                  labelcolor=INK)  # fmt: skip


def _label(workload: str, shape: tuple[int, ...], mode: str) -> str:
    title = WORKLOADS[workload].title if workload in WORKLOADS else workload
    return f"{title}\n{format_shape(shape)}, {mode.replace('bwd', ' + bwd')}"


def out_of_date(root: Path, documents: dict[str, Document]) -> dict[Path, Document]:
    """The plots docs/images/bench-NAME.png that are missing or were drawn from other results. Sweeps are too long for
    one, and what scripts record has nothing to draw."""
    folder = root / "docs" / "images"
    paths = {
        folder / f"bench-{name}.png": document
        for name, document in documents.items()
        if document["results"] and "sweep" not in name
    }
    return {path: document for path, document in paths.items() if read_digest(path) != digest(document)}


def read_digest(path: Path) -> str | None:
    """The digest a PNG carries; None when there is no such file or it carries none."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"tEXt" and body.startswith(DIGEST_KEY.encode() + b"\0"):
            return body.split(b"\0", 1)[1].decode("latin-1")
        at += 12 + length
    return None
