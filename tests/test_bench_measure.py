"""How the bench measures: times, memory, limits, errors, and a case with every rival. No test asserts a time."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_cases import CPU, effort, tiny

from fxfuse.bench import accuracy, measure, memory, rivals
from fxfuse.bench.cases import plan
from fxfuse.bench.limits import Limits, matmul_precision, measure_bandwidth, measure_matrix_rate
from fxfuse.bench.timing import Timing, time_together
from fxfuse.bench.workloads import WORKLOADS, Work

# Timing, memory, limits -----------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_in_an_order_drawn_anew() -> None:
    order: list[str] = []

    def step(name: str) -> Any:
        return lambda i: (order.append(name), time.sleep(0.006))

    times = time_together({n: step(n) for n in "abc"}, CPU, rounds=12, warmup=1)
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]  # after the warm-up
    assert len(rounds) == 12 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1
    assert {t.rounds for t in times.values()} == {12}


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


def test_running_statistics_are_judged_too(plant_rival: Any) -> None:
    def forgetful(model: Any, workload: Any) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            y = model.linear(x) * model.scale
            return F.batch_norm(y, None, None, model.bn.weight, model.bn.bias, True)

        return call

    plant_rival("forgetful", forgetful)
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


def test_a_wrong_rival_shows_its_error_and_a_failing_one_is_named(plant_rival: Any) -> None:
    def drops_the_bias(model: Any, workload: Any) -> Any:
        return lambda x: torch.relu(F.linear(x, model.linear.weight)) / 2

    def raises(model: Any, workload: Any) -> Any:
        raise RuntimeError("no such kernel\nwith details")

    def missing(model: Any, workload: Any) -> Any:
        raise rivals.Unavailable("missing", "not installed")

    plant_rival("wrong", drops_the_bias)
    plant_rival("broken", raises)
    plant_rival("absent", missing)
    plant_rival("nan", lambda model, workload: lambda x: model(x) * math.nan)
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


def test_a_rival_that_fails_while_timed_does_not_stop_the_others(plant_rival: Any) -> None:
    def tires(model: Any, workload: Any) -> Any:
        calls = [0]

        def call(x: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > 5:
                raise RuntimeError("worn out")
            return model(x)

        return call

    plant_rival("tires", tires)
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


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.captures
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_bench_on_a_gpu(precision: str) -> None:
    gpu = torch.device("cuda")
    for case in plan(list(WORKLOADS), [(256, 512, 384), (256, 512)], [precision], ["fwd", "fwdbwd"], gpu):
        eager, ours = measure.measure_case(case, ["eager", "fxfuse"], Limits(), effort(device=gpu))
        assert eager["status"] == ours["status"] == "ok", ours["reason"]
        assert len(ours["replaced"]) == 1
        assert ours["error"] < max(1.25 * eager["error"], 1e-6)
        assert ours["peak_bytes"] > 0
