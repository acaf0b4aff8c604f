"""Bench results as text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from tabulate import tabulate

from fxfuse.bench import compiler
from fxfuse.bench.formats import by_case, case_title, error, milliseconds, percent, ratio, size

Document = dict[str, Any]


def show(document: Document) -> str:
    """All results as text of at most 80 columns, a table a case."""
    blocks = [_head(document)]
    for key, rivals in by_case(document["results"]).items():
        limit = next((row["limit_ms"] for row in rivals.values() if row.get("limit_ms")), None)
        lines = []
        notes = []
        for name, row in rivals.items():
            if row["status"] == "n/a":
                notes.append(f"{name}: {row['reason']}")
                continue
            if row["status"] != "ok":
                lines.append([name, row["status"]])
                notes.append(f"{name} {row['status']}: {row['reason']}")
                continue
            lines.append(
                [
                    name,
                    milliseconds(row["median_ms"]),
                    f"±{50 * row['spread']:.0f} %",
                    ratio(row["ratio"]),
                    percent(row["share_of_limit"]),
                    milliseconds(row.get("gpu_ms")),
                    size(row["peak_bytes"]),
                    error(row.get("error")),
                    error(row.get("grad_error")),
                ]
            )
            if "replaced" in row:
                notes.append("replaced: " + (", ".join(row["replaced"]) or "nothing"))
        headings = ["", "ms", "spread", "vs\neager", "of\nlimit", "GPU\nms", "peak", "error", "grad\nerror"]
        optional = {"GPU\nms": "gpu_ms", "grad\nerror": "grad_error"}
        absent = {h for h, key in optional.items() if not any(row.get(key) for row in rivals.values())}
        keep = [i for i, heading in enumerate(headings) if heading not in absent]
        headings = [headings[i] for i in keep]
        lines = [[line[i] for i in keep if i < len(line)] for line in lines]
        table = tabulate(lines, headings, tablefmt="simple", colalign=["left", *["right"] * (len(headings) - 1)],
                         disable_numparse=True)  # fmt: skip
        title = case_title(key) + (f" (limit {milliseconds(limit)} ms)" if limit else "")
        blocks.append("\n".join([title, table, *(_wrap(note) for note in notes)]))
    return "\n\n".join(blocks)


def show_sweep(document: Document) -> str:
    """Many cases in a line per workload, precision and mode, and the cases that failed."""
    from fxfuse.bench.tables import sweep

    headings, lines = sweep(by_case(document["results"]))
    failed = [row for row in document["results"] if row["status"] == "failed"]
    notes = [_wrap(f"{row['rival']} failed at {row['workload']} {row['shape']} {row['precision']} {row['mode']}: "
                   f"{row['reason']}") for row in failed]  # fmt: skip
    skipped = len({(r["workload"], *r["shape"], r["precision"], r["mode"]) for r in document["results"]
                   if r["status"] == "skipped"})  # fmt: skip
    if skipped:
        notes.append(_wrap(f"{skipped} cases were skipped: the budget was spent"))
    return "\n".join([_head(document), "", tabulate(lines, headings, disable_numparse=True), *notes])


def show_compiler(document: Document) -> str:
    """What the compiler itself costs."""
    headings, lines = compiler.table(document["compiler"])
    return tabulate(lines, headings, disable_numparse=True, colalign=("left", "right"))


def _head(document: Document) -> str:
    """The machine, versions and measured ceilings as a few lines."""
    made, versions, limits = document["machine"], document["versions"], document["limits"]
    where = made.get("gpu") or f"{made['cpu']}, {made['torch_threads']} threads"
    lines = [f"{where}; torch {versions['torch']}, fxfuse {versions['fxfuse']}, seed {document['seed']}"]
    if limits.get("bandwidth"):
        rates = [f"{name} {rate / 1e12:.3g}" for name, rate in limits["matrix_rate"].items()]
        line = f"measured limits: {limits['bandwidth'] / 1e12:.3g} TB/s"
        lines.append(line + (f"; products in TFLOP/s: {', '.join(rates)}" if rates else ""))
    if document.get("limits_failed"):
        lines.append(f"limits not measured: {document['limits_failed']}")
    return "\n".join(lines)


def _wrap(text: str, width: int = 80) -> str:
    return textwrap.fill(text, width, initial_indent="  ", subsequent_indent="    ")
