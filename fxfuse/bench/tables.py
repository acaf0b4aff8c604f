"""Tables from bench results for the README and the docs, between markers.

A page says where a table goes and what is in it:

    <!-- bench:NAME workload=kl_div view=full -->
    <!-- /bench:NAME -->

NAME is benchmarks/NAME.json. `workload`, `precision`, `mode` take comma-separated names and default to all; `view` is
`summary` (a row per case, the default), `full` (a row per rival), `memory`, `error`, `sweep` (where fxfuse is least
ahead of each rival), `product` (beside the bare product) or `compiler` (what optimizing itself costs). Of a JSON that a
script wrote (`record`), `table` names the table to show. `python -m fxfuse.bench.tables` writes the tables (and the
plots docs/images/bench-NAME.png, where matplotlib is installed); with --check it only says what is out of date and
exits with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxfuse.bench import compiler
from fxfuse.bench.cases import format_shape
from fxfuse.bench.formats import DASH, CaseKey, Row, by_case, error, milliseconds, percent, ratio, size
from fxfuse.bench.rivals import RIVALS
from fxfuse.bench.workloads import WORKLOADS

Document = dict[str, Any]
OURS = ("fxfuse", "fxfuse-compile", "frozen")

MARKER = re.compile(
    r"(?P<open><!-- bench:(?P<name>[\w.-]+)(?P<options>(?: \w+=[\w.,-]+)*) -->\n)"
    r".*?(?P<close><!-- /bench:(?P=name) -->)",
    re.DOTALL,
)
PAGES = ("*.md", "docs/**/*.md")


def _value(row: Row | None, key: str) -> float | None:
    return row.get(key) if row else None


def _summary(cases: dict[CaseKey, dict[str, Row]]) -> tuple[list[str], list[list[str]]]:
    headings = ["workload", "shape", "precision", "mode", "eager ms", "torch.compile ms", "fxfuse ms",
                "vs eager", "vs compile", "limit ms", "of limit", "GPU ms", "GPU vs eager"]  # fmt: skip
    lines = []
    for (workload, shape, precision, mode), rivals in cases.items():
        compiled = [t for n in ("compile", "max-autotune") if (t := _value(rivals.get(n), "median_ms"))]
        best = min(compiled, default=None)
        ours = rivals.get("fxfuse")
        time = _value(ours, "median_ms")
        lines.append(
            [
                WORKLOADS[workload].title if workload in WORKLOADS else workload,
                format_shape(shape),
                precision,
                mode,
                _time(rivals.get("eager")),
                milliseconds(best),
                _time(ours),
                ratio(_value(ours, "ratio")),
                ratio(best / time if best and time else None),
                milliseconds(_value(ours, "limit_ms")),
                percent(_value(ours, "share_of_limit")),
                milliseconds(_value(ours, "gpu_ms")),
                ratio(_value(ours, "gpu_ratio")),
            ]
        )
    if all(line[-1] == line[-2] == DASH for line in lines):  # a CPU has no time of its own beside this one
        return headings[:-2], [line[:-2] for line in lines]
    return headings, lines


def _time(row: Row | None) -> str:
    """A time, or the word for why there is none."""
    if row is None:
        return DASH
    return milliseconds(row["median_ms"]) if row["status"] == "ok" else row["status"]


def _full(cases: dict[CaseKey, dict[str, Row]]) -> tuple[list[str], list[list[str]]]:
    headings = ["shape", "precision", "mode", "", "ms", "spread", "vs eager", "of limit", "GPU ms", "peak memory",
                "error", "gradient error"]  # fmt: skip
    lines = []
    for (_, shape, precision, mode), rivals in cases.items():
        for name, row in rivals.items():
            lines.append(
                [
                    format_shape(shape),
                    precision,
                    mode,
                    RIVALS[name].title if name in RIVALS else name,
                    _time(row),
                    f"±{50 * row['spread']:.0f} %" if "spread" in row else DASH,
                    ratio(row.get("ratio")),
                    percent(row.get("share_of_limit")),
                    milliseconds(row.get("gpu_ms")),
                    size(row.get("peak_bytes")),
                    error(row.get("error")),
                    error(row.get("grad_error")),
                ]
            )
    return headings, lines


def _one_measure(key: str, show: Callable[[float | None], str]) -> Callable[..., tuple[list[str], list[list[str]]]]:
    def view(cases: dict[CaseKey, dict[str, Row]]) -> tuple[list[str], list[list[str]]]:
        names = list(dict.fromkeys(name for rivals in cases.values() for name in rivals))
        headings = ["workload", "shape", "precision", "mode"]
        headings += [RIVALS[name].title if name in RIVALS else name for name in names]
        lines = []
        for (workload, shape, precision, mode), rivals in cases.items():
            title = WORKLOADS[workload].title if workload in WORKLOADS else workload
            values = [show(_value(rivals.get(name), key)) for name in names]
            lines.append([title, format_shape(shape), precision, mode, *values])
        return headings, lines

    return view


def sweep(cases: dict[CaseKey, dict[str, Row]]) -> tuple[list[str], list[list[str]]]:
    """A row per workload, precision, mode and rival: over how many shapes, and where fxfuse is least ahead of it."""
    groups: dict[tuple[str, str, str, str], list[tuple[float, float | None, tuple[int, ...]]]] = {}
    for (workload, shape, precision, mode), rivals in cases.items():
        ours = rivals.get("fxfuse")
        for name, row in rivals.items():
            if name in OURS or not ours or ours["status"] != "ok" or row["status"] != "ok":
                continue
            gpu = row["gpu_ms"] / ours["gpu_ms"] if "gpu_ms" in row and "gpu_ms" in ours else None
            ratios = groups.setdefault((workload, precision, mode, name), [])
            ratios.append((row["median_ms"] / ours["median_ms"], gpu, shape))
    headings = ["workload", "precision", "mode", "against", "shapes", "least", "at", "median", "most",
                "GPU least", "GPU at"]  # fmt: skip
    lines = []
    for (workload, precision, mode, name), ratios in groups.items():
        least = min(ratios)
        on_gpu = min(((gpu, shape) for _, gpu, shape in ratios if gpu is not None), default=None)
        lines.append(
            [
                WORKLOADS[workload].title if workload in WORKLOADS else workload,
                precision,
                mode,
                RIVALS[name].title if name in RIVALS else name,
                str(len(ratios)),
                ratio(least[0]),
                format_shape(least[2]),
                ratio(statistics.median(r for r, _, _ in ratios)),
                ratio(max(ratios)[0]),
                ratio(on_gpu[0] if on_gpu else None),
                format_shape(on_gpu[1]) if on_gpu else DASH,
            ]
        )
    return headings, lines


def _product(cases: dict[CaseKey, dict[str, Row]]) -> tuple[list[str], list[list[str]]]:
    """What stands behind the product beside the library's product alone (three of them with the backward)."""
    headings = ["workload", "shape", "precision", "mode", "the bare product", "eager", "fxfuse", "of the product"]
    lines = []
    for (workload, shape, precision, mode), rivals in cases.items():
        bare, ours = _value(rivals.get("product"), "median_ms"), _value(rivals.get("fxfuse"), "median_ms")
        if bare is None:
            continue
        title = WORKLOADS[workload].title if workload in WORKLOADS else workload
        eager = _time(rivals.get("eager"))
        lines.append([title, format_shape(shape), precision, mode, milliseconds(bare), eager, milliseconds(ours),
                      ratio(ours / bare if ours else None)])  # fmt: skip
    return headings, lines


VIEWS = {
    "product": _product,
    "summary": _summary,
    "sweep": sweep,
    "full": _full,
    "memory": _one_measure("peak_bytes", size),
    "error": _one_measure("error", error),
}


def markdown(document: Document, name: str, options: dict[str, str]) -> str:
    """A document's table as Markdown with its provenance below; ValueError on an unknown option or view."""
    options = dict(options)
    view = options.pop("view", "summary")
    if view == "compiler":
        return _provenance(_left_and_right(*compiler.table(document["compiler"]), left=1), document, name)
    if "table" in options:
        held = document.get("tables", {}).get(options["table"])
        if held is None:
            raise ValueError(f"bench:{name}: there is no table {options['table']!r} in it")
        return _provenance(_left_and_right(held["headings"], held["lines"], held.get("left", 1)), document, name)
    if view not in VIEWS:
        raise ValueError(f"bench:{name}: there is no view {view!r}; {', '.join(VIEWS)} exist")
    rows = [row for row in document["results"] if row["status"] != "skipped"]  # the budget was spent before they came
    for key, wanted in options.items():
        if key not in ("workload", "precision", "mode", "rival"):
            raise ValueError(f"bench:{name}: unknown option {key!r}; workload, precision, mode, rival, view exist")
        rows = [row for row in rows if row[key] in wanted.split(",")]
    if not rows:
        raise ValueError(f"bench:{name}: no result matches {options}")
    headings, lines = VIEWS[view](by_case(rows))
    left = sum(heading in ("workload", "shape", "precision", "mode", "") for heading in headings)
    return _provenance(_left_and_right(headings, lines, left), document, name)


def _left_and_right(headings: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are text and whose others are numbers."""
    align = ["left"] * left + ["right"] * (len(headings) - left)
    return tabulate(lines, headings, tablefmt="pipe", disable_numparse=True, colalign=align)


def _provenance(table: str, document: Document, name: str) -> str:
    made, versions = document["machine"], document["versions"]
    where = made.get("gpu") or f"{made['cpu']}, {made['torch_threads']} threads"
    first, *more = document["command"].split(" && ")
    file = f"benchmarks/{name}.json" + (f", which names {len(more)} more run{'s' * (len(more) > 1)}" if more else "")
    source = f"{where}, torch {versions['torch']}, {document['date']}; `{first}` ({file})"
    return f"\n{table}\n\n{source}\n\n"


def fill(text: str, documents: dict[str, Document]) -> str:
    """`text` with the body between each pair of markers replaced; ValueError when a marker names no document."""

    def one(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in documents:
            raise ValueError(f"bench:{name}: there is no benchmarks/{name}.json")
        options = dict(option.split("=", 1) for option in found["options"].split())
        return found["open"] + markdown(documents[name], name, options) + found["close"]

    opened = len(re.findall(r"<!-- bench:", text))
    filled, count = MARKER.subn(one, text)
    if count != opened:
        raise ValueError(f"{opened - count} bench marker(s) without a matching <!-- /bench:NAME --> or malformed")
    return filled


def load(folder: Path) -> dict[str, Document]:
    """Every benchmarks/NAME.json by NAME."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def out_of_date(root: Path) -> dict[Path, str]:
    """The pages under `root` whose tables differ from their JSON, with the text they should have."""
    documents = load(root / "benchmarks")
    changed = {}
    for path in sorted({page for pattern in PAGES for page in root.glob(pattern)}):
        text = path.read_text(encoding="utf-8")
        try:
            filled = fill(text, documents)
        except ValueError as fault:
            raise ValueError(f"{path.relative_to(root)}: {fault}") from None
        if filled != text:
            changed[path] = filled
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: write what is out of date, or with --check only say it."""
    parser = argparse.ArgumentParser(prog="python -m fxfuse.bench.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when something differs")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository (default: here)")
    args = parser.parse_args(arguments)
    root = args.root.resolve()
    try:
        changed = out_of_date(root)
    except ValueError as fault:
        print(f"tables: {fault}", file=sys.stderr)
        return 1
    for path, text in changed.items():
        if not args.check:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(root)}: {'out of date' if args.check else 'written'}")

    from fxfuse.bench import plot

    stale = plot.out_of_date(root, load(root / "benchmarks"))
    for path, document in stale.items():
        if not args.check:
            try:
                plot.draw(document, path)
            except ImportError as missing:
                print(f"tables: {missing}", file=sys.stderr)
                return 1
        print(f"{path.relative_to(root)}: {'out of date' if args.check else 'written'}")
    return int(args.check and bool(changed or stale))


if __name__ == "__main__":
    sys.exit(main())
