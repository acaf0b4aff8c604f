"""The bench of the compiler itself, the sweep and the yardsticks."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from fxfuse.bench import compiler, measure, rivals, tables, terminal
from fxfuse.bench.cases import plan
from fxfuse.bench.formats import by_case
from fxfuse.bench.sweeps import SWEEPS
from fxfuse.bench.workloads import WORKLOADS
from fxfuse.cli import main

CPU = torch.device("cpu")


def test_what_the_compiler_costs_is_measured(tmp_path, capsys):
    path = tmp_path / "own.json"
    command = ["bench", "--device", "cpu", "--workload", "kl_div", "--shapes", "4,4", "--mode", "fwd", "--vs", "eager"]
    assert main([*command, "--repeat", "1", "--compiler", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    lines = document["compiler"]
    assert all(line["value"] > 0 for line in lines) and len({line["what"] for line in lines}) == len(lines) == 13
    assert "import fxfuse" in capsys.readouterr().out
    markdown = tables.markdown(document, "own", {"view": "compiler"})
    assert f"{lines[3]['value']:.2f}×" in markdown
    assert main([*command, "--repeat", "1", "--append", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["compiler"] == lines, "a later run without it forgot it"


def test_a_graph_that_matches_is_measured():
    from fxfuse.pattern import select
    from fxfuse.rewrite import find
    from fxfuse.view import View

    found = find(View(compiler._graph(100), None), select(None))
    assert found.matches and found.misses


def test_the_sweep_covers_every_workload_with_shapes_it_takes():
    assert SWEEPS.keys() == WORKLOADS.keys()
    cases = plan(list(WORKLOADS), None, ["fp32"], ["fwd"], CPU, sweep=True)
    assert len(cases) == sum(map(len, SWEEPS.values())) and all(min(case.shape) >= 1 for case in cases)


def test_the_sweep_names_the_shape_where_fxfuse_is_least_ahead():
    def row(rival, n, ms, **more):
        return {"workload": "kl_div", "shape": [n, n], "precision": "fp32", "mode": "fwd", "rival": rival,
                "status": "ok", "median_ms": ms, **more}  # fmt: skip

    rows = [
        row("eager", 1, 1.0), row("fxfuse", 1, 2.0),
        row("eager", 2, 3.0, gpu_ms=1.0), row("fxfuse", 2, 1.0, gpu_ms=0.5), row("frozen", 2, 0.1),
        {**row("eager", 3, 0), "status": "failed", "reason": "no room"}, row("fxfuse", 3, 1.0),
    ]  # fmt: skip
    (line,) = tables.sweep(by_case(rows))[1]
    assert line[4:] == ["2", "0.50×", "1×1", "1.75×", "3.00×", "2.00×", "2×2"]
    document = {
        "results": [*rows, {**row("eager", 4, 0), "status": "skipped"}], "limits": {}, "seed": 0,
        "machine": {"cpu": "a", "torch_threads": 1}, "versions": {"torch": "2", "fxfuse": "0"},
    }  # fmt: skip
    shown = terminal.show_sweep(document)
    assert "no room" in shown and "1 cases were skipped" in shown


@pytest.mark.parametrize(
    ("name", "workloads"),
    [
        ("product", {"linear_scale_batchnorm1d_train", "linear_scale_batchnorm1d_eval", "linear_activation_scale"}),
        ("two-step", {"matmul_div_sum_scale"}),
        ("frozen", {"matmul_div_sum_scale"}),
    ],
)
def test_yardsticks_compute_what_they_say(name, workloads):
    compared = set()
    for workload in WORKLOADS.values():
        shape = (8, 6, 5) if workload.has_product else (8, 6)
        model = workload.build(shape).train(workload.training)
        try:
            callee = rivals.RIVALS[name].prepare(model, workload)
        except rivals.Unavailable:
            continue
        (x,) = workload.inputs(shape, torch.Generator().manual_seed(0))
        want = x @ model.linear.weight.T if name == "product" else model(x)
        torch.testing.assert_close(callee(x), want)
        compared.add(workload.name)
    assert compared == workloads


def test_autograd_alone_is_a_step_without_its_work():
    workload, shape = WORKLOADS["matmul_div_sum_scale"], (8, 6, 5)
    model = workload.build(shape)
    callee = rivals.RIVALS["autograd"].prepare(model, workload)
    (x,) = workload.inputs(shape, torch.Generator().manual_seed(0))
    x.requires_grad_()
    want = model(x).detach()
    for _ in range(2):
        out = callee(x)
        torch.testing.assert_close(out, want)
        gradients = torch.autograd.grad(out, [x, model.weight], torch.ones_like(out))
        assert [g.shape for g in gradients] == [x.shape, model.weight.shape]
        with torch.no_grad():
            model.weight.zero_()  # the results are handed on, not computed again


class Graph:
    """Stands in for a captured CUDA graph: replays by calling."""

    def __init__(self, step, calls, alive):
        self.step, self.calls, self.alive = step, calls, alive
        alive.append(self)

    def replay(self):
        for i in range(self.calls):
            self.step(i)


@pytest.mark.parametrize("room", [1, 3])
def test_graphs_are_timed_in_turn_as_far_as_memory_holds_them(monkeypatch, room):
    order, alive = [], []

    def capture(step, calls, device):
        if step is broken:
            raise RuntimeError("this call waits for the GPU\nmore")
        if len(alive) >= room:
            alive.clear()
            raise torch.OutOfMemoryError("no room")
        return Graph(step, calls, alive)

    def broken(i):
        raise AssertionError("never captured")

    steps = {name: lambda i, name=name: order.append(name) for name in ("eager", "compile", "fxfuse")}
    steps["two-step"] = broken
    rows = {name: {"median_ms": 1.0} for name in (*steps, "max-autotune")}
    monkeypatch.setattr(measure.graphs, "capture", capture)
    measure._time_graphs({**steps, "max-autotune": broken}, rows, measure.Effort(CPU, 0, 10, 0))
    assert all(rows[name]["gpu_ms"] > 0 for name in ("eager", "compile", "fxfuse"))
    assert rows["two-step"] == {"median_ms": 1.0, "gpu_reason": "RuntimeError: this call waits for the GPU"}
    assert "graphs of its own" in rows["max-autotune"]["gpu_reason"]
    turns = [a != b for a, b in itertools.pairwise(order)]
    assert sum(turns) > 10 if room == 3 else sum(turns) == 2
