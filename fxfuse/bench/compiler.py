"""What the compiler itself costs: importing it, reading graphs, optimizing a model in which nothing matches.

Medians on one thread. `optimize` traces with a tracer of its own; "beyond tracing" is what it takes apart from that
trace, as a share of what `torch.fx.symbolic_trace` takes for the same model.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

import fxfuse
from fxfuse import fuse
from fxfuse.pattern import select
from fxfuse.rewrite import find
from fxfuse.view import View

Line = dict[str, Any]
_IMPORT = "import time, torch; t = time.perf_counter(); import fxfuse; print(time.perf_counter() - t)"


def measure(rounds: int, tell: Callable[[str], None] = lambda what: None) -> list[Line]:
    """All of it as lines of {what, value, unit}."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tell("import")
        lines = [_line("import fxfuse, torch imported before", _import_ms(rounds), "ms")]
        tell("matching")
        small, large = (_matching_ms(_graph(count), rounds) for count in (1_000, 10_000))
        lines.append(_line("reading and matching a graph of 1,000 nodes", small, "ms"))
        lines.append(_line("reading and matching a graph of 10,000 nodes", large, "ms"))
        lines.append(_line("10,000 nodes against 1,000", large / small, "×"))
        for name, model in _nothing_to_match().items():
            tell(name)
            trace, whole, beyond = _optimize_ms(model, rounds)
            lines.append(_line(f"{name}: symbolic_trace", trace, "ms"))
            lines.append(_line(f"{name}: fxfuse.optimize, its tracing included", whole, "ms"))
            lines.append(_line(f"{name}: optimize beyond tracing, of symbolic_trace", beyond / trace, "share"))
        return lines
    finally:
        torch.set_num_threads(threads)


def _line(what: str, value: float, unit: str) -> Line:
    return {"what": what, "value": value, "unit": unit}


def _import_ms(rounds: int) -> float:
    runs = [subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
            for _ in range(rounds)]  # fmt: skip
    return statistics.median(float(run.stdout) for run in runs) * 1e3


def _graph(count: int) -> fx.Graph:
    """A chain with a place to look at in every third node: products, scalings, activations that match, and do not."""
    graph = fx.Graph()
    value, weight = graph.placeholder("x"), graph.placeholder("w")
    for i in range(count):
        if i % 9 == 0:
            value = graph.call_function(F.linear, (value, weight))
        elif i % 9 == 1:
            value = graph.call_function(torch.relu, (value,))
        elif i % 9 == 4:
            value = graph.call_function(torch.log_softmax, (value, -1))
        elif i % 3 == 0:
            value = graph.call_function(torch.mul, (value, 2.0))
        else:
            value = graph.call_function(torch.add, (value, value))
    graph.output(value)
    return graph


def _matching_ms(graph: fx.Graph, rounds: int) -> float:
    patterns = select(None)
    return _median_ms(lambda: find(View(graph, None), patterns), rounds)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), nn.ELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.fc(x))


def _nothing_to_match() -> dict[str, nn.Module]:
    """Networks of 150 layers."""
    return {
        "150 LayerNorm": nn.Sequential(*[nn.LayerNorm(8) for _ in range(150)]),
        "75 Linear, 75 ELU": nn.Sequential(*[m for _ in range(75) for m in (nn.Linear(8, 8), nn.ELU())]),
        "50 residual blocks of Linear, ELU and a sum": nn.Sequential(*[_Block() for _ in range(50)]),
    }


def _optimize_ms(model: nn.Module, rounds: int) -> tuple[float, float, float]:
    """symbolic_trace, optimize, and optimize without its own tracing; measured in turn."""
    spent = 0.0
    capture = fuse.capture

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        began = time.perf_counter()
        try:
            return capture(*args, **kwargs)
        finally:
            spent += time.perf_counter() - began

    traces, wholes, beyonds = [], [], []
    fuse.capture = timed
    try:
        for _ in range(5 * rounds + 2):
            traces.append(_once_ms(lambda: fx.symbolic_trace(model)))
            spent = 0.0
            wholes.append(_once_ms(lambda: fxfuse.optimize(model)))
            beyonds.append(wholes[-1] - spent * 1e3)
    finally:
        fuse.capture = capture
    return tuple(statistics.median(values[2:]) for values in (traces, wholes, beyonds))  # type: ignore[return-value]


def _median_ms(run: Callable[[], Any], rounds: int) -> float:
    """Without the garbage collector, as timeit does it: it walks what all of PyTorch holds."""
    run()
    gc.collect()
    gc.disable()
    try:
        return statistics.median(_once_ms(run) for _ in range(rounds))
    finally:
        gc.enable()


def _once_ms(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def table(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows."""
    return ["the compiler itself", "median"], [[line["what"], _show(line)] for line in lines]


def _show(line: Line) -> str:
    if line["unit"] == "share":
        return f"{100 * line['value']:.0f} %"
    return f"{line['value']:.2f}×" if line["unit"] == "×" else f"{line['value']:.2f} ms"
