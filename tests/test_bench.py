"""The bench: what it plans, measures, saves and shows. No test asserts a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxfuse import cli
from fxfuse.bench import accuracy, demo, formats, measure, memory, plot, rivals, run, tables
from fxfuse.bench.cases import Case, Runner, Setup, parse_shapes, plan
from fxfuse.bench.limits import Limits, matmul_precision, measure_bandwidth, measure_matrix_rate
from fxfuse.bench.timing import Timing, time_together
from fxfuse.bench.workloads import WORKLOADS, Work

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
TINY = {"M,N,K": (8, 6, 5), "M,N": (8, 6)}


def tiny(name: str, mode: str = "fwd") -> Case:
    workload = WORKLOADS[name]
    return Case(workload, TINY[workload.dims], "fp32", mode)


def effort(**changes: Any) -> measure.Effort:
    return measure.Effort(**{"device": CPU, "seed": 0, "rounds": 3, "cache_bytes": 0, **changes})


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a rival for one test: planted(name, prepare)."""

    def plant(name: str, prepare: Any) -> None:
        monkeypatch.setitem(rivals.RIVALS, name, rivals.Rival(name, name, prepare))

    return plant


# Workloads ------------------------------------------------------------------------------------------------------------


def reference(name: str, model: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Each workload's formula, written out another way."""
    if name.startswith("linear_scale"):
        y = (inputs[0] @ model.linear.weight.T + model.linear.bias) * model.scale
        mean, var = (y.mean(0), y.var(0, unbiased=False)) if model.training else (torch.zeros(6), torch.ones(6))
        return (y - mean) / (var + 1e-5).sqrt()
    if name == "matmul_div_sum_scale":
        return (inputs[0] * model.weight.sum(0)).sum(1, keepdim=True) * 0.75
    if name == "linear_activation_scale":
        return (inputs[0] @ model.linear.weight.T + model.linear.bias).clamp(min=0) * 0.5
    p, t = inputs
    if name == "distillation_kl":
        p, t = F.softmax(p / 2, -1), F.softmax(t / 2, -1)
    return (t * (t / p).log()).sum() / len(p) * (4 if name == "distillation_kl" else 1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_computes_its_formula(name: str) -> None:
    setup = Setup.make(tiny(name), CPU, seed=3, cache_bytes=0)
    inputs = setup.input_sets[0]
    with torch.no_grad():
        expected = reference(name, setup.model, inputs)
        torch.testing.assert_close(setup.fresh_model()(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_issue_s_sizes_are_the_defaults() -> None:
    assert WORKLOADS["matmul_div_sum_scale"].sizes["cpu"] == [(1024, 8192, 8192)]
    assert (16384, 4096, 4096) in WORKLOADS["linear_scale_batchnorm1d_train"].sizes["cuda"]
    assert WORKLOADS["kl_div"].sizes["cuda"] == [(16384, 16384)]
    assert WORKLOADS["distillation_kl"].sizes["cuda"] == [(4096, 128256)]


def test_least_work_counts_each_tensor_once() -> None:
    product = WORKLOADS["linear_activation_scale"].work
    assert product((2, 3, 5), 4, False) == Work(bytes=4 * (10 + 15 + 6), matrix_ops=2 * 30)
    assert product((2, 3, 5), 4, True).matrix_ops == 3 * 2 * 30
    collapsed = WORKLOADS["matmul_div_sum_scale"].work((2, 3, 5), 2, False)
    assert collapsed == Work(bytes=2 * (10 + 15), matrix_ops=0)
    assert WORKLOADS["kl_div"].work((7, 11), 4, True).bytes == 3 * 4 * 77


# Planning -------------------------------------------------------------------------------------------------------------


def test_shapes_are_parsed_and_go_to_workloads_of_their_rank() -> None:
    shapes = parse_shapes("4,5,6; 7,8")
    assert shapes == [(4, 5, 6), (7, 8)]
    cases = plan(list(WORKLOADS), shapes, ["fp32", "tf32"], ["fwd", "fwdbwd"], CPU)
    assert {c.shape for c in cases if c.workload.has_product} == {(4, 5, 6)}
    assert {c.shape for c in cases if not c.workload.has_product} == {(7, 8)}
    assert not [c for c in cases if c.precision == "tf32" and not c.workload.has_product]
    assert not [c for c in cases if c.workload.name.endswith("eval") and c.mode == "fwdbwd"]


@pytest.mark.parametrize("text", ["", "4", "4,x", "0,1", "1,2,3,4"])
def test_a_bad_shape_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="shape"):
        parse_shapes(text)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        plan(["kl_div"], [(1, 2, 3)], ["fp32"], ["fwd"], CPU)


def test_small_inputs_rotate_and_large_ones_do_not() -> None:
    case = tiny("kl_div")
    size = 2 * 8 * 6 * 4
    assert len(Setup.make(case, CPU, 0, cache_bytes=0).input_sets) == 1
    sets = Setup.make(case, CPU, 0, cache_bytes=2 * size).input_sets
    assert len(sets) == 4
    assert not torch.equal(sets[0][0], sets[1][0])
    seen = []
    runner = Runner(Setup.make(case, CPU, 0, 2 * size), nn.Module(), lambda p, t: seen.append(p.data_ptr()) or p.sum())
    for i in range(5):
        runner.step(i)
    assert len(set(seen)) == 4
    assert seen[0] == seen[4]


def test_every_rival_has_the_same_weights_inputs_and_its_own_statistics() -> None:
    setup = Setup.make(tiny("linear_scale_batchnorm1d_train"), CPU, seed=5, cache_bytes=0)
    again = Setup.make(tiny("linear_scale_batchnorm1d_train"), CPU, seed=5, cache_bytes=0)
    one, two = setup.fresh_model(), again.fresh_model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(setup.input_sets[0][0], again.input_sets[0][0])
    before = setup.model.bn.running_mean.clone()
    Runner(setup, one, one).step(0)
    assert not torch.equal(one.bn.running_mean, before)
    assert torch.equal(setup.model.bn.running_mean, before)


# Timing, memory, limits -----------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_begin_with_another_each_time() -> None:
    order: list[str] = []

    def step(name: str) -> Any:
        return lambda i: (order.append(name), time.sleep(0.006))

    times = time_together({n: step(n) for n in "abc"}, CPU, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the warm-up, then three rounds
    assert {t.rounds for t in times.values()} == {3}


def test_timing_stops_when_time_is_up_but_not_before_three_rounds() -> None:
    times = time_together({"a": lambda i: time.sleep(0.001)}, CPU, rounds=1000, seconds=0.0)
    assert times["a"].rounds == 3


def test_every_call_gets_its_own_number() -> None:
    numbers: list[int] = []
    time_together({"a": numbers.append}, CPU, rounds=3)
    assert numbers == list(range(len(numbers)))


def test_median_and_deciles() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0], group=2)
    assert (timing.median_ms, timing.p10_ms, timing.p90_ms, timing.rounds) == (6.0, 2.0, 10.0, 11)
    assert timing.spread == pytest.approx(8 / 6)


def test_peak_memory_is_exact() -> None:
    x = torch.ones(1000, 1000)  # 4 MB, there before the call

    def call() -> torch.Tensor:
        y = x * 2  # 4 MB
        z = y + 1  # 8 MB
        del y
        return z.exp()  # 8 MB again

    assert memory.peak_bytes(call, CPU) == pytest.approx(8e6, rel=1e-3)
    assert memory.peak_bytes(lambda: x.mul_(1.0), CPU) < 1000


def test_the_limit_is_the_larger_of_moving_and_computing() -> None:
    limits = Limits(copy_bandwidth=1e9, read_bandwidth=2e9, matrix_rate={"fp32": 1e9, "bf16": 12e9})
    assert limits.milliseconds(Work(bytes=2_000_000, matrix_ops=0), "fp32", CPU) == pytest.approx(1.0)
    assert limits.milliseconds(Work(bytes=2_000_000, matrix_ops=5_000_000), "fp32", CPU) == pytest.approx(5.0)
    on_gpu = limits.milliseconds(Work(bytes=0, matrix_ops=5_000_000), "fp32", torch.device("cuda"))
    assert on_gpu == pytest.approx(2.5)  # six bf16 products
    assert limits.milliseconds(Work(bytes=1, matrix_ops=1), "fp16", CPU) is None
    assert Limits().milliseconds(Work(1, 0), "fp32", CPU) is None


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["fxfuse.bench.limits"].COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(sys.modules["fxfuse.bench.limits"].PRODUCT, "cpu", (64, 64, 64))
    limits = Limits()
    measure_bandwidth(limits, CPU, rounds=3)
    measure_matrix_rate(limits, CPU, "fp32", rounds=3)
    assert limits.copy_bandwidth > 0
    assert limits.read_bandwidth > 0
    assert limits.matrix_rate["fp32"] > 0


def test_matmul_precision_is_set_and_restored() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        with matmul_precision("fp32"):
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


# Errors ---------------------------------------------------------------------------------------------------------------


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert accuracy.relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert accuracy.relative_error(torch.tensor([3.0, math.nan]), reference) == math.inf
    assert accuracy.relative_error(torch.tensor([[3.0, 4.0]]), reference) == math.inf


def test_vanishing_gradients_do_not_hide_the_others() -> None:
    one, tiny_one = torch.ones(2, dtype=torch.float64), torch.full((2,), 1e-12, dtype=torch.float64)
    want = accuracy.Result(one, {"w": one, "bias": tiny_one}, {})
    got = accuracy.Result(one, {"w": one * 1.25, "bias": tiny_one * 1000}, {})
    assert accuracy.errors(got, want) == {"error": 0.0, "grad_error": pytest.approx(0.25)}
    assert accuracy.errors(accuracy.Result(one, {}, {}), want)["grad_error"] == math.inf  # a missing gradient


def test_running_statistics_are_judged_too(planted: Any) -> None:
    def forgetful(model: Any, workload: Any) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            y = model.linear(x) * model.scale
            return F.batch_norm(y, None, None, model.bn.weight, model.bn.bias, True)

        return call

    planted("forgetful", forgetful)
    case = tiny("linear_scale_batchnorm1d_train")
    eager, planted_row = measure.measure_case(case, ["eager", "forgetful"], Limits(), effort())
    assert eager["state_error"] < 1e-6
    assert planted_row["error"] < 1e-6
    assert planted_row["state_error"] > 1e-2


# Measuring a case -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_fxfuse_matches_every_workload_and_is_as_exact_as_eager(name: str) -> None:
    for mode in WORKLOADS[name].modes:
        shape = (64, 48, 96) if WORKLOADS[name].has_product else (64, 96)
        case = dataclasses.replace(tiny(name, mode), shape=shape)
        eager, ours = measure.measure_case(case, ["eager", "fxfuse"], Limits(1e9, 1e9, {"fp32": 1e9}), effort())
        assert eager["status"] == ours["status"] == "ok", ours["reason"]
        assert ours["replaced"] == [name.removesuffix("_train").removesuffix("_eval")]
        assert ours["error"] < max(1.25 * eager["error"], 5e-7)
        if mode == "fwdbwd":
            assert ours["grad_error"] < max(1.25 * eager["grad_error"], 5e-7)
        assert ours["ratio"] > 0
        assert ours["share_of_limit"] == pytest.approx(ours["limit_ms"] / ours["median_ms"])


def test_a_wrong_rival_shows_its_error_and_a_failing_one_is_named(planted: Any) -> None:
    def drops_the_bias(model: Any, workload: Any) -> Any:
        return lambda x: torch.relu(F.linear(x, model.linear.weight)) / 2

    def raises(model: Any, workload: Any) -> Any:
        raise RuntimeError("no such kernel\nwith details")

    def missing(model: Any, workload: Any) -> Any:
        raise rivals.Unavailable("missing", "not installed")

    planted("wrong", drops_the_bias)
    planted("broken", raises)
    planted("absent", missing)
    planted("nan", lambda model, workload: lambda x: model(x) * math.nan)
    names = ["eager", "wrong", "broken", "absent", "nan"]
    rows = measure.measure_case(tiny("linear_activation_scale"), names, Limits(), effort())
    by_name = {row["rival"]: row for row in rows}
    assert list(by_name) == names
    assert by_name["eager"]["error"] < 1e-6 < by_name["wrong"]["error"]
    assert by_name["broken"]["status"] == "failed"
    assert by_name["broken"]["reason"] == "RuntimeError: no such kernel"
    assert by_name["absent"] | {"status": "missing", "reason": "not installed"} == by_name["absent"]
    assert by_name["nan"]["status"] == "failed"
    assert "median_ms" in by_name["wrong"]


def test_a_rival_that_fails_while_timed_does_not_stop_the_others(planted: Any) -> None:
    def tires(model: Any, workload: Any) -> Any:
        calls = [0]

        def call(x: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > 5:
                raise RuntimeError("worn out")
            return model(x)

        return call

    planted("tires", tires)
    eager, tired = measure.measure_case(tiny("linear_activation_scale"), ["eager", "tires"], Limits(), effort())
    assert (tired["status"], tired["reason"]) == ("failed", "RuntimeError: worn out")
    assert eager["status"] == "ok"
    assert eager["median_ms"] > 0


def test_liger_is_named_when_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    row = measure.measure_case(tiny("kl_div"), ["liger"], Limits(), effort())[0]
    assert row["status"] == "missing"
    assert "liger_kernel is not installed" in row["reason"]
    row = measure.measure_case(tiny("linear_activation_scale"), ["liger"], Limits(), effort())[0]
    assert row["status"] == "n/a"


# The run --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings from small buffers: their values do not matter here."""
    monkeypatch.setitem(sys.modules["fxfuse.bench.limits"].COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(sys.modules["fxfuse.bench.limits"].PRODUCT, "cpu", (64, 64, 64))
    monkeypatch.setattr(run.machine, "cache_bytes", lambda device: 0)


def test_bench_end_to_end(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "new" / "results.json", tmp_path / "results.png"
    arguments = ["bench", "--device", "cpu", "--shapes", "8,6,5;8,6", "--mode", "fwd", "--vs", "eager,liger"]
    arguments += ["--repeat", "3", "--seed", "7", "--json", str(out), "--plot", str(picture)]
    assert cli.main(arguments) == 0
    document = json.loads(out.read_text())
    assert document["command"].startswith("fxfuse bench --device cpu --shapes '8,6,5;8,6'")
    assert document["seed"] == 7
    assert document["versions"]["torch"] == torch.__version__
    assert document["machine"]["cpu"]
    assert document["limits"]["bandwidth"] > 0
    assert {row["workload"] for row in document["results"]} == set(WORKLOADS)
    assert {row["rival"] for row in document["results"]} == {"eager", "liger", "fxfuse"}
    ours = [row for row in document["results"] if row["rival"] == "fxfuse"]
    assert all(row["status"] == "ok" and len(row["replaced"]) == 1 for row in ours)
    assert not list(out.parent.glob(".*")), "a temporary file was left"
    assert plot.read_digest(picture) == plot.digest(document)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= max(80, len(str(out)) + 9)
    assert "KL divergence 8×6, fp32, fwd" in shown


def test_the_budget_ends_a_run_in_the_middle_of_a_case(
    quick: None, planted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallows_everything(model: Any, workload: Any) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(60)

        return call

    planted("endless", swallows_everything)
    out = tmp_path / "results.json"
    began = time.monotonic()
    arguments = ["bench", "--device", "cpu", "--shapes", "8,6,5", "--workload", "linear_activation_scale"]
    assert cli.main([*arguments, "--vs", "endless", "--budget", "3", "--json", str(out)]) == 0
    assert time.monotonic() - began < 30
    rows = json.loads(out.read_text())["results"]
    assert {row["status"] for row in rows} == {"skipped"}
    assert {row["rival"] for row in rows} == {"eager", "endless", "fxfuse"}
    assert "the budget of 3 s was spent" in capsys.readouterr().out


def test_a_workload_that_cannot_be_built_is_reported_and_the_rest_measured(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(shape: Any) -> nn.Module:
        raise RuntimeError("out of memory")

    broken = dataclasses.replace(WORKLOADS["kl_div"], build=no_memory)
    monkeypatch.setitem(WORKLOADS, "kl_div", broken)
    out = tmp_path / "r.json"
    arguments = ["bench", "--device", "cpu", "--shapes", "8,6", "--mode", "fwd", "--vs", "eager", "--repeat", "3"]
    assert cli.main([*arguments, "--json", str(out)]) == 1
    rows = json.loads(out.read_text())["results"]
    assert {row["status"] for row in rows if row["workload"] == "kl_div"} == {"failed"}
    assert {row["status"] for row in rows if row["workload"] == "distillation_kl"} == {"ok"}
    assert "out of memory" in capsys.readouterr().out


def test_append_replaces_measured_cases_whole_and_keeps_the_others(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    base = ["bench", "--device", "cpu", "--shapes", "8,6", "--mode", "fwd", "--repeat", "3", "--json", str(out)]
    assert cli.main([*base, "--vs", "liger"]) == 0
    before = formats.by_case(json.loads(out.read_text())["results"])
    assert cli.main([*base, "--vs", "eager", "--workload", "kl_div", "--append"]) == 0
    document = json.loads(out.read_text())
    after = formats.by_case(document["results"])
    assert list(after) == list(before)
    distillation, divergence = sorted(after)
    assert after[distillation] == before[distillation]
    assert set(after[divergence]) == {"eager", "fxfuse"}, "rivals of two runs were mixed in one case"
    assert document["command"].count("fxfuse bench") == 2

    assert cli.main([*base, "--vs", "eager", "--append", "--seed", "1"]) == 2
    assert "its seed is 0, here it is 1" in capsys.readouterr().err
    assert json.loads(out.read_text()) == document
    skipped = {"command": "", "limits": {}, "results": [measure.empty_row(tiny("kl_div"), "fxfuse", "skipped")]}
    assert formats.by_case(run.merged(document, skipped)["results"]) == after


def test_saving_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    run.save({"results": [1]}, path)
    with pytest.raises(TypeError):
        run.save({"results": object()}, path)
    assert json.loads(path.read_text()) == {"results": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "kl"], "kl is not one of"),
        (["--vs", "eager,nobody"], "nobody is not one of"),
        (["--shapes", "1,x"], "not numbers"),
        (["--budget", "-1"], "not a number above 0"),
        (["--repeat", "0"], "not a number above 0"),
    ],
)
def test_bad_options_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nonsense", "meta"] + ([] if torch.cuda.is_available() else ["cuda"]))
def test_a_device_that_cannot_be_used_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", name]) == 2
    assert f"--device {name}" in capsys.readouterr().err


# Tables and plots -----------------------------------------------------------------------------------------------------


def row(rival: str, ms: float, **more: Any) -> dict[str, Any]:
    base = {"workload": "kl_div", "shape": [4, 4], "precision": "fp32", "mode": "fwd", "rival": rival, "status": "ok"}
    numbers = {"median_ms": ms, "spread": 0.02, "ratio": 8.0 / ms, "limit_ms": 1.0, "share_of_limit": 1.0 / ms}
    return {**base, "reason": "", **numbers, "peak_bytes": 3 << 20, "error": 1e-7, **more}


DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "command": "fxfuse bench",
    "date": "2026-01-01",
    "seed": 0,
    "machine": {"cpu": "a CPU", "torch_threads": 2, "gpu": "a GPU"},
    "versions": {"torch": "2.13.0", "fxfuse": "0.1.0"},
    "limits": {},
    "results": [
        row("eager", 8.0),
        row("compile", 4.0),
        row("max-autotune", 2.0),
        {key: row("liger", 1.0)[key] for key in ("workload", "shape", "precision", "mode", "rival")}
        | {"status": "missing", "reason": "not installed"},
        row("fxfuse", 1.25),
    ],
}
MARKED = "# T\n\n<!-- bench:here -->\nold\n<!-- /bench:here -->\n\nrest <!-- a comment -->\n"


def test_a_table_is_written_between_its_markers_and_only_there() -> None:
    filled = tables.fill(MARKED, {"here": DOCUMENT})
    assert filled.startswith("# T\n\n<!-- bench:here -->\n")
    assert filled.endswith("<!-- /bench:here -->\n\nrest <!-- a comment -->\n")
    assert "old" not in filled
    line = next(line for line in filled.splitlines() if line.startswith("| KL divergence"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["KL divergence", "4×4", "fp32", "fwd", "8", "2", "1.25", "6.40×", "1.60×", "1", "80 %"]
    assert "a GPU, torch 2.13.0" in filled
    assert "`fxfuse bench`" in filled
    assert tables.fill(filled, {"here": DOCUMENT}) == filled


def test_views_and_filters() -> None:
    for view in tables.VIEWS:
        assert "| " in tables.fill(MARKED.replace("here -->", f"here view={view} -->", 1), {"here": DOCUMENT})
    full = tables.markdown(DOCUMENT, "here", {"view": "full", "rival": "liger,fxfuse"})
    assert "missing" in full
    assert "PyTorch eager" not in full


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MARKED.replace("bench:here", "bench:nowhere"), "no benchmarks/nowhere.json"),
        (MARKED.replace("<!-- /bench:here -->", ""), "without a matching"),
        (MARKED.replace("here -->", "here view=odd -->", 1), "no view 'odd'"),
        (MARKED.replace("here -->", "here colour=red -->", 1), "unknown option 'colour'"),
        (MARKED.replace("here -->", "here workload=none -->", 1), "no result matches"),
    ],
)
def test_a_bad_marker_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tables.fill(text, {"here": DOCUMENT})


def test_the_command_writes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "here.json").write_text(json.dumps(DOCUMENT))
    page = tmp_path / "README.md"
    page.write_text(MARKED)
    picture = tmp_path / "docs" / "images" / "bench-here.png"
    check = ["--check", "--root", str(tmp_path)]
    assert tables.main(check) == 1
    assert page.read_text() == MARKED
    assert not picture.exists()
    assert tables.main(["--root", str(tmp_path)]) == 0
    assert tables.main(check) == 0
    page.write_text(page.read_text().replace("1.25", "1.24"))  # a number typed by hand
    assert tables.main(check) == 1
    assert "README.md: out of date" in capsys.readouterr().out
    assert tables.main(["--root", str(tmp_path)]) == 0
    changed = json.loads(json.dumps(DOCUMENT))
    changed["results"][0]["median_ms"] = 9.0
    (tmp_path / "benchmarks" / "here.json").write_text(json.dumps(changed))
    assert tables.main(check) == 1
    assert "bench-here.png: out of date" in capsys.readouterr().out


def test_the_pages_of_this_repository_show_their_results() -> None:
    stale = tables.out_of_date(ROOT)
    assert not stale, f"run `make tables`: {[str(page.relative_to(ROOT)) for page in stale]} differ from benchmarks/"
    drawn = plot.out_of_date(ROOT, tables.load(ROOT / "benchmarks"))
    assert not drawn, f"run `make tables`: {[path.name for path in drawn]} differ from benchmarks/"


def test_a_plot_is_opaque_and_has_something_on_it(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="plots need matplotlib: pip install 'fxfuse[bench]'")
    path = tmp_path / "p.png"
    plot.draw(DOCUMENT, path)
    pixels = image.imread(path)
    assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1.0
    assert tuple(pixels[0, 0, :3]) == (1.0, 1.0, 1.0)
    orange = abs(pixels[..., :3] - [0xD5 / 255, 0x5E / 255, 0]).max(-1) < 0.02
    assert orange.sum() > 500, "the bar of fxfuse is not there"
    assert plot.read_digest(path) == plot.digest(DOCUMENT)
    assert plot.read_digest(tmp_path / "none.png") is None


# The demo -------------------------------------------------------------------------------------------------------------


def test_demo_shows_five_models_in_eighty_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, workload in list(WORKLOADS.items()):
        monkeypatch.setitem(WORKLOADS, name, dataclasses.replace(workload, sizes={"cpu": [TINY[workload.dims]]}))
    assert cli.main(["demo", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("replaced: ") == len(demo.DEMO) == 5
    for pattern in {name.removesuffix("_train") for name, _ in demo.DEMO}:
        assert pattern in shown
    assert "gain" in shown
    assert "MiB" in shown


def test_demo_fails_when_a_model_is_not_matched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = WORKLOADS["linear_activation_scale"]
    other = dataclasses.replace(workload, build=lambda s: nn.Sequential(nn.Linear(s[2], s[1]), nn.Softmax(-1)),
                                sizes={"cpu": [(8, 6, 5)]})  # fmt: skip
    monkeypatch.setitem(WORKLOADS, "linear_activation_scale", other)
    monkeypatch.setattr(demo, "DEMO", (("linear_activation_scale", "fwd"),))
    assert cli.main(["demo", "--device", "cpu"]) == 1
    assert "nothing was replaced" in capsys.readouterr().out


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_bench_on_a_gpu(precision: str) -> None:
    gpu = torch.device("cuda")
    for case in plan(list(WORKLOADS), [(256, 512, 384), (256, 512)], [precision], ["fwd", "fwdbwd"], gpu):
        eager, ours = measure.measure_case(case, ["eager", "fxfuse"], Limits(), effort(device=gpu))
        assert eager["status"] == ours["status"] == "ok", ours["reason"]
        assert len(ours["replaced"]) == 1
        assert ours["error"] < max(1.25 * eager["error"], 1e-6)
        assert ours["peak_bytes"] > 0
